"""`accelerate=`: signals and lost processes as the launcher tells them, and runs that go on on other processes."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    SHORT_PIPELINE,
    Outcome,
    Posttrain,
    command,
    ended,
    logged,
    manifest,
    read_rows,
    start,
    wait_for,
    weights,
)
from forked import Forked

# 32 rows to train on, which both two processes and one divide into batches of two
STEPS = ("stage.batch_size=2", "data.test_size=8", "trainer.max_steps=20")
EACH = "trainer.save_steps=1"


def two(*words: str, cwd: Path) -> Forked:
    """A run on two processes, begun by `accelerate=`."""
    return start("accelerate=cpu2", *words, cwd=cwd, new_session=True)


def stopped(folder: Path, stage: str, *more: str, number: int = signal.SIGTERM, group: bool = False) -> Outcome:
    """A run on two processes that a signal to its launcher, or to the launcher's group, has ended."""
    process = two(*command(stage, "cut", *STEPS, EACH, *more), cwd=folder)
    wait_for(folder / f"outputs/cut/{stage}/checkpoint-2/checkpoint.json", process)
    os.killpg(process.pid, number) if group else os.kill(process.pid, number)
    return ended(process)


def apart(folder: Path, stage: str) -> float:
    """The largest difference between the weights of the runs `cut` and `whole`, in units of each tensor's largest."""
    first, second = (weights(folder / f"outputs/{name}/{stage}/model") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    found = max(float((value - second[name]).abs().max() / value.abs().max()) for name, value in first.items())
    print(f"{stage}: weights within {found:.1e}")
    return found


def test_a_run_stopped_on_two_processes_goes_on_on_one(posttrain: Posttrain, sources: Path) -> None:
    done = stopped(sources, "sft")
    assert done.code == 128 + signal.SIGTERM, done
    assert "accelerate: cpu2, 2 processes" in done.out
    assert done.err.count("stopped by SIGTERM at step") == 1, done
    assert "the checkpoint is written, and the same command goes on from it" in done.err
    assert "stopped by SIGTERM, and so were its processes" in done.err
    again = posttrain(*command("sft", "cut", *STEPS))
    assert again.code == 0, again
    assert "resuming from checkpoint-" in again.out
    assert "gradient_accumulation_steps=2 instead of 1 keeps the rows of each update" in again.out
    assert posttrain(*command("sft", "whole", *STEPS, "trainer.gradient_accumulation_steps=2")).code == 0
    assert apart(sources, "sft") < 1e-6
    left, right = (logged(sources / f"outputs/{name}/sft") for name in ("whole", "cut"))
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for one, other in zip(left, right, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-4)
    complete = posttrain(*command("sft", "cut", *STEPS))
    assert "already complete" in complete.out, complete


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "bound"), [("sft", 1e-6), ("reward", 1e-6), ("dpo", 1e-6), ("kto", 1e-3)])
def test_a_run_killed_on_one_process_goes_on_on_two(
    posttrain: Posttrain, sources: Path, stage: str, bound: float
) -> None:
    """KTO's estimate of KL is one for the batches of both processes, and one for each batch of a single process."""
    accumulated = "trainer.gradient_accumulation_steps=2"
    process = start(*command(stage, "cut", *STEPS, EACH, accumulated), cwd=sources)
    wait_for(sources / f"outputs/cut/{stage}/checkpoint-2/checkpoint.json", process)
    process.kill()
    process.wait()
    again = ended(two(*command(stage, "cut", *STEPS, accumulated), cwd=sources))
    assert again.code == 0, again
    assert "gradient_accumulation_steps=1 instead of 2" in again.out
    assert posttrain(*command(stage, "whole", *STEPS, accumulated)).code == 0
    assert apart(sources, stage) < bound


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_pairs_go_on_on_one_process(posttrain: Posttrain, sources: Path, stage: str) -> None:
    done = stopped(sources, stage, number=signal.SIGINT, group=True)
    assert done.code == 128 + signal.SIGINT, done
    assert "stopped by SIGINT at step" in done.err
    again = posttrain(*command(stage, "cut", *STEPS))
    assert again.code == 0, again
    assert "resuming from checkpoint-" in again.out
    assert "gradient_accumulation_steps=2 instead of 1" in again.out
    assert posttrain(*command(stage, "whole", *STEPS, "trainer.gradient_accumulation_steps=2")).code == 0
    assert apart(sources, stage) < 1e-6


@pytest.mark.slow
def test_numbers_of_processes_that_do_not_fit_are_named(sources: Path, posttrain: Posttrain) -> None:
    assert stopped(sources, "sft", "trainer.train_sampling_strategy=group_by_length").code == 143
    for more in ("", "accelerate.num_processes=3"):
        words = command("sft", "cut", *STEPS, "trainer.train_sampling_strategy=group_by_length")
        wrong = ended(two(*words, more, cwd=sources)) if more else posttrain(*words)
        assert wrong.code == 2, wrong
        assert wrong.err.count("go on with accelerate.num_processes=2, or start over") == 1, wrong
    assert (sources / "outputs/cut/sft/checkpoint-2").is_dir(), "nothing was touched"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("model.use_peft=true",)], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rollouts_go_on_on_one_process(posttrain: Posttrain, sources: Path, stage: str, more: tuple[str, ...]) -> None:
    """The rollout at hand is the old processes'; the next prompts are those of an undisturbed run."""
    done = stopped(sources, stage, *more)
    assert done.code == 143, done
    before = read_rows(sources / f"outputs/cut/{stage}/rollouts.jsonl")
    again = posttrain(*command(stage, "cut", *STEPS, *more))
    assert again.code == 0, again
    assert "num_processes was 2 at first: its rollout is shared out among 1" in again.out
    rollouts = read_rows(sources / f"outputs/cut/{stage}/rollouts.jsonl")
    assert rollouts[: len(before)] == before
    assert posttrain(*command(stage, "whole", *STEPS, *more)).code == 0
    whole = read_rows(sources / f"outputs/whole/{stage}/rollouts.jsonl")
    assert [(line["step"], line["prompt"]) for line in rollouts] == [(line["step"], line["prompt"]) for line in whole]
    assert manifest(sources / f"outputs/cut/{stage}")["metrics"]["steps"] == 20


@pytest.mark.slow
def test_a_lost_process_is_named(sources: Path) -> None:
    (sources / "my_rewards.py").write_text(
        "import os, signal\n"
        "def vowels(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [1.0 for _ in completions]\n"
    )
    done = ended(two(*command("ppo", "lost", "stage.batch_size=2"), cwd=sources))
    assert done.code == 1, done
    assert "process 1 of 2 was killed by SIGKILL (often: no memory left)" in done.err
    assert "rank      : 1 (local_rank: 1)" in done.err, "torch's table"


@pytest.mark.slow
def test_a_pipeline_on_two_processes_in_one_command(sources: Path) -> None:
    words = (*SHORT_PIPELINE, "accelerate=cpu2", "stages=[sft,dpo]", "trainer.max_steps=2")
    done = ended(start(*words, cwd=sources, module="posttrain.pipeline"))
    assert done.code == 0, done
    assert done.out.count("× 2 devices") == done.out.count("[1 of 2] sft") + done.out.count("[2 of 2] dpo") == 2
    refused = ended(start("-m", *words, "dpo.beta=0.1,0.3", cwd=sources, module="posttrain.pipeline"))
    assert refused.code == 2
    assert "posttrain run -m stage=dpo" in refused.err


@pytest.mark.slow
def test_the_slurm_script_asks_for_its_job_again_and_goes_on(sources: Path) -> None:
    """With commands of Slurm's that start the one process of one machine here, and write down what is asked of them."""
    stubs = sources / "bin"
    stubs.mkdir()
    for name, body in {
        "srun": 'shift\nexec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$ASKED"; fi',
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod((stubs / name).stat().st_mode | stat.S_IEXEC)
    environment = {
        **os.environ,
        **{"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "ASKED": str(sources / "asked.txt")},
        **{"SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "0"},
        **{"SLURM_JOB_ID": "7"},
    }
    words = ["bash", str(ROOT / "recipes/launch.slurm"), *command("sft", "cut", *STEPS, EACH), "accelerate=cpu2"]
    with (sources / "job.txt").open("w") as output:
        job = subprocess.Popen(words, cwd=sources, env=environment, stdout=output, stderr=output)
        end = time.monotonic() + 120
        while not (sources / "outputs/cut/sft/checkpoint-2/checkpoint.json").exists():
            assert job.poll() is None, (sources / "job.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        # as Slurm does, to the processes that srun has started, and not to the script
        [step] = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(step), signal.SIGTERM)
        assert job.wait(120) == 143, (sources / "job.txt").read_text()
    assert (sources / "asked.txt").read_text() == "requeue 7\n"
    again = subprocess.run(words, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoint-" in again.stdout
