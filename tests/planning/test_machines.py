"""Plans for machines that are not here: from a config.json alone, shared out as an engine does, with the time."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Posttrain, ended, start, write_rows

from posttrain import configure, paths
from posttrain.config.accelerate import accelerate_config
from posttrain.config.machines import bytes_of
from posttrain.config.schema import Config
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.planning.advice import changes, cheapest, words
from posttrain.planning.machines import machine_of
from posttrain.planning.memory import MemoryPlan, plan_memory

LAYERS, WIDTH, TOKENS = 3, 128, 916  # of posttrain/tiny
TINY = "model.model_name_or_path=posttrain/tiny"


def configured(*overrides: str) -> Config:
    return configure(
        TINY, "dry_run=true", *(word.replace("accelerate=", "accelerate.config_file=") for word in overrides)
    )


def plan(config: Config, longest: int = 64) -> MemoryPlan:
    return plan_memory(config, load_tokenizer(config.model)[0], longest, 16)


def test_sizes() -> None:
    assert (bytes_of("80GiB"), bytes_of("22.5 GiB"), bytes_of("80GB")) == (80 * 2**30, 45 * 2**29, 80 * 10**9)
    for wrong in ("80", "80 gigabytes", "0GiB"):
        with pytest.raises(ConfigError, match="must be a size such as 80GiB"):
            bytes_of(wrong)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"plan.device=h10 is not one of .*; did you mean h100\?"):
        configured("plan.device=h10")
    with pytest.raises(ConfigError, match=r"plan.devices is for a dry run, .*: add dry_run=true"):
        configure("plan.devices=8")
    with pytest.raises(ConfigError, match=r"plan.memory=80 must be a size"):
        configured("plan.memory=80")
    with pytest.raises(ConfigError, match="precision=fp32 contradicts mixed_precision=bf16"):
        machine_of(configured("accelerate=ddp", "precision=fp32"))


def test_the_machine() -> None:
    machine = machine_of(configured("plan.devices=4", "plan.device=h100"))
    assert (machine.devices, machine.memory, machine.tflops, machine.precision) == (4, 80 * 2**30, 989, "bf16")
    machine = machine_of(configured("plan.device=h100", "plan.memory=40GiB", "plan.tflops=100", "precision=fp32"))
    assert (machine.devices, machine.memory, machine.tflops, machine.precision) == (1, 40 * 2**30, 100, "no")
    # the data sheet's peak is not that of float32
    assert machine_of(configured("plan.device=h100", "precision=fp32")).tflops is None
    assert machine_of(configured("accelerate=zero2", "accelerate.mixed_precision=fp16")).precision == "fp16"


def test_shared_out_by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(*overrides: str) -> tuple[float, float, float]:
        machine = machine_of(configured("plan.devices=4", *overrides))
        return machine.weights, machine.gradients, machine.optimizer

    assert shares() == shares("accelerate=ddp") == (1, 1, 1)
    assert shares("accelerate=zero2") == (1, 1 / 4, 1 / 4)
    assert shares("accelerate=zero3") == shares("accelerate=fsdp2") == (1 / 4, 1 / 4, 1 / 4)
    assert shares("accelerate=fsdp2", "accelerate.fsdp_config.fsdp_offload_params=true") == (0, 0, 0)
    offloaded = "accelerate.deepspeed_config.offload_optimizer_device=cpu"
    assert shares("accelerate=zero2", offloaded) == (1, 1 / 4, 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch says it
    assert shares() == (1 / 4, 1 / 4, 1 / 4)


def test_a_devices_share_by_hand() -> None:
    numbers = LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + (TOKENS + 512) * WIDTH + 2 * WIDTH
    single = ("plan.devices=2", "precision=fp32", "accelerate.mixed_precision='no'")
    ddp = plan(configured("accelerate=ddp", *single)).parts
    assert (ddp["weights"], ddp["optimizer"], ddp["buckets of DDP"]) == (4 * numbers, 8 * numbers, 4 * numbers)
    fsdp = plan(configured("accelerate=fsdp2", *single)).parts
    assert (fsdp["weights"], fsdp["optimizer"]) == (2 * numbers, 4 * numbers)
    zero = plan(configured("accelerate=zero2", "plan.devices=2")).parts  # weights in bf16, a copy of them in float32
    assert (zero["weights"], zero["optimizer"]) == (2 * numbers, 6 * numbers)


def test_operations_by_hand() -> None:
    found = plan(configured("stage=sft", "precision=fp32"))
    attention = LAYERS * 4 * 64 * WIDTH  # queries by keys, and weights by values, of 64 positions
    assert (
        found.forward == 2 * LAYERS * 12 * WIDTH**2 + 2 * TOKENS * WIDTH * 63 / 64 + attention
    )  # the last has no next
    assert 2 * found.forward <= found.backward <= 2.5 * found.forward  # of weights and of inputs, attention once more
    recomputing = plan(configured("stage=sft", "precision=fp32", "trainer.gradient_checkpointing=true"))
    # but for the last product of each layer
    assert recomputing.backward == found.backward + LAYERS * 2 * 8 * WIDTH**2 + attention
    adapters = plan(configured("stage=sft", "precision=fp32", "model.use_peft=true"))
    assert adapters.backward < 0.75 * found.backward


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("stage.batch_size=8",), "stage.batch_size=4 trainer.gradient_accumulation_steps=2"),
        (("stage.batch_size=1",), "trainer.gradient_checkpointing=true"),
        (("stage.batch_size=1", "plan.devices=4"), "accelerate=zero2"),
        (
            ("stage.batch_size=1", "trainer.gradient_checkpointing=true", "trainer.optim=adamw_8bit"),
            "model.use_peft=true",
        ),
    ],
    ids=["batch", "recomputing", "zero2", "lora"],
)
def test_the_cheapest_change_that_fits(overrides: tuple[str, ...], named: str) -> None:
    """In just as much memory as the change needs."""
    config = configured("plan.tflops=1", *overrides)
    memory, found = plan(configured("plan.tflops=1", *overrides, *named.split())).peak, {}

    def peak(other: Config) -> int:
        key = words(config, other)
        found[key] = found[key] if key in found else plan(other).peak
        return found[key]

    changed = cheapest(config, peak, memory)
    assert changed is not None
    assert words(config, changed) == named
    assert memory < peak(config)
    assert cheapest(config, lambda other: 10**6, 1000) is None


def test_engines_keep_the_precision() -> None:
    config = configured("precision=fp32", "stage.batch_size=1", "plan.devices=4")
    shared = [words(config, changed) for what, changed in changes(config) if what.startswith("shared out")]
    assert shared == [f"accelerate={name} accelerate.mixed_precision=no" for name in ("zero2", "fsdp2")]
    assert machine_of(configured("precision=fp32", "plan.devices=4", *shared[0].split())).precision == "no"


def test_a_model_of_which_there_is_no_more_than_its_config(posttrain: Posttrain, tmp_path: Path) -> None:
    """The documented command, for a Llama of 2 billion parameters."""
    model = tmp_path / "llama"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.TINY / name, model)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    where = (f"model.model_name_or_path={model}", "dry_run=true", "plan.devices=8", "plan.device=h100")
    done = posttrain("recipes=quickstart/sft", "data.max_rows=60", "accelerate=fsdp2", *where)
    assert done.code == 0, done
    assert "per device × 1 accumulation × 8 devices" in done.out
    assert "of 80.00 GiB on h100" in done.out
    assert "does not fit" not in done.out
    assert "on 8 × h100 at 40% of its 989 TFLOPS (plan.mfu)" in done.out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu2", "fsdp2", "zero2"])
def test_measured_in_two_processes(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random GPT-2 of 124 million parameters in float32; each process is within a tenth of its plan."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'posttrain[deepspeed]'")
    nothing = {"n_embd": 8, "n_head": 1, "n_layer": 1, "vocab_size": 1000}
    for name, shape in {"gpt2": {}, "nothing": nothing}.items():
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=1)).save_pretrained(
            tmp_path / name
        )
        load_tokenizer(configured().model)[0].save_pretrained(tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say {n}.", "response": "word " * 100} for n in range(24)])
    keys = {"config_file": engine, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(accelerate_config(keys)))
    short = ("stage.batch_size=2", "data.test_size=0", "trainer.eval_strategy=no", "trainer.save_strategy=no")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back at once
    options = ("--config_file", str(file), "--main_process_port", "29655", str(ROOT / "tests/peaks.py"), str(tmp_path))
    done = ended(start(*options, *short, cwd=tmp_path, module="accelerate.commands.launch"), timeout=900)
    assert done.code == 0, done
    model = f"model.model_name_or_path={tmp_path}/gpt2"
    config = configure(*short, model, "dry_run=true", f"accelerate.config_file={file}")
    longest = 117  # tokens of each row, about
    planned = plan_memory(config, load_tokenizer(config.model)[0], longest, 0).peak
    for process in (0, 1):
        measured = int((tmp_path / f"peaks.{process}").read_text())
        print(f"{engine}, process {process}: {measured / 2**30:.2f} GiB measured, {planned / 2**30:.2f} planned")
        assert planned == pytest.approx(measured, rel=0.1)
