// The samples of a report: one table at a time, whose rows are drawn as they come into view. What models and data
// wrote becomes text nodes and values of attributes, never markup.
const CHUNK = 50; // rows that are drawn at once
const DRAWN = 500; // rows that stay drawn while more come into view
const CHOICES = 50; // different values that a select offers
const TONES = { win: "good", right: "good", loss: "bad", regression: "bad", wrong: "bad" };

const section = document.getElementById("samples");
const tables = JSON.parse(document.getElementById("samples-data").textContent);
let table, shown, current; // the rows that pass the filters, and which of them keys act on
let first, drawn; // the first of the rows that are drawn, and the first after them that is not
let accepts, order, searched; // column or control -> what a row must fulfil; how rows are sorted; words

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

for (const each of tables) {
  each.columns = each.columns.map(([name, group, kind], place) => {
    const label = group && group !== name ? `${group}: ${name}` : name;
    return { name, group, kind, place, label };
  });
  each.rows = each.rows.map((cells, number) => ({ cells, number }));
  each.cells = []; // of a row: columns of one group share a cell
  for (const column of each.columns) {
    const last = each.cells.at(-1);
    if (column.group && last?.heading === column.group) last.columns.push(column);
    else each.cells.push({ heading: column.group || column.name, columns: [column] });
  }
}

// -- which rows are shown, in which order

function textOf(sample) {
  const texts = table.columns.filter((column) => column.kind === "text").map((column) => sample.cells[column.place]);
  return (sample.text ??= texts.join("\n").toLowerCase());
}

function compare(one, other) {
  const [a, b] = [one, other].map((sample) => sample.cells[order.place]);
  if (a === null || b === null) return (a === null) - (b === null); // rows without a value come last
  const difference = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  return order.isDescending ? -difference : difference;
}

function update() {
  const words = searched.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = [...accepts.values()];
  shown = table.rows.filter(
    (sample) => tests.every((test) => test(sample.cells)) && words.every((word) => textOf(sample).includes(word)),
  );
  if (order.place !== undefined) shown.sort(compare);
  else if (order.isDescending) shown.reverse();
  current = -1;
  drawFrom(0);
  count.textContent = `${shown.length.toLocaleString("en")} of ${table.rows.length.toLocaleString("en")} samples`;
}

function constrain(key, test) {
  if (test) accepts.set(key, test);
  else accepts.delete(key);
  update();
}

// -- the table

function written(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : value;
}

const legible = (text) => (text.trim() ? text : text ? "(whitespace only)" : "(nothing)");
const isFact = ({ kind }) => kind === "value" || kind === "outcome";

function contents(columns, sample) {
  const known = columns.filter((column) => sample.cells[column.place] !== null);
  const texts = known.filter((column) => column.kind === "text");
  const facts = known.filter(isFact);
  const nodes = texts.map(({ place }) => make("div", { class: "text" }, legible(sample.cells[place])));
  if (facts.length) {
    const spans = facts.map(({ name, place, kind }) => {
      const value = sample.cells[place];
      const tone = kind === "outcome" && Object.hasOwn(TONES, value) ? TONES[value] : undefined;
      return make("span", {}, `${name} `, make("b", { class: tone }, written(value)));
    });
    nodes.push(make("div", { class: "facts" }, ...spans));
  }
  return nodes;
}

const linkTo = (sample) => `#sample/${encodeURIComponent(table.id)}/${sample.number + 1}`;

function drawRow(sample) {
  const number = String(sample.number + 1);
  const link = make("a", { href: linkTo(sample), title: `copy a link to sample ${number}` }, number);
  const cells = table.cells.map(({ heading, columns }) =>
    make("td", { role: "cell", "data-heading": heading }, ...contents(columns, sample)),
  );
  return make("tr", { role: "row", tabindex: "-1" }, make("td", { role: "cell" }, link), ...cells);
}

function drawFrom(place) {
  first = drawn = place - (place % CHUNK);
  body.replaceChildren();
  drawMore();
}

function drawEarlier() {
  const before = Math.max(first - CHUNK, 0);
  body.prepend(...shown.slice(before, first).map(drawRow));
  first = before;
  earlier.hidden = !first;
}

function drawMore() {
  const rows = shown.slice(drawn, drawn + CHUNK);
  body.append(...rows.map(drawRow));
  drawn += rows.length;
  if (drawn - first > DRAWN) {
    const top = end.getBoundingClientRect().top;
    for (const row of [...body.children].slice(0, drawn - first - DRAWN)) row.remove();
    first = drawn - DRAWN;
    scrollBy(0, end.getBoundingClientRect().top - top); // what is in view stays where it is
  }
  earlier.hidden = !first;
  observer.unobserve(end); // so that it tells again where the end is still in view
  if (drawn < shown.length) observer.observe(end);
}

function clicked(event) {
  const place = first + [...body.children].indexOf(event.target.closest("tr"));
  if (event.target.closest("a")) {
    event.preventDefault();
    copyLink(shown[place]);
  } else if (getSelection().isCollapsed) {
    mark(place);
    open(shown[place]);
  }
}

const inView = (entries) => entries.at(-1).isIntersecting && drawMore();
const observer = new IntersectionObserver(inView, { rootMargin: "900px" });
const head = make("thead");
const body = make("tbody", { click: clicked });
const earlier = make("button", { type: "button", click: drawEarlier }, "Earlier samples");
const end = make("p", { class: "soft", "aria-hidden": "true" });

const rowOf = (place) => body.children[place - first];

function mark(place) {
  if (place >= drawn + CHUNK || place < first - CHUNK) drawFrom(place);
  else if (place >= drawn) drawMore();
  else if (place < first) drawEarlier();
  rowOf(current)?.removeAttribute("aria-current");
  current = place;
  const row = rowOf(current);
  row.setAttribute("aria-current", "true");
  row.scrollIntoView({ block: "nearest" });
  if (!dialog.open) row.focus({ preventScroll: true });
}

function move(step) {
  if (!shown.length) return;
  mark(Math.min(Math.max(current + step, 0), shown.length - 1));
  if (dialog.open) open(shown[current]);
}

// -- one sample in full, and links to it

const opened = make("div");
const dialog = make("dialog", { "aria-labelledby": "sample-title", close: closed }, opened);

function closed() {
  history.replaceState(null, "", location.pathname + location.search);
  rowOf(current)?.focus();
}

// Each token over its log-probability against the reference, or its advantage; blue is above 0, orange below.
function traceOf({ place }, sample) {
  const tokens = sample.cells[place];
  const view = make("div", { class: "trace" });
  const draw = (which) => {
    const most = Math.max(...tokens.map((token) => Math.abs(token[which])), 1e-9);
    const spans = tokens.map((token) => {
      const share = ((Math.abs(token[which]) / most) * 0.6).toFixed(2);
      const shade = `${token[which] < 0 ? "217 140 31" : "47 111 184"} / ${share}`;
      return make("span", { style: `background: rgb(${shade})` }, token[0], make("small", {}, token[which].toFixed(2)));
    });
    view.replaceChildren(...spans);
  };
  const numbers = [[1, "log π/π_ref in nats, whose sum is the KL"], [2, "advantage"]];
  const known = numbers.filter(([which]) => tokens.every((token) => token[which] !== null));
  draw(known[0][0]);
  return [select(`the first ${tokens.length} tokens by`, known, draw), view];
}

function open(sample) {
  const parts = table.cells.flatMap(({ heading, columns }) => {
    const traces = columns.filter(({ kind, place }) => kind === "trace" && sample.cells[place]?.length);
    const views = traces.flatMap((column) => traceOf(column, sample));
    return [make("h4", {}, heading), ...contents(columns, sample), ...views];
  });
  const button = (words, click) => make("button", { type: "button", click }, words);
  const buttons = [
    button("Previous", () => move(-1)),
    button("Next", () => move(1)),
    button("Copy link", () => copyLink(sample)),
    button("Close", () => dialog.close()),
  ];
  const title = make("h3", { id: "sample-title" }, `${table.title}, sample ${sample.number + 1}`);
  opened.replaceChildren(title, make("div", { class: "tools" }, ...buttons, said.cloneNode()), ...parts);
  history.replaceState(null, "", linkTo(sample));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function say(words) {
  for (const node of section.querySelectorAll(".said")) node.textContent = words;
}

async function copyLink(sample) {
  history.replaceState(null, "", linkTo(sample));
  try {
    await navigator.clipboard.writeText(location.href);
    say(`link to sample ${sample.number + 1} copied`);
  } catch {
    say("copy the link from the address bar"); // the browser allows no page to copy
  }
}

function followLink() {
  const found = /^#sample\/(.+)\/(\d+)$/.exec(location.hash);
  if (!found) return;
  const named = tables.find((each) => encodeURIComponent(each.id) === found[1]);
  const sample = named?.rows[found[2] - 1];
  if (!sample) return say(`the sample ${found[0]} is not on this page`);
  if (named !== table) choose(named);
  if (shown.includes(sample)) mark(shown.indexOf(sample));
  open(sample);
}

// -- the controls

function select(name, options, change) {
  const choices = options.map(([value, words]) => make("option", { value }, words));
  const changed = (event) => change(event.target.value);
  return make("label", {}, name, make("select", { "aria-label": name, change: changed }, ...choices));
}

function limit({ name, label, place }, words, test) {
  const input = (event) => {
    const bound = event.target.valueAsNumber;
    const holds = (cells) => typeof cells[place] === "number" && test(cells[place], bound);
    constrain(`${place} ${words}`, Number.isNaN(bound) ? null : holds);
  };
  const field = make("input", { type: "number", step: "any", "aria-label": `${label} ${words}`, input });
  return make("label", {}, `${name} ${words}`, field);
}

function filterOf(column) {
  const values = new Set(table.rows.map((sample) => sample.cells[column.place]).filter((value) => value !== null));
  if ([...values].some((value) => typeof value === "number")) {
    return [
      limit(column, "at least", (value, bound) => value >= bound),
      limit(column, "at most", (value, bound) => value <= bound),
    ];
  }
  if (values.size > CHOICES) return [];
  const options = [["", "any"], ...[...values].sort().map((value) => [value, value])];
  const holds = (wanted) => (cells) => cells[column.place] === wanted;
  const label = select(column.name, options, (wanted) => constrain(column.place, wanted && holds(wanted)));
  label.lastChild.setAttribute("aria-label", column.label);
  return [label];
}

function filters() {
  const groups = table.cells.map(({ heading, columns }) => {
    const controls = columns.filter(isFact).flatMap(filterOf);
    const fields = [make("legend", {}, heading), make("div", { class: "tools" }, ...controls)];
    return controls.length ? [make("fieldset", {}, ...fields)] : [];
  });
  return make("details", { class: "filters" }, make("summary", {}, "Filters"), ...groups.flat());
}

function outcomes() {
  const columns = table.columns.filter((column) => column.kind === "outcome");
  const named = columns.flatMap(({ name, place }) => table.rows.map((sample) => [name, sample.cells[place]]));
  const found = new Set(named.filter(([, value]) => value !== null).map(([name, value]) => `${name}: ${value}`));
  if (!found.size) return [];
  const holds = (wanted) => (cells) => columns.some(({ name, place }) => `${name}: ${cells[place]}` === wanted);
  const options = [["", "all"], ...[...found].sort().map((each) => [each, each])];
  return [select("show", options, (wanted) => constrain("outcome", wanted && holds(wanted)))];
}

function slider() {
  const column = table.columns.find(({ name }) => name === table.slider);
  if (!column) return [];
  const stops = [...new Set(table.rows.map((sample) => sample.cells[column.place]))].sort((one, other) => one - other);
  const output = make("output", {}, "all");
  const input = (event) => {
    const stop = stops[event.target.value - 1];
    output.textContent = stop === undefined ? "all" : `${stop} of ${stops.at(-1)}`;
    constrain("slider", stop === undefined ? null : (cells) => cells[column.place] === stop);
  };
  const bounds = { type: "range", min: 0, max: stops.length, value: 0 };
  const range = make("input", { ...bounds, "aria-label": table.slider, input });
  return [make("label", { class: "wide" }, make("span", {}, `${table.slider}: `, output), range)];
}

const count = make("p", { role: "status", class: "soft" });
const said = make("span", { role: "status", class: "soft said" });
const about = make("p", { class: "soft" });
const controls = make("div");
const titles = tables.map(({ title }, place) => [place, title]);
const chosen = select("samples of", titles, (place) => choose(tables[place]));
const told = [["j k", "or arrows move,"], ["Enter", "opens,"], ["/", "searches,"], ["Escape", "closes,"]];
const line = [...told, ["?", "shows this line. A click on a number copies a link to the sample."]];
const words = line.flatMap(([key, does]) => [make("kbd", {}, key), ` ${does} `]);
const keys = make("details", { class: "keys soft" }, make("summary", {}, "? Keys"), make("p", {}, ...words));

function choose(which) {
  table = which;
  accepts = new Map();
  order = {};
  searched = "";
  chosen.lastChild.value = String(tables.indexOf(table));
  about.textContent = `${table.about} ${table.kept}.`;
  const find = (event) => {
    searched = event.target.value;
    update();
  };
  const sortBy = (change) => {
    Object.assign(order, change);
    update();
  };
  const search = make("input", { type: "search", id: "samples-search", input: find });
  const sortable = table.columns.filter(({ kind }) => kind !== "trace");
  const sorts = [["", "place in the file"], ...sortable.map(({ label, place }) => [place, label])];
  const sort = select("sort by", sorts, (place) => sortBy({ place: place === "" ? undefined : Number(place) }));
  const directions = [["", "ascending"], ["descending", "descending"]];
  const direction = select("order", directions, (value) => sortBy({ isDescending: value !== "" }));
  const tools = [make("label", { class: "wide" }, "search", search), ...outcomes(), sort, direction, ...slider()];
  controls.replaceChildren(make("div", { class: "tools" }, ...tools), filters());
  const headings = ["", ...table.cells.map(({ heading }) => heading)];
  const cells = headings.map((heading) => make("th", { role: "columnheader", scope: "col" }, heading));
  head.replaceChildren(make("tr", { role: "row" }, ...cells));
  const width = (columns) =>
    columns.every(isFact) ? "8rem" : `minmax(9rem, ${columns.some(({ name }) => name === "completion") ? 3 : 2}fr)`;
  const widths = table.cells.map(({ columns }) => width(columns));
  grid.style.setProperty("--columns", `2.8rem ${widths.join(" ")}`);
  grid.style.setProperty("--least", `${table.cells.length * 9}rem`);
  update();
}

document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || !(at instanceof Element)) return;
  if (at.closest("input, select, textarea")) {
    if (event.key === "Escape") at.blur();
    return;
  }
  const inRow = at.closest("#samples tbody tr");
  const arrows = dialog.open ? { ArrowRight: 1, ArrowLeft: -1 } : inRow ? { ArrowDown: 1, ArrowUp: -1 } : {};
  const step = { j: 1, k: -1, ...arrows }[event.key];
  if (step) move(step);
  else if (event.key === "Enter" && inRow === at) open(shown[current]);
  else if (event.key === "/" && !dialog.open) document.getElementById("samples-search").focus();
  else if (event.key === "?" && !dialog.open) keys.open = !keys.open;
  else return;
  event.preventDefault();
});
window.addEventListener("hashchange", followLink);

const grid = make("table", { role: "table", "aria-label": "Samples" }, head, body);
const tools = make("div", { class: "tools" }, chosen);
const rows = make("div", { class: "scroll" }, grid);
const live = make("div", { class: "live" }, tools, about, controls, keys, count, said, earlier, rows, end, dialog);
section.querySelector(".plain").replaceWith(live);
choose(tables[0]);
followLink();
performance.mark("samples");
