"""The optimum is known, and training through the real entry point reaches it."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_every_stage_reaches_what_it_must(tmp_path: Path) -> None:
    import closed_form

    found = closed_form.prove(tmp_path)
    for point in found["dpo"]:
        assert point["kl_to_optimum_before"] > 5 * closed_form.KL_LIMIT
        assert point["kl_to_optimum"] <= closed_form.KL_LIMIT, point
    assert found["reward_model"]["correlation"] >= closed_form.CORRELATION_LIMIT
    assert found["reward_model"]["order_recovered"]
    found["ppo"] = closed_form.prove_ppo(tmp_path)
    assert len(found["ppo"]["points"]) == 10
    for point in found["ppo"]["points"]:
        assert point["J_best"] - point["J_before"] > 20 * closed_form.J_LIMIT, point
        assert point["J_best"] - point["J"] <= closed_form.J_LIMIT, point
        assert point["kl_to_optimum"] <= closed_form.PPO_KL_LIMIT, point
    closed_form.draw(found, tmp_path / "closed_form.png")
    assert (tmp_path / "closed_form.png").stat().st_size > 10_000
