"""The numbers of the report card against cases worked out by hand."""

import math

import pytest

from posttrain.metrics.report_card import (
    ScoredPair,
    card_table,
    correlation,
    reliability,
    report_card,
    sigmoid,
    slices,
    wilson,
)


def pair(
    chosen: float, rejected: float, chosen_length: int = 5, rejected_length: int = 5, name: str = "a"
) -> ScoredPair:
    return ScoredPair(name, f"{name} good", f"{name} bad", chosen, rejected, chosen_length, rejected_length)


def test_wilson_interval() -> None:
    # 8 of 10 at z = 1.96: centre (0.8 + 0.19208) / 1.38416, spread sqrt(0.016 + 0.009604) * 1.96 / 1.38416
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4901, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_correlation_and_sigmoid() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0
    assert sigmoid(0) == 0.5
    assert sigmoid(-1000) == 0
    assert sigmoid(math.log(3)) == pytest.approx(0.75)


def test_calibration() -> None:
    # margin ln 3 says 75 %: right three times of four is perfect, right always is off by a quarter
    right, wrong = math.log(3), -math.log(3)
    error, bins = reliability([right, right, right, wrong])
    assert error == pytest.approx(0, abs=1e-9)
    assert [row["pairs"] for row in bins] == [4]
    assert reliability([right] * 4)[0] == pytest.approx(0.25)
    assert reliability([0.0])[0] == 0


def test_card_of_three_right_one_wrong_one_tie() -> None:
    pairs = [pair(2, 0, 9, 3), pair(1, 0, 3, 9), pair(1, 0), pair(0, 3, 4, 2, "wrong"), pair(1, 1)]
    card = report_card(pairs, best_accuracy=0.9)
    assert card["pairs"] == 5
    assert card["accuracy"] == 3 / 5
    assert card["ties"] == 1
    assert card["mean_margin"] == pytest.approx((2 + 1 + 1 - 3 + 0) / 5)
    assert card["baselines"]["longer_wins"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert card["loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (2, 1, 1, -3, 0)) / 5)
    assert [row["prompt"] for row in card["lowest_margins"]] == ["wrong", "a", "a", "a", "a"]
    assert card["chosen"]["max"] == 2


def test_verdicts() -> None:
    good = [pair(math.log(9), 0) for _ in range(90)] + [pair(0, math.log(9)) for _ in range(10)]
    assert report_card(good)["verdict"] == "fit to optimise against"
    guess = [pair(1, 0) for _ in range(50)] + [pair(0, 1) for _ in range(50)]
    assert report_card(guess)["verdict"] == "no better than length"
    only_length = [pair(9, 3, 9, 3) for _ in range(80)] + [pair(3, 9, 3, 9) for _ in range(20)]
    assert report_card(only_length)["verdict"] == "no better than length"
    overconfident = [pair(50, 0) for _ in range(75)] + [pair(0, 50) for _ in range(25)]
    card = report_card(overconfident)
    assert card["verdict"] == "weak"
    assert "margins are off" in card["reasons"][0]


def of_words(margin: float, chosen: str, rejected: str, group: str | None = None) -> ScoredPair:
    lengths = (len(chosen.split()), len(rejected.split()))
    return ScoredPair("a", chosen, rejected, margin, 0.0, *lengths, group)


def test_accuracy_by_kind_of_pair() -> None:
    same = of_words(1, "it is Rome", "it is Oslo", "right")
    wrong = of_words(-1, "it is Rome", "it is Oslo", "right")
    longer = of_words(1, "it is Rome I think", "it is Rome", "brief")
    pairs = [same, wrong, wrong, wrong, longer]
    found = {each.kind: each for each in slices(pairs)}
    assert {kind: (each.pairs, each.accuracy) for kind, each in found.items()} == {
        "group: right": (4, 1 / 4),
        "group: brief": (1, 1.0),
        "lengths: 0 to 10 % apart": (4, 1 / 4),
        "lengths: 10 to 50 % apart": (1, 1.0),
        "words that differ: 0 or 1": (4, 1 / 4),
        "words that differ: 2 to 5": (1, 1.0),
    }
    each = found["group: right"]
    assert (each.accuracy_low, each.accuracy_high) == wilson(1, 4)
    assert list(slices([same, wrong])) == []  # one kind alone says no more than the whole
    assert of_words(1, "it is Rome", "it is Rome I think", "brief").kinds == longer.kinds


def test_the_verdict_is_that_of_the_worst_kind_with_enough_pairs() -> None:
    """47 of 90 are right: Wilson's interval is 0.4203 to 0.6223."""
    longer, shorter = (
        of_words(math.log(9), *texts, "friendly") for texts in (("Yes, Rome", "Rome"), ("Yes", "Yes, Rome"))
    )
    style = [longer, shorter] * 90
    right = [of_words(math.log(9), "it is Rome", "it is Oslo", "correct")] * 47
    wrong = [of_words(-math.log(9), "it is Rome", "it is Oslo", "correct")] * 43
    card = report_card([*style, *right, *wrong])
    assert card["verdict"] == "weak"
    assert card["reasons"][0] == (
        "on group: correct it is right in 52.2% (42.0% to 62.2%) of 90 pairs, which may be chance"
    )
    assert ("group: friendly", "accuracy 100.0% (97.9% to 100.0%) of 180 pairs") in card_table(card)
    few = report_card([*style, *right[:23], *wrong[:26]])  # 49 pairs say nothing
    assert few["verdict"] == "fit to optimise against", few["reasons"]
    assert "group: correct" in {each["kind"] for each in few["slices"]}
    assert not any("group: correct" in row[0] for row in card_table(few))
