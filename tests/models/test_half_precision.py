"""Weights in bfloat16, quantised or not, with float32 or bfloat16 around them: every stage starts, learns and saves."""

from pathlib import Path

import pytest
from conftest import QLORA, Posttrain, manifest

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
