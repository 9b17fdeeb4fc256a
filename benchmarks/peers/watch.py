"""Running a tool's command: what it prints, how long it takes, what its processes hold, and what is left."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from peers.inputs import ROOT

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")
LIMIT = 480  # seconds of a run


class Ran(NamedTuple):
    code: int | None  # None: stopped at the time limit, or by `until`
    seconds: float
    cpu: float  # seconds, of the processes that it waited for
    text: str
    peak: int  # bytes, of all its processes together


def resident(group: int) -> int:
    """Bytes that the processes of a session hold."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        if int(fields[3]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run(command: Sequence[str], folder: Path, log: Path, until: Callable[[], bool] = lambda: False) -> Ran:
    """Run it offline on the CPU with one thread; killed with SIGKILL as soon as `until` holds."""
    programs = str(Path(command[0]).parent)
    variables = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT) if "posttrain.run" in command else "",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
        "TERM": "dumb",
        "HOME": str(folder / "home"),
    }
    (folder / "home").mkdir(exist_ok=True)
    started, peak, stopped, before = time.monotonic(), 0, False, cpu_seconds()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            if until() or time.monotonic() - started > LIMIT:
                stopped = True
                os.killpg(process.pid, signal.SIGKILL)
            peak = max(peak, resident(process.pid))
            time.sleep(0.05)
    return Ran(
        None if stopped else process.returncode, time.monotonic() - started, cpu_seconds() - before, plain(log), peak
    )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plain(log: Path) -> str:
    """What was printed, without colours, and each state of a progress bar as a line."""
    return ESCAPES.sub("", log.read_text(errors="replace")).replace("\r", "\n")


def states(folder: Path) -> list[Path]:
    """What the trainer wrote beside its checkpoints, the newest last."""
    found = [path for path in folder.rglob("trainer_state.json") if path.parent.name.startswith("checkpoint-")]
    return sorted(found, key=lambda path: int(path.parent.name.partition("-")[2]))


def weights(folder: Path) -> Path | None:
    """The weights of a result: of a model, else of an adapter."""
    for place in (folder / "model", folder):
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (place / name).is_file():
                return place / name
    return None


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of weights under a folder, checkpoints included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def history(folder: Path) -> list[dict[str, float]]:
    """The log of the newest checkpoint."""
    found = states(folder)
    if not found:
        return []
    try:
        return json.loads(found[-1].read_text())["log_history"]
    except json.JSONDecodeError:  # NaN is written so by some
        return []


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def fresh(source: Path, folder: Path) -> Path:
    """A copy of the inputs for one run."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder)
    return folder
