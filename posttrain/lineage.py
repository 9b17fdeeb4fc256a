"""The run folder: what a run is, whether it is new, interrupted or complete, and the manifest that it ends with.

config.yaml      the resolved configuration
run.json         what the run is: configuration, data, starting weights, number of processes
run.log          everything that was printed, and more
metrics.jsonl    a line per log entry
rollouts.jsonl   of PPO: some answers of each rollout with their rewards (and curves.svg: what became of them)
samples.json     the prompt panel before and after (report_card.json for a reward model)
checkpoint-N/    to resume from
model/           the result: a plain, self-contained model folder (adapter/ beside it after LoRA)
posttrain.json   the manifest, written last: a folder with it is complete
"""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from posttrain.checkpoint import PREFIX, fault, file_hashes, newest_whole, read_running, write_atomically
from posttrain.config import differences
from posttrain.console import is_main_process, say
from posttrain.errors import ConfigError, PosttrainError
from posttrain.schema import Config, PPOStage

MANIFEST = "posttrain.json"
IDENTITY = "run.json"
LOGS = ("metrics.jsonl", "rollouts.jsonl")  # a line per log entry, each with its step
OWN_FILES = (
    *(MANIFEST, IDENTITY, "config.yaml", "run.log", *LOGS),
    *("samples.json", "report_card.json", "curves.svg", "report.html", ".lock"),
)
PARTS = {"model": "weights", "adapter": "adapter_weights"}  # what a run makes -> its hashes in the manifest
OWN_FOLDERS = ("model", "adapter", "base", "runs")
# Keys that change what is shown or kept, never what is learned.
FREE_KEYS = (
    "dry_run",
    "overwrite",
    "output_dir",
    "trainer.report_to",
    "trainer.save_total_limit",
    "trainer.save_steps",
)
PACKAGES = ("posttrain", "torch", "transformers", "trl", "datasets", "peft", "accelerate", "tokenizers", "hydra-core")

State = Literal["new", "interrupted", "complete"]


def versions() -> dict[str, str]:
    """Package -> installed version, Python's among them."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # posttrain itself, in a checkout without an install
            found[package] = "not installed"
    return found


def weight_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the weights and the tokenizer in a model's or an adapter's folder."""
    names = ("*.safetensors", "tokenizer.json", "chat_template.jinja", "config.json", "adapter_config.json")
    files = [path for name in names for path in sorted(folder.glob(name))]
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_json(file: Path, remedy: str) -> Any:
    """The content of a file that a run wrote; None where there is no such file.

    Raises:
        ConfigError: it is broken; ends with the remedy.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{file} is broken ({error}); {remedy}") from error


def read_object(file: Path, needed: Collection[str], remedy: str) -> dict[str, Any] | None:
    """As `read_json`, of a JSON object with at least the `needed` keys."""
    found = read_json(file, remedy)
    if found is None:
        return None
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing or not isinstance(found, dict):
        raise ConfigError(f"{file} is broken (no {' and no '.join(missing) or 'object'}); {remedy}")
    return found


def parent_of(model_folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that made a model folder, if a run of ours did.

    Raises:
        ConfigError: the manifest is broken.
    """
    run = model_folder.parent
    needed = ("stage", *PARTS.values(), "inputs")
    return read_object(run / MANIFEST, needed, f"train {run} again with overwrite=true")


def input_hashes(model_folder: Path) -> dict[str, str]:
    """The `weight_hashes` of a model or adapter that something starts from; none of a model on the Hub.

    Raises:
        ConfigError: a run of ours made it, and it is no longer what that run wrote.
    """
    found = weight_hashes(model_folder)
    parent = parent_of(model_folder) if model_folder.name in PARTS else None
    written = parent[PARTS[model_folder.name]] if parent is not None else found
    for name, digest in found.items():
        if written.get(name) != digest:
            raise ConfigError(
                f"{model_folder / name} has changed since its run wrote it; train {model_folder.parent} again with "
                f"overwrite=true, or copy {model_folder.name}/ elsewhere to take it as it is"
            )
    return found


def with_inputs(config: Config, to_come: Collection[str] = ()) -> tuple[Config, str]:
    """The configuration with `model.model_name_or_path` and, for PPO, `stage.reward_model` filled in.

    Returned with it is why this starting model was taken. What stages that are still `to_come` will make is not asked
    for: the base model stands for the SFT model.

    Raises:
        ConfigError: a run whose model this stage would take has not finished, or PPO has no reward.
    """
    config, why = _with_starting_model(config, "sft" in to_come)
    return _with_reward_model(config, "reward" in to_come), why


def _with_reward_model(config: Config, to_come: bool) -> Config:
    stage = config.stage
    if not isinstance(stage, PPOStage) or stage.reward_model is not None:
        return config
    reward = Path(config.output_dir) / config.run_name / "reward"
    if (reward / MANIFEST).is_file():
        return replace(config, stage=replace(stage, reward_model=str(reward)))
    if stage.reward_functions or to_come:
        return config
    begun = f"{reward} has not finished" if (reward / IDENTITY).is_file() else f"{reward} is not there"
    raise ConfigError(
        f"stage=ppo needs a reward, and {begun}: run stage=reward run_name={config.run_name} first, or name one with "
        "stage.reward_model=<folder or Hub id> or stage.reward_functions=[my_rewards.concise]"
    )


def _with_starting_model(config: Config, to_come: bool) -> tuple[Config, str]:
    if config.model.model_name_or_path is not None:
        return config, "named by model.model_name_or_path"
    sft = Path(config.output_dir) / config.run_name / "sft"
    if config.stage.name != "sft" and (sft / MANIFEST).is_file():
        model = replace(config.model, model_name_or_path=str(sft), from_scratch=False)
        return replace(config, model=model), "the SFT model of this run"
    if to_come:
        base = replace(config.model, model_name_or_path=config.model.base_model)
        return replace(config, model=base), "in place of the SFT model that is still to come"
    if config.stage.name != "sft" and (sft / IDENTITY).is_file():
        raise ConfigError(
            f"{sft} has not finished; run stage=sft run_name={config.run_name} again, "
            "or name another model with model.model_name_or_path=…"
        )
    return replace(config, model=replace(config.model, model_name_or_path=config.model.base_model)), "the base model"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file of a run; none where it is not there. A kill may have cut the last one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_path(config: Config) -> Path:
    """The folder of the run that a configuration describes."""
    return Path(config.output_dir) / config.run_name / str(config.stage.name)


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.base = path / "base"
        self.log = path / "run.log"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.curves = path / "curves.svg"

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_object(self.path / name, (), "overwrite=true starts this run anew")

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a complete run, None before."""
        return self._read(MANIFEST)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second start of the same run out while this one is alive.

        Raises:
            PosttrainError: another process holds the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                held = f"{self.path} is in use by another process; wait for it or choose run_name=…"
                raise PosttrainError(held) from error
            yield

    def state(self, identity: dict[str, Any], overwrite: bool, rerun: bool = False) -> State:
        """Whether this run has begun here before; `overwrite` deletes a run that has, whichever it is.

        `rerun` deletes another run only, and says what differs.

        Raises:
            ConfigError: the folder holds another run, or files that no run wrote; names what differs.
        """
        if overwrite and (self.path / IDENTITY).is_file():
            if is_main_process():
                self.clear()
            return "new"
        earlier = self._read(IDENTITY)
        if earlier is None:
            foreign = [entry.name for entry in self._foreign()]
            if foreign:
                raise ConfigError(
                    f"{self.path} holds files that no run of posttrain wrote ({', '.join(sorted(foreign)[:3])}); "
                    "choose run_name=… or output_dir=…"
                )
            return "new"
        finished = self.manifest() is not None
        changed = {
            key: values
            for key, values in differences(earlier, identity).items()
            if not key.startswith("versions") and key.removeprefix("config.") not in FREE_KEYS
        }
        if finished:
            changed.pop("processes", None)
        if changed:
            what = "a finished run" if finished else "an interrupted run"
            told = "; ".join(_changed(key, *values) for key, values in list(changed.items())[:5])
            if rerun:
                say(f"{self.path} held {what} and is made anew: {told}")
                if is_main_process():
                    self.clear()
                return "new"
            raise ConfigError(
                f"{self.path} holds {what} with another configuration ({told}); "
                "choose run_name=… for a new run, or pass overwrite=true to delete the old one"
            )
        return "complete" if finished else "interrupted"

    def _foreign(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [
            entry
            for entry in self.path.iterdir()
            if entry.name not in (*OWN_FILES, "multirun.yaml", "sweep.svg", "frontier.json")
            and not (entry.is_dir() and ("=" in entry.name or entry.name == ".submitit"))
        ]

    def clear(self) -> None:
        """Delete the run, its checkpoints and its result; points of a sweep below it stay."""
        (self.path / MANIFEST).unlink(missing_ok=True)  # first: without it nothing here counts as complete
        for name in OWN_FILES:
            if name not in (".lock", "run.log"):  # both are open
                (self.path / name).unlink(missing_ok=True)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for checkpoint in self.path.glob(f"{PREFIX}*"):
            shutil.rmtree(checkpoint)

    def begin(self, identity: dict[str, Any], checkpoint: Path | None) -> None:
        """Write down what the run is, before its first step; cut the logs back to what `checkpoint` knows of them."""
        sizes = read_running(checkpoint)["logs"] if checkpoint else {}
        for file in (self.path / name for name in LOGS):
            if file.is_file():
                os.truncate(file, min(sizes.get(file.name, 0), file.stat().st_size))
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity["config"])))
        write_atomically(self.path / IDENTITY, json.dumps(identity, indent=1, ensure_ascii=False))

    def checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint; broken ones are deleted and told."""
        newest, faults = newest_whole(self.path)
        for checkpoint in self.path.glob(f"{PREFIX}*"):
            if is_main_process() and checkpoint != newest and fault(checkpoint) is not None:
                shutil.rmtree(checkpoint)
        return newest, faults

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, after which the run is complete."""
        manifest |= {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{
                part: {name: entry["sha256"] for name, entry in file_hashes(self.path / folder).items()}
                for folder, part in PARTS.items()
            },
        }
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))


def _changed(key: str, old: Any, new: Any) -> str:
    if key.startswith("data.fingerprint"):
        return f"the {key.rsplit('.', 1)[-1]} rows are not the same"
    if key.startswith("reward_model."):
        return "the reward model's weights are not the same"
    if key.startswith("model."):
        return "the weights to start from are not the same"
    return f"{key.removeprefix('config.')} was {old}, now {new}"
