"""Ten pipelines in one process, and a sweep of thirty points: memory, threads and open files stay what they were."""

import gc
import os
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import SHORT_PIPELINE, Posttrain
from test_sweeps import PPO, complete, prompts  # noqa: F401  a fixture

MIB = 2**20


def held() -> tuple[float, int, int]:
    """Resident MiB, threads and open files of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(list(Path("/proc/self/fd").iterdir()))
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB, threading.active_count(), files


def told(when: str, mebibytes: float, threads: int, files: int) -> None:
    print(f"{when}: {mebibytes:.0f} MiB, {threads} threads, {files} files")


@pytest.mark.slow
def test_ten_pipelines_in_one_process(pipeline: Posttrain) -> None:
    found = []
    for number in range(10):
        done = pipeline(*SHORT_PIPELINE, f"run_name=soak{number}")
        assert done.code == 0, done
        found.append(held())
    for number, state in enumerate(found):
        told(f"after pipeline {number + 1}", *state)
    (warm, *counts), (end, *last) = found[3], found[-1]
    assert end - warm < 80  # six pipelines; one alone holds some hundred MiB while it runs
    assert last == counts


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["process", "basic"])
def test_a_sweep_of_thirty_points(posttrain: Posttrain, prompts: Path, launcher: str) -> None:  # noqa: F811
    sweep = partial(posttrain, "-m", *PPO, f"hydra/launcher={launcher}")
    first = sweep("stage.max_new_tokens=3,4", "run_name=warm")
    assert first.code == 0, first
    before = held()
    rates = ",".join(f"{number}e-7" for number in range(1, 31))
    done = sweep("stage.max_new_tokens=3", f"stage.learning_rate={rates}")
    assert done.code == 0, done
    assert len(complete(prompts)) == 30
    after = held()
    told("before", *before)
    told("after", *after)
    assert after[0] - before[0] < 80
    assert after[1:] == before[1:]
