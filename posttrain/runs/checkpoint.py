"""What makes a run safe to lose: checkpoints that prove themselves, and an orderly end on a signal.

A checkpoint counts when its `checkpoint.json`, written last and atomically, names every file with size and sha256, and
they agree. One that a kill or a full disk cut short is never resumed from: it has a `checkpoint.json.part` from the
beginning, which marks it as ours. A folder with neither is never touched.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from posttrain.devices import world_size
from posttrain.errors import PosttrainError, Stopped
from posttrain.values import JsonObject

PREFIX = "checkpoint-"
MANIFEST = "checkpoint.json"
PART = f"{MANIFEST}.part"
RUNNING = "running_{}.json"  # of each process


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a run writes a file or a folder; half a folder is removed again, for it only takes room.

    Raises:
        PosttrainError: it could not be written; says why, and what to do.
    """
    try:
        yield
    except BaseException as error:
        written = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)):  # torch's for a full disk is RuntimeError
            raise
        text, free = str(error), shutil.disk_usage(path.parent).free
        full = any(os.strerror(number) in text for number in FULL) or free < 2**20
        last, _ = newest_whole(path.parent)
        raise PosttrainError(
            f"{'no space left' if full else 'failed'} while writing {path} ({written / 1e6:.1f} MB written, "
            f"{free / 1e6:.1f} MB free; {type(error).__name__}: {text.splitlines()[0] if text else ''}). "
            f"{f'Last whole checkpoint: {last.name}' if last else 'There is no whole checkpoint'}; "
            f"make room there{'' if full else ' or make it writable'}, and the same command goes on"
        ) from error


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader, whenever it looks, finds the old content, the new, or no file."""
    staged = path.with_name(path.name + ".part")
    if staged.exists() and staged.name != PART:  # somebody else's
        staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path), staged.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def modes_by_umask(folder: Path) -> None:
    """Give a folder that has just been written, and all below it, the modes that anything new has.

    safetensors makes its own readable by their owner alone (0.8), which locks a colleague or a server out.
    """
    os.umask(mask := os.umask(0o077))  # it can only be read by setting it
    for path in (folder, *folder.rglob("*")):
        if path.exists() and not path.is_symlink():
            kept = path.stat().st_mode & 0o7000  # a folder may hand its group on to what is in it
            path.chmod(kept | (0o777 if path.is_dir() else 0o666) & ~mask)


def sha256(path: Path) -> str:
    """The digest of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, dict[str, int | str]]:
    """Relative path -> size and sha256 of every file below a folder, except the manifest itself."""
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, PART)
    }


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a whole one."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        recorded = {name: (wanted["size"], wanted["sha256"]) for name, wanted in files.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is broken ({error})"
    for name, (size, digest) in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


def log_sizes(folder: Path) -> dict[str, int]:
    """How many bytes the logs of a run have by now, all of them on the disk."""
    found = {}
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.name] = os.fstat(file.fileno()).st_size
    return found


def read_running(checkpoint: Path, process: int = 0) -> JsonObject:
    """What the next log entries are made of, on a process, besides the weights.

    Of a checkpoint from another number of processes, the mean of their losses, and the rest of one of them.

    Raises:
        PosttrainError: the checkpoint is of a version that did not keep it.
    """
    wrote = processes_of(checkpoint)
    if not wrote:
        raise PosttrainError(
            f"{checkpoint / RUNNING.format(0)} is missing: an older version of posttrain wrote this checkpoint. Finish "
            "the run with that version, or start over with overwrite=true"
        )

    def text_of(number: int) -> str:
        return (checkpoint / RUNNING.format(number)).read_text(encoding="utf-8")

    running: JsonObject = json.loads(text_of(process % wrote))
    if wrote != world_size():
        running["loss"] = math.fsum(json.loads(text_of(number))["loss"] for number in range(wrote)) / wrote
    return running


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(checkpoint.glob(RUNNING.format("*"))))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 of any other folder, such as a user's checkpoint-best."""
    named = re.fullmatch(rf"{PREFIX}(0|[1-9][0-9]*)", checkpoint.name)
    return int(named[1]) if named else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run has written or begun to, the oldest step first; the clock plays no part."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if step_of(path) >= 0 and is_ours(path)), key=step_of)


def is_ours(checkpoint: Path) -> bool:
    """Whether a run has written a folder or begun to, and not a user."""
    return any((checkpoint / name).is_file() for name in (MANIFEST, PART))


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the newest and the best one stay."""
    written = checkpoints(folder)
    excess = len(written) - limit if limit and limit > 0 else 0
    kept = {written[-1].name, Path(best or "").name}
    for checkpoint in [path for path in written if path.name not in kept][: max(excess, 0)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    faults: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} is not resumed from: {problem}")
    return None, faults


class StopSignals:
    """While active, SIGTERM and SIGINT ask for a checkpoint at the end of the step; a second one ends at once."""

    outside = "nothing was trained"  # what an interruption outside of training has done to this command's work

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            written = [path.name for path in checkpoints(self.folder)]
            last = f"{written[-1]} is kept" if written else "there is no checkpoint yet"
            raise KeyboardInterrupt(f"by a second signal in the middle of a step; {last}")
        self.received = number

    def __exit__(self, *exception: object) -> None:
        StopSignals.outside = "what was saved stands, and the same command goes on from it"
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_received(self, message: str) -> None:
        if self.received is not None:
            raise Stopped(f"stopped by {signal.Signals(self.received).name} {message}", self.received)
