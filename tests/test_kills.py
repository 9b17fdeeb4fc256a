"""Each stage is killed at random moments, twenty times, and ends with the weights of a run that nobody touched."""

import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import same_weights, start
from test_launch import command, sources  # noqa: F401  a fixture

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_killed_at_any_moment_it_ends_the_same(sources: Path, stage: str) -> None:  # noqa: F811
    arguments = [*command(stage, "whole"), "stage.batch_size=2", "trainer.save_steps=1"]
    arguments = [each.replace("trainer.max_steps=4", "trainer.max_steps=12") for each in arguments]
    process = start(*arguments, cwd=sources)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    cut = [each.replace("run_name=whole", "run_name=cut") for each in arguments]
    moments = random.Random(stage)
    kills = 0
    while kills < KILLS:
        process = start(*cut, cwd=sources)
        try:
            out, err = process.communicate(timeout=moments.uniform(0.2, 9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, out + err
        # faster than the kill; begin anew, so that there is something to kill
        shutil.rmtree(sources / "outputs/cut")
    process = start(*cut, cwd=sources)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert same_weights(sources / f"outputs/whole/{stage}/model", sources / f"outputs/cut/{stage}/model")
