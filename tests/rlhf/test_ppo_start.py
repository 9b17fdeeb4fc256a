"""What is checked before the first step, and what is said of a rollout: each known cause is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REWARD, SHORT_PPO, Posttrain

from posttrain.config.stages import PPOStage
from posttrain.errors import PosttrainError
from posttrain.rlhf.diagnostics import Alarms
from posttrain.rlhf.ppo import PPOTrainer


def top_k(trainer: Any) -> None:
    trainer.generation_config.top_k = 3


def ban_words(trainer: Any) -> None:
    trainer.model.policy.generation_config.suppress_tokens = list(range(2, 400))


def dropout(trainer: Any) -> None:
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3


def reference(trainer: Any) -> None:
    with torch.no_grad():
        trainer.ref_model.transformer.h[0].mlp.c_fc.weight.mul_(3)


def positions(trainer: Any) -> None:
    """As TRL's RLOO and GRPO do: positions are counted from the padding on."""
    inputs_of = trainer.inputs_of

    def counted(buffer: Any) -> dict[str, Any]:
        found = inputs_of(buffer)
        counts = torch.arange(found["input_ids"].size(1)).expand_as(found["input_ids"])
        return {**found, "position_ids": counts}

    trainer.inputs_of = counted


CAUSES = {
    "top_k": (top_k, "generation samples otherwise than by temperature alone (top_k=3)"),
    "suppressed tokens": (ban_words, "generation samples otherwise than by temperature alone (suppress_tokens="),
    "dropout": (dropout, "dropout is on ("),
    "reference": (reference, "the reference is not the model that the policy starts from"),
    "positions": (positions, "the model counts the padding on the left among its positions"),
}


@pytest.mark.parametrize(("break_it", "told"), CAUSES.values(), ids=CAUSES)
def test_a_wrong_start_stops_the_run_and_names_its_cause(
    posttrain: Posttrain,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Any], None],
    told: str,
) -> None:
    """The trainer is broken after it is built, as a new release of a library might break it."""
    build = PPOTrainer.__init__

    def broken(self: Any, **options: Any) -> None:
        build(self, **options)
        break_it(self)

    monkeypatch.setattr(PPOTrainer, "__init__", broken)
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD)
    assert done.code == 1, done
    assert "step-0 check failed" in done.err
    assert told in done.err
    assert not Path("outputs/demo/ppo/posttrain.json").exists()


CALM = {
    "reward": 1.0,
    "reward_std": 1.0,
    "shaped_reward": 1.0,
    "ended_by_eos": 0.9,
    "kl": 1.0,
    "kl_error": 0.1,
    "kl_k3": 1.0,
    "entropy": 2.0,
    "response_length": 20.0,
    "explained_variance": 0.5,
}
ALARMS = {
    "negative KL": ({"kl": -1.0}, "below 0 by more than chance", "precision=fp32"),
    "high KL": ({"kl": 12.0}, "far from what the reward model has seen", "stage.kl_coef=0.2"),
    "entropy": ({"entropy": 0.3}, "entropy collapse", "stage.entropy_coef=0.01"),
    "longer": (
        {"response_length": 45.0},
        "completions have become longer: 20 to 45 tokens",
        "stage.length_penalty=0.011",
    ),
    "shorter": ({"response_length": 8.0}, "completions have become shorter: 20 to 8 tokens", "stage.kl_coef=0.2"),
    "constant": ({"reward_std": 0.0}, "all completions of a rollout got the same reward", "rollouts.jsonl"),
    "endless": ({"ended_by_eos": 0.0}, "no completion of a rollout ended by itself", "stage.missing_eos_penalty=1"),
    "large": ({"shaped_reward": -1e6}, "rewards are large (-1e+06 on average)", "stage.reward_scale=1e+06"),
    "vLLM": (
        {"vllm_difference": 0.3, "vllm_difference_max": 2.5, "vllm_tokens_beyond": 0.4},
        "0.300 nats per token off the trainer's (at most 2.50; 40.0% of tokens beyond 0.2)",
        "stage.vllm_importance_sampling_cap=2 corrects for it",
    ),
    "vLLM at few tokens": (
        {"vllm_difference": 0.02, "vllm_difference_max": 2.5, "vllm_tokens_beyond": 0.06},
        "0.020 nats per token off",
        "the same dtype on both sides",
    ),
    "saturated": ({"reward_std": 0.01}, "rewards are saturated", "stage.num_epochs"),
}


def alarms(**changes: Any) -> Alarms:
    settings = {
        "max_new_tokens": 64,
        "reward_scale": 1.0,
        "kl_coef": 0.1,
        "kl_ceiling": None,
        "learning_rate": 1e-6,
        "value_learning_rate": None,
        "critic_warmup_steps": 0,
        "num_mini_batches": 2,
        "ppo_epochs": 2,
        "rollout_batch_size": 16,
        "vllm_importance_sampling_cap": None,
    }
    return Alarms(PPOStage(**(settings | changes)), planned=20)


@pytest.mark.parametrize(("change", "told", "remedy"), ALARMS.values(), ids=ALARMS)
def test_each_alarm_is_told_once_with_a_remedy(change: dict[str, float], told: str, remedy: str) -> None:
    watch = alarms()
    assert watch(CALM) == []
    [text] = watch(CALM | change)
    assert told in text
    assert remedy in text
    assert watch(CALM | change) == []


def test_a_critic_may_be_bad_for_a_while() -> None:
    watch = alarms()
    bad = CALM | {"explained_variance": -0.2}
    assert [watch(bad) for _ in range(4)] == [[]] * 4
    [text] = watch(bad)
    assert "worse than a constant (explained variance -0.20)" in text
    assert "stage.value_learning_rate=1e-05" in text
    assert [alarms()(numbers) for numbers in [bad, CALM] * 5] == [[]] * 10


STILL = CALM | {"kl": 0.001, "kl_k3": 0.0, "kl_error": 0.002}


def test_a_policy_that_does_not_move_is_told_half_way() -> None:
    watch = alarms()
    assert [watch(STILL) for _ in range(9)] == [[]] * 9
    [text] = watch(STILL)
    assert "after 10 rollouts the policy has not moved" in text
    assert "stage.learning_rate=1e-05" in text
    for moved in (STILL | {"kl_k3": 0.02}, STILL | {"kl": 0.2}, STILL | {"reward": 3.0}):
        watch = alarms()
        assert [watch(STILL) for _ in range(9)] == [[]] * 9
        assert watch(moved) == []
    watch = alarms(critic_warmup_steps=40)
    assert [watch(STILL) for _ in range(10)] == [[]] * 10


@pytest.mark.parametrize(("epochs", "told"), [("2", 1), ("0.5", 0)])
def test_a_run_that_has_learned_nothing_says_so_at_its_end(
    posttrain: Posttrain,
    prompts: str,
    epochs: str,
    told: int,
) -> None:
    """Four rollouts, and one, after which nobody can tell."""
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, "stage.learning_rate=1e-9", f"stage.num_epochs={epochs}")
    assert done.code == 0, done
    assert done.out.count("the policy has not moved") == told
    assert done.out.count("stage.learning_rate=1e-08") == told


def test_a_ceiling_is_an_error() -> None:
    watch = alarms(kl_ceiling=5.0)
    assert watch(CALM | {"kl": 4.9}) == []
    with pytest.raises(PosttrainError, match=r"is 5.10 nats per completion, above stage.kl_ceiling=5;"):
        watch(CALM | {"kl": 5.1})


def test_an_alarm_reaches_the_screen_and_the_log(posttrain: Posttrain, prompts: str) -> None:
    more = ("stage.reward_functions=[my_rewards.short]", "stage.kl_coef=0", "stage.learning_rate=3e-2")
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, *more, "stage.num_epochs=6")
    assert done.code == 0, done
    assert "warning rollout " in done.out
    assert "rollout " in Path("outputs/demo/ppo/run.log").read_text()
    json.loads(Path("outputs/demo/ppo/posttrain.json").read_text())
