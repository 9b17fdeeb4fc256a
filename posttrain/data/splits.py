"""Rows of one format, read strictly and counted.

No type is inferred and no value changed: a row is what its file says, or an error that names file and line.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from posttrain.config.schema import DataConfig, PreferenceConfig
from posttrain.config.suggest import nearest
from posttrain.data.messages import Message, MessageKeys, check_text, kind, message_keys
from posttrain.data.sources import NAMED, Problems, Source, parse_line
from posttrain.errors import ConfigError
from posttrain.values import Fields

ECHO = 20  # characters of a prompt from which on a completion that begins with them is hardly a coincidence


class TemplateInputs(NamedTuple):
    """What the chat template is given beside a row's messages."""

    tools: list[Fields]
    options: Fields  # the row's own chat_template_kwargs


NO_INPUTS = TemplateInputs([], {})


class Example(Protocol):
    """What a checked row of any format has."""

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last completion."""

    @property
    def where(self) -> str:
        """Where it stood."""

    @property
    def reference(self) -> str:
        """The completion that the data gives or prefers; empty where it gives none."""

    @property
    def inputs(self) -> TemplateInputs:
        """What the chat template is given beside the messages."""

    @property
    def content(self) -> str:
        """What makes two rows the same row."""


Row = TypeVar("Row", bound=Example)


@dataclass
class Counts:
    """What became of the rows of one split."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0  # exact repetitions, kept
    repeats_prompt: int = 0  # kept although the completion begins with its whole prompt
    in_test_too: int = 0  # left out of training because the same row is held out
    bad: int = 0  # left out on request (data.bad_rows=drop)
    unmixed: int = 0  # left out because data.mixture wants fewer of their source
    ties: int = 0  # left out: chosen and rejected are the same, perhaps only after the cut
    low_margin: int = 0  # left out on request (data.min_margin)
    truncated: int = 0  # kept without their end
    prompt_too_long: int = 0  # left out: nothing of the response would remain
    too_long: int = 0  # left out on request (data.overlength=drop)

    @property
    def left_out(self) -> str:
        """How many rows are left out, and why; empty where none is."""
        reasons = {
            "also held out": self.in_test_too,
            "not in the mixture": self.unmixed,
            "prompt too long": self.prompt_too_long,
            "too long": self.too_long,
            "ties": self.ties,
            "margin too low": self.low_margin,
            "bad": self.bad,
        }
        return ", ".join(f"{count:,} ({reason})" for reason, count in reasons.items() if count)


@dataclass
class Tally:
    """What was found in the rows read so far, besides the rows themselves."""

    problems: Problems = field(default_factory=Problems)
    dropped: Problems = field(default_factory=Problems)  # on request (data.bad_rows=drop)
    # split -> rows that do not fit the tokenizer or the length, which matters where the split is used
    unfit: dict[str, Problems] = field(default_factory=lambda: defaultdict(Problems))
    left_out: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))  # split -> rows that it lost
    told: dict[str, Problems] = field(default_factory=lambda: defaultdict(Problems))  # sentence -> rows that it is of
    formats: Counter[str] = field(default_factory=Counter)
    with_more: Counter[str] = field(default_factory=Counter)  # EXTRAS -> rows that have some
    others: Counter[str] = field(default_factory=Counter)  # columns that are not documented -> rows that fill them
    columns: Counter[str] = field(default_factory=Counter)  # the same, whether they are filled or not
    ignored_keys: Counter[str] = field(default_factory=Counter)  # of messages
    trained_keys: Counter[str] = field(default_factory=Counter)  # of messages, which say whether a turn is trained
    options: Counter[str] = field(default_factory=Counter)  # of rows' own chat_template_kwargs
    unlike_generation: int = 0  # completions without the thought that the generation prompt begins

    def merge(self, later: "Tally") -> None:
        """Add what was found in rows that come after."""
        self.problems.merge(later.problems)
        self.dropped.merge(later.dropped)
        for mine, theirs in ((self.unfit, later.unfit), (self.told, later.told)):
            for name, problems in theirs.items():
                mine[name].merge(problems)
        for split, counts in later.left_out.items():
            mine_of = self.left_out[split]
            mine_of.read += counts.read
            mine_of.bad += counts.bad
            mine_of.ties += counts.ties
        for counted, more in (
            (self.formats, later.formats),
            (self.with_more, later.with_more),
            (self.others, later.others),
            (self.columns, later.columns),
            (self.ignored_keys, later.ignored_keys),
            (self.trained_keys, later.trained_keys),
            (self.options, later.options),
        ):
            counted.update(more)
        self.unlike_generation += later.unlike_generation


class Shape(NamedTuple):
    """A way in which public data sets write a row: the columns that it needs, ours -> theirs (a name or a path)."""

    name: str  # in the summary
    needs: dict[str, str | None]
    unless: tuple[str, ...] = ()  # columns of the source that must not be there
    more: Mapping[str, str | None] = MappingProxyType({})  # columns that it may have, besides EXTRAS
    documented: bool = False  # its columns are those of data.columns


EXTRAS = ("system", "history", "tools")  # of data.columns, in every format


def at(record: Fields, path: str | None) -> object:
    """The value of a column, or of a dotted path into it; None where there is none."""
    if path is None or path in record:
        return None if path is None else record[path]
    value: object = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# columns that look as if they say which row or answer is good; where two answers have names that say it themselves,
# scores and ranks are more of the same
_DECIDES = re.compile(
    r"(?:^|_)(?:winner\w*|better\w*|best\w*|choice|selected|is_correct|labels?|preferences?|preferred|ranks?|scores?)(?:_|$)",
    re.IGNORECASE,
)
_MEASURES = re.compile(r"(?:^|_)(?:ranks?|scores?)(?:_|$)", re.IGNORECASE)


def decides(name: str) -> bool:
    """Whether a column of that name looks as if it says which row or answer is good."""
    return _DECIDES.search(name) is not None


# What columns are often called elsewhere: only to suggest a mapping, never to guess one.
_ALIASES = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "instruction": ("question", "prompt", "query", "problem"),
    "completion": ("response", "output", "answer", "solution"),
    "response": ("output", "answer", "completion", "solution"),
    "prompt": ("question", "instruction", "input", "query", "problem"),
    "input": ("context", "passage"),
    "system": ("system_prompt", "system_message"),
}

IS_TIE = "tie"  # of a row in our names: neither of its two answers is better

_PAIRS = (("response_chosen", "response_rejected"), ("preferred", "dispreferred"), ("better", "worse"))


def _hints(record: Fields, columns: dict[str, str | None]) -> str:
    """The keys that would read a row which no known shape fits."""
    if {"completion", "label"} <= record.keys() and "label" not in columns:
        return "; rows of one completion and a label are for stage=kto: pairs cannot be made of them"
    if {"chosen", "rejected"} <= record.keys() and "response" in columns:
        texts = all(isinstance(record.get(name), str) for name in ("prompt", "chosen"))
        how = (
            "data.columns.instruction=prompt data.columns.response=chosen" if texts else "data.columns.messages=chosen"
        )
        return f"; pairs are for stage=reward and stage=dpo; here {how} trains on the better answers"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"rank", "score"} & value[0].keys():
            return f"; {name!r} ranks several answers: write the pairs that you want as prompt, chosen and rejected"
        if name in ("replies", "children", "parent_id"):
            return f"; {name!r} looks like a tree: write each path through it as messages"
    found = []
    for ours, theirs in columns.items():
        alias = next((name for name in _ALIASES.get(ours, ()) if name in record), None)
        if alias is not None and at(record, theirs) is None:
            found.append(f"data.columns.{ours}={alias}")
    if not found and isinstance(record.get("text"), str) and "text" in columns:
        return "; try data.columns.text=text (raw text) or data.columns.messages=text (a transcript)"
    if "label" in columns:
        says = next((name for name, value in record.items() if isinstance(value, bool)), "…")
        found += [f"data.columns.label={says}"] if at(record, columns["label"]) is None else []
    elif "chosen" in columns and at(record, columns["chosen"]) is None:
        better, worse = next((pair for pair in _PAIRS if set(pair) <= record.keys()), ("…", "…"))
        found.append(f"data.columns.chosen={better} data.columns.rejected={worse}")
        if better == "…":
            found.append("(the two answers; data.preference.winner=… names the column that says which is better)")
    if "response" in columns:
        gone = [ours for ours in ("instruction", "response") if at(record, columns[ours]) is None]
        found += [f"data.columns.{ours}=…" for ours in gone if f"data.columns.{ours}=" not in "".join(found)]
    return f"; try {' '.join(found)}" if found else ""


def _said(row: Example) -> list[tuple[object, object]]:
    """Who says what in a row, whatever else it holds."""
    return [*((message["role"], message["content"]) for message in row.prompt), ("", row.reference)]


def _is(value: object, wanted: object) -> bool:
    if isinstance(wanted, list):
        return any(_is(value, each) for each in wanted)
    try:
        number = float(str(value))  # a CSV file has texts alone
    except ValueError:
        return wanted is not None and str(value).lower() == str(wanted).lower()
    if wanted in ("positive", "negative"):
        return number > 0 if wanted == "positive" else number < 0
    return isinstance(wanted, (int, float, str)) and str(wanted) in (str(value), f"{number:g}")


# (the documented columns of a record, where it stood, its other columns) -> a row
Make = Callable[[Fields, str, Fields], Row]


class Reader(Generic[Row]):
    """Turns what stands in sources into rows of one format, counting as it goes.

    `make` makes a row; `shapes` are the ways in which it may be written. Columns that are not documented are ignored,
    or handed on as they are.
    """

    def __init__(
        self,
        data: DataConfig,
        make: Make[Row],
        shapes: Sequence[Shape] = (),
        hands_on: bool = False,
        keys: MessageKeys | None = None,
        tally: Tally | None = None,
        keeps_ties: bool = False,
    ) -> None:
        self.keeps_ties = keeps_ties
        self.data, self.keys, self.tally = data, keys or message_keys(data.messages), tally or Tally()
        self.tally.ignored_keys, self.tally.trained_keys = self.keys.ignored, self.keys.seen
        self.columns: dict[str, str | None] = dict(vars(data.columns))
        shapes = shapes or [Shape("rows", {}, more=self.columns)]
        self.make: Any = make
        self.rule: PreferenceConfig = data.preference
        # a column that was named decides; only the shapes that it belongs to are looked for
        named = {ours for ours, theirs in self.columns.items() if theirs not in (ours, None)}
        chosen = [shape for shape in shapes if shape.documented and named & shape.needs.keys()]
        self.shapes, self.is_named = chosen or list(shapes), bool(chosen)
        self.hands_on = hands_on
        self.ignored = set(data.ignored_columns)
        self.drop_bad = data.bad_rows == "drop"

    def row(self, source: Source, number: int, content: object) -> tuple[str, Row | None]:
        """The part that a row belongs to, and the row; None where it is left out and counted."""
        where, split, row = source.place(number), source.split, None
        try:
            record = parse_line(number, content) if isinstance(content, bytes) else content
            if isinstance(record, dict) and not source.keeps_split:
                named = record.get("split")
                split = named if isinstance(named, str) and named and not named.startswith(NAMED) else split
            found = self._row(where, record)
            if found is not None:
                check_text(found.content, "the row")  # what it hands to templates and reward functions as well
            row = found
            self.tally.left_out[split].ties += row is None
        except ConfigError:
            raise
        except ValueError as error:
            what = str(error)
            if what.startswith("invalid JSON"):
                self.tally.problems.add(where, what)
                return split, None
            what = self._explained(what, record) if isinstance(record, dict) else what
            (self.tally.dropped if self.drop_bad else self.tally.problems).add(where, what)
            self.tally.left_out[split].bad += 1
        self.tally.left_out[split].read += row is None
        return split, row

    def _row(self, where: str, record: object) -> Row | None:
        if not isinstance(record, dict):
            raise ValueError(f"must be an object, got {kind(record)}")
        self.tally.others.update(self.ignored & record.keys())
        record = {name: value for name, value in record.items() if name not in self.ignored}
        fits = [
            shape
            for shape in self.shapes
            if all(at(record, theirs) not in (None, []) for theirs in shape.needs.values())
            and not any(record.get(name) is not None for name in shape.unless)
        ]
        # by the documented columns where no shape fits, which fails and says what is missing
        row = self._read(fits[0] if fits else Shape("", {}, more=self.columns), where, record)
        if not self.hands_on:
            self._compare(row, fits, where, record)
        return row

    def _mapped(self, shape: Shape, record: Fields) -> tuple[Fields, Fields]:
        """The record in our names, and its other columns."""
        used = {**{name: self.columns.get(name) for name in EXTRAS}, **shape.more, **shape.needs}
        # `history` mapped to be the prompt is the prompt alone
        taken = {path for ours, path in used.items() if ours not in EXTRAS}
        mapped = {ours: at(record, path) for ours, path in used.items() if ours not in EXTRAS or path not in taken}
        mapped = {ours: value for ours, value in mapped.items() if value is not None or used[ours] in record}
        known = {path.split(".")[0] if path not in record else path for path in used.values() if path}
        known |= {self.rule.winner.split(".")[0], self.rule.winner} if self.rule.winner else set()
        others = {str(name): value for name, value in record.items() if name not in known | {"split"}}
        if "chat_template_kwargs" in others:
            mapped["chat_template_kwargs"] = others.pop("chat_template_kwargs")
        return mapped, others

    def _read(self, shape: Shape, where: str, record: Fields) -> Row | None:
        mapped, others = self._mapped(shape, record)
        if shape.name and not self.hands_on:
            self._check_others(others)
        made = self._made(mapped, where, others, record)
        if made is None:
            return None
        self.tally.formats[shape.name] += 1
        self.tally.with_more.update(ours for ours in (*EXTRAS, "chat_template_kwargs") if mapped.get(ours))
        self.tally.others.update(name for name, value in others.items() if value not in (None, "", [], {}))
        self.tally.columns.update(others.keys())
        self.tally.options.update(made.inputs.options.keys())
        return made

    def _made(self, mapped: Fields, where: str, others: Fields, record: Fields) -> Row | None:
        """The row, its two answers in the order that the winner says; None of a tie."""
        if self.rule.winner is not None and "chosen" in mapped:
            says = at(record, self.rule.winner)
            if _is(says, self.rule.tie):
                return self.make({**mapped, IS_TIE: True}, where, others) if self.keeps_ties else None
            if _is(says, self.rule.b):
                mapped = {**mapped, "chosen": mapped["rejected"], "rejected": mapped["chosen"]}
            elif not _is(says, self.rule.a):
                raise ValueError(
                    f"data.preference.winner={self.rule.winner} is {says!r} here, and none of data.preference.a, b and "
                    "tie has it; each may be a list"
                )
        made: Row = self.make(mapped, where, others)
        return made

    def _check_others(self, others: Fields) -> None:
        """No column is left unread that may say which rows or answers are good."""
        if self.rule.winner is not None:
            return
        two_answers = "chosen" in self.columns
        found = [name for name, value in others.items() if decides(name) and value not in (None, "", [])]
        measures = [name for name in found if _MEASURES.search(name)]
        if two_answers and not self.is_named:  # chosen and rejected say it themselves
            found = [name for name in found if name not in measures]
        if found:
            first = next((name for name in found if name not in measures), found[0])
            how = f"data.preference.winner={first} with data.preference.a and b, or " if two_answers else ""
            raise ConfigError(
                f"data.dataset_name: column {first!r} ({others[first]!r} in a row) looks as if it decides which rows "
                f"or answers are good, and nothing reads it; set {how if first not in measures else ''}"
                f"data.ignored_columns=[{','.join(found)}] to train without it"
            )

    def _compare(self, row: Row | None, fits: Sequence[Shape], where: str, record: Fields) -> None:
        """Two readings of a row that differ are one too many."""
        for shape in fits[1:]:
            mapped, others = self._mapped(shape, record)
            try:
                other = self._made(mapped, where, others, record)
            except ValueError:  # it is not one of this shape then
                continue
            if row is not None and other is not None and _said(row) != _said(other):
                one, two = ([str(path).split(".")[0] for path in each.needs.values()] for each in (fits[0], shape))
                ways = (sorted(set(one) - set(two)), sorted(set(two) - set(one)))
                choice = " or ".join(f"data.ignored_columns=[{','.join(names)}]" for names in ways if names)
                raise ConfigError(
                    f"{where}: reads as {fits[0].name} and as {shape.name}, and these differ; leave one out: {choice}"
                )

    def _explained(self, what: str, record: Fields) -> str:
        """An error about a missing column in the source's names, and what may be meant."""
        if not what.startswith("no '"):
            return what
        what = re.sub(r"\(found: [^)]*\)", lambda _: f"(found: {', '.join(record) or 'nothing'})", what)
        for ours, theirs in self.columns.items():
            if ours != theirs:
                told = f"no {theirs!r}, which data.columns.{ours} names{nearest(str(theirs), record)} "
                what = what.replace(f"no {ours!r} ", told)
        return what + _hints(record, self.columns)

    def notes(self) -> list[str]:
        """What was read as what, and what was not.

        Raises:
            DataError: names file, line and fault of the first bad rows and counts the others.
            ConfigError: a key names something that no row has.
        """
        tally = self.tally
        tally.problems.raise_if_any()
        if unknown := sorted(self.ignored - tally.others.keys()):
            raise ConfigError(f"data.ignored_columns: no row has a column {unknown[0]!r}")
        for key in self.keys.train if len(self.keys.train) == 1 else ():
            if not tally.trained_keys[key]:
                raise ConfigError(f"data.messages.train={key}: no message has this key")
        more = ", ".join(f"{name} in {count:,}" for name, count in tally.with_more.items())
        read = "; ".join(f"{name}, {count:,} rows" for name, count in tally.formats.items())
        found = [f"format: {read}{'; ' + more if more else ''}"] if read else []
        for name, count in sorted(tally.others.items()):
            ours = [ours for ours in self.columns if name in _ALIASES.get(ours, ())] if not self.hands_on else []
            hint = f"; data.columns.{ours[0]}={name} reads it" if ours and ours[0] in ("input", "system") else ""
            what = "handed to reward functions" if self.hands_on else "ignored"
            found.append(f"column {name!r} is {what} ({count} rows){hint}")
        found += [told.format(count=rows.count, line=rows.lines[0]) for told, rows in tally.told.items()]
        return found + [f"key {name!r} of messages is ignored ({n:,} times)" for name, n in tally.ignored_keys.items()]
