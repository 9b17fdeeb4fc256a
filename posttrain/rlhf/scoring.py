"""What a sampled completion is worth: the reward that is optimised, its parts, and reward functions kept apart."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.chat import ChatEncoder
from posttrain.data.formats import Prompt
from posttrain.data.messages import Message
from posttrain.errors import PosttrainError
from posttrain.metrics.comparison import REWARD
from posttrain.models.generate import completion_kl, generate, scores
from posttrain.models.load import load_reward_model, max_positions
from posttrain.rlhf.rewards import Encode, RewardFunction, encoded_again, same_ids
from posttrain.rlhf.roles import RewardSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32  # prompts that are completed at a time

Opened = Callable[[], AbstractContextManager["PreTrainedModel"]]


@dataclass
class RewardScorer:
    """Scores completions; `functions` has the reward model first, if there is one, and a weight for each."""

    functions: list[RewardFunction]
    weights: list[float]
    eval_functions: list[RewardFunction]
    loop: asyncio.AbstractEventLoop | None = None  # that async functions run in

    def __call__(self, columns: Mapping[str, object]) -> dict[str, list[float | None]]:
        """Score -> of each completion: the weighted reward, its parts, and each eval function; None: does not apply.

        `columns` are those of TRL's reward functions: prompts, completions, completion_ids and the rows' own.

        Raises:
            PosttrainError: a function failed, or gave what is not a finite number.
        """
        parts = [self._call(function, columns) for function in self.functions]
        found = {score_name(function): self._call(function, columns) for function in self.eval_functions}
        if not parts:
            return found
        reward = [self._weighted(row) for row in zip(*parts, strict=True)]
        return {REWARD: reward, **(dict(zip(self.names(), parts, strict=True)) if len(parts) > 1 else {}), **found}

    def names(self) -> list[str]:
        """What the parts of the reward are called; a function that is called as another one has its place added."""
        names = [score_name(function) for function in self.functions]
        return [name if name not in names[:place] else f"{name} {place + 1}" for place, name in enumerate(names)]

    def _weighted(self, row: Sequence[float | None]) -> float | None:
        known = [weight * value for weight, value in zip(self.weights, row, strict=True) if value is not None]
        total = math.fsum(known)
        if not math.isfinite(total):
            raise PosttrainError(
                f"the reward is not a finite number for a completion ({', '.join(self.names())}: {row})"
            )
        return total if known else None

    def _call(self, function: RewardFunction, columns: Mapping[str, object]) -> list[float | None]:
        found = function(**columns)
        if not inspect.iscoroutine(found):
            return list(found)
        # one loop for all calls: what a function keeps between them, such as a connection, belongs to a loop
        if self.loop is None:
            from trl.trainer.utils import start_event_loop_in_daemon

            _, self.loop, ready = start_event_loop_in_daemon()
            ready.wait()
        return list(asyncio.run_coroutine_threadsafe(found, self.loop).result())


def score_name(function: RewardFunction) -> str:
    """What a function's scores are called; `reward` alone is their weighted sum."""
    return "reward()" if function.__name__ == REWARD else str(function.__name__)


class ScoredCompletion(NamedTuple):
    """A completion sampled to a held-out prompt; `kl` in nats, None without a reference that reads the same tokens."""

    text: str
    length: int  # tokens
    ended: bool
    scores: dict[str, float | None]
    kl: float | None


def columns_of(rows: Sequence[Prompt]) -> dict[str, list[object]]:
    """The rows' own columns, None where a row lacks one."""
    names = sorted({name for row in rows for name in row.columns})
    return {name: [row.columns.get(name) for row in rows] for name in names}


def score_answers(
    policy: "PreTrainedModel",
    reference: Opened | None,
    encoder: ChatEncoder,
    rows: Sequence[Prompt],
    scorer: RewardScorer,
    new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    **extra: object,
) -> list[ScoredCompletion]:
    """Sample a completion to each prompt, BATCH at a time, and score it; `extra` is handed to the reward functions."""
    found: list[ScoredCompletion] = []
    pad = encoder.tokenizer.pad_token_id
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        made = generate(policy, encoder, part, new_tokens, temperature, seeds[start : start + BATCH])
        kl: Sequence[float | None] = [None] * len(part)
        if reference is not None:
            kl = completion_kl(policy, reference, made.prompts, made.completions, pad, 16).tolist()
        texts = [str(text) for text in encoder.tokenizer.batch_decode(made.completions, skip_special_tokens=True)]
        scored = scorer(
            {
                **columns_of(part),
                "prompts": [row.prompt for row in part],
                "completions": [[{"role": "assistant", "content": text}] for text in texts],
                "completion_ids": made.completions,
                "prompt_ids": made.prompts,
                **extra,
            }
        )
        by_row = [{name: values[index] for name, values in scored.items()} for index in range(len(part))]
        columns = (texts, map(len, made.completions), made.ended, by_row, kl)
        found += [ScoredCompletion(*each) for each in zip(*columns, strict=True)]
    return found


def encoding_for(source: RewardSource) -> Encode:
    """How a reward model is handed a completion: its ids, or its text through a tokenizer of the model's own."""
    if source.same_tokenizer:
        return same_ids
    limits = (max_positions(source.settings), source.tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit is not None)
    return encoded_again(ChatEncoder(source.tokenizer, allow_special_tokens=True), limit)


class RewardModel:
    """A trained reward model: a sequence classifier with one score, read at a conversation's last token."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 16,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.autocast = batch_size, autocast

    @classmethod
    def load(
        cls,
        source: RewardSource,
        seed: int,
        device: "torch.device",
        batch_size: int = 16,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> "RewardModel":
        """The one that a run names, frozen, on `device`."""
        model = load_reward_model(source.settings, source.tokenizer, source.path, seed, quantised=False, new_head=False)
        return cls(model.to(device).eval().requires_grad_(False), source.tokenizer, batch_size, autocast)

    def __call__(self, rows: list[list[int]]) -> list[float]:
        """The score of each conversation, given as token ids."""
        with self.autocast():
            return scores(self.model, rows, self.tokenizer.pad_token_id, self.batch_size)

    def score(self, conversations: Sequence[list[Message]]) -> list[float]:
        """The score of each conversation, given as messages; they go through the model's chat template."""
        encoder = ChatEncoder(self.tokenizer, allow_special_tokens=True)
        return self([encoder.conversation_ids(each) for each in conversations])
