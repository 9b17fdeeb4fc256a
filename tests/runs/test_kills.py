"""Each stage is killed at random moments, fifty times, and ends with the weights of a run that nobody touched.

On one process, and on two, which end together with what has launched them.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import command, launched, same_weights, start

KILLS = 50
STEPS = 30


def newest(folder: Path) -> int:
    """The step of the last whole checkpoint."""
    return max((int(path.parent.name[11:]) for path in folder.glob("checkpoint-*/checkpoint.json")), default=0)


def family(process: int) -> list[int]:
    """A process and what it has started: torch's launcher puts each of its processes into a session of its own."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in children for each in family(int(child)))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "kto", "grpo"])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_it_ends_the_same(sources: Path, processes: int, stage: str) -> None:
    begin = start if processes == 1 else launched
    arguments = [*command(stage, "whole"), "stage.batch_size=2", "trainer.save_steps=1"]
    arguments = [each.replace("trainer.max_steps=4", f"trainer.max_steps={STEPS}") for each in arguments]
    process = begin(*arguments, cwd=sources)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    cut = [each.replace("run_name=whole", "run_name=cut") for each in arguments]
    folder = sources / "outputs/cut" / stage
    moments = random.Random(stage)
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        reached = newest(folder)
        process = begin(*cut, cwd=sources)
        if killed.total() % 4:  # three of four once it trains, the fourth at any time
            while newest(folder) == reached and process.poll() is None:
                time.sleep(0.01)
        try:
            out, err = process.communicate(timeout=moments.uniform(0, 1.5 if killed.total() % 4 else 9 * processes))
        except subprocess.TimeoutExpired:
            for each in family(process.pid):
                os.kill(each, signal.SIGKILL)
            process.communicate()
            step = newest(folder)
            killed["training" if reached < step < STEPS else "starting" if step == reached < STEPS else "ending"] += 1
            continue
        assert process.returncode == 0, out + err
        # faster than the kill; begin anew, so that there is something to kill
        shutil.rmtree(sources / "outputs/cut")
    print(processes, stage, dict(killed))
    assert killed["training"] >= KILLS // 4
    process = begin(*cut, cwd=sources)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert same_weights(sources / f"outputs/whole/{stage}/model", folder / "model")
