"""Data, model folders, templates and checkpoints that want more than to be read: shown, refused, never obeyed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import Posttrain, once, write_rows
from test_broken_input import model_folder, refused, rows

from posttrain.runs.checkpoint import MANIFEST, fault

SMALL = ("data.dataset_name=rows.jsonl", "stage.max_length=64", "data.test_size=0", "trainer.max_steps=2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(rows("sft"))
    return model_folder(tmp_path / "model")


def test_a_terminal_obeys_neither_data_nor_models(posttrain: Posttrain, tmp_path: Path) -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07 [red]x[/red] \x9b31m"
    write_rows(tmp_path / "rows.jsonl", [{"instruction": f"{nasty} {n}", "response": nasty} for n in range(9)])
    source = ("data.dataset_name=rows.jsonl", "data.test_size=3", "model.model_name_or_path=posttrain/tiny")
    plan = posttrain(*source, "stage.max_length=128", "dry_run=true")
    assert plan.code == 0, plan
    run = posttrain(*source, "stage.max_length=128", "trainer.max_steps=1")
    assert run.code == 0, run
    log = (tmp_path / "outputs/demo/sft/run.log").read_text()
    for text in (plan.out, plan.err, run.out, run.err, log):
        assert not set(text) & {"\x1b", "\x07", "\x9b"}
    assert "␛" in plan.out
    assert "[red]x[/red]" in run.out.replace("\n", "")


def test_code_in_a_model_folder_is_not_run(posttrain: Posttrain, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    told = refused(posttrain, tmp_path, *SMALL, f"model.model_name_or_path={folder}")
    assert "trust_remote_code" in told


def test_a_template_that_reaches_for_python_is_refused(posttrain: Posttrain, folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert "SecurityError" in refused(posttrain, tmp_path, *SMALL, f"model.model_name_or_path={folder}")


class Bomb:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.fixture
def killed(posttrain: Posttrain, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Put a run that ended after its first checkpoint into outputs, trained once; returns its command line."""

    def make(where: Path) -> None:
        shutil.copytree(folder, where / "model")
        assert posttrain(*arguments(where)).code == 0
        shutil.move("outputs", where)
        run = where / "outputs/demo/sft"
        (run / "posttrain.json").unlink()
        for other in run.glob("checkpoint-2/*"):
            other.unlink()

    def arguments(where: Path) -> list[str]:
        return [*SMALL, f"model.model_name_or_path={where / 'model'}", "trainer.save_steps=1"]

    where = once(tmp_path_factory, "killed", make)
    shutil.copytree(where / "outputs", "outputs")
    return arguments(where)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run(
    posttrain: Posttrain, killed: list[str], tmp_path: Path, file: str
) -> None:
    """Even where somebody has put its own sum into the checkpoint's list."""
    import torch

    checkpoint = tmp_path / "outputs/demo/sft/checkpoint-1"
    torch.save(Bomb(tmp_path / "ran"), checkpoint / file)
    assert fault(checkpoint) == f"{file} has changed since it was written"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    content = (checkpoint / file).read_bytes()
    manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert fault(checkpoint) is None
    done = posttrain(*killed)
    assert done.code == 1, done
    assert "Weights only load failed" in done.err
    assert not (tmp_path / "ran").exists()
