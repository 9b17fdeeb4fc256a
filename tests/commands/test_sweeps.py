"""Sweeps: a process for each point, failures that stay alone, skipped points, shared GPUs, accelerate, and Slurm."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Posttrain, manifest, start, wait_for, write_rows
from hydra.core.plugins import Plugins

from hydra_plugins.posttrain_launcher import share_out
from posttrain.cli.sweep import _values
from posttrain.devices import visible_gpus

REWARDS = """
import os, pathlib
def short(prompts, completions, completion_ids, **columns):
    longest = max(map(len, completion_ids))
    with open(f"seen-{os.getpid()}.txt", "a") as file:
        names = ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
        print(longest, *(os.environ.get(name) or None for name in names), os.getpid(), file=file)
    if longest == 6:
        raise ValueError("six is too many")
    if longest == 7:
        os.kill(os.getpid(), 9)
    return [float(-longest + index) for index in range(len(completion_ids))]
"""
PPO = (
    *("stage=ppo", "data.dataset_name=prompts.jsonl", "stage.max_length=64", "data.test_size=0"),
    *("stage.reward_functions=[my_rewards.short]", "stage.rollout_batch_size=8", "stage.num_mini_batches=1"),
    *("stage.batch_size=4", "stage.ppo_epochs=1", "trainer.max_steps=1"),
    "model.model_name_or_path=posttrain/tiny",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"What is {n}?"} for n in range(24)])
    return tmp_path


def seen(folder: Path) -> list[list[str]]:
    lines = []
    for file in sorted(folder.glob("seen-*.txt")):
        lines += [line.split() for line in file.read_text().splitlines()]
        file.unlink()
    return lines


def complete(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("outputs/demo/ppo/*/posttrain.json")}


def test_points_fail_alone_and_finished_ones_are_skipped(posttrain: Posttrain, prompts: Path) -> None:
    done = posttrain("-m", *PPO, "stage.max_new_tokens=6,7,4")
    assert done.code == 1, done
    assert complete(prompts) == {"stage.max_new_tokens=4"}
    assert "stage.max_new_tokens=6 failed with exit code 1" in done.err
    assert "stage.max_new_tokens=7 was killed by SIGKILL" in done.err
    assert "six is too many" in done.err
    processes = {line[3] for line in seen(prompts)}
    assert len(processes) == 3, "each point is a process"
    assert str(os.getpid()) not in processes

    again = posttrain("-m", *PPO, "stage.max_new_tokens=4,3")
    assert again.code == 0, again
    assert "stage.max_new_tokens=4: already complete, and nothing has changed" in again.out
    assert {line[0] for line in seen(prompts)} == {"3"}
    rows = [line for line in again.out.splitlines() if "complete" in line or "not finished" in line]
    assert sum("│ complete" in line for line in rows) == 2, "the table has the points of both sweeps"
    # other prompts: the point is not the same any more, and says so itself
    write_rows(prompts / "prompts.jsonl", [{"prompt": f"Who is {n}?"} for n in range(24)])
    changed = posttrain("-m", *PPO, "stage.max_new_tokens=4,3")
    assert changed.code == 1
    assert "rows are not the same" in changed.err


@pytest.mark.slow
def test_gpus_are_shared_out_and_the_objective_reaches_hydras_sweeper(
    posttrain: Posttrain, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective is what an optimising sweeper such as Optuna's reads."""
    Plugins.instance()  # it imports all plugins once more
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweep, objectives = BasicSweeper.sweep, []

    def kept(self: Any, arguments: Any) -> Any:
        returns = sweep(self, arguments)
        objectives.extend(each.return_value for batch in returns for each in batch)
        return returns

    monkeypatch.setattr(BasicSweeper, "sweep", kept)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_gpus() == ["4", "5", "6", "7"]
    done = posttrain("-m", *PPO, "stage.max_new_tokens=3,4", "hydra.launcher.n_jobs=2", "data.test_size=8")
    assert done.code == 0, done
    assert "2 points, 2 at a time, 2 GPUs each" in done.out
    assert {line[1] for line in seen(prompts)} == {"4", "6"}
    assert "[stage.max_new_tokens=3] " in done.out
    points = [manifest(prompts / f"outputs/demo/ppo/stage.max_new_tokens={n}") for n in (3, 4)]
    assert objectives == [point["metrics"]["penalised_reward"] for point in points]


def test_share_out() -> None:
    assert share_out([], 2) == [[], []]
    assert share_out(["0", "1", "2", "3"], 2) == [["0", "1"], ["2", "3"]]
    assert share_out(["0", "1"], 3) == [["0"], ["1"], ["0"]]


def test_a_swept_list_is_one_value(tmp_path: Path) -> None:
    mixture = "[{name:a.jsonl,weight:1},{name:b.jsonl,weight:2}]"
    assert _values(tmp_path / f"stage.beta=0.1,data.mixture={mixture}") == {
        "stage.beta": "0.1",
        "data.mixture": mixture,
    }


@pytest.mark.slow
def test_each_point_under_accelerate(posttrain: Posttrain, prompts: Path) -> None:
    done = posttrain("-m", *PPO, "stage.max_new_tokens=3", "accelerate=cpu2")
    assert done.code == 0, done
    assert {tuple(line[:3]) for line in seen(prompts)} == {("3", "None", "2")}


def test_a_wrong_accelerate_is_told_before_the_points(posttrain: Posttrain, prompts: Path) -> None:
    wrong = posttrain("-m", *PPO, "stage.max_new_tokens=3,4", "accelerate=cpu")
    assert wrong.code == 2
    assert "did you mean cpu2?" in wrong.err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_every_point_with_a_checkpoint(prompts: Path, number: signal.Signals) -> None:
    long = [argument for argument in PPO if not argument.startswith("trainer.max_steps")]
    sweep = ("-m", *long, "trainer.max_steps=500", "stage.max_new_tokens=4,5", "hydra.launcher.n_jobs=2")
    process = start(*sweep, cwd=prompts)
    for tokens in (4, 5):
        wait_for(prompts / f"outputs/demo/ppo/stage.max_new_tokens={tokens}/rollouts.jsonl", process)
    children = {int(line[3]) for line in seen(prompts)}
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    for tokens in (4, 5):
        assert list((prompts / f"outputs/demo/ppo/stage.max_new_tokens={tokens}").glob("checkpoint-*/checkpoint.json"))


@pytest.mark.slow
def test_points_as_jobs_of_submitit(posttrain: Posttrain, prompts: Path) -> None:
    """What queues points on Slurm, here with processes in place of its jobs."""
    done = posttrain("-m", *PPO, "stage.max_new_tokens=3,4", "hydra/launcher=submitit_local")
    assert done.code == 0, done
    assert complete(prompts) == {"stage.max_new_tokens=3", "stage.max_new_tokens=4"}
    assert str(os.getpid()) not in {line[3] for line in seen(prompts)}
