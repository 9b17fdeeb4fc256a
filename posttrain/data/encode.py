"""Rows to token ids and labels: one encoder for every stage, so that all see the same text.

Prompt and completion are tokenised apart, so a trained prompt has exactly the ids that the same prompt has when the
model generates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import IGNORED, ChatEncoder, Segment
from posttrain.data.formats import Conversation, Pair, Prompt
from posttrain.data.sources import Problems
from posttrain.data.splits import Counts, Splits
from posttrain.errors import DataError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Encoded:
    """One split ready to train on, and what it holds."""

    dataset: "Dataset"  # input_ids and labels; for pairs prompt_ids, chosen_ids and rejected_ids
    rows: list[Any]  # the Conversation or Pair of each row
    lengths: list[int]  # tokens per row after the cut; of a pair its longer conversation
    tokens: int
    loss_tokens: int  # tokens of responses
    without_end: int  # rows with a response that lost the token that ends its turn, because it was cut


def response_start(labels: list[int], number: int) -> int:
    """Where the response of that number begins (0: the first one)."""
    starts = [at for at, label in enumerate(labels) if label != IGNORED and (at == 0 or labels[at - 1] == IGNORED)]
    return starts[number]


def encode_rows(
    encoder: ChatEncoder,
    rows: Sequence[Any],
    segments_of: Callable[[Any], list[list[Segment]]],
    columns_of: Callable[[Any, list[tuple[list[int], list[int]]]], JsonObject | None],
    counts: Counts,
    dropped: Problems | None,
) -> tuple["Dataset", list[Any]]:
    """Encode rows a thousand at a time; `columns_of` makes a row of the Dataset, or None to leave it out.

    Raises:
        DataError: names the first rows that `segments_of` or `columns_of` refuses, and counts the others; those of
            `segments_of` are only counted where there is a list of what is `dropped`.
    """
    from datasets import Dataset, concatenate_datasets

    tables, kept, problems = [], [], Problems()
    for start in range(0, len(rows), 1000):
        chunk, parts = [], []
        for row in rows[start : start + 1000]:
            try:
                parts.append(segments_of(row))
                chunk.append(row)
            except ValueError as error:
                if dropped is None:
                    problems.add(row.where, str(error))
                else:
                    dropped.add(row.where, str(error))
                    counts.bad += 1
        encoded = iter(encoder.encode([conversation for part in parts for conversation in part]))
        table = []
        for row, part in zip(chunk, parts, strict=True):
            conversations = [next(encoded) for _ in part]
            try:
                columns = columns_of(row, conversations)
            except ValueError as error:
                problems.add(row.where, str(error))
                continue
            if columns is not None:
                table.append(columns)
                kept.append(row)
        if table:
            tables.append(Dataset.from_list(table))
    problems.raise_if_any()
    return concatenate_datasets(tables) if tables else Dataset.from_list([]), kept


@dataclass
class LengthRule:
    """What happens to rows longer than `max_length` (truncate, drop or error), counting what it did."""

    max_length: int
    overlength: str
    counts: Counts

    def room(self, length: int, prompt: int) -> int | None:
        """How many tokens of a row are kept; None to leave it out.

        Raises:
            ValueError: the row is too long and overlength=error.
        """
        if length <= self.max_length:
            return length
        if self.overlength == "error":
            raise ValueError(
                f"{length} tokens, stage.max_length={self.max_length} (data.overlength=truncate cuts long rows, "
                "data.overlength=drop leaves them out)"
            )
        if self.overlength == "drop":
            self.counts.too_long += 1
            return None
        if prompt >= self.max_length:
            self.counts.prompt_too_long += 1
            return None
        self.counts.truncated += 1
        return self.max_length


def encode_conversations(
    encoder: ChatEncoder,
    rows: Sequence[Conversation],
    counts: Counts,
    max_length: int,
    overlength: str,
    dropped: Problems | None = None,
    train_on: str = "all",
) -> Encoded:
    """Encode instruction rows into `input_ids` and `labels`; completions carry loss (or the last one), nothing else.

    Raises:
        DataError: names the rows that contain control tokens, do not fit the template, or are too long. With a list of
            what is `dropped`, the first two go there and are counted.
    """
    rule = LengthRule(max_length, overlength, counts)

    def columns(row: Conversation, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        [(ids, labels)] = encoded
        room = rule.room(len(ids), response_start(labels, 0))
        return None if room is None else {"input_ids": ids[:room], "labels": labels[:room]}

    def segments(row: Conversation) -> list[list[Segment]]:
        if row.is_text:
            return [encoder.raw_text(row.reference)]
        return [encoder.segments(row.messages, row.inputs, train_on)]

    dataset, kept = encode_rows(encoder, rows, segments, columns, counts, dropped)
    counts.kept = len(kept)
    lengths = [len(ids) for ids in dataset["input_ids"]] if kept else []
    labels = list(dataset["labels"]) if kept else []
    return Encoded(
        dataset,
        kept,
        lengths,
        tokens=sum(lengths),
        loss_tokens=sum(label != IGNORED for row in labels for label in row),
        without_end=counts.truncated,
    )


def encode_pairs(
    encoder: ChatEncoder,
    rows: Sequence[Pair],
    counts: Counts,
    max_length: int,
    overlength: str,
    dropped: Problems | None = None,
    learns_tokens: bool = False,
) -> Encoded:
    """Encode preference rows into `prompt_ids`, `chosen_ids`, `rejected_ids` and, where rows have one, `margin`.

    A completion's ids follow its prompt's and end with the token that ends the turn. A pair whose completions are the
    same, perhaps only after the cut, teaches nothing and is left out and counted. Where the stage learns each token of
    the completions (`learns_tokens`), each is one message.

    Raises:
        DataError: as `encode_conversations`; or every pair is a tie.
    """
    rule = LengthRule(max_length, overlength, counts)

    def segments(row: Pair) -> list[list[Segment]]:
        if learns_tokens and max(len(row.chosen), len(row.rejected)) > 1:
            raise ValueError(
                f"chosen has {len(row.chosen)} and rejected {len(row.rejected)} messages after the prompt that they "
                "share, others' words among them, which DPO would learn; end each with its first answer"
            )
        sides = [encoder.answer(row.prompt, answer, row.inputs) for answer in (row.chosen, row.rejected)]
        # where one of the two begins as a generation prompt ends (with a thought), the prompt ends before that
        shorter = min(len(prompt.text) for prompt, _ in sides)
        return [
            [Segment(prompt.text[:shorter], False), Segment(prompt.text[shorter:] + answer.text, True)]
            for prompt, answer in sides
        ]

    def columns(row: Pair, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        prompt = response_start(encoded[0][1], 0)
        longer = max(len(ids) for ids, _ in encoded)
        room = rule.room(longer, prompt)
        if room is None:
            return None
        chosen, rejected = (ids[prompt:room] for ids, _ in encoded)
        if chosen == rejected:
            counts.ties += 1
            return None
        cut.append(room < longer)
        made: JsonObject = {"prompt_ids": encoded[0][0][:prompt], "chosen_ids": chosen, "rejected_ids": rejected}
        return made | ({"margin": row.margin} if row.margin is not None else {})

    cut: list[bool] = []
    margins = sum(row.margin is not None for row in rows)
    if 0 < margins < len(rows):
        without = next(row for row in rows if row.margin is None)
        raise DataError(f"{without.where}: no 'margin', but {margins} of {len(rows)} rows have one")
    dataset, kept = encode_rows(encoder, rows, segments, columns, counts, dropped)
    counts.kept = len(kept)
    if rows and counts.ties == len(rows):
        raise DataError(f"in all {len(rows)} pairs chosen and rejected are the same: there is nothing to learn")
    ids = [list(dataset[name]) if kept else [] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    sizes = [(len(prompt), len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*ids, strict=True)]
    return Encoded(
        dataset,
        kept,
        lengths=[prompt + max(chosen, rejected) for prompt, chosen, rejected in sizes],
        tokens=sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in sizes),
        loss_tokens=sum(chosen + rejected for _, chosen, rejected in sizes),
        without_end=sum(cut),
    )


def encode_prompts(
    encoder: ChatEncoder,
    rows: Sequence[Prompt],
    counts: Counts,
    max_length: int,
    overlength: str,
    dropped: Problems | None = None,
) -> Encoded:
    """Encode prompt rows into `prompt_ids`.

    Of a prompt that is too long nothing is cut, as its end asks the question: it is left out and counted, or refused
    (overlength=error). `max_length` is what it may have so that there is room for a completion.

    Raises:
        DataError: as `encode_conversations`.
    """

    def columns(row: Prompt, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        [(ids, _)] = encoded
        if len(ids) > max_length:
            if overlength == "error":
                raise ValueError(f"a prompt of {len(ids)} tokens; {max_length} leave room for stage.max_new_tokens")
            counts.prompt_too_long += 1
            return None
        return {"prompt_ids": ids}

    def segments(row: Prompt) -> list[list[Segment]]:
        return [encoder.prompt(row.prompt, row.inputs)]

    dataset, kept = encode_rows(encoder, rows, segments, columns, counts, dropped)
    counts.kept = len(kept)
    lengths = [len(ids) for ids in dataset["prompt_ids"]] if kept else []
    return Encoded(dataset, kept, lengths, tokens=sum(lengths), loss_tokens=0, without_end=0)


def encode_splits(
    encode: Callable[[Any, Counts], Encoded], splits: Splits[Any], max_length: int
) -> tuple[Encoded, Encoded | None]:
    """Encode the rows to train on and those held out (None where there are none).

    Raises:
        DataError: no row is left to train on, or none keeps its end.
    """
    counts = splits.counts["train"]
    train = encode(splits.train, counts)
    if not train.rows:
        raise DataError(
            f"no rows left to train on with stage.max_length={max_length}: {counts.prompt_too_long} prompts fill it "
            f"alone, {counts.too_long} rows are longer, {counts.ties} pairs are ties, {counts.bad} rows do not fit"
        )
    if train.loss_tokens and train.without_end == len(train.rows):
        raise DataError(
            "every response is cut before its end, so the model could not learn to stop; raise stage.max_length "
            "or set data.overlength=drop"
        )
    test = encode(splits.test, splits.counts["test"]) if splits.test else None
    return train, test if test is not None and test.rows else None
