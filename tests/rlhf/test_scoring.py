"""Scores of completions against cases by hand: weights, what does not apply, names, async functions."""

import asyncio
from typing import Any

import pytest

from posttrain.errors import PosttrainError
from posttrain.rlhf.rewards import checked
from posttrain.rlhf.scoring import RewardScorer

COLUMNS = {"prompts": [[], []], "completions": [[{"content": "a"}], [{"content": "bcd"}]], "completion_ids": [[1], [2]]}


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(each[0]["content"])) for each in completions]


def sometimes(completions: list[Any], **columns: Any) -> list[float | None]:
    return [None, 10.0]


def test_the_reward_is_the_weighted_sum_of_what_applies() -> None:
    scorer = RewardScorer([checked("length", length), checked("sometimes", sometimes)], [2.0, 0.5], [])
    assert scorer(COLUMNS) == {"reward": [2.0, 11.0], "length": [1.0, 3.0], "sometimes": [None, 10.0]}
    assert RewardScorer([checked("sometimes", sometimes)], [1.0], [])(COLUMNS) == {"reward": [None, 10.0]}


def test_functions_of_the_same_name_are_kept_apart() -> None:
    scorer = RewardScorer([checked("reward_model", length), checked("reward_model", sometimes)], [1.0, 1.0], [])
    assert scorer(COLUMNS)["reward"] == [1.0, 13.0]
    assert scorer.names() == ["reward_model", "reward_model 2"]
    alone = RewardScorer([], [], [checked("reward", length)])
    assert alone(COLUMNS) == {"reward()": [1.0, 3.0]}


def test_a_reward_that_overflows_is_refused() -> None:
    large = checked("large", lambda completions, **columns: [1e308, 1e308])
    with pytest.raises(PosttrainError, match="large"):
        RewardScorer([large], [100.0], [])(COLUMNS)


def test_async_functions_share_a_loop_also_inside_a_running_one() -> None:
    """As in a notebook, with an object that belongs to the loop of its first call."""
    gate = asyncio.Semaphore(1)

    async def waits(completions: list[Any], **columns: Any) -> list[float]:
        async def one(text: str) -> float:
            async with gate:
                await asyncio.sleep(0)
                return float(len(text))

        return list(await asyncio.gather(*(one(each[0]["content"]) for each in completions)))

    scorer = RewardScorer([checked("waits", waits)], [1.0], [])

    async def notebook() -> list[dict[str, list[float | None]]]:
        return [scorer(COLUMNS), scorer(COLUMNS)]

    assert asyncio.run(notebook()) == [{"reward": [1.0, 3.0]}] * 2
