"""PPO that generates with vLLM through TRL, as a server and in the same process: what it is asked, checked and told.

Both generate with transformers here (tests/vllm_server.py), so that the results can be compared with plain generation.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stand_in
from conftest import (
    LORA,
    REWARD,
    ROOT,
    SHORT_PPO,
    Posttrain,
    computed,
    ended,
    launched,
    logged,
    manifest,
    read_rows,
    same_weights,
    start,
    wait_for,
    weights,
)
from forked import Forked

from posttrain import paths

PPO = ("stage=ppo", *SHORT_PPO, REWARD, "model.model_name_or_path=./policy", "stage.vf_coef=0.5")
VLLM = ("stage.use_vllm=true", "+trainer.vllm_server_host=127.0.0.1", "+trainer.vllm_server_timeout=0")
OURS = {"vllm_difference", "vllm_difference_max", "vllm_tokens_beyond"}


class Served:
    """A running server."""

    def __init__(self, process: Forked, folder: Path) -> None:
        self.process, self.folder = process, folder
        self.port = int((folder / "port").read_text())
        self.asks = ("+trainer.vllm_mode=server", *VLLM, f"+trainer.vllm_server_port={self.port}")

    def requests(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / "requests.jsonl")


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """Start servers of ./policy, a model whose next tokens are not all alike; TRL finds vllm installed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths.TINY))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(4)
    model.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(paths.TINY).save_pretrained(tmp_path / "policy")
    vllm_stand_in.install(monkeypatch)
    processes = []

    def serve(*options: str, model: str = "policy") -> Served:
        folder = tmp_path / f"server-{len(processes)}"
        folder.mkdir()
        process = start(str(tmp_path / model), str(folder), *options, cwd=tmp_path, module="vllm_server")
        processes.append(process)
        wait_for(folder / "port", process)
        return Served(process, folder)

    yield serve
    for process in processes:
        process.kill()


def rollouts(run: str) -> list[dict[str, Any]]:
    return [line for line in logged(f"outputs/{run}/ppo") if "reward_std" in line]


def without_vllm(run: str) -> list[dict[str, Any]]:
    lines = computed(f"outputs/{run}/ppo")
    return [{name: value for name, value in line.items() if name not in OURS} for line in lines]


def test_a_server_seeded_alike_gives_what_plain_generation_gives(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served]
) -> None:
    """Eight prompts in a rollout and in the step-0 check, each in a request with a seed of its own."""
    plain = posttrain(*PPO, prompts, "run_name=plain")
    assert plain.code == 0, plain
    server = serve("--together", "8")
    done = posttrain(*PPO, prompts, *server.asks, "run_name=vllm")
    assert done.code == 0, done
    assert f"started by: trl vllm-serve --model policy --port {server.port})" in done.out
    assert "vLLM's log-probabilities within" in done.out
    assert same_weights(Path("outputs/plain/ppo/model"), Path("outputs/vllm/ppo/model"))
    assert without_vllm("plain") == without_vllm("vllm")
    assert len(rollouts("vllm")) == 4
    assert all(line["vllm_difference_max"] < 1e-4 for line in rollouts("vllm"))
    assert all(line["vllm_tokens_beyond"] == 0 for line in rollouts("vllm"))
    asked = server.requests()
    assert len({each["seed"] for each in asked}) == len(asked) == 8 + 4 * 8
    assert all(each["ignore_eos"] and each["stop_token_ids"] for each in asked)
