"""The forwards of an update: who stands beside whom, what is padded or packed, and that gradients do not notice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REWARD, SHORT_PPO, Posttrain
from transformers import TrainerCallback

from posttrain.models.generate import by_length
from posttrain.rlhf import losses
from posttrain.rlhf.ppo import PPOTrainer
from posttrain.rlhf.rollout import RolloutBuffer, laid_out, spread
from posttrain.rlhf.rollout_plan import episode_order, packing_pays, split

TWO = {
    "prompt_ids": [[9, 5, 6], [2, 3, 4]],
    "prompt_mask": [[0, 1, 1], [1, 1, 1]],
    "completion_ids": [[7, 8], [5, 9]],
    "completion_mask": [[1, 1], [1, 0]],
}


def test_two_episodes_by_hand() -> None:
    buffer = RolloutBuffer(**{name: torch.tensor(rows) for name, rows in TWO.items()}, **_nothing())
    assert buffer.lengths == [4, 4]
    padded, packed = laid_out(buffer), laid_out(buffer, packed=True)
    assert padded["input_ids"].tolist() == [[9, 5, 6, 7, 8], [2, 3, 4, 5, 9]]
    assert padded["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert padded["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    assert padded["picked"].tolist() == [3, 4, 8]
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 2, 3, 4, 5]]
    assert packed["attention_mask"] is None
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert packed["picked"].tolist() == [2, 3, 7]
    assert spread(torch.tensor([0.1, 0.2, 0.3]), buffer.completion_mask).tolist() == [
        pytest.approx([0.1, 0.2]),
        pytest.approx([0.3, 0.0]),
    ]


def _nothing() -> dict[str, torch.Tensor]:
    return dict.fromkeys(("logps", "values", "advantages", "returns"), torch.empty(0))


def test_batches_of_like_lengths() -> None:
    assert by_length([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    assert by_length([3, 9, 4, 9, 1], 2, [4, 0, 3]) == [[3, 0], [4]]


def test_forwards_have_room_for_their_tokens() -> None:
    def never(lengths: Sequence[int]) -> bool:
        return False

    def always(lengths: Sequence[int]) -> bool:
        return True

    lengths = [10, 8, 4, 3, 2, 2]
    assert split([0, 1, 2, 3, 4, 5], lengths, 20, never) == [[0, 1], [2, 3, 4, 5]]
    assert split([0, 1, 2, 3, 4, 5], lengths, 18, never) == [[0], [1, 2], [3, 4, 5]]
    assert split([0, 1, 2, 3, 4, 5], lengths, 18, always) == [[0, 1], [2, 3, 4, 5]]
    assert split([0, 1, 2, 3], lengths, 100, always, least=3) == [[0], [1], [2, 3]]  # another process has three
    assert split([4, 5], lengths, 100, always) == [[4, 5]]


def test_packing_saves_padding_and_pays_in_attention() -> None:
    # 30 · (6·16 + 30) = 3,780 for one row; 2 · 20 · (6·16 + 20) = 4,640 for two
    assert packing_pays([20, 10], 16, quadratic=True)
    # 38 · (96 + 38) = 5,092, but 38 · (96 + 20) = 4,408 where attention sees each sequence alone
    assert not packing_pays([20, 18], 16, quadratic=True)
    assert packing_pays([20, 18], 16, quadratic=False)
    assert not packing_pays([20, 20], 16, quadratic=False)  # there is no padding


class Compare(TrainerCallback):
    """Before each optimizer step, the gradients of a mini-batch as one padded batch in the order of its drawing."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.worst, self.shapes = trainer, [], set()

    def on_train_begin(self, *_: Any, **more: Any) -> None:
        def watch(_: Any, given: Any, options: Any) -> None:
            if torch.is_grad_enabled():
                self.shapes.add(tuple(options["input_ids"].shape))

        self.trainer.model.register_forward_pre_hook(watch, with_kwargs=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer, plan, stage = self.trainer, self.trainer.plan, args.stage
        number, within = divmod(state.global_step, plan.steps_per_rollout)
        each, mini = divmod(within, plan.mini_batches)
        size = plan.per_process // plan.mini_batches
        order = episode_order(plan, args.seed, number, each, 0)[mini * size : (mini + 1) * size]
        part, both = trainer._buffer.take(order), trainer.model
        mask, width = part.completion_mask, part.completion_mask.size(1)
        ids = torch.cat([part.prompt_ids, part.completion_ids], 1)
        attention = torch.cat([part.prompt_mask, mask], 1)
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(-1) - 1).clamp(0)}
        every = both.policy(**inputs).logits[:, -width - 1 : -1].log_softmax(-1)
        logps = every.gather(-1, part.completion_ids[..., None])[..., 0]
        trunk = both.policy.base_model if both.value.on_policy else both.value.trunk
        values = both.value.head(trunk(**inputs).last_hidden_state)[:, -width - 1 : -1, 0]
        policy = losses.policy_loss(logps, part.logps, part.advantages, mask, stage.clip_ratio).loss
        value = losses.value_loss(values, part.values, part.returns, mask, stage.cliprange_value)
        loss = (policy.sum() + stage.vf_coef * value.sum()) / mask.sum()
        weights = [weight for weight in both.parameters() if weight.requires_grad]
        for weight, wanted in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if wanted is not None:
                self.worst.append(float((weight.grad - wanted).abs().max()))


PATHS = {
    "packed by tokens": (("stage.batch_size=4", "stage.micro_batch_tokens=64"), True),
    "padded, head": (("stage.batch_size=2", "stage.critic=head", "stage.value_learning_rate=1e-2"), False),
}


@pytest.mark.parametrize(("more", "packs"), PATHS.values(), ids=PATHS)
def test_gradients_are_those_of_one_padded_batch(
    posttrain: Posttrain, prompts: str, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], packs: bool
) -> None:
    build, found = PPOTrainer.__init__, []

    def watched(self: Any, **options: Any) -> None:
        build(self, **options)
        found.append(Compare(self))
        self.add_callback(found[0])

    monkeypatch.setattr(PPOTrainer, "__init__", watched)
    if not packs:
        monkeypatch.setattr("posttrain.rlhf.online.packing_pays", lambda *_: False)
    short = (*SHORT_PPO, REWARD, "stage.num_epochs=1", "trainer.max_grad_norm=0", "data.test_size=0", "precision=fp32")
    done = posttrain("stage=ppo", prompts, *short, "stage.vf_coef=0.5", *more)
    assert done.code == 0, done
    assert "in updates they are packed where that takes less work" in done.out
    assert len(found[0].worst) >= 8 * 20
    assert max(found[0].worst) < 1e-6
    head = "stage.critic=head" in more
    assert ("critic = a new head on the policy's own hidden states" in done.out) == head
    assert ("2 models in memory" if head else "3 models in memory") in done.out
    rows = {shape[0] for shape in found[0].shapes}
    assert (1 in rows) == packs
    if "stage.micro_batch_tokens=64" in more:
        assert all(tokens * row <= 64 for row, tokens in found[0].shapes)
    assert Path("outputs/demo/ppo/posttrain.json").is_file()
