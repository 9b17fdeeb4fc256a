"""One process, one thread, no network; the real entry point, called in this process or in one of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "200"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "red", "blue", "green", "white", "black")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs in this process reaches no further than this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a test reaches for {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


class Outcome:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Outcome]:
    """Call an entry point with arguments in an empty folder, in this process: imports are paid for once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's

    def call(main: Callable[[], None], *arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(sys.modules[main.__module__].__file__), *arguments])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        told = capfd.readouterr()
        return Outcome(int(code), told.out, told.err)

    return call


@pytest.fixture
def posttrain(entry: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`python -m posttrain.run <arguments>`."""
    from posttrain.run import main

    return partial(entry, main)


def start(*arguments: str, cwd: Path, module: str = "posttrain.run", **more: Any) -> subprocess.Popen[str]:
    """The same command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty small instruction rows in data.jsonl."""
    return write_rows(
        tmp_path / "data.jsonl",
        [{"instruction": f"What is {a} and {b}?", "response": f"{a} and {b}."} for a in WORDS[:8] for b in WORDS[8:13]],
    )


def data_config(name: Any, columns: Any, **changes: Any) -> Any:
    """A DataConfig that holds nothing out, but for `changes`."""
    from posttrain.config.schema import DataConfig

    settings: dict[str, Any] = {
        "dataset_config": None,
        "dataset_train_split": "train",
        "dataset_test_split": None,
        "test_size": 0.0,
        "max_rows": None,
        "overlength": "truncate",
        "bad_rows": "error",
        "allow_special_tokens": False,
    }
    return DataConfig(dataset_name=name, columns=columns, **(settings | changes))


def weights(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    import torch

    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
