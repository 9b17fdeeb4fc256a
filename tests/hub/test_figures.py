"""What the recipes that need the Hub say is expected: `pytest -m hub -n 0 tests/hub`, hours on the hardware they name.

Each test runs a recipe's commands as its README has them, and skips with the reason where Hub or GPU are missing.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_shipped
from conftest import ROOT, Posttrain

from posttrain.cli.command import read_command

CONNECT = "import socket; socket.create_connection(('huggingface.co', 443), 2)"
RECIPES = ("gpt2-alpaca", "gpt2-hh", "pythia-1b-tldr", "qwen3-0.6b-preferences", "zephyr-7b")


def commands(recipe: str) -> list[str]:
    """The words behind `posttrain run` of each command of a recipe's README, in their order."""
    lines = test_shipped.commands(ROOT / "recipes" / recipe / "README.md")
    return [line.removeprefix("posttrain run ") for line in lines if line.startswith("posttrain run ")]


@pytest.fixture
def no_network() -> None:
    """In place of the one that keeps all other tests on this machine."""


@pytest.fixture
def hub() -> None:
    """Skips where huggingface.co does not answer within two seconds, name resolution included."""
    try:
        done = subprocess.run([sys.executable, "-c", CONNECT], timeout=2, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("huggingface.co does not answer within 2 s")
    if done.returncode:
        pytest.skip(f"huggingface.co cannot be reached: {done.stderr.splitlines()[-1]}")


def needs(gigabytes: int) -> None:
    """Skips without a GPU of that size."""
    import torch

    found = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0
    if found < gigabytes:
        pytest.skip(f"needs a GPU with {gigabytes} GB; there is {f'one with {found:.0f} GB' if found else 'none'}")


def result(folder: Path, words: str) -> dict[str, Any]:
    """Run one command of a README in `folder`, and read the manifest that it leaves."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT)}
    before = {*folder.glob("outputs/*/*/posttrain.json")}
    code = [sys.executable, "-m", "posttrain.run", *words.split()]
    done = subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    [manifest] = {*folder.glob("outputs/*/*/posttrain.json")} - before
    found: dict[str, Any] = json.loads(manifest.read_text())
    return found


def on_card(model: str, name: str) -> float:
    """A number of the list of results that TRL wrote on a model's card on the Hub."""
    from huggingface_hub import ModelCard

    [value] = re.findall(rf"^- {name}: ([\d.]+)$", ModelCard.load(model).text, flags=re.MULTILINE)
    return float(value)


@pytest.mark.hub
def test_gpt2_alpaca_reaches_the_loss_of_the_tutorial(hub: None, tmp_path: Path) -> None:
    [sft] = commands("gpt2-alpaca")
    # other rows are held out, and the mean is over other tokens; see the README
    assert result(tmp_path, sft)["metrics"]["eval_loss"] == pytest.approx(2.4244, abs=0.15)


@pytest.mark.hub
def test_gpt2_hh_has_the_rows_of_the_card_and_a_reward_model_above_chance(hub: None, tmp_path: Path) -> None:
    needs(16)
    sft, reward, dpo, _ = commands("gpt2-hh")
    result(tmp_path, sft)
    found = result(tmp_path, reward)
    counts = found["data"]["counts"]
    assert counts["train"]["read"] == pytest.approx(161_000, rel=0.01)
    assert counts["test"]["read"] == pytest.approx(8_500, rel=0.01)
    assert found["metrics"]["accuracy_low"] > 0.5
    assert result(tmp_path, dpo)["metrics"]["accuracy_low"] > 0.5


@pytest.mark.hub
def test_pythia_1b_tldr_gains_reward_for_its_kl(hub: None, tmp_path: Path) -> None:
    """Huang et al. 2024, figures 4 to 7: the reward rises with KL."""
    needs(79)
    sft, reward, ppo, dpo = commands("pythia-1b-tldr")
    result(tmp_path, sft)
    assert result(tmp_path, reward)["metrics"]["accuracy_low"] > 0.5
    numbers = result(tmp_path, ppo)["metrics"]
    assert numbers["reward_low"] > numbers["reward_high_before"]
    assert numbers["kl"] > 0
    assert result(tmp_path, dpo)["metrics"]["accuracy_low"] > 0.5


@pytest.mark.hub
def test_qwen3_06b_prefers_the_chosen_completions(hub: None, tmp_path: Path) -> None:
    needs(23)
    [dpo] = commands("qwen3-0.6b-preferences")
    assert result(tmp_path, dpo)["metrics"]["accuracy_low"] > 0.5


@pytest.mark.hub
def test_zephyr_7b_reaches_the_numbers_of_the_handbooks_cards(hub: None, tmp_path: Path) -> None:
    """By QLoRA on one GPU, against the cards of full fine-tuning, hence the tolerance."""
    needs(23)
    sft, dpo = commands("zephyr-7b")[:2]
    loss = on_card("alignment-handbook/zephyr-7b-sft-full", "Loss")
    assert result(tmp_path, sft)["metrics"]["eval_loss"] == pytest.approx(loss, abs=0.1)
    accuracy = on_card("alignment-handbook/zephyr-7b-dpo-full", "Rewards/accuracies")
    assert result(tmp_path, dpo)["metrics"]["accuracy"] == pytest.approx(accuracy, abs=0.08)


def test_each_command_is_right_up_to_the_hub(posttrain: Posttrain) -> None:
    """Without a network, what is missing first is the model that the recipe names."""
    for recipe in RECIPES:
        first, *_ = (read_command(words.split(), to_come=("sft", "reward")).config for words in commands(recipe))
        done = posttrain(*commands(recipe)[0].split(), "dry_run=true")
        assert done.code == 2, done
        assert f"={first.model.model_name_or_path or first.model.base_model}: " in done.err, done
