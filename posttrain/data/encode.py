"""Rows to token ids: one encoder for every stage, so that all see the same text.

Prompt and completion are tokenised apart, so a trained prompt has exactly the ids that the same prompt has when the
model generates.
"""

import base64
import datetime
import decimal
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from posttrain.data.chat import IGNORED, ChatEncoder, Segment
from posttrain.data.formats import Conversation, Pair, Prompt
from posttrain.data.splits import Example
from posttrain.values import Fields

TokenIds = tuple[list[int], list[int]]  # the ids of a conversation and its labels
ColumnType = Literal["ids", "flag", "integer", "number", "text"]
RowT_contra = TypeVar("RowT_contra", bound=Example, contravariant=True)

# why a row is left out, besides that it is bad; KEPT: it is not
KEPT, TOO_LONG, PROMPT_TOO_LONG, TIE, BAD, LOW_MARGIN = range(6)


class LeftOut(Exception):  # noqa: N818, it is no error
    """A row that nothing is learned from: `why` is one of the numbers above."""

    def __init__(self, why: int) -> None:
        super().__init__(why)
        self.why = why


class EncodedRow(NamedTuple):
    """A row of a stage's data set, and what is counted of it."""

    columns: Fields
    length: int  # tokens after the cut; of a pair those of its longer conversation
    tokens: int
    loss_tokens: int = 0  # tokens of responses
    is_cut: bool = False
    loses_end: bool = False  # the token that ends its response, because it was cut


class Encoding(Protocol[RowT_contra]):
    """How rows become the columns of a stage's data set; it is handed to other processes, so it holds plain values."""

    @property
    def types(self) -> dict[str, ColumnType]:
        """Its columns."""

    def segments(self, encoder: ChatEncoder, row: RowT_contra) -> list[list[Segment]]:
        """The conversations to tokenise; raises ValueError where the row does not fit."""

    def columns(self, row: RowT_contra, encoded: list[TokenIds]) -> EncodedRow:
        """What is made of them; raises ValueError where the row is an error, LeftOut where nothing is learned."""


def response_start(labels: list[int], number: int) -> int:
    """Where the response of that number begins (0: the first one)."""
    return response_spans(labels)[2 * number]


def response_spans(labels: Sequence[int]) -> list[int]:
    """Where each response begins and ends, one after the other."""
    carries = np.zeros(len(labels) + 2, dtype=bool)
    carries[1:-1] = np.array(labels) != IGNORED
    return list(np.flatnonzero(carries[1:] != carries[:-1]).tolist())


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """The labels of a row whose responses are given as `response_spans`."""
    labels = [IGNORED] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels


def room_for(length: int, prompt: int, max_length: int, overlength: str) -> int:
    """How many tokens of a row are kept (stage.max_length, data.overlength).

    Raises:
        ValueError: the row is too long and overlength=error.
        LeftOut: nothing of it is kept.
    """
    if length <= max_length:
        return length
    if overlength == "error":
        raise ValueError(
            f"{length} tokens, stage.max_length={max_length} (data.overlength=truncate cuts long rows, "
            "data.overlength=drop leaves them out)"
        )
    if overlength == "drop":
        raise LeftOut(TOO_LONG)
    if prompt >= max_length:
        raise LeftOut(PROMPT_TOO_LONG)
    return max_length


@dataclass(frozen=True)
class ConversationEncoding:
    """Instruction rows as `input_ids` and the spans of their completions, which carry loss; nothing else does."""

    max_length: int
    overlength: str
    train_on: str = "all"
    types: ClassVar[dict[str, ColumnType]] = {"input_ids": "ids", "spans": "ids"}

    def segments(self, encoder: ChatEncoder, row: Conversation) -> list[list[Segment]]:
        if row.is_text:
            return [encoder.raw_text(row.reference)]
        return [encoder.segments(row.messages, row.inputs, self.train_on)]

    def columns(self, row: Conversation, encoded: list[TokenIds]) -> EncodedRow:
        [(ids, labels)] = encoded
        room = room_for(len(ids), response_start(labels, 0), self.max_length, self.overlength)
        spans = response_spans(labels[:room])
        loss, cut = sum(spans[1::2]) - sum(spans[::2]), room < len(ids)
        return EncodedRow({"input_ids": ids[:room], "spans": spans}, room, room, loss, cut, cut)


@dataclass(frozen=True)
class PairEncoding:
    """Preference rows as `chosen_ids` and `rejected_ids`, and a `margin` where they have one.

    A reward model reads whole conversations, with the length of the prompt that they share as `prompt_length`. Where
    a stage learns each token of the completions (`learns_tokens`), each is one message, and ids of its own after
    `prompt_ids`; of a completion that was rated alone the other side is None. A pair whose completions are the same,
    perhaps only after the cut, teaches nothing: it is a tie.
    """

    max_length: int
    overlength: str
    learns_tokens: bool = False
    keeps_ties: bool = False  # as `tie`
    min_margin: float | None = None

    @property
    def types(self) -> dict[str, ColumnType]:
        prompt: dict[str, ColumnType] = {"prompt_ids": "ids"} if self.learns_tokens else {"prompt_length": "integer"}
        tie: dict[str, ColumnType] = {"tie": "flag"} if self.keeps_ties else {}
        return {**prompt, "chosen_ids": "ids", "rejected_ids": "ids", "margin": "number", **tie}

    def segments(self, encoder: ChatEncoder, row: Pair) -> list[list[Segment]]:
        if self.learns_tokens and max(len(row.chosen), len(row.rejected)) > 1:
            raise ValueError(
                f"chosen has {len(row.chosen)} and rejected {len(row.rejected)} messages after the prompt that they "
                "share, others' words among them, which DPO would learn; end each with its first answer"
            )
        sides = [encoder.answer(row.prompt, answer, row.inputs) for answer in (row.chosen, row.rejected) if answer]
        # where one of the two begins as a generation prompt ends (with a thought), the prompt ends before that
        shorter = min(len(prompt.text) for prompt, _ in sides)
        return [
            [Segment(prompt.text[:shorter], False), Segment(prompt.text[shorter:] + answer.text, True)]
            for prompt, answer in sides
        ]

    def columns(self, row: Pair, encoded: list[TokenIds]) -> EncodedRow:
        if self.min_margin is not None:
            if row.margin is None:
                raise ValueError(f"no 'margin', which data.min_margin={self.min_margin:g} needs (data.columns.margin)")
            if row.margin < self.min_margin:
                raise LeftOut(LOW_MARGIN)
        prompt = response_start(encoded[0][1], 0)
        longer = max(len(ids) for ids, _ in encoded)
        room = room_for(longer, prompt, self.max_length, self.overlength)
        sides = [ids[:room] for ids, _ in encoded]
        if len(sides) > 1 and sides[0] == sides[1]:
            raise LeftOut(TIE)
        names = [name for name, answer in (("chosen_ids", row.chosen), ("rejected_ids", row.rejected)) if answer]
        start = prompt if self.learns_tokens else 0
        made: Fields = {name: ids[start:] for name, ids in zip(names, sides, strict=True)}
        made |= {"prompt_ids": sides[0][:prompt]} if self.learns_tokens else {"prompt_length": prompt}
        made |= {"margin": row.margin} if row.margin is not None else {}
        made |= {"tie": row.tie} if self.keeps_ties else {}
        tokens, cut = sum(map(len, sides)), room < longer
        return EncodedRow(made, max(map(len, sides)), tokens, tokens - len(sides) * prompt, cut, cut)


@dataclass(frozen=True)
class PromptEncoding:
    """Prompt rows as `prompt_ids`, and what reward functions are handed: the messages and the row's other columns.

    Of a prompt that is too long nothing is cut, as its end asks the question: it is left out and counted, or refused
    (overlength=error). `max_length` is what it may have so that there is room for a completion.
    """

    max_length: int
    overlength: str
    types: ClassVar[dict[str, ColumnType]] = {"prompt_ids": "ids", "prompt": "text", "columns": "text"}

    def segments(self, encoder: ChatEncoder, row: Prompt) -> list[list[Segment]]:
        return [encoder.prompt(row.prompt, row.inputs)]

    def columns(self, row: Prompt, encoded: list[TokenIds]) -> EncodedRow:
        [(ids, _)] = encoded
        if len(ids) > self.max_length:
            if self.overlength == "error":
                raise ValueError(
                    f"a prompt of {len(ids)} tokens; {self.max_length} leave room for stage.max_new_tokens"
                )
            raise LeftOut(PROMPT_TOO_LONG)
        made: Fields = {"prompt_ids": ids, "prompt": to_text(row.prompt), "columns": to_text(row.columns)}
        return EncodedRow(made, len(ids), len(ids))


def encode_rows(
    encoder: ChatEncoder, rows: Sequence[RowT_contra], encoding: Encoding[RowT_contra]
) -> Iterator[EncodedRow | ValueError | LeftOut]:
    """What becomes of each row, tokenised together."""
    parts: list[list[list[Segment]] | ValueError] = []
    for row in rows:
        try:
            parts.append(encoding.segments(encoder, row))
        except ValueError as error:
            parts.append(error)
    given = [conversation for part in parts if not isinstance(part, ValueError) for conversation in part]
    encoded = iter(encoder.encode(given))
    for row, part in zip(rows, parts, strict=True):
        if isinstance(part, ValueError):
            yield part
            continue
        conversations = [next(encoded) for _ in part]
        try:
            yield encoding.columns(row, conversations)
        except (ValueError, LeftOut) as error:
            yield error


# what a Parquet file or a Hub data set may hold and JSON has no word for
_WRITTEN = "written_as"


def to_text(value: object) -> str:
    """JSON from which `from_text` reads the same value; dates, bytes and decimals among it."""
    return json.dumps(value, ensure_ascii=False, default=_write)


def _write(value: object) -> object:
    if isinstance(value, bytes):
        return {_WRITTEN: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, decimal.Decimal):
        return {_WRITTEN: "decimal", "value": str(value)}
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return {_WRITTEN: type(value).__name__, "value": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {_WRITTEN: "timedelta", "value": value / datetime.timedelta(microseconds=1)}
    raise ValueError(f"a column holds a {type(value).__name__}, which is not handed to reward functions")


def from_text(text: str) -> object:
    """The value that `to_text` wrote."""
    return json.loads(text, object_hook=_read)


def _read(value: Fields) -> object:
    how, written = str(value.get(_WRITTEN)), str(value.get("value"))
    readers: dict[str, Callable[[str], object]] = {
        "bytes": base64.b64decode,
        "decimal": decimal.Decimal,
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "datetime": datetime.datetime.fromisoformat,
        "timedelta": lambda micros: datetime.timedelta(microseconds=float(micros)),
    }
    return readers[how](written) if how in readers else value
