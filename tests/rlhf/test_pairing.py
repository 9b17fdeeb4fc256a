"""Which of several answers become a pair, worked by hand."""

import dataclasses

import pytest

from posttrain.data.formats import Prompt
from posttrain.data.splits import TemplateInputs
from posttrain.errors import ConfigError
from posttrain.rlhf.pairing import (
    GOLD,
    LOW_MARGIN,
    LOW_REWARD,
    NO_END,
    NO_REWARD,
    SAME,
    Choice,
    PairsConfig,
    choose,
    row_of,
)
from posttrain.rlhf.scoring import ScoredCompletion

BEST = PairsConfig(keep="best")


def answer(text: str, reward: float | None, ended: bool = True, **scores: float | None) -> ScoredCompletion:
    return ScoredCompletion(text, len(text), ended, {"reward": reward, **scores}, None)


A, B, C = answer("a", 1.0, correct=0.0), answer("b", 0.25, correct=1.0), answer("c", -0.5, correct=None)


def chosen(found: Choice | str) -> tuple[str, str, float]:
    assert isinstance(found, Choice), found
    return found.best.text, found.worst.text, found.margin


def test_the_best_that_has_an_end_and_the_worst_of_all() -> None:
    assert chosen(choose([B, A, C], PairsConfig())) == ("a", "c", 1.5)
    cut = A._replace(ended=False)
    assert chosen(choose([B, cut, C], PairsConfig())) == ("b", "c", 0.75)
    assert chosen(choose([B, A, C._replace(ended=False)], PairsConfig())) == ("a", "c", 1.5)
    # what has no reward or says nothing is no candidate
    assert chosen(choose([B, A, answer("d", None), answer(" \n", -9.0)], PairsConfig())) == ("a", "b", 0.75)
    assert chosen(choose([A, A._replace(text="also a"), B], PairsConfig()))[0] == "a"  # the first of equals


def test_what_makes_no_pair_and_why() -> None:
    assert choose([answer("a", None), answer(" ", 1.0)], PairsConfig()) == NO_REWARD
    assert choose([A._replace(ended=False), B._replace(ended=False)], PairsConfig()) == NO_END
    assert choose([A, A, A], PairsConfig()) == SAME
    assert choose([B, A, C], PairsConfig(min_reward=A.scores["reward"] + 0.01)) == LOW_REWARD
    assert chosen(choose([B, A, C], PairsConfig(min_reward=A.scores["reward"])))[0] == "a"
    assert choose([A, B], PairsConfig(min_margin=0.8)) == LOW_MARGIN
    assert chosen(choose([A, B], PairsConfig(min_margin=0.75)))[2] == 0.75
    assert choose([A, A._replace(text="also a")], PairsConfig(min_margin=0)) == LOW_MARGIN
    # the only one with an end is the worst
    assert choose([A._replace(ended=False), C], PairsConfig(min_margin=0)) == LOW_MARGIN


def test_gold_has_its_say_only_where_it_is_asked_and_applies() -> None:
    assert chosen(choose([A, B], PairsConfig())) == ("a", "b", 0.75)
    assert choose([A, B], PairsConfig(), ["correct"]) == GOLD
    assert chosen(choose([A, B], PairsConfig(), ["style"])) == ("a", "b", 0.75)
    assert chosen(choose([A, C], PairsConfig(), ["correct"])) == ("a", "c", 1.5)
    assert chosen(choose([A, B._replace(scores={"reward": 0.0, "correct": 0.0})], PairsConfig(), ["correct"]))[1] == "b"


def test_of_one_prompt_the_best_alone() -> None:
    assert chosen(choose([B, A, C], BEST))[0] == "a"
    assert chosen(choose([A, A], BEST))[0] == "a"
    assert choose([A._replace(ended=False)], BEST) == NO_END


def test_a_row_has_what_its_readers_need_and_nothing_that_they_would_mistake() -> None:
    asked = [{"role": "user", "content": "Two?"}]
    columns = {"topic": "sums", "label": 1, "text": "x", "chosen": "y", "margin": 9, "prompt": "z"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    prompt = Prompt(asked, "a.jsonl line 1", columns, TemplateInputs(tools, {"enable_thinking": False}))
    found = Choice(A, C, 1.5)
    said = [{"role": "assistant", "content": "a"}]
    shared = {"topic": "sums", "prompt": asked, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    rejected = [{"role": "assistant", "content": "c"}]
    assert row_of(prompt, found, PairsConfig()) == {**shared, "chosen": said, "rejected": rejected, "margin": 1.5}
    assert row_of(prompt, found, BEST) == {**shared, "completion": said}


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 1}, {"keep": "all"}, {"min_margin": -1.0}, {"min_margin": float("nan")}, {"min_reward": float("nan")}],
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(PairsConfig(), **wrong)  # type: ignore[arg-type]
