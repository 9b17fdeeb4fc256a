"""Documented data formats read strictly into conversations, each of which knows the line that it came from.

No type is inferred and no value changed: a row is what its file says, or an error that names file and line.
"""

import csv
import glob
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config import DataConfig
from posttrain.errors import ConfigError, DataError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
HELD_OUT_NAMES = ("test", "validation")
SHOWN_PROBLEMS = 5


class Conversation(NamedTuple):
    """One checked row: its messages, the last by the assistant, and where it stands ("data.jsonl line 3")."""

    messages: list[Message]
    where: str

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return json.dumps(self.messages, ensure_ascii=False)


@dataclass
class Counts:
    """What became of the rows of one split; every row read is in exactly one of kept, dropped and elsewhere."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0  # exact repetitions, kept
    in_test_too: int = 0  # left out of training because the same row is held out
    truncated: int = 0  # kept without their end
    prompt_too_long: int = 0  # dropped: nothing of the response would be left
    too_long: int = 0  # dropped on request (data.overlength=drop)


@dataclass
class Splits:
    """The rows to train on and the rows held out; no row is in both."""

    train: list[Conversation]
    test: list[Conversation]
    counts: dict[str, Counts]
    sources: dict[str, str]  # resolved file or Hub id -> sha256 of its bytes, or the Hub's own fingerprint
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> dict[str, str]:
        """sha256 over the content of each split, in order."""
        return {
            name: hashlib.sha256("\n".join(row.content for row in rows).encode()).hexdigest()
            for name, rows in (("train", self.train), ("test", self.test))
        }


class _Problems:
    """Collects what is wrong with rows, so that the first few are told at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.lines) < SHOWN_PROBLEMS:
            self.lines.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        if self.count > len(self.lines):
            self.lines.append(f"... and {self.count - len(self.lines)} more rows")
        if self.lines:
            raise DataError(*self.lines)


Record = tuple[str, Any]  # where it stands, and what stands there


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return row


def _read_jsonl(path: Path, problems: _Problems) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield where, json.loads(text.rstrip("\r\n"), object_pairs_hook=_unique_keys)
            except json.JSONDecodeError as error:
                problems.add(where, f"invalid JSON ({error.msg} at column {error.colno})")
            except ValueError as error:  # not UTF-8, or a key that stands twice
                problems.add(where, f"invalid JSON ({error})")


def _read_json(path: Path, problems: _Problems) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        problems.add(str(path), f"invalid JSON ({error})")
        return
    if not isinstance(rows, list):
        problems.add(str(path), "must hold a list of objects; one object a line belongs in a .jsonl file")
        return
    for number, row in enumerate(rows, start=1):
        yield f"{path} item {number}", row


def _read_csv(path: Path, problems: _Problems) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    problems.add(where, f"has not as many fields as the header ({len(reader.fieldnames or ())})")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            problems.add(f"{path} line {reader.line_num}", f"invalid CSV ({error})")


def _read_parquet(path: Path, problems: _Problems) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        problems.add(str(path), f"invalid Parquet ({str(error).splitlines()[0]})")


_READERS: dict[str, Callable[[Path, _Problems], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _files(name: str) -> list[Path]:
    """The files that a path or pattern names; none where it is not a local name."""
    if Path(name).is_file():
        return [Path(name)]
    return sorted(Path(found) for found in glob.glob(name) if Path(found).is_file())  # noqa: PTH207, it takes absolute patterns


def _sources(data: DataConfig) -> list[str]:
    return [data.dataset_name] if isinstance(data.dataset_name, str) else list(data.dataset_name)


def is_local(data: DataConfig) -> bool:
    """Whether every source is a file or folder here."""
    return all(_files(name) or Path(name).is_dir() for name in _sources(data))


def check_source(data: DataConfig) -> None:
    """Refuse a source that cannot exist, before anything slow is done.

    Raises:
        ConfigError: no such file, or files of a type that is not read.
    """
    names = _sources(data)
    for name in names:
        found = _files(name)
        looks_local = name.startswith((".", "/", "~")) or Path(name).suffix in FILE_TYPES or name.count("/") > 1
        if not found and not Path(name).is_dir() and (looks_local or "*" in name or len(names) > 1):
            raise ConfigError(f"data.dataset_name={name}: no such file")
        for path in found:
            if path.suffix not in _READERS:
                known = ", ".join(FILE_TYPES)
                raise ConfigError(f"data.dataset_name={path}: the type {path.suffix!r} is not one of {known}")


def _read_files(paths: list[Path], problems: _Problems, sources: dict[str, str]) -> Iterator[Record]:
    for path in paths:
        with path.open("rb") as content:
            sources[str(path.resolve())] = hashlib.file_digest(content, "sha256").hexdigest()
        yield from _READERS[path.suffix](path, problems)


def _read_dataset(dataset: Any, name: str, sources: dict[str, str]) -> Iterator[Record]:
    sources[name] = dataset._fingerprint
    for number, row in enumerate(dataset, start=1):
        yield f"{name} row {number}", row


def _read_folder_or_hub(data: DataConfig, name: str, sources: dict[str, str]) -> dict[str, Iterator[Record]]:
    """Splits of a folder saved by `datasets` or of a data set on the Hub."""
    import datasets

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
            raise ConfigError(
                f"data.dataset_name={name} is a folder that datasets.save_to_disk did not write; "
                f"name its files instead ({', '.join(FILE_TYPES)}; a pattern such as '{name}/*.jsonl' will do)"
            )
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {data.dataset_train_split: saved}
    else:
        try:
            wanted = [split for split in (data.dataset_test_split, *HELD_OUT_NAMES) if split]
            available = datasets.get_dataset_split_names(name, data.dataset_config)
            chosen = [data.dataset_train_split, *(split for split in wanted if split in available)]
            splits = {split: datasets.load_dataset(name, data.dataset_config, split=split) for split in chosen}
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data.dataset_name={name} is neither a file here nor a data set that could be had from the Hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
    if data.dataset_train_split not in splits:
        raise ConfigError(
            f"data.dataset_train_split={data.dataset_train_split} is not a split of {name}; it has {', '.join(splits)}"
        )
    return {
        split: _read_dataset(rows, f"{name}[{split}]", sources)
        for split, rows in splits.items()
        if split in (data.dataset_train_split, data.dataset_test_split, *HELD_OUT_NAMES)
    }


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _check_text(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character")


def _as_messages(value: Any, role: str, column: str) -> list[Message]:
    """A text as one message of that role; a list of messages as it is."""
    if isinstance(value, str):
        _check_text(value, repr(column))
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column!r} must be a text or a list of messages, got {_kind(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"message {number} of {column!r} must have the keys role and content, and no others")
        if message["role"] not in ("system", "user", "assistant"):
            role = message["role"]
            raise ValueError(f"message {number} of {column!r} has the role {role!r}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {number} of {column!r} has {_kind(message['content'])} for content, not a text")
        _check_text(message["content"], f"message {number} of {column!r}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def format_instruction(row: dict[str, Any]) -> list[Message]:
    """Turn an instruction row into the messages of its conversation.

    `instruction` and `response` are texts or lists of messages; `input` is appended to the instruction after a
    blank line; `system` becomes the first message. Every assistant message is a response to learn.

    Raises:
        ValueError: says what is missing or out of order.
    """
    for column in ("instruction", "response"):
        if column not in row:
            found = ", ".join(str(name) for name in row) or "nothing"
            raise ValueError(f"no {column!r} (found: {found}); format 'instruction' needs instruction, response")
    instruction = row["instruction"]
    for column in ("input", "system"):
        if row.get(column) is not None and not isinstance(row[column], str):
            raise ValueError(f"{column!r} must be a text, got {_kind(row[column])}")
    if row.get("input", "") and row["input"].strip():
        if not isinstance(instruction, str):
            raise ValueError("'input' goes with an 'instruction' that is a text, not a list of messages")
        instruction = f"{instruction}\n\n{row['input']}"
    messages = _as_messages(instruction, "user", "instruction") + _as_messages(row["response"], "assistant", "response")
    if row.get("system", "") and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"the roles are {', '.join(roles)}; user and assistant must take turns and assistant be last")
    return messages


class _Reader:
    """Reads one source into conversations, counting as it goes."""

    def __init__(self, data: DataConfig) -> None:
        self.columns: dict[str, str] = dict(vars(data.columns))
        self.problems = _Problems()
        self.ignored: dict[str, int] = {}

    def conversation(self, where: str, record: Any) -> Conversation | None:
        if not isinstance(record, dict):
            self.problems.add(where, f"must be an object, got {_kind(record)}")
            return None
        known = {*self.columns.values(), "split"}
        for name in record:
            if name not in known:
                self.ignored[str(name)] = self.ignored.get(str(name), 0) + 1
        row = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        try:
            return Conversation(format_instruction(row), where)
        except ValueError as error:
            what = str(error)
            if what.startswith("no '"):
                what = re.sub(r"\(found: [^)]*\)", lambda _: f"(found: {', '.join(record) or 'nothing'})", what)
                what += self._mapping_hint(record)
            self.problems.add(where, what)
            return None

    def _mapping_hint(self, record: dict[str, Any]) -> str:
        aliases = {"instruction": ("question", "prompt", "query"), "response": ("output", "answer", "completion")}
        hints = [
            f"data.columns.{ours}={alias}"
            for ours, names in aliases.items()
            for alias in names
            if self.columns[ours] not in record and alias in record
        ]
        return f"; try {' '.join(hints)}" if hints else ""


def _held_out(rows: list[Conversation], test_size: float) -> tuple[list[Conversation], list[Conversation]]:
    """Split by content, so that equal rows stay together and the choice depends on nothing but the rows."""
    if test_size <= 0:
        return rows, []
    wanted = int(test_size) if test_size >= 1 else round(test_size * len(rows))
    if not 0 < wanted < len(rows):
        raise ConfigError(
            f"data.test_size={test_size:g} of {len(rows)} rows leaves {len(rows) - wanted} to train on and "
            f"{wanted} held out; data.test_size=0 holds out none"
        )
    by_content: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_content.setdefault(row.content, []).append(index)
    order = sorted(by_content, key=lambda content: hashlib.sha256(content.encode()).digest())
    chosen: set[int] = set()
    for content in order:
        if len(chosen) + len(by_content[content]) <= wanted:
            chosen.update(by_content[content])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def _records(data: DataConfig, sources: dict[str, str], problems: _Problems) -> dict[str, Iterable[Record]]:
    """The source's splits; files have one, whose rows may say in `split` which part they belong to."""
    check_source(data)
    parts: dict[str, Iterable[Record]] = {}
    paths = [path for name in _sources(data) for path in _files(name)]
    if paths:
        parts[data.dataset_train_split] = _read_files(paths, problems, sources)
    else:
        parts.update(_read_folder_or_hub(data, _sources(data)[0], sources))
    if data.dataset_test_split and (paths := _files(data.dataset_test_split)):
        parts[data.dataset_test_split] = _read_files(paths, problems, sources)
    return parts


def _split_of(record: Any, default: str) -> str:
    split = record.get("split") if isinstance(record, dict) else None
    return split if isinstance(split, str) and split else default


def read_instructions(data: DataConfig) -> Splits:
    """Read, check and split the instruction rows that `data` names.

    Raises:
        DataError: names file, line and fault of the first bad rows and counts the others; no row is skipped.
        ConfigError: a source or split does not exist.
    """
    sources: dict[str, str] = {}
    reader = _Reader(data)
    by_split: dict[str, list[Conversation]] = {}
    unread = 0
    for part, records in _records(data, sources, reader.problems).items():
        for taken, (where, record) in enumerate(records):
            if taken == data.max_rows:
                unread += 1
                break
            row = reader.conversation(where, record)
            if row is not None:
                by_split.setdefault(_split_of(record, part), []).append(row)
    reader.problems.raise_if_any()
    train = by_split.pop(data.dataset_train_split, [])
    if not train:
        found = ", ".join(by_split) or "no rows at all"
        wanted = f"no rows of split {data.dataset_train_split} (found: {found})"
        raise DataError(f"data.dataset_name={data.dataset_name}: {wanted}")
    test_split = data.dataset_test_split or next((name for name in HELD_OUT_NAMES if name in by_split), None)
    counts = {"train": Counts(read=len(train)), "test": Counts()}
    notes = [f"ignored column {name!r} ({count} rows)" for name, count in sorted(reader.ignored.items())]
    if unread:
        notes.append(f"data.max_rows={data.max_rows}: the rows after it were not read")
    if test_split is not None:
        if test_split not in by_split:
            raise ConfigError(
                f"data.dataset_test_split={test_split} is neither a file nor a split of {data.dataset_name} "
                f"(found: {', '.join([data.dataset_train_split, *by_split])})"
            )
        test = by_split.pop(test_split)
        held_out = {row.content for row in test}
        kept = [row for row in train if row.content not in held_out]
        counts["train"].in_test_too = len(train) - len(kept)
        train = kept
        counts["test"].read = len(test)
    else:
        train, test = _held_out(train, data.test_size)
        counts["train"].read, counts["test"].read = len(train), len(test)
    notes += [f"{len(rows)} rows of split {name!r} are not used" for name, rows in by_split.items()]
    for name, rows in (("train", train), ("test", test)):
        counts[name].kept = len(rows)
        counts[name].duplicates = len(rows) - len({row.content for row in rows})
    if not train:
        raise DataError("no rows left to train on: every one of them is also among the held-out rows")
    return Splits(train, test, counts, sources, notes)
