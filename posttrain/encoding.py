"""Conversations to token ids and labels: one encoder for every stage, so that all see the same text.

The chat template renders a conversation; the text from the end of the generation prompt to the token that
ends the turn is the response, and it alone carries loss. Prompt and response are tokenised apart, so a
trained prompt has exactly the ids that the same prompt has when the model generates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data import Conversation, Counts, Message, Splits
from posttrain.errors import ConfigError, DataError

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
    """One split ready to train on: a Dataset of `input_ids` and `labels`, and what it holds."""

    dataset: "Dataset"
    rows: list[Conversation]
    lengths: list[int]  # tokens per row after the cut
    loss_tokens: int  # tokens that carry loss
    without_end: int  # rows whose last label is not the token that ends a turn, because they were cut

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class ChatEncoder:
    """Renders and tokenises conversations with one tokenizer and its chat template.

    Raises:
        ConfigError: the template cannot be used for training, and why.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", allow_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn = self._find_end_of_turn()
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
            raise ValueError(f"the chat template refuses it ({type(error).__name__}: {error})") from error
        assert isinstance(text, str)
        return text

    def _find_end_of_turn(self) -> str:
        """The special token that the template writes after an answer; EOS where it writes none."""
        question: list[Message] = [{"role": "user", "content": "Q"}]
        try:
            start = len(self.render(question, add_generation_prompt=True))
            rendered = self.render([*question, {"role": "assistant", "content": "ANSWER"}])
        except ValueError as error:
            raise ConfigError(f"a plain question and answer: {error}") from error
        answer = rendered.find("ANSWER", start)
        if answer < 0:
            raise ConfigError("the chat template does not begin an answer where its generation prompt ends")
        after = rendered[answer + len("ANSWER") :].lstrip()
        # the longest match first: <|im_end|> before <|im
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for token in sorted(tokens, key=len, reverse=True):
            if after.startswith(token):
                return str(token)
        if self.tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no EOS token, so a model could never learn to stop")
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

        What the template writes after the last response is left out: nobody generates it.

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
        full = self.render(messages)
        pieces: list[Segment] = []
        position = 0
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            if not full.startswith(prompt):
                raise ValueError("the chat template renders the beginning of the conversation in two ways")
            start, content = len(prompt), message["content"].strip()
            at = full.find(content, start)
            end = full.find(self.end_of_turn, at + len(content)) if at >= 0 else -1
            if at < 0 or (end < 0 and index != last):
                raise ValueError("the chat template changes an answer or does not mark its end")
            if end < 0:
                response = full[start : at + len(content)] + self.end_of_turn
            else:
                response = full[start : end + len(self.end_of_turn)]
            pieces += [Segment(full[position:start], False), Segment(response, True)]
            position = start + len(response)
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
        """The ids from which the model generates its answer."""
        return self._ids([self.render(messages, add_generation_prompt=True)])[0]


def _chunks(rows: Sequence[Any], size: int = 1000) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def encode_split(
    encoder: ChatEncoder, rows: list[Conversation], counts: Counts, max_length: int, overlength: str
) -> Encoded:
    """Encode one split, counting in `counts` what `overlength` (truncate, drop or error) did to long rows.

    Raises:
        DataError: names the rows that contain control tokens, do not fit the template, or are too long.
    """
    from datasets import Dataset, concatenate_datasets

    tables, kept, lengths = [], [], []
    problems: list[str] = []
    loss_tokens = without_end = refused = 0
    end_id = encoder.tokenizer.convert_tokens_to_ids(encoder.end_of_turn)
    for chunk in _chunks(rows):
        parts = []
        for row in chunk:
            try:
                parts.append(encoder.segments(row.messages))
            except ValueError as error:
                refused += 1
                problems += [f"{row.where}: {error}"] if len(problems) < 5 else []
                parts.append([])
        table: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row, segments, (ids, labels) in zip(chunk, parts, encoder.encode(parts), strict=True):
            if not segments:
                continue
            if len(ids) > max_length:
                if overlength == "error":
                    refused += 1
                    what = f"{row.where}: {len(ids)} tokens, stage.max_length={max_length}"
                    problems += [what] if len(problems) < 5 else []
                    continue
                if overlength == "drop":
                    counts.too_long += 1
                    continue
                ids, labels = ids[:max_length], labels[:max_length]
                if all(label == IGNORED for label in labels):
                    counts.prompt_too_long += 1
                    continue
                counts.truncated += 1
            without_end += labels[-1] != end_id
            loss_tokens += sum(label != IGNORED for label in labels)
            table["input_ids"].append(ids)
            table["labels"].append(labels)
            kept.append(row)
            lengths.append(len(ids))
        tables.append(Dataset.from_dict(table))
    if problems:
        more = [f"... and {refused - len(problems)} more rows"] if refused > len(problems) else []
        hint = ["data.overlength=truncate cuts long rows, data.overlength=drop leaves them out"]
        raise DataError(*problems, *more, *(hint if overlength == "error" else []))
    counts.kept = len(kept)
    filled = [table for table in tables if len(table)]
    return Encoded(concatenate_datasets(filled) if filled else tables[0], kept, lengths, loss_tokens, without_end)


def encode_splits(
    encoder: ChatEncoder, splits: Splits, max_length: int, overlength: str
) -> tuple[Encoded, Encoded | None]:
    """Encode the rows to train on and those held out (None where there are none).

    Raises:
        DataError: no row is left to train on.
    """
    train = encode_split(encoder, splits.train, splits.counts["train"], max_length, overlength)
    if not train.rows:
        counts = splits.counts["train"]
        raise DataError(
            f"no rows left to train on with stage.max_length={max_length}: "
            f"{counts.prompt_too_long} prompts fill it alone, {counts.too_long} rows are longer"
        )
    test = encode_split(encoder, splits.test, splits.counts["test"], max_length, overlength) if splits.test else None
    return train, test if test is not None and test.rows else None
