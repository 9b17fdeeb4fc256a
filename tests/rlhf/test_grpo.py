"""GRPO: advantages within groups by hand; on one batch, advantages, losses and gradients are TRL's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Posttrain, write_rows
from trl import GRPOConfig, RLOOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl import RLOOTrainer as TRLRLOOTrainer

from posttrain.config.stages import GRPOStage
from posttrain.errors import ConfigError
from posttrain.rlhf import losses
from posttrain.rlhf.grpo import GRPOTrainer
from posttrain.rlhf.rollout_plan import RolloutPlan, plan_rollouts, prompts_of_rollout

GRPO = "outputs/demo/grpo"
SHORT = (
    *("stage.rollout_batch_size=8", "stage.num_generations=4", "stage.batch_size=8", "stage.ppo_epochs=2"),
    *("stage.max_new_tokens=6", "stage.max_length=64", "stage.learning_rate=1e-2", "stage.missing_eos_penalty=0"),
    *("trainer.logging_steps=1", "trainer.save_strategy=no", "data.test_size=0", "precision=fp32"),
    "stage.reward_functions=[my_rewards.even]",
)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    spread = losses.group_spread(rewards, 4)
    assert spread.tolist() == pytest.approx([math.sqrt(8 / 3)] * 4 + [0.0] * 4)
    plain = losses.group_advantages(rewards, 4, leave_one_out=False, spread=None)
    assert plain.tolist() == [-2, 0, 2, 0, 0, 0, 0, 0]
    for reward in (7.3, 250.7, 123456.79):  # whose mean is rounded
        same, deviation = torch.full((8,), reward), losses.group_spread(torch.full((8,), reward), 8)
        assert not losses.group_advantages(same, 8, leave_one_out=False, spread=deviation).any()
    others = losses.group_advantages(rewards, 4, leave_one_out=True, spread=None)
    assert others.tolist() == pytest.approx([1 - 11 / 3, 3 - 9 / 3, 5 - 7 / 3, 3 - 9 / 3, 0, 0, 0, 0])
    scaled = losses.group_advantages(rewards, 4, leave_one_out=False, spread=spread)
    assert scaled.tolist() == pytest.approx(
        [-2 / (math.sqrt(8 / 3) + 1e-4), 0, 2 / (math.sqrt(8 / 3) + 1e-4)] + [0] * 5
    )


def test_prompts_stand_as_often_as_they_are_completed() -> None:
    plan = RolloutPlan(6, 8, 8, 1, 1, 1, 8, 2, group=2)
    found = [prompts_of_rollout(plan, 42, number) for number in range(3)]
    assert all(row[::2] == row[1::2] for row in found)
    assert sorted(prompt for row in found for prompt in row[::2]) == sorted([*range(6), *range(6)])


def test_a_prompts_completions_stay_together() -> None:
    stage = GRPOStage(rollout_batch_size=12, num_mini_batches=1, batch_size=2, ppo_epochs=1, num_generations=4)
    assert plan_rollouts(stage, 7, 1).rollouts_per_epoch == 3
    with pytest.raises(ConfigError, match=r"stage\.num_generations=4.*stage\.rollout_batch_size=16"):
        plan_rollouts(stage, 7, 2)


# ours and theirs
ALGORITHMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dapo": (("stage.clip_ratio_high=0.28",), {"epsilon_high": 0.28}),
    "grpo": (("stage.loss_type=grpo", "stage.dual_clip=1.5"), {"loss_type": "grpo", "delta": 1.5}),
    "dr_grpo": (
        ("stage.loss_type=dr_grpo", "stage.scale_rewards=none"),
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "grpo, batch": (
        ("stage.loss_type=grpo", "stage.scale_rewards=batch"),
        {"loss_type": "grpo", "scale_rewards": "batch"},
    ),
    "rloo": (("stage.loss_type=rloo", "stage.scale_rewards=none"), {}),
}


def theirs(base: torch.nn.Module, tokenizer: Any, name: str, options: dict[str, Any], rollout: Any, reward: Any) -> Any:
    """TRL's trainer, whose generation gives a rollout that is there already."""
    trainer, config = (TRLRLOOTrainer, RLOOConfig) if name == "rloo" else (TRLGRPOTrainer, GRPOConfig)

    class Given(trainer):  # type: ignore[misc, valid-type]
        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            asked, said = (
                [row[mask.bool()].tolist() for row, mask in zip(rows, masks, strict=True)]
                for rows, masks in (
                    (rollout.prompt_ids, rollout.prompt_mask),
                    (rollout.completion_ids, rollout.completion_mask),
                )
            )
            texts = [[{"role": "assistant", "content": text}] for text in self._tokenizer.batch_decode(said)]
            if name == "rloo":
                return asked, said, texts
            return asked, said, None, texts, None, {}, None, None

    from datasets import Dataset

    arguments = config(
        output_dir="theirs",
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_iterations=2,
        max_completion_length=6,
        beta=0.3,
        temperature=1.0,
        disable_dropout=True,
        bf16=False,
        report_to="none",
        use_cpu=True,
        **options,
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "1"}]}] * 8)
    return Given(model=base, args=arguments, reward_funcs=[reward], train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(("more", "options"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_advantages_losses_and_gradients_are_trls(
    posttrain: Posttrain,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    more: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    from transformers import AutoModelForCausalLM

    name = request.node.callspec.id
    compute, found = GRPOTrainer._compute_loss, []
    generate = GRPOTrainer._generate

    def of_different_lengths(self: Any, asked: Any) -> Any:
        prompt_ids, said, texts = generate(self, asked)
        return prompt_ids, [ids[: 2 + at % 5] for at, ids in enumerate(said)], texts

    def compared(self: Any, model: Any, inputs: Any) -> torch.Tensor:
        loss: torch.Tensor = compute(self, model, inputs)
        if self.state.global_step == 1:  # the policy has moved away from the one that sampled
            policy = self.model.policy
            base = AutoModelForCausalLM.from_pretrained(f"{GRPO}/base")
            other = theirs(base, self._tokenizer, name, options, self._buffer, self.reward_funcs[0])
            before = other._generate_and_score_completions(list(other.train_dataset))
            other.model.load_state_dict(policy.state_dict())
            other.model.train()
            other.current_gradient_accumulation_steps = 1
            wanted = other._compute_loss(other.model, before)
            wanted.backward()
            grads = dict(other.model.named_parameters())
            ours = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True, allow_unused=True)
            apart = [
                float((grad - grads[each].grad).abs().max())
                for (each, _), grad in zip(policy.named_parameters(), ours, strict=True)
                if grad is not None
            ]
            advantages = self._buffer.advantages[:, 0]
            found.append((float(loss), float(wanted), advantages, before["advantages"], max(apart)))
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compared)
    monkeypatch.setattr(GRPOTrainer, "_generate", of_different_lengths)
    # of one length: TRL counts padding on the left among GPT-2's positions (TRL 1.16)
    write_rows(Path("prompts.jsonl"), [{"prompt": f"Say {number}."} for number in range(8)])
    done = posttrain("stage=grpo", prompts, *SHORT, "stage.kl_coef=0.3", "trainer.max_steps=2", *more)
    assert done.code == 0, done
    [(loss, wanted, advantages, their_advantages, apart)] = found
    assert abs(loss) > 1e-3
    assert loss == pytest.approx(wanted, abs=1e-6)
    assert float(advantages.abs().max()) > 0.1
    assert torch.allclose(advantages, their_advantages, atol=1e-6)
    assert apart < 1e-6
    assert Path(GRPO, "posttrain.json").is_file()
