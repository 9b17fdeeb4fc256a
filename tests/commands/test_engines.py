"""Every stage under FSDP2, ZeRO-2 and ZeRO-3 on two CPU processes: DDP's weights, exact resume, one whole model.

`pytest -m slow -n 0 tests/commands/test_engines.py` prints the table; the lines of DeepSpeed need it installed.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    LORA,
    ROOT,
    STAGES,
    Posttrain,
    command,
    computed,
    ended,
    manifest,
    once,
    read_rows,
    same_weights,
    start,
    weights,
    write_sources,
)

LORA_MODE = (*LORA, "model.lora_dropout=0")
MODES: dict[str, tuple[str, ...]] = {"full": (), "lora": LORA_MODE, "head": ("stage.critic=head",)}
# after which step a run is cut off; 4 is the last one
STOPS = {"sft": 4, "reward": 2, "dpo": 2, "ppo": 2, "kto": 2, "grpo": 2}
# checkpoints of TRL's trainers are the engine's own files, and PPO's under FSDP the weights that it trains
WEIGHTS = {"model.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp.bin", "global_step4"}


def launch(engine: str, folder: Path, tasks: list[dict[str, Any]], precision: str = "no") -> list[dict[str, Any]]:
    """Run the tasks one after the other in two processes, under a shipped configuration."""
    shipped = yaml.safe_load((ROOT / f"accelerate_configs/{engine}.yaml").read_text())
    file, todo = folder / f"{engine}.yaml", folder / f"{engine}.json"
    file.write_text(yaml.safe_dump(shipped | {"mixed_precision": precision, "num_processes": 2, "use_cpu": True}))
    todo.write_text(json.dumps(tasks))
    words = ("--config_file", str(file), "--main_process_port", "0", str(ROOT / "tests/engines.py"), str(todo))
    started = start(*words, cwd=folder, module="accelerate.commands.launch", new_session=True)
    done = ended(started, timeout=900)
    assert done.code == 0, done
    found = [read_rows(f"{todo}.{process}") for process in (0, 1)]
    for task, *both in zip(tasks, *found, strict=True):
        for each in both:
            assert f"stopped after step {task['stop']}" in each["said"] if task["stop"] else not each["said"], each
    saved = sum(not task["stop"] for task in tasks)
    assert done.out.count("saved model: reloaded") == saved
    return found[0]


def needs_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install --no-build-isolation deepspeed")


def stages_of(mode: str) -> tuple[str, ...]:
    return ("ppo",) if mode == "head" else (*STAGES, "kto", "grpo")


def run(stage: str, mode: str, name: str, stop: int = 0) -> dict[str, Any]:
    more = ("stage.batch_size=2", "trainer.save_steps=1", *MODES[mode])
    return {"overrides": command(stage, f"{mode}-{name}", *more), "stop": stop}


def whole_and_cut(mode: str) -> list[dict[str, Any]]:
    """Of each stage an undisturbed run, one that is cut off, and what continues it."""
    tasks = []
    for stage in stages_of(mode):
        tasks += [run(stage, mode, "whole"), run(stage, mode, "cut", STOPS[stage]), run(stage, mode, "cut")]
    return tasks


@pytest.fixture
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs under DDP, made once."""

    def make(folder: Path) -> None:
        write_sources(folder)
        launch("cpu2", folder, [run(stage, mode, "ddp") for mode in MODES for stage in stages_of(mode)])

    return once(tmp_path_factory, "engines", make) / "outputs"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_every_stage_under_every_engine(engine: str, mode: str, sources: Path, ddp: Path, capsys: Any) -> None:
    needs_deepspeed(engine)
    tasks = whole_and_cut(mode)
    found = launch(engine, sources, tasks)
    if engine == "fsdp2":  # the layers, and what is around them
        assert min(each["units"] for each in found[::3]) > 2
    for stage in stages_of(mode):
        other, whole, cut = (
            folder / f"{mode}-{name}" / stage
            for folder, name in ((ddp, "ddp"), (sources / "outputs", "whole"), (sources / "outputs", "cut"))
        )
        first, second, base = weights(other / "model"), weights(whole / "model"), weights(whole / "base")
        assert first.keys() == second.keys()  # tied weights once
        apart = max(float((first[name] - second[name]).abs().max()) for name in first)
        moved = max(float((first[name] - base[name]).abs().max()) for name in first if name in base)
        with capsys.disabled():
            print(f"\n{engine} {stage} {mode}: trains, {apart:.1e} from DDP after {moved:.1e}", end="")
        assert apart < 1e-5
        assert moved > 20 * apart
        numbers, others = manifest(whole)["metrics"], manifest(other)["metrics"]
        assert numbers.keys() == others.keys()
        for name in numbers.keys() - {"tokens_per_second"}:
            assert numbers[name] == pytest.approx(others[name], rel=1e-3, abs=1e-4), name
        assert len(WEIGHTS & {path.name for path in (whole / "checkpoint-4").iterdir()}) == 1
        assert same_weights(whole / "model", cut / "model")
        assert computed(whole) == computed(cut)
        with capsys.disabled():
            print(", resumes bit for bit, saves a whole model", end="")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_every_stage_in_the_precision_of_the_shipped_files(engine: str, mode: str, sources: Path) -> None:
    needs_deepspeed(engine)
    more = ("trainer.eval_strategy=steps", "trainer.eval_steps=1")
    tasks = whole_and_cut(mode)
    for task in tasks:
        task["overrides"] += more
    launch(engine, sources, tasks, precision="bf16")
    for stage in stages_of(mode):
        whole, cut = (sources / f"outputs/{mode}-{name}" / stage for name in ("whole", "cut"))
        assert manifest(whole)["metrics"]["steps"] == 4
        assert same_weights(whole / "model", cut / "model")
        assert computed(whole) == computed(cut)


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("dpo", "trainer.precompute_ref_log_probs=true"),
        ("sft", "model.use_peft=true model.lora_init_weights=pissa"),
        ("ppo", "stage.micro_batch_tokens=512"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    stage: str, wrong: str, posttrain: Posttrain, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    done = posttrain(*command(stage, "wrong", *wrong.split()))
    assert done.code == 2, done
    assert f"{wrong.split()[-1].removesuffix('=512')} does not work under DeepSpeed; leave it out" in done.err


@pytest.mark.slow
def test_torchrun_does_what_accelerate_does(sources: Path, ddp: Path) -> None:
    words = run("ppo", "full", "torchrun")["overrides"]
    options = ("--standalone", "--nproc_per_node", "2", "-m", "posttrain.run")
    done = ended(start(*options, *words, cwd=sources, module="torch.distributed.run", new_session=True))
    assert done.code == 0, done
    assert "× 2 devices" in done.out
    one, other = sources / "outputs/full-torchrun/ppo", ddp / "full-ddp/ppo"
    assert same_weights(one / "model", other / "model")
    assert computed(one) == computed(other)
