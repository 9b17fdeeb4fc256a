"""The run folder: what a run is, whether it is new, interrupted or complete, and the manifest that it ends with.

A run is identified by what is in its folder and by the hashes of what it starts from, never by a path or a clock: it
can be moved, renamed and copied whole.

config.yaml      the resolved configuration
run.json         what the run is: configuration, data, starting weights, number of processes
run.log          everything that was printed, and more
metrics.jsonl    a line per log entry
rollouts.jsonl   of PPO and GRPO: completions of each rollout with their rewards (and curves.svg: reward and KL)
samples.json     the prompt panel before and after (report_card.json for a reward model)
checkpoint-N/    to resume from
model/           the result: a plain, self-contained model folder (adapter/ beside it after LoRA)
posttrain.json   the manifest, written last: a folder with it is complete
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from posttrain.config.check import differences
from posttrain.config.schema import Config
from posttrain.console import say
from posttrain.errors import ConfigError, PosttrainError
from posttrain.runs.checkpoint import checkpoints, fault, file_hashes, newest_whole, read_running, write_atomically
from posttrain.values import JsonObject

MANIFEST = "posttrain.json"
IDENTITY = "run.json"
LOGS = ("metrics.jsonl", "rollouts.jsonl")  # a line per log entry, each with its step
ANSWERS = "answers"  # of `posttrain pairs`: what was sampled, in shards
OWN_FILES = (
    *(MANIFEST, IDENTITY, "config.yaml", "run.log", *LOGS, "preferences.jsonl", "instructions.jsonl"),
    *("samples.json", "report_card.json", "curves.svg", "report.html"),
)
PARTS = {"model": "weights", "adapter": "adapter_weights"}  # what a run makes -> its hashes in the manifest
BASE = "base_weights"  # the same of base/
OWN_FOLDERS = ("model", "adapter", "base", "runs", ANSWERS)
BEFORE_THE_FIRST_STEP = (IDENTITY, "config.yaml", "run.log", "base", "runs", ".lock")
OF_SWEEPS = ("multirun.yaml", "sweep.svg", "frontier.json", ".submitit")  # beside the points, in a stage's folder
ROUND = "-round"  # in the name of a stage's folder, before the number of the pipeline's round
EARLIER = "earlier"  # in the folder of a run: results that a re-run has moved aside
SHOWN_REASONS = 5  # why a run is not the one that its folder holds
# Keys that change what is shown or kept, never what is learned; data are compared by their content.
FREE_KEYS = (
    "dry_run",
    "overwrite",
    "move_aside",
    "output_dir",
    "run_name",
    "data.dataset_name",
    "data.num_proc",
    "data.cache_dir",
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


def sha256_of(file: Path) -> str:
    """The digest of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_json(file: Path, remedy: str) -> Any:
    """The content of a file that a run wrote; None where there is no such file.

    Raises:
        ConfigError: it is broken; ends with the remedy.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{file} is broken ({error}); {remedy}") from error


def read_object(file: Path, needed: Collection[str], remedy: str) -> JsonObject | None:
    """As `read_json`, of a JSON object with at least the `needed` keys."""
    found = read_json(file, remedy)
    if found is None:
        return None
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing or not isinstance(found, dict):
        raise ConfigError(f"{file} is broken (no {' and no '.join(missing) or 'object'}); {remedy}")
    return found


def read_lines(file: Path) -> list[JsonObject]:
    """The whole lines of a .jsonl file of a run; none where it is not there. A kill may have cut the last one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_path(config: Config) -> Path:
    """The folder of the run that a configuration describes."""
    return Path(config.output_dir) / config.run_name / str(config.stage.name)


def check_path(config: Config) -> None:
    """Refuse a run folder that cannot be made.

    Raises:
        ConfigError: output_dir is an address, a name is too long, or a file stands where a folder would.
    """
    folder = run_path(config)
    if not config.output_dir.strip():
        raise ConfigError("output_dir is empty; name a folder, for example output_dir=outputs")
    if "://" in config.output_dir:
        raise ConfigError(f"output_dir={config.output_dir} must be a folder of this machine or of one mounted on it")
    for name in folder.parts:
        if len(os.fsencode(name)) > 255:
            raise ConfigError(f"{name[:40]}… has {len(os.fsencode(name))} bytes; a file name may have 255")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output_dir={config.output_dir}: {path} is a file, so {folder} cannot be a folder")
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"output_dir={config.output_dir}: {path} is a link to {path.readlink()}, which is not there"
            )


@contextlib.contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Keep other processes out of the folders of some runs; this process may lock one again.

    The lock stands beside a folder, so that the folder can be moved.

    Raises:
        PosttrainError: another process holds one of them.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    whole = folder.resolve()
    file = whole.with_name(f".{whole.name}.lock")
    lock = FileLock(file, timeout=0, is_singleton=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise PosttrainError(f"{folder} is in use by another process; wait for it or choose run_name=…") from error
    except OSError as error:
        raise ConfigError(f"output_dir: {folder.parent} is not writable ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1 and not folder.exists():  # nothing began here
            file.unlink(missing_ok=True)
            remove_if_empty(folder)
        lock.release()


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that did not begin, and those above it, as far as nothing else lives there."""
    for path in (folder, *folder.parents[:2]):
        with contextlib.suppress(OSError):
            path.rmdir()


def first_begun(run: Path) -> datetime.datetime:
    """When the first of the stages in a run's folder began; now, where none has."""
    found = [read_object(file, (), "overwrite=true starts that stage over") or {} for file in run.glob(f"*/{IDENTITY}")]
    begun = [identity["begun"] for identity in found if "begun" in identity]
    now = datetime.datetime.now().replace(microsecond=0)
    return datetime.datetime.fromisoformat(min(begun)) if begun else now


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
        self.elsewhere = "run_name=…"  # the key by which another folder is named
        self.trains = False  # set once training begins: from then on the folder is kept even if the run fails
        self._room: Literal["", "clear", "move"] = ""  # what has to happen to a run that is here

    def _read(self, name: str) -> JsonObject | None:
        return read_object(self.path / name, (), "overwrite=true starts this run over")

    def manifest(self) -> JsonObject | None:
        """The manifest of a complete run, None before."""
        return self._read(MANIFEST)

    def look(
        self, identity: JsonObject, overwrite: bool, move_aside: bool, once_done: Mapping[str, object] | None = None
    ) -> State:
        """Whether this run has begun here before; changes nothing, and is for the main process alone.

        Where another run is here, `overwrite` lets `make_room` delete it, whichever it is, and `move_aside` move it to
        `earlier/`. What `once_done` holds, by the names of the manifest, may change until the run is finished.

        Raises:
            ConfigError: the folder holds another run, or files that no run wrote; names what differs.
        """
        earlier = self._read(IDENTITY)
        if earlier is None:
            names = sorted(entry.name for entry in self._entries())
            foreign = [name for name in names if name.removesuffix(".part") not in BEFORE_THE_FIRST_STEP]
            if foreign:
                raise ConfigError(
                    f"{self.path} holds files that are not of one run ({', '.join(foreign[:3])}); "
                    f"choose {self.elsewhere}"
                )
            return "new"
        if overwrite:
            self._room = "clear"
            return "new"
        finished = self.manifest()
        if finished is not None and once_done is not None:
            earlier = earlier | {name: finished[name] for name in once_done if name in finished}
            identity = {**identity, **once_done}
        changed = changes(earlier, identity)
        damage = [f"{name} {what}" for name, what in self.damage(finished).items()] if finished is not None else []
        if not changed and not damage:
            return "complete" if finished else "interrupted"
        reasons = [*(_changed(key, *values) for key, values in changed.items()), *damage]
        more = len(reasons) - SHOWN_REASONS
        why = "; ".join([*reasons[:SHOWN_REASONS], *([f"and {more} more"] if more > 0 else [])])
        how = "with another configuration" if changed else "whose result is not as it was written"
        if not finished and not checkpoints(self.path) and not any((self.path / ANSWERS).glob("*.jsonl")):
            say(f"{self.path}: an earlier start stopped before its first checkpoint; starting over ({why})")
            self._room = "clear"
            return "new"
        what = "a finished run" if finished else "an interrupted run"
        if move_aside:
            say(f"{self.path} holds {what} {how}: {why}")
            self._room = "move"
            return "new"
        raise ConfigError(
            f"{self.path} holds {what} {how} ({why}); "
            f"choose {self.elsewhere} for a new run, or pass move_aside=true to keep the old one aside, overwrite=true "
            "to delete it"
        )

    def began_on(self) -> int | None:
        """How many processes the run began on whose checkpoints are here; None without any."""
        identity = self._read(IDENTITY) if checkpoints(self.path) else None
        return identity["processes"] if identity else None

    def make_room(self) -> Path | None:
        """Do to a run that is here what `look` has found; where it is now, if it was moved aside."""
        if self._room == "clear":
            if (self.path / MANIFEST).is_file():
                what = ", its model with it" if self.model.is_dir() else ""
                say(f"{self.path}: the finished run is deleted{what} (overwrite=true)")
            self.clear()
        elif self._room == "move":
            aside = self.move_aside()
            say(f"{self.path}: it is moved to {aside}")
            return aside
        return None

    def damage(self, manifest: JsonObject) -> dict[str, str]:
        """File of the result -> what has become of it since the run finished."""
        found = {}
        parts = {**PARTS, "": "files"}
        if manifest.get(PARTS["adapter"]):  # which is nothing without it
            parts["base"] = BASE
        for part, hashes in parts.items():
            for name, digest in manifest.get(hashes, {}).items():
                file = self.path / part / name
                if not file.is_file():
                    found[str(Path(part, name))] = "is missing"
                elif sha256_of(file) != digest:
                    found[str(Path(part, name))] = "has changed since the run finished"
        return found

    def _entries(self) -> list[Path]:
        """What is in the folder, but for the points of sweeps and what belongs to them."""
        entries = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [entry for entry in entries if not _of_sweeps(entry)]

    def others(self) -> list[str]:
        """Names in the folder that no run writes: they are never touched."""
        own = {*OWN_FILES, *OWN_FOLDERS, ".lock", *(checkpoint.name for checkpoint in checkpoints(self.path))}
        return [entry.name for entry in self._entries() if entry.name not in own]

    def move_aside(self) -> Path:
        """Rename the folder whole to earlier/<stage>-<when it finished> and return where; points of a sweep stay."""
        manifest = self.manifest()
        since = datetime.datetime.fromtimestamp((self.path / IDENTITY).stat().st_mtime, datetime.UTC).isoformat()
        when = re.sub(r"[-:]|\..*|\+.*", "", manifest["finished"] if manifest else since)
        is_point = "=" in self.path.name
        run = self.path.parent.parent if is_point else self.path.parent
        name = f"{self.path.parent.name}-{self.path.name}-{when}" if is_point else f"{self.path.name}-{when}"
        target, number = run / EARLIER / name, 1
        while target.exists():
            number += 1
            target = run / EARLIER / f"{name}-{number}"
        target.parent.mkdir(exist_ok=True)
        self.path.rename(target)
        self.path.mkdir()
        for entry in target.iterdir():
            if _of_sweeps(entry):
                entry.rename(self.path / entry.name)
        return target

    def clear(self) -> None:
        """Delete the run, its checkpoints and its result; points of a sweep and other files stay."""
        (self.path / MANIFEST).unlink(missing_ok=True)  # first: without it nothing here counts as complete
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        for folder in [*(self.path / name for name in OWN_FOLDERS), *checkpoints(self.path)]:
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self, identity: JsonObject, checkpoint: Path | None) -> None:
        """Write down what the run is, before it writes anything else; cut the logs back to what `checkpoint` knows."""
        self.path.mkdir(parents=True, exist_ok=True)
        sizes = read_running(checkpoint)["logs"] if checkpoint else {}
        for file in (self.path / name for name in LOGS):
            if file.is_file():
                os.truncate(file, min(sizes.get(file.name, 0), file.stat().st_size))
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity["config"])))
        write_atomically(self.path / IDENTITY, json.dumps(identity, indent=1, ensure_ascii=False))

    def checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a line for each newer one that is broken; those are deleted."""
        newest, faults = newest_whole(self.path)
        for checkpoint in checkpoints(self.path):
            if checkpoint != newest and (problem := fault(checkpoint)) is not None:
                faults += [] if any(checkpoint.name in line for line in faults) else [f"{checkpoint.name}: {problem}"]
                shutil.rmtree(checkpoint)
        return newest, faults

    def finish(self, manifest: JsonObject) -> None:
        """Write the manifest, after which the run is complete."""
        manifest |= {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{
                part: {name: entry["sha256"] for name, entry in file_hashes(self.path / folder).items()}
                for folder, part in {**PARTS, "base": BASE}.items()
            },
        }
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))


def of_round(stage: str, number: int) -> str:
    """The name of a stage's folder in a round of a pipeline."""
    return f"{stage}{ROUND}{number}" if number > 1 else stage


def _of_sweeps(entry: Path) -> bool:
    return entry.name in OF_SWEEPS or "=" in entry.name  # a point, or the lock beside it


def changes(earlier: JsonObject, identity: JsonObject) -> dict[str, tuple[object, object]]:
    """Key -> (old, new) of all that makes two runs different ones; an input with a hash is compared by it alone."""
    hashed = {
        "model": ("model.model_name_or_path", "model.base_model"),
        "reward_model": ("stage.reward_model",),
        "reference": ("stage.reference",),
        "chat_template": ("model.chat_template_path",),
        "code": ("stage.reward_functions", "stage.eval_reward_functions"),
    }
    free = {
        *FREE_KEYS,
        *(key for part, keys in hashed.items() if earlier.get(part) and identity.get(part) for key in keys),
    }
    found = {}
    for key, values in differences(_comparable(earlier), _comparable(identity)).items():
        section = key.split(".")[0]
        unknown_then = section in hashed and section not in earlier  # a run of an older posttrain
        is_free = (
            key.startswith(("versions.", "config.accelerate.", "config.plan.")) or key.removeprefix("config.") in free
        )
        if not is_free and not unknown_then:
            found[key] = values
    found.pop("processes", None)  # the rows of an update stay the same, or it is refused
    return found


def _comparable(identity: JsonObject) -> JsonObject:
    """Reward functions by name and code, whatever the folder of their file is."""
    identity = {name: part for name, part in identity.items() if name != "begun"}
    named = {re.split(r"[:.]", spec)[-1]: digest for spec, digest in identity.get("code", {}).items()}
    return {**identity, "code": named} if "code" in identity else identity


def _changed(key: str, old: object, new: object) -> str:
    if key.startswith("data."):
        return "the rows are not the same: data names another file, or the content of one has changed"
    if key == "config.data.mixture":
        return "data.mixture is not the same"
    if key.startswith("reward_model."):
        return "the reward model's weights are not the same"
    if key.startswith("reference."):
        return "the reference's weights are not the same"
    if key.startswith("model."):
        return "the weights to start from are not the same"
    if key.startswith("chat_template"):
        return "the chat template is not the same"
    if key.startswith("code."):
        return f"reward function {key.rsplit('.', 1)[-1]} is not the same"
    return f"{key.removeprefix('config.')} was {old}, now {new}"
