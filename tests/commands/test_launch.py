"""Several processes: the same result as one, one folder, one voice; and the shipped accelerate configurations."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from conftest import (
    LORA,
    ROOT,
    SHORT_PIPELINE,
    Outcome,
    Posttrain,
    command,
    computed,
    ended,
    launched,
    logged,
    manifest,
    wait_for,
    weights,
)
from filelock import FileLock

from posttrain import evaluate
from posttrain.cli.command import configure
from posttrain.config.accelerate import accelerate_config
from posttrain.errors import ConfigError

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NO_DROPOUT = (*LORA, "model.lora_dropout=0")


SEVERAL = """
import json, sys
from posttrain import run
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        run.main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def several(folder: Path, *commands: list[str]) -> Outcome:
    """Several runs in one launch, as a pipeline has them."""
    (folder / "several.py").write_text(SEVERAL)
    return ended(launched(json.dumps(commands), cwd=folder, module="several"))


def check_agreement(posttrain: Posttrain, folder: Path, *runs: tuple[str, tuple[str, ...]]) -> None:
    """Four rows an update in one process, and two in each of two: the same losses and weights."""
    two = several(folder, *(command(stage, "two", "stage.batch_size=2", *more) for stage, more in runs))
    assert two.code == 0, two
    assert "find_unused_parameters" not in two.err
    assert two.out.count("device: cpu") == two.out.count("saved model: reloaded") == len(runs)
    assert two.out.count("× 2 devices = 4") == len(runs)
    for stage, more in runs:
        one = posttrain(*command(stage, "one", "stage.batch_size=4", *more))
        assert one.code == 0, one
        left, right = (folder / "outputs" / name / stage for name in ("one", "two"))
        expected = {path.name for path in left.iterdir()}
        assert {path.name for path in right.iterdir()} == expected
        first, second = weights(left / "model"), weights(right / "model")
        start = weights(left / "base")
        apart = max(float((weight - second[name]).abs().max()) for name, weight in first.items())
        moved = max(float((weight - start[name]).abs().max()) for name, weight in first.items() if name in start)
        assert apart < 1e-6
        assert moved > 20 * apart
        for a, b in zip(logged(left), logged(right), strict=True):
            assert a.keys() == b.keys()
            for name in a:  # seven held-out rows: the last of them are read by both processes
                if name in ("loss", "grad_norm") or name.startswith("eval_"):
                    assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (a["step"], name)
        found, other = (manifest(folder)["metrics"] for folder in (left, right))
        assert {"eval_rows", "eval_loss_before", "eval_loss"} <= found.keys() == other.keys()
        for name in found.keys() - {"tokens_per_second"}:
            assert found[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
        if "samples.json" in expected:
            assert (left / "samples.json").read_text() == (right / "samples.json").read_text()


def test_two_processes_learn_what_one_learns(posttrain: Posttrain, sources: Path) -> None:
    check_agreement(posttrain, sources, ("sft", ()), ("dpo", ()), ("reward", NO_DROPOUT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", NO_DROPOUT), ("reward", ()), ("dpo", NO_DROPOUT), ("dpo", ("trainer.precompute_ref_log_probs=true",))],
    ids=["sft lora", "reward full", "dpo lora", "dpo precomputed"],
)
def test_every_way_of_training(posttrain: Posttrain, sources: Path, stage: str, more: tuple[str, ...]) -> None:
    check_agreement(posttrain, sources, (stage, more))


def interrupted(stage: str, folder: Path, *more: str) -> None:
    """Killed with its second checkpoint written, started again: weights and logs of an undisturbed run, bit for bit."""
    arguments = ("stage.batch_size=2", "trainer.save_steps=1", "trainer.logging_steps=3", *more)
    cut, whole = (command(stage, name, *arguments) for name in ("cut", "whole"))
    longer = launched(*cut, cwd=folder)
    wait_for(folder / f"outputs/cut/{stage}/checkpoint-2/checkpoint.json", longer)
    os.killpg(longer.pid, signal.SIGKILL)
    longer.communicate()
    with FileLock(folder / f"outputs/cut/.{stage}.lock", timeout=60):
        pass  # the launcher's children end a moment later
    again = several(folder, cut, whole)
    assert again.code == 0, again
    assert "find_unused_parameters" not in again.err
    assert "resuming from checkpoint-" in again.out or "already complete" in again.out, again
    first, second = (weights(folder / f"outputs/{name}/{stage}/model") for name in ("whole", "cut"))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert computed(folder / f"outputs/whole/{stage}") == computed(folder / f"outputs/cut/{stage}")


# the last two of a rollout's four updates are skipped
CONTROLS = ("data.ptx=rows.jsonl", "stage.ptx_coef=0.5", "stage.target_kl=1e-9", "stage.ppo_epochs=2")


def test_ppo_on_two_processes_resumes(posttrain: Posttrain, sources: Path) -> None:
    interrupted("ppo", sources, *NO_DROPOUT, *CONTROLS)
    # rollouts are other ones in one process; what is held out is sampled and scored alike
    assert posttrain(*command("ppo", "one", "trainer.max_steps=1", *NO_DROPOUT)).code == 0
    one, two = (manifest(sources / f"outputs/{name}/ppo")["metrics"] for name in ("one", "whole"))
    before = {name for name in one if name.endswith("_before")}
    assert {"reward_before", "kl_before", "response_length_before"} <= before
    assert {name: one[name] for name in before} == pytest.approx({name: two[name] for name in before}, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "kto", "grpo"])
def test_every_stage_resumes(sources: Path, stage: str) -> None:
    interrupted(stage, sources)


def test_a_failure_is_told_once_and_ends_all(sources: Path) -> None:
    wrong = ended(launched(*command("sft", "wrong", "stage.lerning_rate=1"), cwd=sources))
    assert wrong.code != 0
    assert wrong.err.count("did you mean stage.learning_rate?") == 1, wrong
    # one process alone fails in the middle of the run; the other waits for it in a collective
    (sources / "my_rewards.py").write_text(
        "import os\n"
        "def vowels(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('no vowels today')\n"
        "    return [1.0 for _ in completions]\n"
    )
    alone = ended(launched(*command("ppo", "alone", "stage.batch_size=2"), cwd=sources))
    assert alone.code != 0
    assert "process 1 of 2" in alone.err
    assert "no vowels today" in alone.err


@pytest.mark.slow
def test_a_pipeline_on_two_processes(sources: Path, entry: Posttrain) -> None:
    done = ended(
        launched(*SHORT_PIPELINE, "ppo.batch_size=16", "trainer.max_steps=2", cwd=sources, module="posttrain.pipeline")
    )
    assert done.code == 0, done
    assert done.out.count("[4 of 4] dpo") == done.out.count("report: outputs/demo/report.html") == 1
    found = json.loads((sources / "outputs/demo/evaluation.json").read_text())
    assert [each["policy"] for each in found] == [f"outputs/demo/{stage}" for stage in ("sft", "ppo", "dpo")]
    # one process says the same of these policies
    alone = ("policies=[outputs/demo/sft,outputs/demo/dpo]", "recipes=quickstart/ppo", "run_name=alone")
    scored = ("reward_model=outputs/demo/reward", "max_new_tokens=8", "data.max_rows=200")
    again = entry(evaluate.main, *alone, *scored)
    assert again.code == 0, again
    repeated = json.loads((sources / "outputs/alone/evaluation-prompts.json").read_text())
    assert repeated[1]["answers"] == found[2]["answers"]
    assert repeated[1]["metrics"]["kl"] == pytest.approx(found[2]["metrics"]["kl"], rel=1e-4)
    assert repeated[1]["scores"]["reward"] == pytest.approx(found[2]["scores"]["reward"], rel=1e-4)


def test_sweeps_are_refused_under_accelerate(sources: Path) -> None:
    done = ended(launched("-m", *command("sft", "sweep"), "stage.batch_size=1,2", cwd=sources))
    assert done.code != 0
    assert "python -m posttrain.run -m stage=sft" in done.err
    assert "accelerate=<name or file>" in done.err
    nested = ended(launched("accelerate=cpu2", *command("sft", "nested"), cwd=sources))
    assert nested.code != 0
    assert nested.err.count("accelerate=cpu2 inside accelerate launch or torchrun would start processes") == 1, nested


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_every_accelerate_config_is_what_accelerate_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    content = yaml.safe_load(file.read_text())
    config = load_config_from_file(str(file))  # refuses unknown keys, but none that is nested
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(section, {})) <= known, f"{section}: accelerate would not read all of it"
    assert config.num_processes == {"single_gpu": 1, "cpu2": 2, "multi_node": 16}.get(file.stem, 8)
    args, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(file), "--main_process_port", "0", "x.py"])
    )
    if file.stem == "single_gpu":
        assert not args.multi_gpu
        return
    assert args.multi_gpu or args.use_fsdp or args.use_deepspeed, "one process would be started"
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(content["deepspeed_config"])  # as its launcher does
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if args.use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
    if args.use_deepspeed:
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file.stem[-1]


def test_what_accelerate_names_is_read_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> str:
        with pytest.raises(ConfigError) as error:
            configure("data.dataset_name=rows", *words)
        return str(error.value)

    assert "accelerate=cpu is neither a file nor one of" in told("accelerate=cpu")
    assert "did you mean cpu2?" in told("accelerate=cpu")
    assert "did you mean num_processes?" in told("accelerate=ddp", "accelerate.num_proceses=2")
    assert "fsdp_offload_params?" in told("accelerate=fsdp2", "accelerate.fsdp_config.fsdp_offload_param=true")
    assert "needs accelerate=<cpu2|" in told("accelerate.num_processes=2")
    for name in ("cp", "tp", "sp"):
        key = f"accelerate.parallelism_config.parallelism_config_{name}_size"
        assert f"{key} must be 1" in told("accelerate=fsdp2", f"{key}=2")
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")  # as accelerate launch sets it
        assert f"{key} must be 1" in told()
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE")

    for value, wrong in {
        "num_processes=two": "num_processes=two must be a number",
        "num_processes=0": "num_processes=0 must be a number",
        "num_processes=1.5": "num_processes=1.5 must be",
        "mixed_precision=bf61": "did you mean bf16",
        "distributed_type=MULTI_CPU": "distributed_type=MULTI_CPU is not one of",
        "distributed_type=NO": "is one process, and num_processes=2",
        "fsdp_config=3": "fsdp_config=3 must hold keys",
        "use_cpu=si": "use_cpu=si must be true or false",
    }.items():
        assert wrong in told("accelerate=cpu2", f"accelerate.{value}")
    odd = tmp_path / "odd.yaml"
    for text in ("- a", "num_processes: ${nothing}", "num_processes: 2", "distributed_type: ["):
        odd.write_text(text)
        assert f"accelerate={odd}" in told(f"accelerate={odd}")

    def processes(*words: str) -> int:
        found: int = accelerate_config(configure("data.dataset_name=rows", *words).accelerate)["num_processes"]
        return found

    own = tmp_path / "own.yaml"
    shutil.copy(ROOT / "accelerate_configs/ddp.yaml", own)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert processes("accelerate=ddp") == processes(f"accelerate={own}") == 4
    assert processes("accelerate=ddp", "accelerate.num_processes=2") == 2
    assert processes("accelerate=cpu2") == 2
    assert processes("accelerate=multi_node") == 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(16))))
    assert (processes("accelerate=ddp"), processes(f"accelerate={own}")) == (16, 8)
