"""A run can be killed at any moment and ends, started again, with the weights of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    LORA,
    REWARD,
    ROWS,
    Posttrain,
    computed,
    logged,
    manifest,
    once,
    same_weights,
    start,
    wait_for,
    write_rows,
)

from posttrain import configure, run_stage
from posttrain.runs.checkpoint import MANIFEST, fault, newest_whole, rotate

# three epochs, a checkpoint in the middle of each
RUN = (
    "trainer.max_steps=26",
    "trainer.save_steps=4",
    "trainer.logging_steps=1",
    "stage.warmup_steps=2",
    "stage.learning_rate=1e-3",
    "stage.max_length=64",
)
DROPOUT = (*LORA, "model.lora_dropout=0.1")
SFT = Path("outputs/demo/sft")


def arguments(rows: Path, *more: str, steps: int = 26) -> list[str]:
    return [f"data.dataset_name={rows}", f"trainer.max_steps={steps}", *RUN[1:], *more]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has disturbed, made once."""

    def make(folder: Path) -> None:
        run_stage(configure(*arguments(write_rows(folder / "data.jsonl", ROWS)), f"output_dir={folder}"))

    return once(tmp_path_factory, "straight", make) / "demo/sft"


@pytest.mark.parametrize(
    "more", [(), DROPOUT, ("trainer.gradient_accumulation_steps=2",)], ids=["full", "lora", "accumulate"]
)
def test_killed_inside_a_save_and_started_again(
    posttrain: Posttrain, rows: Path, straight: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    if more:
        assert posttrain(*arguments(rows, *more, "output_dir=straight")).code == 0
        straight = Path("straight/demo/sft")
    process = start(*arguments(rows, *more), cwd=tmp_path)
    wait_for(tmp_path / SFT / "checkpoint-12", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (SFT / "posttrain.json").exists()
    assert not (SFT / "model").exists()
    (SFT / "checkpoint-20").mkdir()  # what a kill between two calls leaves
    done = posttrain(*arguments(rows, *more))
    assert done.code == 0, done
    assert "resuming from checkpoint-" in done.out
    assert "do not match" not in done.out + done.err
    assert same_weights(straight / "model", SFT / "model")
    assert [line["step"] for line in computed(SFT) if "loss" in line] == list(range(1, 27))
    assert computed(SFT) == computed(straight)


# a log entry is made of five steps, and checkpoints lie in between; an evaluation falls on some of the checkpoints
LOGS = ("trainer.logging_steps=5", "trainer.save_steps=3", "trainer.eval_steps=6", "stage.batch_size=4")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_the_logs_of_a_killed_run_are_those_of_an_undisturbed_one(
    posttrain: Posttrain, rows: Path, tmp_path: Path, stage: str
) -> None:
    pairs = [
        {"prompt": f"Say {n}.", "chosen": f"{n} it is. " * (n % 3 + 1), "rejected": f"No {n}."} for n in range(1, 41)
    ]
    data = rows if stage == "sft" else write_rows(tmp_path / "pairs.jsonl", pairs)
    command = [*arguments(data, *LOGS, f"stage={stage}", "data.test_size=7")]
    assert posttrain(*command, "output_dir=straight").code == 0
    straight, folder = Path("straight/demo", stage), Path("outputs/demo", stage)
    assert len([line for line in computed(straight) if "loss" in line]) == 5
    for written, number in (("metrics.jsonl", signal.SIGKILL), (f"checkpoint-3/{MANIFEST}", signal.SIGTERM)):
        process = start(*command, cwd=tmp_path)
        wait_for(tmp_path / folder / written, process)
        process.send_signal(number)
        process.communicate()
    assert not (folder / "posttrain.json").exists()
    assert posttrain(*command).code == 0
    assert computed(folder) == computed(straight)
    assert same_weights(straight / "model", folder / "model")
    assert len({json.dumps(line) for line in computed(folder)}) == len(computed(folder))

    (folder / "posttrain.json").unlink()  # killed at the very end: nothing is left to train
    shutil.rmtree(folder / "model")
    assert posttrain(*command).code == 0
    assert computed(folder) == computed(straight)


def test_sigterm_writes_a_checkpoint_and_exits_143(
    posttrain: Posttrain, rows: Path, straight: Path, tmp_path: Path
) -> None:
    process = start(*arguments(rows), cwd=tmp_path)
    wait_for(tmp_path / SFT / "checkpoint-8" / MANIFEST, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, (out, err)
    assert "stopped by SIGTERM at step" in err
    assert "Traceback" not in err
    assert not (SFT / "posttrain.json").exists()
    newest, faults = newest_whole(SFT)
    assert newest is not None
    assert faults == []
    assert f"step {newest.name.removeprefix('checkpoint-')} of 26" in err
    assert posttrain(*arguments(rows)).code == 0
    assert same_weights(straight / "model", SFT / "model")


def test_an_interruption_says_what_it_has_interrupted(rows: Path, tmp_path: Path) -> None:
    process = start(*arguments(rows), "run_name=early", cwd=tmp_path)
    wait_for(tmp_path / "outputs/early/sft/run.log", process)  # the model is loaded next
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "nothing was trained" in err
    process = start(*arguments(rows), cwd=tmp_path)
    wait_for(tmp_path / SFT / "checkpoint-8" / MANIFEST, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    newest, _ = newest_whole(tmp_path / SFT)
    assert newest is not None
    assert f"by a second signal in the middle of a step; {newest.name} is kept" in err


def test_killed_after_the_last_step_and_before_the_end(posttrain: Posttrain, rows: Path, straight: Path) -> None:
    """Nothing is left to train, in the middle of an epoch, too: no further step is taken."""
    shutil.copytree(straight, SFT)
    before = (SFT / "model" / "model.safetensors").read_bytes()
    (SFT / "posttrain.json").unlink()
    shutil.rmtree(SFT / "model")
    done = posttrain(*arguments(rows))
    assert done.code == 0, done
    assert "resuming from checkpoint-26" in done.out
    assert (SFT / "model" / "model.safetensors").read_bytes() == before
    assert manifest(SFT)["metrics"]["steps"] == 26


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(posttrain: Posttrain, rows: Path) -> None:
    short = arguments(rows, steps=2)
    assert posttrain(*short).code == 0
    bad = write_rows(rows.parent / "bad.jsonl", [{"instruction": "a"}])
    done = posttrain(*short, f"data.dataset_name={bad}", "overwrite=true")
    assert done.code == 2, done
    assert (SFT / "posttrain.json").is_file()
    assert (SFT / "model" / "model.safetensors").is_file()


@pytest.fixture
def interrupted(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run that was killed after its second checkpoint."""

    def make(folder: Path) -> None:
        data = write_rows(folder / "data.jsonl", ROWS)
        process = start(*arguments(data, "trainer.save_total_limit=4"), cwd=folder)
        wait_for(folder / SFT / "checkpoint-8" / MANIFEST, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for checkpoint in (folder / SFT).glob("checkpoint-*"):
            if checkpoint.name not in ("checkpoint-4", "checkpoint-8"):
                shutil.rmtree(checkpoint)

    return Path(shutil.copytree(once(tmp_path_factory, "interrupted", make) / SFT, tmp_path / SFT))


BREAKS: dict[str, Callable[[Path], Any]] = {
    "optimizer missing": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "scheduler missing": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "generators missing": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "weights cut": lambda checkpoint: os.truncate(checkpoint / "model.safetensors", 1000),
    "one bit changed": lambda checkpoint: (checkpoint / "trainer_state.json").write_text(
        (checkpoint / "trainer_state.json").read_text().replace("1", "2", 1)
    ),
    "no manifest": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "broken manifest": lambda checkpoint: (checkpoint / MANIFEST).write_text("{"),
    "a manifest of another kind": lambda checkpoint: (checkpoint / MANIFEST).write_text('{"files": {"a": "b"}}'),
    "a list in place of a manifest": lambda checkpoint: (checkpoint / MANIFEST).write_text('{"files": []}'),
}


def test_a_checkpoint_with_any_fault_is_passed_over(interrupted: Path, tmp_path: Path) -> None:
    for number, (name, damage) in enumerate(BREAKS.items()):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(interrupted, copy)
        damage(copy / "checkpoint-8")
        assert fault(copy / "checkpoint-8") is not None, name
        newest, faults = newest_whole(copy)
        assert newest == copy / "checkpoint-4", name
        if name != "no manifest":  # which a checkpoint of ours has from the beginning
            assert faults[0].startswith("checkpoint-8 is not resumed from: "), name


def test_a_broken_checkpoint_is_told_and_the_one_before_it_is_used(
    posttrain: Posttrain, rows: Path, straight: Path, interrupted: Path
) -> None:
    (interrupted / "checkpoint-8" / "optimizer.pt").unlink()
    (interrupted / "checkpoint-999").mkdir()
    (interrupted / "checkpoint-9").mkdir()
    (interrupted / "checkpoint-9" / f"{MANIFEST}.part").touch()  # a kill in the middle of its save
    done = posttrain(*arguments(rows, "trainer.save_total_limit=4"))
    assert done.code == 0, done
    assert (interrupted / "checkpoint-999").is_dir(), "it is not ours"
    assert done.out.count("checkpoint-999") == 1
    assert "checkpoint-8 is not resumed from: optimizer.pt is missing" in done.out
    assert "checkpoint-9 is not resumed from: no checkpoint.json: it was not finished" in done.out
    assert not (interrupted / "checkpoint-9").exists()
    assert "resuming from checkpoint-4" in done.out
    assert same_weights(straight / "model", SFT / "model")


def test_checkpoints_are_rotated_by_step_never_by_the_clock(
    posttrain: Posttrain, rows: Path, interrupted: Path
) -> None:
    """Those of the first start seem to come from tomorrow: the clock was set back, or the folder copied."""
    tomorrow = time.time() + 86400
    for checkpoint in interrupted.glob("checkpoint-*"):
        os.utime(checkpoint, (tomorrow, tomorrow))
    done = posttrain(*arguments(rows, "trainer.save_total_limit=2"))
    assert done.code == 0, done
    assert {path.name for path in interrupted.glob("checkpoint-*")} == {"checkpoint-24", "checkpoint-26"}
    assert "mtime" not in done.out + done.err


def test_folders_that_only_begin_like_a_checkpoint_are_not_looked_at(interrupted: Path) -> None:
    theirs = {"checkpoint-mybackup", "checkpoint-8-copy", "checkpoint-best", "checkpoint-08", "checkpoint-²"}
    for name in theirs:
        shutil.copytree(interrupted / "checkpoint-8", interrupted / name)
    assert newest_whole(interrupted) == (interrupted / "checkpoint-8", [])
    rotate(interrupted, 1, None)
    assert {path.name for path in interrupted.glob("checkpoint-*")} == {*theirs, "checkpoint-8"}
    shutil.copytree(interrupted / "checkpoint-8", interrupted / "checkpoint-4")
    rotate(interrupted, 1, str(interrupted / "checkpoint-4"))  # the best and the newest stay
    assert (interrupted / "checkpoint-4").is_dir()


def test_other_hyperparameters_data_or_weights_are_refused_by_name(
    posttrain: Posttrain, rows: Path, interrupted: Path
) -> None:
    before = sorted(path.name for path in interrupted.iterdir())
    for change, told in (
        ("stage.learning_rate=5e-2", "stage.learning_rate was 0.001, now 0.05"),
        ("+trainer.weight_decay=0.3", "trainer.weight_decay was None, now 0.3"),
        ("seed=7", "seed was 42, now 7"),
        ("model.use_peft=true", "model.use_peft was False, now True"),
    ):
        done = posttrain(*[word for word in arguments(rows) if not word.startswith(change.split("=")[0])], change)
        assert done.code == 2, done
        assert told in done.err
        assert "overwrite=true" in done.err
    write_rows(rows, [{"instruction": "other", "response": f"row {number}"} for number in range(40)])
    done = posttrain(*arguments(rows))
    assert done.code == 2, done
    assert "the rows are not the same" in done.err
    assert sorted(path.name for path in interrupted.iterdir()) == before


def test_a_finished_run_says_so_and_is_not_touched(posttrain: Posttrain, rows: Path) -> None:
    short = arguments(rows, steps=2)
    assert posttrain(*short).code == 0
    written = (SFT / "model" / "model.safetensors").stat().st_mtime_ns
    done = posttrain(*short)
    assert done.code == 0, done
    assert "already complete: " in done.out
    assert (SFT / "model" / "model.safetensors").stat().st_mtime_ns == written
    done = posttrain(*short, "stage.batch_size=2")
    assert done.code == 2, done
    assert "holds a finished run with another configuration (stage.batch_size was 4, now 2)" in done.err
    assert posttrain(*short, "stage.batch_size=2", "overwrite=true").code == 0
    assert (SFT / "model" / "model.safetensors").stat().st_mtime_ns != written


def test_a_folder_of_something_else_is_refused(posttrain: Posttrain, rows: Path) -> None:
    (SFT / "model").mkdir(parents=True)
    (SFT / "model" / "theirs.txt").write_text("theirs")
    done = posttrain(*arguments(rows))
    assert done.code == 2, done
    assert "holds files that are not of one run (model)" in done.err
    assert (SFT / "model" / "theirs.txt").read_text() == "theirs"
    shutil.rmtree("outputs")
    Path("outputs").write_text("a file")
    done = posttrain(*arguments(rows))
    assert done.code == 2, done
    assert "outputs" in done.err


def test_a_second_start_of_a_running_run_is_refused(posttrain: Posttrain, rows: Path) -> None:
    code = (
        f"from filelock import FileLock\nlock = FileLock('{SFT.parent}/.sft.lock')\nlock.acquire()\n"
        "print('held', flush=True)\ninput()"
    )
    SFT.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = posttrain(*arguments(rows))
        other.communicate("\n")
    assert done.code == 1, done
    assert "is in use by another process" in done.err


# what is the first thing above a limit on the size of files, which stands for the full disk
FULL_DISKS = {
    "base": (1_000_000, ()),
    "checkpoint-4": (4_000_000, ()),
    "adapter": (4_000_000, (*DROPOUT, "model.lora_r=500", "trainer.save_strategy=no", "+trainer.optim=sgd")),
}


@pytest.mark.parametrize(("written", "limit", "more"), [(name, *rest) for name, rest in FULL_DISKS.items()])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    rows: Path, tmp_path: Path, written: str, limit: int, more: tuple[str, ...]
) -> None:
    process = start(*arguments(rows, *more), cwd=tmp_path, file_size=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert f" while writing {tmp_path / SFT / written} (" in err
    assert "There is no whole checkpoint" in err
    assert "Traceback" not in err
    assert not (tmp_path / SFT / written).exists()
    assert not list((tmp_path / SFT).glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log"])
def test_logs_on_a_full_disk_end_without_a_traceback(rows: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / SFT / name
    if name == "run.log":  # opened once
        file.parent.mkdir(parents=True)
        file.symlink_to("/dev/full")
    process = start(*arguments(rows), cwd=tmp_path)
    if name == "metrics.jsonl":  # opened for each entry
        wait_for(file, process)
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(file)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (1 if name == "metrics.jsonl" else 0), out + err
    assert ("while writing" in err) == (name == "metrics.jsonl")
    assert "Traceback" not in out + err


PPO = (
    "stage=ppo",
    "data.dataset_name=prompts.jsonl",
    "data.test_size=4",
    "stage.rollout_batch_size=8",
    "stage.batch_size=2",
    "stage.num_mini_batches=2",
    "stage.ppo_epochs=3",
    "stage.max_new_tokens=6",
    "stage.max_length=64",
    "stage.num_epochs=2",
    "stage.learning_rate=1e-3",
    "stage.kl_controller=adaptive",
    "stage.kl_target=0.01",
    "stage.kl_horizon=50",
    REWARD,
    "trainer.save_total_limit=3",
    "trainer.logging_steps=4",
)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_every_file_has_the_mode_that_the_umask_gives(
    posttrain: Posttrain, rows: Path, prompts: str, stage: str
) -> None:
    command = arguments(rows, steps=4) if stage == "sft" else [*PPO, "trainer.save_steps=6", "trainer.max_steps=6"]
    mask = os.umask(0o027)
    try:
        assert posttrain(*command, *DROPOUT).code == 0
    finally:
        os.umask(mask)
    files = [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert {f"{path.parent.name}/{path.name}" for path in files} >= {
        f"{folder}/{name}.safetensors" for folder, name in (("model", "model"), ("adapter", "adapter_model"))
    }
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): "0o640" for path in files}


# 12 prompts and rollouts of 8: 2 rollouts of 6 steps in each of 2 passes; 13 lies inside the third rollout
KILLS = {
    "full, before the first checkpoint": ((), 0),
    "full, between rollouts": ((), 6),
    "full, inside a rollout": ((), 13),
    "full, before the end": ((), 23),
    # its second update is beyond the target, so 14 to 17 are skipped
    "lora, instruction rows and a target, inside a rollout": (
        (*LORA, "data.ptx=data.jsonl", "stage.ptx_coef=0.5", "stage.target_kl=1e-9"),
        15,
    ),
    # KL from the reference, of which the buffer holds log-probabilities, is part of the loss
    "grpo, inside a rollout": (("stage=grpo", "stage.num_generations=4", "trainer.max_steps=24"), 15),
}


@pytest.mark.parametrize(("more", "step"), KILLS.values(), ids=KILLS)
def test_an_online_stage_killed_at_any_step_ends_with_the_same_weights(
    posttrain: Posttrain,
    prompts: str,
    rows: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    more: tuple[str, ...],
    step: int,
) -> None:
    command = [*(PPO[1:] if "stage=grpo" in more else PPO), *more, "trainer.save_steps=1"]
    folder = Path("outputs/demo", "grpo" if "stage=grpo" in more else "ppo")

    def make(folder: Path) -> None:
        assert posttrain(*command, f"output_dir={folder}").code == 0

    straight = once(tmp_path_factory, f"straight-ppo-{len(more)}", make) / "demo" / folder.name
    process = start(*command, cwd=tmp_path)
    written = f"checkpoint-{step}/{MANIFEST}" if step else "metrics.jsonl"
    wait_for(tmp_path / folder / written, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (tmp_path / folder / "posttrain.json").exists():
        pytest.fail("the run had ended before it was killed")
    done = posttrain(*command)
    assert done.code == 0, done
    assert ("resuming from checkpoint-" in done.out) == (step > 0)
    assert same_weights(straight / "model", folder / "model")
    assert computed(folder) == computed(straight)
    assert (folder / "rollouts.jsonl").read_text() == (straight / "rollouts.jsonl").read_text()


def test_a_model_is_evaluated_once_in_each_state(posttrain: Posttrain, prompts: str, tmp_path: Path) -> None:
    """Before the first step, when it is due, and not again after the last step nor in a resumed run."""
    (tmp_path / "my_rewards.py").write_text(
        (tmp_path / "my_rewards.py").read_text()
        + "def counted(trainer_state, completions, **columns):\n"
        + "    with open('calls.txt', 'a') as file:\n"
        + "        file.write(f'{trainer_state.global_step}\\n')\n"
        + "    return [float(len(each[0]['content'])) for each in completions]\n"
    )
    sys.modules.pop("my_rewards", None)
    command = (*PPO, "stage.eval_reward_functions=[my_rewards.counted]", "trainer.save_steps=6")
    command = (*command, "trainer.eval_strategy=steps", "trainer.eval_steps=6", "trainer.max_steps=12")
    assert posttrain(*command).code == 0
    folder, calls = Path("outputs/demo/ppo"), tmp_path / "calls.txt"
    assert calls.read_text().split() == ["0", "6", "12"]
    undisturbed, samples = computed(folder), (folder / "samples.json").read_text()
    evaluated = [line["eval_reward"] for line in undisturbed if "eval_reward" in line]
    assert [undisturbed[-1]["reward_before"], undisturbed[-1]["reward"]] == [evaluated[0], evaluated[-1]]
    for steps, more in ((12, []), (6, ["12"])):
        calls.write_text("")
        (folder / "posttrain.json").unlink()
        shutil.rmtree(folder / "model")
        for checkpoint in folder.glob("checkpoint-*"):
            if int(checkpoint.name.removeprefix("checkpoint-")) > steps:
                shutil.rmtree(checkpoint)
        assert posttrain(*command).code == 0
        assert calls.read_text().split() == more
        assert computed(folder) == undisturbed
        assert (folder / "samples.json").read_text() == samples


def test_an_epochs_last_checkpoint_holds_what_is_logged_once_an_epoch(posttrain: Posttrain, rows: Path) -> None:
    """Nine steps an epoch: killed right after the checkpoint at the end of one, and of the last one."""
    by_epoch = ("trainer.eval_strategy=epoch", "+trainer.logging_strategy=epoch", "trainer.save_steps=9")
    command = arguments(rows, *by_epoch, "stage.num_epochs=3", steps=-1)
    assert posttrain(*command).code == 0
    undisturbed = computed(SFT)
    assert [(line["step"], "loss" in line) for line in undisturbed[1:7]] == [
        (step, is_loss) for step in (9, 18, 27) for is_loss in (True, False)
    ]
    for step in (27, 18):
        (SFT / "posttrain.json").unlink()
        shutil.rmtree(SFT / "model")
        for checkpoint in SFT.glob("checkpoint-*"):
            if checkpoint.name > f"checkpoint-{step}":
                shutil.rmtree(checkpoint)
        done = posttrain(*command)
        assert done.code == 0, done
        assert f"resuming from checkpoint-{step}" in done.out
        assert computed(SFT) == undisturbed


def test_an_evaluation_that_a_signal_has_put_off_is_made_after_the_resume(
    posttrain: Posttrain, prompts: str, tmp_path: Path
) -> None:
    """SIGTERM comes in the rollout after step 6, and the evaluation is due after step 7."""
    command = (*PPO, "trainer.save_steps=30", "trainer.eval_strategy=steps", "trainer.eval_steps=7")
    assert posttrain(*command, "output_dir=straight").code == 0
    (tmp_path / "my_rewards.py").write_text(
        (tmp_path / "my_rewards.py").read_text()
        + "import os, pathlib, signal\n"
        + "def even_and_stop(trainer_state, **columns):\n"
        + "    if trainer_state.global_step == 6 and not pathlib.Path('stopped').exists():\n"
        + "        pathlib.Path('stopped').touch()\n"
        + "        os.kill(os.getpid(), signal.SIGTERM)\n"
        + "    return even(**columns)\n"
    )
    sys.modules.pop("my_rewards")
    stopping = [word.replace("my_rewards.even", "my_rewards.even_and_stop") for word in command]
    assert posttrain(*stopping).code == 143
    assert [path.name for path in Path("outputs/demo/ppo").glob("checkpoint-*")] == ["checkpoint-7"]
    assert posttrain(*stopping).code == 0
    assert computed(Path("outputs/demo/ppo")) == computed(Path("straight/demo/ppo"))


BEST = (
    *("trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.eval_steps=4"),
    *("trainer.save_steps=4", "trainer.lr_scheduler_type=constant", "trainer.greater_is_better=false"),
)
# stage -> (its command, a metric that is lowest in the beginning, and its name in the manifest)
BEST_OF = {
    "sft": (("data.dataset_name=data.jsonl", *RUN, "stage.learning_rate=0.3"), "eval_loss", "eval_loss"),
    "ppo": ((*PPO, *DROPOUT, "stage.eval_reward_functions=[my_rewards.even]"), "eval_gold/even", "gold/even"),
}


@pytest.mark.parametrize("stage", BEST_OF)
def test_the_best_checkpoint_is_the_result_after_a_kill_too(
    posttrain: Posttrain, rows: Path, prompts: str, stage: str
) -> None:
    command, metric, name = BEST_OF[stage]
    command = (*command, *BEST, f"trainer.metric_for_best_model={metric}")
    done = posttrain(*command)
    assert done.code == 0, done
    folder = Path("outputs/demo", stage)
    lines = logged(folder)
    values = {line["step"]: line[metric] for line in lines if metric in line and line["step"] > 0}
    best = min(values, key=lambda step: values[step])
    assert f"the result is the best checkpoint: checkpoint-{best}, {metric}" in done.out
    assert best < max(values), "the last checkpoint is the best: this shows nothing"
    assert manifest(folder)["metrics"][name] == pytest.approx(values[best])

    (folder / "posttrain.json").unlink()
    shutil.move(folder / "model", "straight")
    done = posttrain(*command)
    assert done.code == 0, done
    assert same_weights(Path("straight"), folder / "model")

    (folder / "posttrain.json").unlink()
    (folder / f"checkpoint-{best}" / "model.safetensors").write_bytes(b"")
    done = posttrain(*command)
    assert done.code == 1, done
    assert f"checkpoint-{best} was the best checkpoint and cannot be loaded" in done.err


def test_early_stopping_goes_on_waiting_after_a_resume(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    """The best evaluation is the one after step 4; two worse ones end the run at step 12, interrupted or not."""
    command, metric, _ = BEST_OF["sft"]
    waits = (*command, *BEST, "trainer.early_stopping_patience=2")
    wrong = posttrain(*waits, "trainer.metric_for_best_model=eval_los", "run_name=wrong")
    assert wrong.code == 2, wrong
    assert "trainer.metric_for_best_model=eval_los is none of the held-out numbers" in wrong.err
    waits = (*waits, f"trainer.metric_for_best_model={metric}")
    done = posttrain(*waits, "output_dir=straight")
    assert done.code == 0, done
    straight = Path("straight/demo/sft")
    steps = manifest(straight)["metrics"]["steps"]
    assert steps == 12
    assert "ended early, at step 12 of 26: no better eval_loss came" in done.out

    process = start(*waits, cwd=tmp_path)
    wait_for(Path("outputs/demo/sft/checkpoint-8/checkpoint.json"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert posttrain(*waits).code == 0
    assert manifest(SFT)["metrics"]["steps"] == 12
    assert same_weights(straight / "model", SFT / "model")

    (SFT / "posttrain.json").unlink()  # killed before it was called finished
    done = posttrain(*waits)
    assert done.code == 0, done
    assert manifest(SFT)["metrics"]["steps"] == 12
