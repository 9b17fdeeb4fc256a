"""Intervals and changes, prompt by prompt, against cases worked out by hand."""

import math

import pytest

from posttrain.metrics.catalogue import charts_with_gold_apart, with_gold_apart
from posttrain.metrics.comparison import before_and_after, change, mean_interval, measured, over_optimised, paired


def test_the_normal_interval_of_a_mean() -> None:
    # sd of 1, 2, 3, 4 is sqrt(5 / 3); 1.96 of it over sqrt(4)
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 2.5 - 1.26517, 2.5 + 1.26517), abs=1e-4)
    assert mean_interval([3.0]) == (3.0, 3.0, 3.0)
    assert all(math.isnan(value) for value in mean_interval([]))


def test_a_score_is_compared_prompt_by_prompt_with_the_first_evaluation() -> None:
    first = [1.0] * 15 + [0.0] * 75
    now = [0.0] * 13 + [1.0] * 4 + [0.0] * 72 + [None]
    found = measured("gold/correct", now, first)
    assert (found["gold/correct_better"], found["gold/correct_worse"]) == (2, 13)
    assert found["gold/correct"] == 4 / 89
    assert change("gold/correct", found) == "fell"
    assert "gold/correct_better" not in measured("gold/correct", now)
    assert change("gold/correct", measured("gold/correct", now)) == ""
    same = measured("reward", [1.0, 2.0, 3.0], [0.0, 1.0, 2.0])  # three of three: p = 0.25
    assert change("reward", same) == "no difference seen"
    before = {f"{key}_before": value for key, value in measured("reward", [0.0, 1.0, 2.0]).items()}
    assert before_and_after("reward", same | before) == (
        *("1.0 (-0.1 to 2.1)", "2.0 (0.9 to 3.1)"),
        "no difference seen (3 better, 0 worse, p = 0.25)",
    )
    assert before_and_after("loss", {"loss": 0.5}) == ("", "0.5000", "")


RISEN = {"reward_better": 20, "reward_worse": 2}
FALLEN = {"gold/correct": 0.8, "gold/correct_better": 2, "gold/correct_worse": 13}


def test_over_optimised_is_a_reward_that_rose_and_a_gold_function_that_fell_beyond_chance() -> None:
    style = {"gold/style": 1.0, "gold/style_better": 40, "gold/style_worse": 0}
    assert over_optimised(RISEN | FALLEN | style) == ["gold/correct"]
    assert over_optimised({f"eval_{key}": value for key, value in (RISEN | FALLEN).items()}, "eval_") == [
        "gold/correct"
    ]
    assert over_optimised(RISEN | FALLEN | {"gold/correct_worse": 8}) == []  # p = 0.11
    assert over_optimised(FALLEN | {"reward_better": 5, "reward_worse": 0}) == []  # p = 0.06
    assert over_optimised(RISEN | style) == []


def test_gold_functions_are_shown_apart() -> None:
    metrics = {*RISEN, *FALLEN, "reward", "gold/low", "gold/low_low", "gold/correct_before", "gold/low_before"}
    assert with_gold_apart(["reward", "gold/", "kl"], sorted(metrics)) == ["reward", "gold/correct", "gold/low", "kl"]
    charts = charts_with_gold_apart([("kl", "eval_kl"), ("eval_gold/",)], sorted(metrics))
    assert charts == [("kl", "eval_kl"), ["eval_gold/correct"], ["eval_gold/low"]]
    assert charts_with_gold_apart([("eval_gold/",)], {"reward"}) == []


def test_what_another_batch_rounds_is_a_tie() -> None:
    found = paired([2.0, 1.0 + 1e-7, 0.5, 1e-7], [1.0, 1.0, 0.5 + 1e-7, 0.0])
    assert (found["better"], found["worse"], found["prompts"], found["p"]) == (1, 0, 4, 1)
    small = paired([2e-9, 1e-9], [1e-9, 2e-9])  # whatever unit the scores have
    assert (small["better"], small["worse"]) == (1, 1)
