"""One process, one thread, no network; the real entry points, called in this process or in one of their own."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "200"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
from filelock import FileLock
from forked import Forked

from posttrain.models import saving

# a shell starts what runs in the background with this one ignored, and so would each command of a test
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "red", "blue", "green", "white", "black")
STAGES = ("sft", "reward", "ppo", "dpo")
ROWS = [{"instruction": f"What is {a} and {b}?", "response": f"{a} and {b}."} for a in WORDS[:8] for b in WORDS[8:]]

# what makes a run short
SHORT = ("trainer.max_steps=4", "trainer.logging_steps=1")
SHORT_PIPELINE = (
    *("recipes=quickstart", "trainer.max_steps=4", "trainer.eval_steps=2", "data.max_rows=200"),
    *("ppo.gate=warn", "ppo.max_new_tokens=8", "sft.max_length=96", "dpo.max_length=96"),
)
SHORT_PPO = (
    *("stage.rollout_batch_size=8", "stage.num_mini_batches=2", "stage.ppo_epochs=2", "stage.num_epochs=2"),
    *("stage.max_new_tokens=6", "stage.max_length=64", "stage.learning_rate=1e-3"),
    *("data.test_size=4", "trainer.logging_steps=1", "trainer.save_strategy=no"),
)
REWARD = "stage.reward_functions=[my_rewards.even]"
LORA = ("model.use_peft=true",)
QLORA = (*LORA, "model.load_in_4bit=true")


class Outcome:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


Posttrain = Callable[..., Outcome]  # an entry point, called with the words of its command line


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs in this process reaches no further than this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a test reaches for {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Posttrain:
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


@pytest.fixture(autouse=True)
def scored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved reward model is read again by a new process, which here is a forked one, but for where it is `real`."""
    if "real_process" not in request.keywords:
        monkeypatch.setattr(saving, "_scores_in_a_new_process", scores_in_a_forked_process)


def scores_in_a_forked_process(folder: Path, rows: Any) -> Any:
    import torch

    done = ended(start(str(folder), cwd=Path.cwd(), module="posttrain.models.saving", typed=json.dumps(rows)))
    assert done.code == 0, done
    return torch.tensor(json.loads(done.out.splitlines()[-1]))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, once for all processes of pytest; for tests that copy what is in it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(saving, "_scores_in_a_new_process", scores_in_a_forked_process)
                make(folder)
            Path(f"{folder}.made").touch()
    return folder


@pytest.fixture
def posttrain(entry: Posttrain) -> Posttrain:
    """`posttrain run <arguments>`."""
    from posttrain.run import main

    return partial(entry, main)


@pytest.fixture
def pipeline(entry: Posttrain) -> Posttrain:
    """`posttrain pipeline <arguments>`."""
    from posttrain.pipeline import main

    return partial(entry, main)


@pytest.fixture
def trained(pipeline: Posttrain, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the outputs of `posttrain pipeline`, with SHORT_PIPELINE, made once; returns what it printed."""

    def make(folder: Path) -> None:
        done = pipeline(*SHORT_PIPELINE)
        assert done.code == 0, done
        shutil.move("outputs", folder)
        (folder / "printed.txt").write_text(done.out)

    folder = once(tmp_path_factory, "pipeline", make)
    shutil.copytree(folder / "outputs", "outputs")
    return (folder / "printed.txt").read_text()


def start(*arguments: str, cwd: Path, module: str = "posttrain.run", **options: Any) -> Forked:
    """The same command in a process of its own."""
    return Forked(module, arguments, cwd, {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}, **options)


def launched(*arguments: str, cwd: Path, module: str = "posttrain.run") -> Forked:
    """`accelerate launch` with two CPU processes, in a process group of its own."""
    options = ("--config_file", str(ROOT / "accelerate_configs/cpu2.yaml"), "--main_process_port", "0", "-m", module)
    return start(*options, *arguments, cwd=cwd, module="accelerate.commands.launch", new_session=True)


def ended(process: Forked, timeout: float = 300) -> Outcome:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=timeout)
    return Outcome(process.wait(), out, err)


def wait_for(path: Path, process: Forked) -> None:
    """Until a running process has written `path`."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path} after two minutes"
        time.sleep(0.001)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON line for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty small instruction rows in data.jsonl."""
    return write_rows(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Sixteen prompts of different lengths, as the argument that names them, and my_rewards.py beside them."""
    (tmp_path / "my_rewards.py").write_text(REWARD_FUNCTIONS)
    rows = [{"prompt": f"Say {'very ' * (n % 4)}{n}.", "wish": "much" if n % 2 else "little"} for n in range(16)]
    return f"data.dataset_name={write_rows(tmp_path / 'prompts.jsonl', rows)}"


REWARD_FUNCTIONS = """
import math

def even(prompts, completions, completion_ids, **columns):
    return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]

def short(prompts, completions, **columns):
    return [-float(len(completion[0]["content"])) for completion in completions]

def sometimes(prompts, completions, **columns):
    return [1.0 if "1" in prompt[-1]["content"] else None for prompt in prompts]

def odd(completion_ids, **columns):
    return [-float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]

def broken(prompts, completions, **columns):
    return [math.nan] * len(prompts)

def infinite(prompts, completions, **columns):
    return [math.inf] * len(prompts)

def huge(prompts, completions, **columns):
    return [(-1) ** number * 1e38 for number, _ in enumerate(prompts)]

def constant(prompts, completions, **columns):
    return [3.0] * len(prompts)

def few(prompts, completions, **columns):
    return [3.0]

def narrow(prompts, completions):
    return [3.0] * len(prompts)

def wanted(prompts, completions, wish, **columns):
    return [float(each == "much") for each in wish]

def leaves(prompts, completions, **columns):
    raise SystemExit(0)

def leaves_later(prompts, completions, **columns):
    for prompt in prompts:
        raise SystemExit(0)
        yield 1.0

async def slow(prompts, completions, **columns):
    return [0.5] * len(prompts)
"""


SOURCES = {"sft": "rows", "reward": "pairs", "dpo": "pairs", "ppo": "prompts", "kto": "pairs", "grpo": "prompts"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with rows.jsonl, pairs.jsonl, prompts.jsonl and my_rewards.py, which `command` names."""
    write_sources(tmp_path)
    return tmp_path


def write_sources(folder: Path) -> None:
    """What `sources` holds."""
    asked = [(f"What is {a} and {b}?", f"{a} and {b}.") for a in WORDS[:8] for b in WORDS[8:]]
    write_rows(folder / "rows.jsonl", [{"instruction": q, "response": a} for q, a in asked])
    write_rows(folder / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in asked])
    write_rows(folder / "prompts.jsonl", [{"prompt": q} for q, _ in asked])
    (folder / "my_rewards.py").write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [float(sum(letter in 'aeiou' for letter in c[0]['content'])) for c in completions]\n"
    )


def command(stage: str, run_name: str, *more: str) -> list[str]:
    """Four steps of a stage on the rows of `sources`."""
    common = [
        *(f"stage={stage}", f"run_name={run_name}", f"data.dataset_name={SOURCES[stage]}.jsonl"),
        *("stage.max_length=64", "data.test_size=7", "trainer.max_steps=4", "trainer.logging_steps=1"),
        "model.model_name_or_path=posttrain/tiny",
    ]
    if stage == "grpo":
        common += ["stage.num_generations=4"]
    if stage in ("ppo", "grpo"):
        common += ["stage.rollout_batch_size=8", "stage.num_mini_batches=2", "stage.ppo_epochs=1"]
        common += ["stage.max_new_tokens=8", "stage.reward_functions=[my_rewards.vowels]", "stage.learning_rate=1e-3"]
    return [*common, *more]


@functools.cache
def _composed(stage: str) -> Any:
    from posttrain.cli.command import compose_config
    from posttrain.config.check import check

    return check(compose_config([f"stage={stage}", "data.dataset_name=rows"], None))


def data_config(name: Any, stage: str, columns: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The DataConfig of a stage that holds nothing out, but for `changes`."""
    data = _composed(stage).data
    mapped = dataclasses.replace(data.columns, **(columns or {}))
    return dataclasses.replace(data, **({"dataset_name": name, "columns": mapped, "test_size": 0.0} | changes))


@dataclasses.dataclass
class Unencoded:
    """The rows of every format as they are read, none left out."""

    types: ClassVar[dict[str, Any]] = {}

    def segments(self, encoder: Any, row: Any) -> list[Any]:
        return []

    def columns(self, row: Any, encoded: Any) -> Any:
        from posttrain.data.encode import EncodedRow

        return EncodedRow({}, 0, 0)


def splits_of(format: Any, data: Any) -> Any:
    """The rows that `data` names, as the reader of a format reads them: to train on and held out, counts and notes."""
    from tokenizers_for_tests import chatml

    from posttrain.data.chat import ChatEncoder
    from posttrain.data.reading import Work, order_of, read, rows_at
    from posttrain.data.sources import find_sources

    work = Work(data, format, find_sources(data), ChatEncoder(chatml()), Unencoded())
    found = read(work, 1, lambda table: None)
    rows = {}
    for part, numbers in found.parts.items():
        facts = found.facts[numbers]
        places = list(zip(facts["source"].tolist(), facts["number"].tolist(), strict=True))
        contents = np.ascontiguousarray(facts["content"]).view("V16").tolist()
        rows[part] = rows_at(work, places, [order_of(content) for content in contents])
    return types.SimpleNamespace(**rows, counts=found.counts, notes=found.notes)


def prepared(format: Any, encoding: Any, tokenizer: Any, data: Any, cache: Path) -> Any:
    """The rows that `data` names, prepared for a stage in the folder `cache`."""
    from posttrain.data.chat import ChatEncoder
    from posttrain.data.hashes import Hashes
    from posttrain.data.prepared import key_of, load, prepare
    from posttrain.data.reading import Work
    from posttrain.data.sources import find_sources

    sources, hashes = find_sources(data), Hashes(cache)
    work = Work(data, format, sources, ChatEncoder(tokenizer, data.allow_special_tokens), encoding)
    digests = hashes.of_sources(sources)
    key = key_of(work, digests)
    prepare(work, cache, hashes, key, digests)
    return load(work, cache, key)


def manifest(folder: str | Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    found: dict[str, Any] = json.loads((Path(folder) / "posttrain.json").read_text())
    return found


def logged(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's log."""
    return read_rows(Path(folder) / "metrics.jsonl")


TIMES = {"time", "step_time", "tokens_per_second", "train_runtime"}
TIMES |= {f"train_{what}_per_second" for what in ("samples", "steps", "tokens")}


def computed(folder: str | Path) -> list[dict[str, Any]]:
    """What a run has logged, and its manifest's numbers last; times and speeds apart."""
    lines = [*logged(folder), manifest(folder)["metrics"]]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def contents(folder: Path) -> dict[str, bytes | None]:
    """What a folder holds, byte by byte, but for what Python compiles and prepared rows, which stay for a next run."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not {"__pycache__", ".cache"} & set(path.parts)
        and not (path.is_dir() and [entry.name for entry in path.iterdir()] == [".cache"])
    }


def weights(model: Path) -> dict[str, Any]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two saved models are equal to the last bit."""
    import torch

    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def documented(page: Path) -> list[str]:
    """Every command in the fenced sh blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [line.replace("python -m posttrain.", "posttrain ") for line in shown]
