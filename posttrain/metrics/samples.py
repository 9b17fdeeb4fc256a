"""The samples on a report's page: what policies completed and how pairs were scored, read from a run's folder."""

import json
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, TypeVar, cast

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from posttrain.metrics import comparison

BYTES = 4 * 2**20  # of JSON on one page; small tables leave their share to larger ones
CHARACTERS = 8_000  # of one text
WHOLE = 2**19  # bytes of a rollouts.jsonl that is read from end to end; of a longer one, rollouts at
PLACES = 200  # places, as long runs write gigabytes
TEXT, VALUE, OUTCOME, TRACE = "text", "value", "outcome", "trace"  # what a column holds

Cell = str | float | None | list[object]
Item = TypeVar("Item")


class Column(NamedTuple):
    """A column; those beside each other with the same group, such as a policy, are shown in one cell."""

    name: str
    group: str = ""
    kind: str = VALUE


class Table(NamedTuple):
    """The samples of one file; `slider` names the column that a slider moves over."""

    title: str
    about: str
    columns: list[Column]
    rows: list[tuple[Cell, ...]]
    slider: str = ""
    id: str = ""  # in links to a sample
    kept: str = ""  # how many of how many rows are here, and where they are from

    @property
    def cells(self) -> list[tuple[str, list[int]]]:
        """The cells of a row: the heading of each, and the places of its columns."""
        places = range(len(self.columns))
        grouped = groupby(places, lambda place: self.columns[place].group or self.columns[place].name)
        return [(heading, list(inside)) for heading, inside in grouped]

    def as_json(self) -> str:
        """For a script element: `<`, `>` and `&` of the texts are escaped, so that none of them ends it."""
        return _json(self._asdict())


class _Evaluated(TypedDict):
    policy: str
    prompts: list[str]
    answers: list[str]
    scores: NotRequired[dict[str, list[float | None]]]  # this and all below are missing in older files
    gold: NotRequired[list[str]]
    tokens: NotRequired[list[int]]
    kl: NotRequired[list[float | None]]
    ended: NotRequired[list[bool]]


def collect(
    runs: Sequence[tuple[Path, Sequence[tuple[str, Path]]]], read_json: Callable[[Path], object]
) -> list[Table]:
    """The tables of runs, each given as its folder with the titles and folders of its finished stages."""
    files: list[tuple[str, str, Path]] = []
    for number, (run, stages) in enumerate(runs, 1):
        title, place = (f"{run}: ", f"{number}/") if len(runs) > 1 else ("", "")
        evaluations = sorted(run.glob("evaluation*.json"), key=lambda file: (file.name != comparison.FILE, file.name))
        named = [(file.stem.replace("-", " of ", 1), file) for file in evaluations]
        for stage, folder in stages:
            named += [(f"{stage}: rollouts", folder / "rollouts.jsonl")]
            named += [(f"{stage}: before and after", folder / "samples.json")]
            named += [(f"{stage}: held-out pairs", folder / "report_card.json")]
        for words, file in named:
            if file.is_file():
                anchor = place + file.relative_to(run).with_suffix("").as_posix()
                files.append((title + words[0].upper() + words[1:], anchor, file))
    found, left = {}, BYTES
    for count, (title, anchor, file) in enumerate(sorted(files, key=lambda each: each[2].stat().st_size)):
        share = left // (len(files) - count)
        table = _rollouts(file, share) if file.name == "rollouts.jsonl" else _table_of(file.name, read_json(file))
        if table is not None and table.rows:
            sizes = list(accumulate(len(_json(row).encode()) + 1 for row in table.rows))
            fits, total = bisect_right(sizes, share), len(sizes)
            kept = f"{total:,} rows, from {file}" if fits == total else f"{fits:,} of {total:,} rows; all are in {file}"
            found[anchor] = table._replace(title=title, id=anchor, rows=table.rows[:fits], kept=kept)
            left -= sizes[fits - 1] if fits else 0
    return [found[anchor] for _, anchor, _ in files if anchor in found]


def _table_of(name: str, content: object) -> Table | None:
    if name == "samples.json":
        return _panel(cast("Sequence[Mapping[str, object]]", content))
    if name == "report_card.json":
        return _pairs(cast("Mapping[str, object]", content))
    if not isinstance(content, list) or not content or not all(isinstance(e, dict) and "answers" in e for e in content):
        return None  # what another evaluation wrote
    return _evaluation(cast("Sequence[_Evaluated]", content))


def _json(content: object) -> str:
    text = htmlsafe_json_dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.encode(errors="replace").decode())  # half a surrogate pair is no text


def _table(about: str, columns: Iterable[tuple[Column, Sequence[object]]], slider: str = "") -> Table:
    """Of columns and their values; a column without any value is left out."""
    there = [(column, values) for column, values in columns if any(value is not None for value in values)]
    rows = zip(*(map(_cell, values) for _, values in there), strict=True)
    return Table("", about, [column for column, _ in there], list(rows), slider)


def _cell(value: object) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return value
    if value is None or value != value:  # NaN: a reward function that does not apply
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    text = str(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… (the first {CHARACTERS:,} of {len(text):,})"


def _conversation(messages: object) -> str:
    """A prompt as it is read: one message by itself, several with their roles."""
    turns = cast("Sequence[Mapping[str, object]]", messages)
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


# -- the evaluation


def _evaluation(found: Sequence[_Evaluated]) -> Table:
    """A row for each prompt, with the completions of all policies beside each other."""
    names = [_occurrences(each["prompts"]) for each in found]
    keys = list(dict.fromkeys(key for own in names for key in own))
    columns: list[tuple[Column, Sequence[object]]] = [(Column("prompt", "", TEXT), [prompt for prompt, _ in keys])]
    first: dict[str, list[float | None]] = {}
    for number, (each, own) in enumerate(zip(found, names, strict=True)):
        group = each["policy"]
        scores = {name: _aligned(keys, own, values) for name, values in each.get("scores", {}).items()}
        first = scores if number == 0 else first
        columns.append((Column("completion", group, TEXT), _aligned(keys, own, each["answers"])))
        if number:
            signs = {name: comparison.signs(scores[name], first[name]) for name in scores if name in first}
            gold = [signs[name] for name in each.get("gold", signs) if name in signs and name != comparison.REWARD]
            by_reward = signs.get(comparison.REWARD, [None] * len(keys))
            by_gold = zip(*gold, strict=True) if gold else ()
            words = {1: "win", 0: "tie", -1: "loss", None: None}
            columns.append((Column("by reward", group, OUTCOME), [words[sign] for sign in by_reward]))
            columns.append((Column("by gold functions", group, OUTCOME), list(map(_by_gold, by_gold))))
        columns += [(Column(name, group), values) for name, values in scores.items()]
        columns.append((Column("tokens", group), _aligned(keys, own, each.get("tokens", []))))
        columns.append((Column("KL", group), _aligned(keys, own, each.get("kl", []))))
        columns.append((Column("ended", group), _aligned(keys, own, each.get("ended", []))))
    about = "The same held-out prompts, completed by each policy"
    against = f"; wins, losses and regressions (a gold function fell) are against {found[0]['policy']}"
    return _table(f"{about}{against if len(found) > 1 else ''}.", columns)


def _occurrences(prompts: Iterable[str]) -> list[tuple[str, int]]:
    """Each prompt with how often it has occurred before: policies with other limits have not all the same prompts."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return found


def _aligned(
    keys: Sequence[tuple[str, int]], own: Sequence[tuple[str, int]], values: Sequence[Item | None]
) -> list[Item | None]:
    at = dict(zip(own, values, strict=False))
    return [at.get(key) for key in keys]


def _by_gold(signs: Iterable[int | None]) -> str | None:
    found = {sign for sign in signs if sign is not None}
    return "regression" if -1 in found else "win" if 1 in found else "tie" if found else None


# -- one stage


def _panel(rows: Sequence[Mapping[str, object]]) -> Table:
    """The prompt panel of samples.json, before and after."""
    columns: list[tuple[Column, Sequence[object]]] = [
        (Column("prompt", "", TEXT), [_conversation(row["prompt"]) for row in rows]),
        (Column("reference", "", TEXT), [row.get("reference") or None for row in rows]),
    ]
    texts = []
    for when in ("before", "after"):
        completions = [cast("Mapping[str, object]", row[when]) for row in rows]
        texts.append([each["text"] for each in completions])
        columns.append((Column("completion", when, TEXT), texts[-1]))
        columns.append((Column("ended", when), [each.get("ended") for each in completions]))
    changed = [one != other for one, other in zip(*texts, strict=True)]
    columns.append((Column("changed", "after", OUTCOME), changed))
    return _table("Held-out prompts, completed before the first step and after the last.", columns)


def _pairs(card: Mapping[str, object]) -> Table:
    """The held-out pairs that a report card keeps."""
    found = card.get("lowest_margins", card.get("most_confidently_wrong"))  # as older cards call the first five
    rows = cast("Sequence[Mapping[str, object]]", found or ())
    margins = [cast(float, row["chosen_score"]) - cast(float, row["rejected_score"]) for row in rows]
    words = ["right" if margin > 0 else "tie" if margin == 0 else "wrong" for margin in margins]
    columns: list[tuple[Column, Sequence[object]]] = [
        (Column("prompt", "", TEXT), [row["prompt"] for row in rows]),
        (Column("margin", "scores"), margins),
        (Column("ranked", "scores", OUTCOME), words),
        (Column("kind", "scores"), [row.get("group") for row in rows]),
    ]
    for side in ("chosen", "rejected"):
        columns.append((Column("completion", side, TEXT), [row[side] for row in rows]))
        columns.append((Column("score", side), [row[f"{side}_score"] for row in rows]))
        columns.append((Column("tokens", side), [row[f"{side}_length"] for row in rows]))
    about = f"{len(rows):,} of {card.get('pairs'):,} held-out pairs"
    return _table(f"{about}, those with the lowest margins: the most confidently wrong come first.", columns)


def _rollouts(file: Path, share: int) -> Table | None:
    """The samples of rollouts, evenly spaced where those of all of them take more than `share` bytes."""
    found = _read_rollouts(file)
    if not found:
        return None
    numbers, size = sorted(found), len(json.dumps(list(found.values())))
    kept = min(len(numbers), max(2, len(numbers) * share // size))
    numbers = [numbers[place * (len(numbers) - 1) // max(kept - 1, 1)] for place in range(kept)]
    rows = [row for number in numbers for row in found[number]]
    named = ("step", "rollout", "prompt", "answer", "trace")
    columns: list[tuple[Column, Sequence[object]]] = [
        (Column("rollout", "time"), [cast(int, row["rollout"]) + 1 for row in rows]),
        (Column("step", "time"), [row.get("step") for row in rows]),
        (Column("prompt", "", TEXT), [_conversation(row["prompt"]) for row in rows]),
        (Column("completion", "completion", TEXT), [row["answer"] for row in rows]),
    ]
    for name in dict.fromkeys(name for row in rows for name in row if name not in named):
        label = "KL" if name == "kl" else name
        columns.append((Column(label, "completion"), [row.get(name) for row in rows]))
    columns.append((Column("tokens", "completion", TRACE), [row.get("trace") for row in rows]))
    total = numbers[-1] + 1
    which = f"all {total:,} rollouts" if kept == total else f"{kept:,} of {total:,} rollouts, evenly spaced"
    return _table(f"Completions sampled in training, from {which}.", columns, "rollout")


def _read_rollouts(file: Path) -> dict[int, list[dict[str, object]]]:
    """The rows of each rollout of a rollouts.jsonl; of a long one, PLACES of them with the first and the last."""
    size = file.stat().st_size
    starts = [size * place // PLACES for place in range(PLACES)] if size > WHOLE else [0]
    found: dict[int, list[dict[str, object]]] = {}
    with file.open("rb") as lines:
        for place, start in enumerate(starts, 1):
            lines.seek(start)
            if start:
                lines.readline()  # it began before
            grouped = groupby(_whole(lines), lambda row: cast(int, row["rollout"]))
            rollouts: Iterable[tuple[int, list[dict[str, object]]]] = ((key, list(rows)) for key, rows in grouped)
            if len(starts) > 1:
                skipped = int(0 < start < starts[-1])  # which may have begun before
                rollouts = deque(rollouts, 1) if place == len(starts) else islice(rollouts, skipped, skipped + 1)
            for number, rows in rollouts:
                found.setdefault(number, rows)
    return found


def _whole(lines: Iterable[bytes]) -> Iterator[dict[str, object]]:
    """The lines but for a last one that a kill has cut."""
    return (json.loads(line) for line in lines if line.endswith(b"\n"))
