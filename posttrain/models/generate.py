"""What a model says to held-out prompts, how likely it finds a completion, and how it scores one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.splits import Row
from posttrain.devices import on_all_processes
from posttrain.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

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


@contextmanager
def half_weights(model: "PreTrainedModel", arguments: "TrainingArguments", shards: bool) -> Iterator[None]:
    """For one generation by continuous batching: the weights in the half precision that is trained in, then as before.

    It runs in a thread of its own, which autocast does not reach. TRL (1.16) casts the weights as well, but for good:
    what a later update adds to them is then rounded away, as the rotary embeddings are. So its own switch is off here.
    """
    import torch

    kind = torch.bfloat16 if arguments.bf16 else torch.float16
    half, switches = (arguments.bf16 or arguments.fp16) and not shards, (arguments.bf16, arguments.fp16)
    kept = [(weight, weight.data) for weight in model.parameters() if half and weight.is_floating_point()]
    arguments.bf16 = arguments.fp16 = False
    try:
        for weight, data in kept:
            weight.data = data.to(kind)
        yield
    finally:
        arguments.bf16, arguments.fp16 = switches
        for weight, data in kept:
            weight.data = data


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


def _sampler(
    temperature: float, seeds: Sequence[int], device: "torch.device"
) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    """Makes scores (rows, vocabulary) whose maximum is a sample, by Gumbel noise from each row's own generator."""
    import torch

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        variates = [
            torch.empty_like(row).exponential_(generator=own) for row, own in zip(scores, generators, strict=True)
        ]
        return scores / temperature - torch.stack(variates).log()

    return draw


def generate(
    model: "PreTrainedModel",
    encoder: "ChatEncoder",
    rows: "Sequence[Example]",
    max_new_tokens: int,
    temperature: float | None = None,
    seeds: Sequence[int] = (),
) -> Generated:
    """Complete each row's prompt, all in one left-padded batch; greedily, or sampled at `temperature`.

    A sampled row draws from a generator of its own, with a seed of `seeds`, so its completion does not depend on which
    rows stand beside it; the run's generators are left as they were.
    """
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
            do_sample=False,
            suppress_tokens=[pad],
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=[] if temperature is None else [_sampler(temperature, seeds, model.device)],
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
    """The most likely completion to each prompt, token by token (greedy); called on all processes, which share them."""

    def share(mine: "list[Example]") -> list[Completion]:
        made = generate(model, encoder, mine, max_new_tokens)
        texts = [encoder.tokenizer.decode(completion, skip_special_tokens=True) for completion in made.completions]
        return [Completion(str(text), ended) for text, ended in zip(texts, made.ended, strict=True)]

    return on_all_processes(rows, share)


def pad_right(rows: Sequence[Sequence[int]], value: int) -> "torch.Tensor":
    """(rows, longest), filled up with `value`."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def by_length(lengths: Sequence[int], size: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """The rows (all, or those given) in batches of `size` and of like lengths, the longest first."""
    order = sorted(range(len(lengths)) if rows is None else rows, key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Batch(NamedTuple):
    rows: list[int]  # their places among all rows
    ids: "torch.Tensor"  # (rows, longest), prompt and completion, padded on the right
    mask: "torch.Tensor"  # (rows, longest), 1 on both
    targets: "torch.Tensor"  # (rows, kept), the last tokens of `ids`, from the first one of any completion on
    learned: "torch.Tensor"  # (rows, kept), 1 where a target belongs to the completion


def _batches(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int,
) -> list[_Batch]:
    """Rows of like lengths, the longest first, as many as their own logits leave room for.

    Called on all processes, which get equally many batches: forwards of a sharded model wait for one another.
    """
    from accelerate.utils import gather_object

    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    room = LOGITS // model.config.get_text_config().vocab_size
    parts: list[list[int]] = []
    for [row] in by_length(lengths, 1):
        part = [*(parts[-1] if parts else []), row]
        kept = lengths[part[0]] - min(len(prompts[each]) for each in part)
        if parts and len(part) <= batch_size and len(part) * kept <= room:
            parts[-1] = part
        else:
            parts.append([row])
    parts += parts[-1:] * (max(gather_object([len(parts)])) - len(parts))
    found = []
    for part in parts:
        learned = pad_right([[0] * len(prompts[row]) + [1] * len(completions[row]) for row in part], 0)
        ids = pad_right([[*prompts[row], *completions[row]] for row in part], pad).to(model.device)
        mask = pad_right([[1] * lengths[row] for row in part], 0).to(model.device)
        first = max(min(len(prompts[row]) for row in part), 1)  # nothing predicts a row's first token
        found.append(_Batch(part, ids, mask, ids[:, first:], learned[:, first:].to(model.device)))
    return found


def _log_probs(model: "PreTrainedModel", batch: _Batch) -> "torch.Tensor":
    """(rows, kept, vocabulary), in float32: of the targets alone, where the model can leave out the other logits."""
    import torch

    kept = batch.targets.size(1) + 1
    options = {"logits_to_keep": kept} if model._supports_logits_to_keep() else {}
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **options).logits
    found: torch.Tensor = logits[:, -kept:-1].float().log_softmax(-1)
    return found


def _by_row(batches: Sequence[_Batch], at_each: "Callable[[_Batch], torch.Tensor]") -> "torch.Tensor":
    """(rows): what is found at each target (rows, kept), summed over the completion of each row."""
    import torch

    found = torch.empty(len({row for batch in batches for row in batch.rows}))
    for batch in batches:
        found[batch.rows] = (at_each(batch) * batch.learned).sum(-1).cpu()
    return found


def completion_logps(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 8,
) -> "torch.Tensor":
    """log π(completion | prompt) in nats, summed over the completion's tokens, as a float32 tensor (rows)."""

    def picked(batch: _Batch) -> "torch.Tensor":
        return _log_probs(model, batch).gather(-1, batch.targets[..., None]).squeeze(-1)

    return _by_row(_batches(model, prompts, completions, pad, batch_size), picked)


def completion_kl(
    policy: "PreTrainedModel",
    reference: Callable[[], AbstractContextManager["PreTrainedModel"]],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 8,
) -> "torch.Tensor":
    """KL(policy‖reference) over the next token, summed over each completion's positions, in nats, as (rows)."""

    def divergence(batch: _Batch) -> "torch.Tensor":
        ours = _log_probs(policy, batch)
        with reference() as model:
            theirs = _log_probs(model, batch)
        return (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0)  # below 0 only by rounding

    return _by_row(_batches(policy, prompts, completions, pad, batch_size), divergence)


def scores(model: "PreTrainedModel", rows: Sequence[Sequence[int]], pad: int, batch_size: int = 16) -> list[float]:
    """The reward of each conversation, read by the model at its last token that is not padding."""
    import torch

    found = torch.empty(len(rows))
    for places in by_length([*map(len, rows)], batch_size):
        part = [rows[place] for place in places]
        ids = pad_right(part, pad).to(model.device)
        mask = pad_right([[1] * len(row) for row in part], 0).to(model.device)
        with torch.no_grad():
            found[places] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
    return found.tolist()
