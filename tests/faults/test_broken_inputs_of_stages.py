"""What one stage hands to the next, damaged in between: told by name, and not trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LORA, Posttrain, contents, once
from test_broken_input import cut

from posttrain import configure, evaluate, export, report, run_stage

SHORT = ("trainer.max_steps=1", "data.max_rows=60", "stage.max_length=96")


@pytest.fixture
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SFT stage and a finished reward stage of one run, made once."""

    def make(folder: Path) -> None:
        for stage in ("sft", "reward"):
            lora = LORA if stage == "reward" else ()
            run_stage(configure(f"recipes=quickstart/{stage}", *SHORT, *lora, f"output_dir={folder}"))

    return once(tmp_path_factory, "handed-over", make) / "demo"


def changed(stage: str, change: Callable[[Path], None], file: str) -> tuple[str, Callable[[Path], object], str]:
    return stage, lambda demo: change(demo / file), f"{file} has changed since its run wrote it"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def reword(template: Path) -> None:
    template.write_text(template.read_text().replace("###", "##"))


# what is damaged -> (the stage that meets it, how, what is told)
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "SFT manifest cut": ("dpo", lambda demo: cut(demo / "sft/posttrain.json"), "sft/posttrain.json is broken"),
    "SFT manifest a list": (
        "dpo",
        lambda demo: (demo / "sft/posttrain.json").write_text("[]"),
        "sft/posttrain.json is broken (no stage",
    ),
    "SFT weights gone": ("dpo", lambda demo: (demo / "sft/model/model.safetensors").unlink(), "model.safetensors"),
    "one bit of the SFT weights": changed("reward", flip, "sft/model/model.safetensors"),
    "another chat template": changed("dpo", reword, "sft/model/chat_template.jinja"),
    "one bit of the reward model": changed("ppo", flip, "reward/model/model.safetensors"),
    "one bit of the reward model's adapter": changed("ppo", flip, "reward/adapter/adapter_model.safetensors"),
    "reward manifest cut": ("ppo", lambda demo: cut(demo / "reward/posttrain.json"), "reward/posttrain.json is broken"),
    "report card empty": (
        "ppo",
        lambda demo: (demo / "reward/report_card.json").write_text("{}"),
        "reward/report_card.json is broken (no verdict and no reasons)",
    ),
    "reward model is no reward model": (
        "ppo",
        lambda demo: [shutil.rmtree(demo / "reward"), shutil.copytree(demo / "sft", demo / "reward")],
        "is a run of stage=sft, not of reward",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hand_over(posttrain: Posttrain, tmp_path: Path, finished: Path, damage: str) -> None:
    stage, make, told = DAMAGES[damage]
    demo = Path(shutil.copytree(finished, tmp_path / "outputs/demo"))
    if stage == "reward":
        shutil.rmtree(demo / "reward")
        (demo / ".reward.lock").unlink()
    make(demo)
    before = contents(tmp_path)
    gate = ("stage.gate=warn", "model.use_peft=true") if stage == "ppo" else ()
    done = posttrain(f"recipes=quickstart/{stage}", *SHORT, *gate)
    assert done.code == 2, done
    assert told in done.err, done
    assert "Traceback" not in done.err
    assert contents(tmp_path) == before


def test_pages_and_exports_name_a_broken_file(entry: Posttrain, tmp_path: Path, finished: Path) -> None:
    demo = Path(shutil.copytree(finished, tmp_path / "outputs/demo"))
    cut(demo / "reward/report_card.json")
    done = entry(report.main, "outputs/demo")
    assert done.code == 2, done
    assert "reward/report_card.json is broken" in done.err
    (demo / "sft/posttrain.json").write_text(json.dumps({"stage": "sft"}))
    done = entry(export.main, "outputs/demo/sft", "to=exported")
    assert done.code == 2, done
    assert "sft/posttrain.json is broken (no weights and no adapter_weights and no inputs)" in done.err
    assert not (tmp_path / "exported").exists()


def test_what_has_changed_is_neither_evaluated_nor_exported(entry: Posttrain, tmp_path: Path, finished: Path) -> None:
    demo = Path(shutil.copytree(finished, tmp_path / "outputs/demo"))
    flip(demo / "reward/model/model.safetensors")
    told = "reward/model/model.safetensors has changed since its run wrote it"
    judged = ("policies=[outputs/demo/sft]", "recipes=quickstart/ppo", "reward_model=outputs/demo/reward")
    for done in (entry(evaluate.main, *judged), entry(export.main, "outputs/demo/reward", "to=exported")):
        assert done.code == 2, done
        assert told in done.err
    flip(demo / "sft/model/model.safetensors")
    done = entry(evaluate.main, *judged)
    assert done.code == 2, done
    assert "sft/model/model.safetensors has changed" in done.err
    assert not (tmp_path / "exported").exists()
