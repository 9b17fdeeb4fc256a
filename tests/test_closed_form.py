"""The optimum is known, and training through the real entry point reaches it."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_dpo_and_the_reward_model_reach_what_they_must(tmp_path: Path) -> None:
    import closed_form

    found = closed_form.prove(tmp_path)
    for point in found["dpo"]:
        assert point["kl_to_optimum_before"] > 5 * closed_form.KL_LIMIT
        assert point["kl_to_optimum"] <= closed_form.KL_LIMIT, point
    assert found["reward_model"]["correlation"] >= closed_form.CORRELATION_LIMIT
    assert found["reward_model"]["order_recovered"]
    closed_form.draw(found, tmp_path / "closed_form.png")
    assert (tmp_path / "closed_form.png").stat().st_size > 10_000
