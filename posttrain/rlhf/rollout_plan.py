"""How many prompts, episodes, updates and steps an online run has, and which prompts its rollouts take."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.config.stages import OnlineStage
from posttrain.errors import ConfigError
from posttrain.models.generate import LOGITS

WIDER = 4  # times stage.batch_size: a forward without gradients keeps the activations of one layer, not of all


@dataclass(frozen=True)
class RolloutPlan:
    """The numbers that follow from the configuration; episodes are prompts with their completions."""

    prompts: int
    rollout: int  # episodes in one rollout, over all processes
    per_process: int  # of these, the ones of one process
    mini_batches: int  # optimizer steps in one pass over a rollout
    passes: int  # over each rollout
    accumulation: int  # forward passes per process in one optimizer step
    batch_size: int  # episodes in one forward pass
    rollouts_per_epoch: int
    group: int = 1  # completions of a prompt

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.mini_batches * self.passes

    @property
    def micro_steps_per_rollout(self) -> int:
        """Forward passes of one process between two rollouts."""
        return self.steps_per_rollout * self.accumulation


def plan_rollouts(stage: OnlineStage, prompts: int, processes: int) -> RolloutPlan:
    """Divide the work.

    Raises:
        ConfigError: a rollout cannot be shared out evenly; names sizes that can.
    """
    micro = stage.num_mini_batches * stage.batch_size * processes
    unit = math.lcm(micro, stage.group * processes)  # each prompt's completions are one process's
    if stage.rollout_batch_size % unit:
        fitting = max(round(stage.rollout_batch_size / unit), 1) * unit
        raise ConfigError(
            f"stage.rollout_batch_size={stage.rollout_batch_size} must be a multiple of stage.num_mini_batches="
            f"{stage.num_mini_batches} × stage.batch_size={stage.batch_size} × {processes} "
            f"{'process' if processes == 1 else 'processes'}{_and_groups(stage)}; set "
            f"stage.rollout_batch_size={fitting} or a smaller stage.batch_size"
        )
    return RolloutPlan(
        prompts=prompts,
        rollout=stage.rollout_batch_size,
        per_process=stage.rollout_batch_size // processes,
        mini_batches=stage.num_mini_batches,
        passes=stage.ppo_epochs,
        accumulation=stage.rollout_batch_size // micro,
        batch_size=stage.batch_size,
        rollouts_per_epoch=math.ceil(prompts * stage.group / stage.rollout_batch_size),
        group=stage.group,
    )


def _and_groups(stage: OnlineStage) -> str:
    return f", and of stage.num_generations={stage.group} in each" if stage.group > 1 else ""


@functools.lru_cache(maxsize=4)  # of prompts and of instruction rows, this pass and the next; 8 MB a million
def _permutation(prompts: int, seed: int, number: int) -> tuple[int, ...]:
    """The prompts in the order of pass `number`."""
    order = list(range(prompts))
    random.Random(f"prompts {seed} {number}").shuffle(order)
    return tuple(order)


def prompts_of_rollout(plan: RolloutPlan, seed: int, rollout: int) -> list[int]:
    """The prompts of a rollout, a function of its number alone, so that a resumed run draws the same ones.

    A rollout that reaches beyond the last prompt goes on with the next permutation: no prompt is left out. One that is
    completed several times stands there as often, one after another.
    """
    chosen: list[int] = []
    wanted = plan.rollout // plan.group
    number, at = divmod(rollout * wanted, plan.prompts)
    while len(chosen) < wanted:
        chosen += _permutation(plan.prompts, seed, number)[at : at + wanted - len(chosen)]
        number, at = number + 1, 0
    return [prompt for prompt in chosen for _ in range(plan.group)]


def episode_order(plan: RolloutPlan, seed: int, rollout: int, number: int, process: int) -> list[int]:
    """The order in which pass `number` takes the episodes of a process."""
    order = list(range(plan.per_process))
    random.Random(f"episodes {seed} {rollout} {number} {process}").shuffle(order)
    return order


def longest_episodes(stage: OnlineStage, longest: int) -> int:
    """How many episodes of `longest` tokens a forward of an update holds."""
    room = stage.micro_batch_tokens
    return stage.batch_size if room is None else max(min(stage.batch_size, room // longest), 1)


def wider(stage: OnlineStage, vocabulary: int, holds_logits: bool) -> int:
    """Episodes in a forward without gradients; with the logits held at once, no more than these have room."""
    numbers, most = stage.max_new_tokens * vocabulary if holds_logits else 1, longest_episodes(stage, stage.max_length)
    return max(most, min(LOGITS // numbers, WIDER * most))


def split(
    episodes: Sequence[int],
    lengths: Sequence[int],
    room: int,
    packs: Callable[[Sequence[int]], bool],
    least: int = 1,
) -> list[list[int]]:
    """The episodes, in order, in at least `least` groups of at most `room` tokens, padding counted unless one `packs`.

    `lengths` has the tokens of every episode of the rollout.
    """
    groups: list[list[int]] = []
    for episode in episodes:
        tokens = [lengths[each] for each in (*(groups[-1] if groups else ()), episode)]
        if groups and (sum(tokens) if packs(tokens) else len(tokens) * max(tokens)) <= room:
            groups[-1].append(episode)
        else:
            groups.append([episode])
    while len(groups) < least:
        most = max(range(len(groups)), key=lambda group: len(groups[group]))
        half = len(groups[most]) // 2
        groups[most : most + 1] = [groups[most][:half], groups[most][half:]]
    return groups


def packing_pays(lengths: Sequence[int], width: int, quadratic: bool) -> bool:
    """Whether a row of all episodes takes less arithmetic than a padded row to each.

    A token costs 24 · width² operations in the linear maps of a layer (four of width², and a feed-forward of eight) and
    4 · width for each token that attention compares it with: all of its row where attention is `quadratic`.
    """
    tokens, longest = sum(lengths), max(lengths)
    together = tokens * (6 * width + (tokens if quadratic else longest))
    return together < len(lengths) * longest * (6 * width + longest)
