"""Broken files of every kind, for every stage: one paragraph that names it, and a disk as it was."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Posttrain, contents, write_rows

from posttrain import pairs

GOOD: dict[str, dict[str, Any]] = {
    "sft": {"instruction": "What is red?", "response": "A colour."},
    "reward": {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."},
    "ppo": {"prompt": "What is red?"},
    "kto": {"prompt": "What is red?", "completion": "A colour."},
}
GOOD["dpo"] = GOOD["reward"]
GOOD["grpo"] = GOOD["ppo"]
ONLINE = ("stage.reward_functions=[my_rewards.constant]", "stage.max_new_tokens=8")


def rows(stage: str, **changes: Any) -> bytes:
    """Twenty good rows, the third changed; a value of None takes the key away."""
    found = []
    for number in range(20):
        row = {name: f"{text} {number}" for name, text in GOOD[stage].items()}
        row |= {"label": number % 2 == 0} if stage == "kto" else {}
        if number == 2:
            row = {name: value for name, value in {**row, **changes}.items() if value is not Ellipsis}
        found.append(json.dumps(row))
    return ("\n".join(found) + "\n").encode()


def first(stage: str) -> str:
    return next(iter(GOOD[stage]))


def last(stage: str) -> str:
    return list(GOOD[stage])[-1]


# kind -> (what the file holds for a stage, its name, what must be told)
FILES: dict[str, tuple[Callable[[str], bytes], str, str]] = {
    "empty": (lambda stage: b"", "rows.jsonl", "rows.jsonl"),
    "blank lines": (lambda stage: b"\n\n \n", "rows.jsonl", "rows.jsonl"),
    "no json": (lambda stage: b"What is red?\n", "rows.jsonl", "line 1"),
    "cut": (lambda stage: rows(stage)[:-9], "rows.jsonl", "line 20"),
    "binary": (lambda stage: bytes(range(256)), "rows.jsonl", "line 1"),
    "latin-1": (lambda stage: rows(stage).replace(b"red", b"r\xe9d"), "rows.jsonl", "line 1"),
    "utf-16": (lambda stage: rows(stage).decode().encode("utf-16"), "rows.jsonl", "line 1"),
    "list": (lambda stage: b'["a", "b"]\n', "rows.jsonl", "line 1"),
    "a key twice": (
        lambda stage: rows(stage) + f'{{"{first(stage)}": "a", "{first(stage)}": "b"}}\n'.encode(),
        "rows.jsonl",
        "line 21",
    ),
    "column missing": (lambda stage: rows(stage, **{last(stage): ...}), "rows.jsonl", "line 3"),
    "null": (lambda stage: rows(stage, **{last(stage): None}), "rows.jsonl", "line 3"),
    "number": (lambda stage: rows(stage, **{last(stage): 5}), "rows.jsonl", "line 3"),
    "empty text": (lambda stage: rows(stage, **{last(stage): ""}), "rows.jsonl", "line 3"),
    "blank text": (lambda stage: rows(stage, **{last(stage): " \n\t"}), "rows.jsonl", "line 3"),
    "control token": (lambda stage: rows(stage, **{last(stage): "a <|endoftext|> b"}), "rows.jsonl", "line 3"),
    "unknown role": (
        lambda stage: rows(stage, **{first(stage): [{"role": "usr", "content": "a"}]}),
        "rows.jsonl",
        "line 3",
    ),
    "half a character": (lambda stage: rows(stage).replace(b"red? 2", b"\\ud800"), "rows.jsonl", "line 3"),
    "half a character in a template option": (
        lambda stage: rows(stage, chat_template_kwargs={"tone": "\ud800"}),
        "rows.jsonl",
        "line 3: the row contains an unpaired surrogate",
    ),
    "an object": (lambda stage: b'{"a": 1}', "rows.json", "rows.json"),
    "csv": (lambda stage: b'a,b\n"1,2\n', "rows.csv", "rows.csv"),
    "parquet": (lambda stage: b"PAR1 but not really", "rows.parquet", "rows.parquet"),
    "another type": (lambda stage: b"a\n", "rows.txt", "rows.txt"),
    "arrow": (lambda stage: b"a\n", "rows.arrow", "rows.arrow"),
}


def write_reward(folder: Path) -> None:
    (folder / "my_rewards.py").write_text("def constant(prompts, **rest):\n    return [1.0 for _ in prompts]\n")


def refused(posttrain: Posttrain, folder: Path, *arguments: str) -> str:
    """What is told by a command that must be refused and leave everything as it was."""
    write_reward(folder)
    before = contents(folder)
    done = posttrain(*arguments)
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert contents(folder) == before
    return done.err


# pairs are read by the same code for reward and DPO, prompts by the same for PPO and GRPO
SAME = ("dpo", "grpo")
READ = [(kind, stage) for kind in FILES for stage in GOOD if stage not in SAME or kind == "column missing"]


@pytest.mark.parametrize(("kind", "stage"), READ)
def test_a_broken_data_file(posttrain: Posttrain, tmp_path: Path, stage: str, kind: str) -> None:
    make, name, told = FILES[kind]
    (tmp_path / name).write_bytes(make(stage))
    more = ONLINE if stage in ("ppo", "grpo") else ()
    named = refused(
        posttrain,
        tmp_path,
        *(f"stage={stage}", f"data.dataset_name={name}", "model.model_name_or_path=posttrain/tiny", *more),
    )
    assert name in named
    assert told in named, named


@pytest.mark.parametrize(
    "kind", ["no json", "cut", "column missing", "half a character in a template option", "control token", "parquet"]
)
def test_a_broken_data_file_of_pairs(entry: Posttrain, tmp_path: Path, kind: str) -> None:
    make, name, told = FILES[kind]
    (tmp_path / name).write_bytes(make("ppo"))
    given = ("policy=posttrain/tiny", f"data.dataset_name={name}", "max_new_tokens=8")
    named = refused(partial(entry, pairs.main), tmp_path, *given, "reward_functions=[my_rewards.constant]")
    assert name in named
    assert told in named, named


@pytest.mark.parametrize("kind", ["config cut", "weights cut", "tokenizer cut", "adapter of a deeper model"])
def test_a_broken_policy_of_pairs(entry: Posttrain, tmp_path: Path, kind: str) -> None:
    make, told = MODELS[kind]
    make(model_folder(tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_bytes(rows("ppo"))
    given = ("policy=model", "data.dataset_name=rows.jsonl", "max_new_tokens=8", "max_length=64")
    named = refused(partial(entry, pairs.main), tmp_path, *given, "reward_functions=[my_rewards.constant]")
    assert told in named, named


@pytest.mark.parametrize("stage", GOOD)
@pytest.mark.parametrize("kind", ["empty text", "control token"])
def test_a_row_that_does_not_fit_can_be_left_out(posttrain: Posttrain, tmp_path: Path, stage: str, kind: str) -> None:
    make, name, told = FILES[kind]
    (tmp_path / name).write_bytes(make(stage))
    write_reward(tmp_path)
    done = posttrain(
        *(f"stage={stage}", f"data.dataset_name={name}", "data.bad_rows=drop", "dry_run=true", "data.test_size=2"),
        *("model.model_name_or_path=posttrain/tiny", *(ONLINE if stage in ("ppo", "grpo") else ())),
    )
    assert done.code == 0, done
    assert f"left out (data.bad_rows=drop): {name} {told}: " in done.out.replace("\n", " ")
    assert "1 (bad)" in done.out


def model_folder(folder: Path) -> Path:
    """A small model with its tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from posttrain import paths

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=916, n_positions=64)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(paths.TINY).save_pretrained(folder)
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def trained_adapter(folder: Path) -> Path:
    """A whole adapter in `folder`, whose base model is in `base` beside it; returns that."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(folder, folder.with_name("base")))
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    settings = LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    return base


def without(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def adapter_of_a_deeper_model(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained_adapter(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    deeper = {name.replace(".h.0.", ".h.1."): weight.clone() for name, weight in weights.items()}
    save_file({**weights, **deeper}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pickled_adapter(folder: Path) -> None:
    import torch

    trained_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


WEIGHT = "transformer.h.0.mlp.c_fc.weight"
LORA_WEIGHT = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
# what is broken -> (how, what must be told)
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "neither config.json nor adapter_config.json"),
    "config cut": (lambda folder: cut(folder / "config.json"), "config.json"),
    "config of nothing known": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
        "model type `nothing`",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut": (lambda folder: cut(folder / "model.safetensors"), "its weights cannot be loaded"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "its weights cannot be loaded"),
    "weights that are no weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"a" * 1000),
        "its weights cannot be loaded",
    ),
    "a weight missing": (lambda folder: without(folder / "model.safetensors", WEIGHT), f"({WEIGHT})"),
    "pickled weights": (pickled, "no file named model.safetensors"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("token*")], "tokenizer"),
    "tokenizer cut": (lambda folder: cut(folder / "tokenizer.json"), "its tokenizer cannot be loaded"),
    "template that is none": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for message in"),
        "the chat template raised",
    ),
    "adapter without weights": (
        lambda folder: [trained_adapter(folder), (folder / "adapter_model.safetensors").unlink()],
        "no adapter_model.safetensors",
    ),
    "adapter whose base is gone": (
        lambda folder: shutil.rmtree(trained_adapter(folder)),
        "adapter_config.json: base_model_name_or_path=",
    ),
    "adapter config cut": (
        lambda folder: [trained_adapter(folder), cut(folder / "adapter_config.json")],
        "adapter_config.json is broken",
    ),
    "adapter cut": (
        lambda folder: [trained_adapter(folder), cut(folder / "adapter_model.safetensors")],
        "its adapter cannot be loaded",
    ),
    "adapter without one of its weights": (
        lambda folder: [trained_adapter(folder), without(folder / "adapter_model.safetensors", LORA_WEIGHT)],
        "keys in the adapter's weights are 1 missing (",
    ),
    "adapter of a deeper model": (adapter_of_a_deeper_model, "keys in the adapter's weights are 6 unexpected ("),
    "pickled adapter": (pickled_adapter, "no adapter_model.safetensors"),
    "adapter on a pickled base": (lambda folder: pickled(trained_adapter(folder)), "no file named model.safetensors"),
    "adapter on a base without one of its weights": (
        lambda folder: without(trained_adapter(folder) / "model.safetensors", WEIGHT),
        f"({WEIGHT})",
    ),
}


@pytest.mark.parametrize("stage", ["sft", "reward"])  # the two kinds of model
@pytest.mark.parametrize("kind", MODELS)
def test_a_broken_model_folder(posttrain: Posttrain, tmp_path: Path, stage: str, kind: str) -> None:
    folder = model_folder(tmp_path / "model")
    make, told = MODELS[kind]
    make(folder)
    (tmp_path / "rows.jsonl").write_bytes(rows(stage))
    source = ("data.dataset_name=rows.jsonl", "stage.max_length=64", "data.test_size=0")
    named = refused(posttrain, tmp_path, f"stage={stage}", f"model.model_name_or_path={folder}", *source)
    assert str(folder) in named, named
    assert told in named, named


YAML: dict[str, tuple[str, str]] = {
    "no yaml": ("a: [", "mine"),
    "a typo": ("# @package _global_\nstage:\n  lerning_rate: 1\n", "did you mean stage.learning_rate?"),
    "a wrong type": ("# @package _global_\nstage:\n  batch_size: four\n", "stage.batch_size"),
    "code to run": ("# @package _global_\nmodel:\n  _target_: os.system\n", "_target_"),
    "a secret": ("# @package _global_\ntrainer:\n  hub_token: hf_abcdefgh\n", "hub_token"),
    "a key of Hydra's": ("# @package _global_\ntrainer:\n  output_dir: elsewhere\n", "trainer.output_dir"),
}


@pytest.mark.parametrize("kind", YAML)
def test_a_broken_recipe(posttrain: Posttrain, tmp_path: Path, kind: str) -> None:
    content, told = YAML[kind]
    (tmp_path / "configs/recipes").mkdir(parents=True)
    (tmp_path / "configs/recipes/mine.yaml").write_text(content)
    named = refused(posttrain, tmp_path, "--config-dir", "configs", "recipes=mine")
    assert told in named, named
    assert "hf_abcdefgh" not in named


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/b", "", ".hidden", "a b"])
def test_run_names_cannot_leave_the_output_folder(posttrain: Posttrain, tmp_path: Path, name: str) -> None:
    assert "run_name" in refused(posttrain, tmp_path, f"run_name='{name}'")


def test_a_file_where_the_folder_would_be(posttrain: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    assert "outputs is a file" in refused(posttrain, tmp_path)
    (tmp_path / "outputs").unlink()
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    write_rows(tmp_path / "good.jsonl", [GOOD["sft"]] * 3)
    assert "nowhere.jsonl: no such file" in refused(posttrain, tmp_path, "data.dataset_name=nowhere.jsonl")
