"""Broken files of every kind, for every stage: one paragraph that names it, and a disk as it was."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Outcome, write_rows

Posttrain = Callable[..., Outcome]
STAGES = ("sft", "reward", "dpo", "ppo")
GOOD: dict[str, dict[str, Any]] = {
    "sft": {"instruction": "What is red?", "response": "A colour."},
    "reward": {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."},
    "ppo": {"prompt": "What is red?"},
}
GOOD["dpo"] = GOOD["reward"]
PPO = ("stage.reward_functions=[my_rewards.constant]", "stage.max_new_tokens=8")


def rows(stage: str, **changes: Any) -> bytes:
    """Twenty good rows, the third changed; a value of None takes the key away."""
    found = []
    for number in range(20):
        row = {name: f"{text} {number}" for name, text in GOOD[stage].items()}
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
    "an object": (lambda stage: b'{"a": 1}', "rows.json", "rows.json"),
    "csv": (lambda stage: b'a,b\n"1,2\n', "rows.csv", "rows.csv"),
    "parquet": (lambda stage: b"PAR1 but not really", "rows.parquet", "rows.parquet"),
    "another type": (lambda stage: b"a\n", "rows.txt", "rows.txt"),
    "arrow": (lambda stage: b"a\n", "rows.arrow", "rows.arrow"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def refused(posttrain: Posttrain, folder: Path, *arguments: str) -> str:
    """What is told by a command that must be refused and leave everything as it was."""
    (folder / "my_rewards.py").write_text("def constant(prompts, **rest):\n    return [1.0 for _ in prompts]\n")
    before = contents(folder)
    done = posttrain(*arguments)
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert contents(folder) == before
    return done.err


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_broken_data_file(posttrain: Posttrain, tmp_path: Path, stage: str, kind: str) -> None:
    make, name, told = FILES[kind]
    (tmp_path / name).write_bytes(make(stage))
    more = PPO if stage == "ppo" else ()
    named = refused(
        posttrain,
        tmp_path,
        *(f"stage={stage}", f"data.dataset_name={name}", "model.model_name_or_path=posttrain/tiny", *more),
    )
    assert name in named
    assert told in named, named


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


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def an_adapter(folder: Path, base: str) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))


MODELS: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut": lambda folder: cut(folder / "config.json"),
    "config of nothing known": lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights that are no weights": lambda folder: (folder / "model.safetensors").write_bytes(b"a" * 1000),
    "a weight missing": without_a_weight,
    "pickled weights": pickled,
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("token*")],
    "tokenizer cut": lambda folder: cut(folder / "tokenizer.json"),
    "template that is none": lambda folder: (folder / "chat_template.jinja").write_text("{% for message in"),
    "adapter without weights": lambda folder: an_adapter(folder, "posttrain/tiny"),
    "adapter whose base is gone": lambda folder: an_adapter(folder, "/nowhere/model"),
    "adapter config cut": lambda folder: (an_adapter(folder, "a"), cut(folder / "adapter_config.json")),
}


@pytest.mark.parametrize("stage", ["sft", "reward"])  # the two kinds of model
@pytest.mark.parametrize("kind", MODELS)
def test_a_broken_model_folder(posttrain: Posttrain, tmp_path: Path, stage: str, kind: str) -> None:
    folder = model_folder(tmp_path / "model")
    MODELS[kind](folder)
    (tmp_path / "rows.jsonl").write_bytes(rows(stage))
    source = ("data.dataset_name=rows.jsonl", "stage.max_length=64", "data.test_size=0")
    told = refused(posttrain, tmp_path, f"stage={stage}", f"model.model_name_or_path={folder}", *source)
    assert str(folder) in told, told


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
