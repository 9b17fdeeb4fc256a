"""Conversations to token ids and labels: one encoder for every stage, so that all see the same text.

The chat template renders a conversation; the text from the end of the generation prompt to the token that
ends the turn is the response, and it alone carries loss. Prompt and response are tokenised apart, so a
trained prompt has exactly the ids that the same prompt has when the model generates.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.formats import Conversation, Counts, Message, Pair, Prompt, Splits
from posttrain.data.sources import Problems
from posttrain.errors import ConfigError, DataError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token without loss: torch.nn.CrossEntropyLoss(ignore_index=-100)

# For models that come without a template: plain text, no token that the model does not know yet.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ '### System:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Ours, beginning with BOS where the tokenizer itself puts one."""
    first = tokenizer("a").input_ids[:1]
    begins_with_bos = bool(first) and first[0] == tokenizer.bos_token_id
    return ("{{- bos_token }}\n" if begins_with_bos else "") + PLAIN_TEMPLATE


class Segment(NamedTuple):
    """A piece of a rendered conversation, and whether it is something to learn."""

    text: str
    is_response: bool


@dataclass
class Encoded:
    """One split ready to train on, and what it holds."""

    dataset: "Dataset"  # input_ids and labels; for pairs prompt_ids, chosen_ids and rejected_ids
    rows: list[Any]  # the Conversation or Pair of each row
    lengths: list[int]  # tokens per row after the cut; of a pair its longer conversation
    tokens: int
    loss_tokens: int  # tokens of responses
    without_end: int  # rows with a response that lost the token that ends its turn, because it was cut


class ChatEncoder:
    """Renders and tokenises conversations with one tokenizer and its chat template.

    Raises:
        ConfigError: the template cannot be used for training, and why.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", allow_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn = self._find_end_of_turn()
        self.end_id = tokenizer.convert_tokens_to_ids(self.end_of_turn)
        special = [token for token in tokenizer.all_special_tokens if token.strip()]
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*special, *added}, key=len, reverse=True)
        self._special = None if allow_special_tokens else re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._anchor = self._find_anchor()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # whatever a template raises: jinja2's errors and its own raise_exception
            raise ValueError(f"the chat template raised {type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _find_end_of_turn(self) -> str:
        """The special token that the template writes after a completion; EOS where it writes none."""
        question: list[Message] = [{"role": "user", "content": "Q"}]
        name = self.tokenizer.name_or_path or "tokenizer"
        try:
            start = len(self.render(question, add_generation_prompt=True))
            rendered = self.render([*question, {"role": "assistant", "content": "ANSWER"}])
        except ValueError as error:
            raise ConfigError(f"{name}, a plain question and answer: {error}") from error
        answer = rendered.find("ANSWER", start)
        if answer < 0:
            raise ConfigError(f"{name}: the chat template does not begin a completion where its generation prompt ends")
        after = rendered[answer + len("ANSWER") :].lstrip()
        # the longest match first: <|im_end|> before <|im
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for token in sorted(tokens, key=len, reverse=True):
            if after.startswith(token):
                return str(token)
        if self.tokenizer.eos_token is None:
            raise ConfigError(f"{name}: the tokenizer has no EOS token, so a model could never learn to stop")
        return str(self.tokenizer.eos_token)

    def _find_anchor(self) -> str | None:
        """Text put before a continuation for tokenizers that start every text with a space of their own."""
        plain = self._ids(["a"])[0]
        anchor = self._ids(["\n"])[0]
        return None if self._ids(["\na"])[0] == anchor + plain else "\n"

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def _continuation_ids(self, text: str) -> list[int]:
        for anchor in ("\n", ":", "a"):
            before, both = self._ids([anchor, anchor + text])
            if both[: len(before)] == before:
                return both[len(before) :]
        raise ValueError("the tokenizer merges the beginning of the response with any text before it")

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The rendered conversation in pieces; a response ends with the token that ends its turn.

        What the template writes after the last response is left out: nobody generates it. Messages that end with
        a question are followed by the generation prompt.

        Raises:
            ValueError: the text of a message spells a control token, or the template cannot be followed.
        """
        if self._special is not None:
            for message in messages:
                if found := self._special.search(message["content"]):
                    raise ValueError(
                        f"a {message['role']} message contains the special token {found.group()!r}; "
                        "data.allow_special_tokens=true lets it through as a control token"
                    )
        asks = messages[-1]["role"] != "assistant"
        full = self.render(messages, add_generation_prompt=asks)
        pieces: list[Segment] = []
        position = 0
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            if not full.startswith(prompt):
                raise ValueError(
                    "the chat template is not prefix-preserving: later messages change how earlier ones are rendered"
                )
            start, content = len(prompt), message["content"].strip()
            at = full.find(content, start)
            end = full.find(self.end_of_turn, at + len(content)) if at >= 0 else -1
            if at < 0 or (end < 0 and index != last):
                raise ValueError("the chat template changes a completion or does not mark its end")
            if end < 0:
                response = full[start : at + len(content)] + self.end_of_turn
            else:
                response = full[start : end + len(self.end_of_turn)]
            pieces += [Segment(full[position:start], False), Segment(response, True)]
            position = start + len(response)
        if asks:
            pieces.append(Segment(full[position:], False))
        return pieces

    def encode(self, batch: Sequence[Sequence[Segment]]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each row; a label is the token itself in a response, IGNORED elsewhere."""
        flat = [segment for segments in batch for segment in segments]
        ids = iter(self._ids([segment.text for segment in flat]) if flat else [])
        rows = []
        for segments in batch:
            row_ids: list[int] = []
            labels: list[int] = []
            for segment in segments:
                piece = next(ids)
                if self._anchor is not None and row_ids:
                    piece = self._continuation_ids(segment.text)
                row_ids += piece
                labels += piece if segment.is_response else [IGNORED] * len(piece)
            rows.append((row_ids, labels))
        return rows

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids from which the model generates its completion."""
        return self.encode([self.segments(messages)])[0][0]


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
) -> Encoded:
    """Encode instruction rows into `input_ids` and `labels`; every response carries loss, nothing else does.

    Raises:
        DataError: names the rows that contain control tokens, do not fit the template, or are too long. With a list of
            what is `dropped`, the first two go there and are counted.
    """
    rule = LengthRule(max_length, overlength, counts)

    def columns(row: Conversation, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        [(ids, labels)] = encoded
        room = rule.room(len(ids), response_start(labels, 0))
        return None if room is None else {"input_ids": ids[:room], "labels": labels[:room]}

    dataset, kept = encode_rows(encoder, rows, lambda row: [encoder.segments(row.messages)], columns, counts, dropped)
    counts.kept = len(kept)
    lengths = [len(ids) for ids in dataset["input_ids"]] if kept else []
    labels = list(dataset["labels"]) if kept else []
    return Encoded(
        dataset,
        kept,
        lengths,
        tokens=sum(lengths),
        loss_tokens=sum(label != IGNORED for row in labels for label in row),
        without_end=sum(row[-1] != encoder.end_id for row in labels),
    )


def encode_pairs(
    encoder: ChatEncoder,
    rows: Sequence[Pair],
    counts: Counts,
    max_length: int,
    overlength: str,
    dropped: Problems | None = None,
) -> Encoded:
    """Encode preference rows into `prompt_ids`, `chosen_ids`, `rejected_ids` and, where rows have one, `margin`.

    A completion's ids follow its prompt's and end with the token that ends the turn. A pair whose completions are the
    same, perhaps only after the cut, teaches nothing and is left out and counted.

    Raises:
        DataError: as `encode_conversations`; or every pair is a tie.
    """
    rule = LengthRule(max_length, overlength, counts)

    def segments(row: Pair) -> list[list[Segment]]:
        return [encoder.segments([*row.prompt, *answer]) for answer in (row.chosen, row.rejected)]

    def columns(row: Pair, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        answered = sum(message["role"] == "assistant" for message in row.prompt)
        prompt = response_start(encoded[0][1], answered)
        room = rule.room(max(len(ids) for ids, _ in encoded), prompt)
        if room is None:
            return None
        chosen, rejected = (ids[prompt:room] for ids, _ in encoded)
        if chosen == rejected:
            counts.ties += 1
            return None
        made: JsonObject = {"prompt_ids": encoded[0][0][:prompt], "chosen_ids": chosen, "rejected_ids": rejected}
        return made | ({"margin": row.margin} if row.margin is not None else {})

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
    ends = [(chosen[-1], rejected[-1]) for chosen, rejected in zip(ids[1], ids[2], strict=True)]
    return Encoded(
        dataset,
        kept,
        lengths=[prompt + max(chosen, rejected) for prompt, chosen, rejected in sizes],
        tokens=sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in sizes),
        loss_tokens=sum(chosen + rejected for _, chosen, rejected in sizes),
        without_end=sum(end != (encoder.end_id, encoder.end_id) for end in ends),
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

    dataset, kept = encode_rows(encoder, rows, lambda row: [encoder.segments(row.prompt)], columns, counts, dropped)
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
