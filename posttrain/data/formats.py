"""Documented data formats read strictly into conversations and pairs, each of which knows where it stood.

No type is inferred and no value changed: a row is what its file says, or an error that names file and line.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from posttrain.config.schema import DataConfig
from posttrain.data.sources import HELD_OUT_NAMES, NOTHING_GIVEN, Given, Problems, records
from posttrain.errors import ConfigError, DataError
from posttrain.values import JsonObject

ECHO = 20  # characters of a prompt from which on a completion that begins with them is hardly a coincidence
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Conversation(NamedTuple):
    """One checked instruction row: its messages, the last by the assistant, and where it stood ("a.jsonl line 3")."""

    messages: list[Message]
    where: str

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last completion."""
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        """The completion that the data gives."""
        return self.messages[-1]["content"]

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return json.dumps(self.messages, ensure_ascii=False)


class Pair(NamedTuple):
    """One checked preference row: after `prompt`, the messages of `chosen` are better than those of `rejected`."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str
    margin: float | None = None  # by how much, where the data says so

    @property
    def reference(self) -> str:
        """The completion that the data prefers."""
        return self.chosen[-1]["content"]

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return json.dumps([self.prompt, self.chosen, self.rejected, self.margin], ensure_ascii=False)


class Prompt(NamedTuple):
    """One checked prompt row, its last message by the user, and the row's other columns."""

    prompt: list[Message]
    where: str
    columns: JsonObject  # handed to reward functions

    @property
    def reference(self) -> str:
        """The data gives no completion."""
        return ""

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return json.dumps([self.prompt, self.columns], ensure_ascii=False)


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
    ties: int = 0  # left out: chosen and rejected are the same, perhaps only after the cut
    truncated: int = 0  # kept without their end
    prompt_too_long: int = 0  # left out: nothing of the response would remain
    too_long: int = 0  # left out on request (data.overlength=drop)


@dataclass
class Splits(Generic[Row]):
    """The rows to train on and the rows held out; no row is in both."""

    train: list[Row]
    test: list[Row]
    counts: dict[str, Counts]
    sources: dict[str, str]  # resolved file or Hub id -> sha256 of its bytes, or the Hub's own fingerprint
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> dict[str, str]:
        """sha256 over the content of each split, in order."""
        return {
            name: hashlib.sha256("\n".join(row.content for row in rows).encode()).hexdigest()
            for name, rows in (("train", self.train), ("test", self.test))
        }


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _check_text(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} contains an unpaired surrogate (invalid Unicode)")


def as_messages(value: object, role: str, column: str) -> list[Message]:
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


def check_turns(messages: Sequence[Message]) -> None:
    """User and assistant take turns after an optional system message, and the assistant is last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if len(turns) < 2 or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"the roles are {', '.join(roles)}; user and assistant must take turns and assistant be last")


def require_columns(row: JsonObject, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in row:
            found = ", ".join(str(other) for other in row) or "nothing"
            raise ValueError(f"no {column!r} (found: {found}); format {name!r} needs {', '.join(columns)}")


def format_instruction(row: JsonObject) -> list[Message]:
    """Turn an instruction row into the messages of its conversation.

    `instruction` and `response` are texts or lists of messages; `input` is appended to the instruction after a
    blank line; `system` becomes the first message. Every assistant message is a response to learn. Without an
    `instruction`, `response` is a whole conversation: a list of messages or a transcript.

    Raises:
        ValueError: says what is missing or out of order.
    """
    if row.get("instruction") is None and _is_conversation(row.get("response")):
        messages = _whole(row["response"], "response")
        check_turns(messages)
        return messages
    require_columns(row, ("instruction", "response"), "instruction")
    instruction = row["instruction"]
    for column in ("input", "system"):
        if row.get(column) is not None and not isinstance(row[column], str):
            raise ValueError(f"{column!r} must be a text, got {_kind(row[column])}")
    if row.get("input", "") and row["input"].strip():
        if not isinstance(instruction, str):
            raise ValueError("'input' goes with an 'instruction' that is a text, not a list of messages")
        instruction = f"{instruction}\n\n{row['input']}"
    messages = as_messages(instruction, "user", "instruction") + as_messages(row["response"], "assistant", "response")
    if row.get("system", "") and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    check_turns(messages)
    return messages


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def parse_transcript(text: str, column: str) -> list[Message]:
    r"""The messages of a transcript in the layout of Anthropic's hh-rlhf ("\n\nHuman: …\n\nAssistant: …").

    Raises:
        ValueError: it does not begin with a turn, or a turn is empty.
    """
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"{column!r} has no 'prompt' beside it and is not a transcript of Human: and Assistant: turns")
    names = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": names[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    for number, message in enumerate(messages, start=1):
        _check_text(message["content"], f"turn {number} of {column!r}")
    return messages


def _is_conversation(value: object) -> bool:
    """Whether a value is more than a completion: messages that begin before one, or a transcript."""
    if isinstance(value, str):
        return bool(_TURN.match(value.lstrip() if value.strip() else ""))
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") != "assistant"
    )


def _whole(value: object, column: str) -> list[Message]:
    """The messages of a whole conversation."""
    return parse_transcript(value, column) if isinstance(value, str) else as_messages(value, "assistant", column)


def format_preference(row: JsonObject) -> tuple[list[Message], list[Message], list[Message]]:
    """Turn a preference row into prompt, chosen and rejected messages.

    With a `prompt` (text or messages), `chosen` and `rejected` are its completions, or conversations beginning with it.
    Without one they are whole transcripts or whole conversations, and the prompt is what both begin with.

    Raises:
        ValueError: says what is missing or out of order.
    """
    if row.get("prompt") is not None:
        require_columns(row, ("prompt", "chosen", "rejected"), "preference")
        prompt = as_messages(row["prompt"], "user", "prompt")
        answers = [as_messages(row[side], "assistant", side) for side in ("chosen", "rejected")]
        if all(answer[: len(prompt)] == prompt for answer in answers):
            answers = [answer[len(prompt) :] for answer in answers]
    else:
        require_columns(row, ("chosen", "rejected"), "preference")
        whole = []
        for side in ("chosen", "rejected"):
            if isinstance(row[side], str) and not _is_conversation(row[side]):
                found = ", ".join(row)
                raise ValueError(f"no 'prompt' (found: {found}); format 'preference' needs prompt, chosen, rejected")
            whole.append(_whole(row[side], side))
        shared = 0
        while shared < min(map(len, whole)) - 1 and whole[0][shared] == whole[1][shared]:
            shared += 1
        while shared and whole[0][shared - 1]["role"] == "assistant":
            shared -= 1
        prompt, answers = whole[0][:shared], [messages[shared:] for messages in whole]
        if not prompt:
            raise ValueError("'chosen' and 'rejected' do not begin with the same prompt")
    for answer in answers:
        check_turns([*prompt, *answer])
    return prompt, answers[0], answers[1]


def format_prompt(row: JsonObject) -> list[Message]:
    """Turn a prompt row into messages that wait for a completion; `prompt` is a text or a list of messages.

    A preference row without a `prompt` has one: what its two conversations begin with.

    Raises:
        ValueError: says what is missing or out of order.
    """
    if row.get("prompt") is None and {"chosen", "rejected"} <= row.keys():
        return format_preference(row)[0]
    require_columns(row, ("prompt",), "prompt")
    messages = as_messages(row["prompt"], "user", "prompt")
    check_turns([*messages, {"role": "assistant", "content": "?"}])
    return messages


def _prompt(row: JsonObject, where: str, others: JsonObject) -> Prompt:
    return Prompt(format_prompt({**others, **row}), where, others)


def _pair(row: JsonObject, where: str, others: JsonObject) -> Pair:
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
        raise ValueError(f"'margin' must be a number, got {_kind(margin)}")
    return Pair(*format_preference(row), where, None if margin is None else float(margin))


# What columns are often called elsewhere: only to suggest a mapping, never to guess one.
_ALIASES = {
    "instruction": ("question", "prompt", "query"),
    "response": ("output", "answer", "completion"),
    "prompt": ("question", "instruction", "input", "query"),
    "chosen": ("preferred", "response_chosen", "better"),
    "rejected": ("dispreferred", "response_rejected", "worse"),
}


# (the documented columns of a record, where it stood, its other columns) -> a row
Make = Callable[[JsonObject, str, JsonObject], Row]


class _Reader(Generic[Row]):
    """Turns records into rows of one format, counting as it goes."""

    def __init__(self, data: DataConfig, make: Make[Row]) -> None:
        self.columns: dict[str, str] = dict(vars(data.columns))
        self.make: Any = make
        self.drop_bad = data.bad_rows == "drop"
        self.problems = Problems()
        self.dropped = Problems()
        self.others: dict[str, int] = {}

    def row(self, where: str, record: object) -> Row | None:
        if not isinstance(record, dict):
            self._refuse(where, f"must be an object, got {_kind(record)}")
            return None
        known = {*self.columns.values(), "split"}
        others = {str(name): value for name, value in record.items() if name not in known}
        for name in others:
            self.others[name] = self.others.get(name, 0) + 1
        mapped = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        try:
            made: Row = self.make(mapped, where, others)
            return made
        except ValueError as error:
            what = str(error)
            if what.startswith("no '"):
                what = re.sub(r"\(found: [^)]*\)", lambda _: f"(found: {', '.join(record) or 'nothing'})", what)
                what += self._mapping_hint(record)
                for ours, theirs in self.columns.items():
                    if ours != theirs:
                        what = what.replace(f"no {ours!r} ", f"no {theirs!r}, which data.columns.{ours} names ")
            self._refuse(where, what)
            return None

    def _refuse(self, where: str, what: str) -> None:
        (self.dropped if self.drop_bad else self.problems).add(where, what)

    def _mapping_hint(self, record: JsonObject) -> str:
        hints = [
            f"data.columns.{ours}={alias}"
            for ours, theirs in self.columns.items()
            for alias in _ALIASES.get(ours, ())
            if theirs not in record and alias in record
        ]
        return f"; try {' '.join(hints)}" if hints else ""


def _held_out(rows: list[Row], test_size: float) -> tuple[list[Row], list[Row]]:
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


def _split_of(record: object, default: str) -> str:
    split = record.get("split") if isinstance(record, dict) else None
    return split if isinstance(split, str) and split else default


def left_out(dropped: Problems) -> list[str]:
    """Notes on rows that data.bad_rows=drop has left out."""
    return [f"left out (data.bad_rows=drop): {line}" for line in dropped.summary()]


def read_rows(data: DataConfig, given: Given, make: Make[Row], others: str = "ignored") -> Splits[Row]:
    sources: dict[str, str] = {}
    reader: _Reader[Row] = _Reader(data, make)
    by_split: dict[str, list[Row]] = {}
    bad: dict[str, int] = {}
    cut_short = False
    for part, found in records(data, given, sources, reader.problems).items():
        for taken, (where, record) in enumerate(found):
            if taken == data.max_rows:
                cut_short = True
                break
            split = part if given else _split_of(record, part)
            row = reader.row(where, record)
            if row is not None:
                by_split.setdefault(split, []).append(row)
            else:
                bad[split] = bad.get(split, 0) + 1
    reader.problems.raise_if_any()
    notes = [f"column {name!r} is {others} ({count} rows)" for name, count in sorted(reader.others.items())]
    notes += left_out(reader.dropped)
    if cut_short:
        notes.append(f"data.max_rows={data.max_rows}: the rows after it were not read")
    train = by_split.pop(data.dataset_train_split, [])
    if not train:
        there = ", ".join(by_split) or "no rows at all"
        wanted = f"no rows of split {data.dataset_train_split} (found: {there})"
        raise DataError(f"data.dataset_name={data.dataset_name}: {wanted}")
    return _splits(data, train, by_split, bad, sources, notes)


def _repeats_prompt(row: Row) -> bool:
    question = row.prompt[-1]["content"].strip()
    return len(question) >= ECHO and row.reference.strip().startswith(question)


def _splits(
    data: DataConfig,
    train: list[Row],
    others: dict[str, list[Row]],
    bad: dict[str, int],
    sources: dict[str, str],
    notes: list[str],
) -> Splits[Row]:
    """Set the held-out rows apart: the source's own, else a share of those read."""
    counts = {"train": Counts(bad=bad.get(data.dataset_train_split, 0)), "test": Counts()}
    test_split = data.dataset_test_split or next((name for name in HELD_OUT_NAMES if name in others), None)
    if test_split is None:
        train, test = _held_out(train, data.test_size)
        counts["train"].read = len(train) + counts["train"].bad
    else:
        if test_split not in others:
            raise ConfigError(
                f"data.dataset_test_split={test_split} is neither a file nor a split of {data.dataset_name} "
                f"(found: {', '.join([data.dataset_train_split, *others])})"
            )
        test = others.pop(test_split)
        counts["test"].bad = bad.get(test_split, 0)
        counts["train"].read = len(train) + counts["train"].bad
        held_out = {row.content for row in test}
        kept = [row for row in train if row.content not in held_out]
        counts["train"].in_test_too = len(train) - len(kept)
        train = kept
    counts["test"].read = len(test) + counts["test"].bad
    notes += [f"{len(rows)} rows of split {name!r} are not used" for name, rows in others.items()]
    for name, rows in (("train", train), ("test", test)):
        counts[name].kept = len(rows)
        counts[name].duplicates = len(rows) - len({row.content for row in rows})
        counts[name].repeats_prompt = sum(map(_repeats_prompt, rows))
    if not train:
        raise DataError("no rows left to train on: every one of them is also among the held-out rows")
    return Splits(train, test, counts, sources, notes)


def read_instructions(data: DataConfig, given: Given = NOTHING_GIVEN) -> Splits[Conversation]:
    """Read, check and split the instruction rows that `data` names.

    Raises:
        DataError: names file, line and fault of the first bad rows and counts the others.
        ConfigError: a source or split does not exist.
    """
    return read_rows(data, given, lambda row, where, others: Conversation(format_instruction(row), where))


def read_preferences(data: DataConfig, given: Given = NOTHING_GIVEN) -> Splits[Pair]:
    """Read, check and split the preference rows that `data` names; raises as `read_instructions`."""
    return read_rows(data, given, _pair)


def read_prompts(data: DataConfig, given: Given = NOTHING_GIVEN) -> Splits[Prompt]:
    """Read, check and split the prompt rows that `data` names; raises as `read_instructions`."""
    return read_rows(data, given, _prompt, others="handed to reward functions")
