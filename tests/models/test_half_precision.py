"""Weights in bfloat16, quantised or not, with float32 or bfloat16 around them: every stage starts, learns and saves."""

from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import QLORA, Posttrain, manifest
from transformers import TrainingArguments

from posttrain.models.generate import half_weights
from posttrain.runs.sharding import keep_output_dtype

PPO = (
    *("stage.reward_functions=[my_rewards.length]", "stage.max_new_tokens=8"),
    *("stage.rollout_batch_size=8", "stage.batch_size=2"),
)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize(
    "stage", ["sft", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "dpo"))]
)
def test_qlora_in_bfloat16(posttrain: Posttrain, tmp_path: Path, stage: str, precision: str) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(completion_ids, **columns):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    done = posttrain(
        *(f"recipes=quickstart/{stage}", "trainer.max_steps=2", "data.max_rows=40", f"precision={precision}"),
        *("model.dtype=bfloat16", "stage.max_length=64", *QLORA, *(PPO if stage == "ppo" else ())),
    )
    assert done.code == 0, done
    assert manifest(f"outputs/demo/{stage}")["metrics"]["steps"] == 2


def test_weights_come_back_from_half_precision() -> None:
    model, given = torch.nn.Linear(3, 2), TrainingArguments("unused", bf16=True, use_cpu=True, report_to=[])
    before = [(weight.data_ptr(), weight.detach().clone()) for weight in model.parameters()]
    with half_weights(model, given, shards=False):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert not given.bf16  # so that TRL casts nothing itself
    assert given.bf16
    for weight, (place, content) in zip(model.parameters(), before, strict=True):
        assert weight.data_ptr() == place
        assert torch.equal(weight, content)


def test_fsdp2_rounds_no_outputs() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_output_dtype(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)
