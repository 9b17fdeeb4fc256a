"""What a model says to held-out prompts, how likely it finds a completion, and how it scores one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.splits import Row
from posttrain.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from posttrain.data.chat import ChatEncoder
    from posttrain.data.splits import Example


COMPLETED = 16  # prompts of the panel whose greedy completions are kept, before and after
# numbers that the logits of one batch may have: a large vocabulary must not need more memory here than in training
LOGITS = 2**25


class Completion(NamedTuple):
    """A generated completion, without special tokens, and whether the model ended it by itself."""

    text: str
    ended: bool


class Generated(NamedTuple):
    """Prompts and the completions generated from them, as ids; a completion includes the token that ended it."""

    prompts: list[list[int]]
    completions: list[list[int]]
    ended: list[bool]


def panel(rows: Sequence[Row], encoder: "ChatEncoder", size: int, room: int, drop_bad: bool = False) -> list[Row]:
    """The first `size` rows whose prompts leave the model room for a completion: the same ones before and after.

    Raises:
        DataError: names a row that the encoder refuses, unless `drop_bad` leaves it out.
    """
    chosen: list[Row] = []
    for row in rows:
        if len(chosen) == size:
            break
        if not row.prompt:  # raw text
            continue
        try:
            length = len(encoder.prompt_ids(row.prompt, row.inputs))
        except ValueError as error:
            if not drop_bad:
                raise DataError(f"{row.where}: {error}") from error
            continue
        if length <= room:
            chosen.append(row)
    return chosen


def share_ended(completions: Sequence[Completion]) -> float:
    """Share of completions that the model ended by itself; NaN of none."""
    return sum(reply.ended for reply in completions) / len(completions) if completions else float("nan")


def generate(
    model: "PreTrainedModel",
    encoder: "ChatEncoder",
    rows: "Sequence[Example]",
    max_new_tokens: int,
    temperature: float | None = None,
) -> Generated:
    """Complete each row's prompt, all in one left-padded batch; greedily, or sampled at `temperature`."""
    import torch

    prompts = [encoder.prompt_ids(row.prompt, row.inputs) for row in rows]
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    training, model.config.use_cache = model.training, True
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=temperature is not None,
            suppress_tokens=[pad],
            temperature=temperature,
            top_p=None if temperature is None else 1.0,
            top_k=None if temperature is None else 0,
        )
    model.train(training)
    stops = model.generation_config.eos_token_id
    stop_ids = {stops} if isinstance(stops, int) else set(stops)
    completions, ended = [], []
    for completion in output[:, width:].tolist():
        end = next((index for index, token in enumerate(completion) if token in stop_ids), None)
        completions.append(completion if end is None else completion[: end + 1])
        ended.append(end is not None)
    return Generated(prompts, completions, ended)


def complete(
    model: "PreTrainedModel", encoder: "ChatEncoder", rows: "Sequence[Example]", max_new_tokens: int
) -> list[Completion]:
    """The most likely completion to each prompt, token by token (greedy)."""
    if not rows:
        return []
    made = generate(model, encoder, rows, max_new_tokens)
    texts = [encoder.tokenizer.decode(completion, skip_special_tokens=True) for completion in made.completions]
    return [Completion(str(text), ended) for text, ended in zip(texts, made.ended, strict=True)]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> "torch.Tensor":
    """(rows, longest), filled up with `value`."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


class _Batch(NamedTuple):
    ids: "torch.Tensor"  # (rows, longest), prompt and completion, padded on the right
    mask: "torch.Tensor"  # (rows, longest), 1 on both
    learned: "torch.Tensor"  # (rows, longest - 1), 1 where the next token belongs to the completion


def _batches(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int,
) -> Iterator[_Batch]:
    rows, device = list(zip(prompts, completions, strict=True)), model.device
    longest = max((len(prompt) + len(completion) for prompt, completion in rows), default=1)
    size = min(batch_size, max(LOGITS // (longest * model.config.get_text_config().vocab_size), 1))
    for start in range(0, len(rows), size):
        pairs = rows[start : start + size]
        learned = pad_right([[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs], 0)
        yield _Batch(
            pad_right([[*prompt, *completion] for prompt, completion in pairs], pad).to(device),
            pad_right([[1] * (len(prompt) + len(completion)) for prompt, completion in pairs], 0).to(device),
            learned[:, 1:].to(device),
        )


def _log_probs(model: "PreTrainedModel", batch: _Batch) -> "torch.Tensor":
    """(rows, longest - 1, vocabulary), in float32."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    found: torch.Tensor = logits[:, :-1].float().log_softmax(-1)
    return found


def completion_logps(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 8,
) -> "torch.Tensor":
    """log π(completion | prompt) in nats, summed over the completion's tokens, as a float32 tensor (rows)."""
    import torch

    found = []
    for batch in _batches(model, prompts, completions, pad, batch_size):
        picked = _log_probs(model, batch).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
        found.append((picked * batch.learned).sum(-1).cpu())
    return torch.cat(found)


def completion_kl(
    policy: "PreTrainedModel",
    reference: Callable[[], AbstractContextManager["PreTrainedModel"]],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 8,
) -> "torch.Tensor":
    """KL(policy‖reference) over the next token, summed over each completion's positions, in nats, as (rows)."""
    import torch

    found = []
    for batch in _batches(policy, prompts, completions, pad, batch_size):
        ours = _log_probs(policy, batch)
        with reference() as model:
            theirs = _log_probs(model, batch)
        at_each = (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0)  # below 0 only by rounding
        found.append((at_each * batch.learned).sum(-1).cpu())
    return torch.cat(found)


def scores(model: "PreTrainedModel", rows: Sequence[Sequence[int]], pad: int, batch_size: int = 16) -> list[float]:
    """The reward of each conversation, read by the model at its last token that is not padding."""
    import torch

    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = pad_right(part, pad).to(model.device)
        mask = pad_right([[1] * len(row) for row in part], 0).to(model.device)
        with torch.no_grad():
            found += model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().tolist()
    return found
