"""Hydra's launcher of a sweep: each point is a process of its own, `python -m posttrain.run`.

A point that fails or is killed takes nothing else with it, and trackers, devices and process groups start fresh. Hydra
looks for launchers in packages of this name only; conf/config.yaml makes it the default for `-m`.

hydra.launcher.n_jobs  points at a time; null: one, or with several GPUs and without `accelerate=` one on each
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


@dataclass
class ProcessLauncherConf:
    """`hydra/launcher=process`."""

    _target_: str = "hydra_plugins.posttrain_launcher.ProcessLauncher"
    n_jobs: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessLauncherConf, provider="posttrain")


@dataclass
class _Point:
    name: str
    folder: Path
    config: DictConfig
    command: list[str]
    result: JobReturn = field(default_factory=JobReturn)


class ProcessLauncher(Launcher):
    """Runs the points of a sweep as processes, `n_jobs` at a time."""

    def __init__(self, n_jobs: int | None = None) -> None:
        self.n_jobs = n_jobs
        self.running: set[subprocess.Popen[Any]] = set()
        self.stopped: int | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every point that is not complete yet; a failed one is reported, and the others go on."""
        from posttrain.console import say
        from posttrain.devices import visible_gpus

        points = [self._point(overrides, initial_job_idx + place) for place, overrides in enumerate(job_overrides)]
        gpus, accelerates = visible_gpus(), any(point.config.accelerate.config_file for point in points)
        jobs = self.n_jobs or (1 if accelerates else max(len(gpus), 1))
        shares = share_out(gpus, jobs)
        slots: queue.Queue[list[str]] = queue.Queue()
        for share in shares:
            # without accelerate one process trains on one device
            slots.put(share if accelerates else share[:1])
        say(f"sweep: {len(points)} points, {jobs} at a time" + (f", {len(shares[0])} GPUs each" if gpus else ""))
        with self._ending_together(), ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda point: self._run(point, slots, prefixed=jobs > 1), points))
        if self.stopped is not None:
            sys.exit(128 + self.stopped)
        return [point.result for point in points]

    def _point(self, overrides: Sequence[str], number: int) -> _Point:
        from posttrain.cli import command, entry

        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # the folder's name is made of it
        name = str(OmegaConf.select(config, "hydra.sweep.subdir"))
        folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir"))) / name
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.task)
        given = command.parse(entry.typed).config_dir
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        words = [sys.executable, "-m", "posttrain.run", *overrides, f"hydra.run.dir='{quoted}'"]
        return _Point(name, folder, config, [*words, *(["--config-dir", given] if given else [])])

    def _run(self, point: _Point, slots: "queue.Queue[list[str]]", prefixed: bool) -> None:
        from posttrain.cli.sweep import is_complete, objective_of
        from posttrain.console import fail, say
        from posttrain.errors import AlreadyToldError

        overrides: Any = OmegaConf.to_container(point.config.hydra.overrides.task)
        point.result.overrides = overrides
        point.result.status = JobStatus.FAILED
        point.result.return_value = AlreadyToldError("stopped")
        if self.stopped is not None:
            return
        if is_complete(point.folder, point.config):
            say(f"{point.name}: already complete, and nothing has changed")
        else:
            devices = slots.get()
            try:
                code = self._wait_for(point, devices, prefixed)
            finally:
                slots.put(devices)
            if code:
                ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                fail("Point", f"{point.name} {ended}; see {point.folder / 'run.log'}")
                return
        point.result.status = JobStatus.COMPLETED
        point.result.return_value = objective_of(point.folder)

    def _wait_for(self, point: _Point, devices: list[str], prefixed: bool) -> int:
        from posttrain import console

        console.say(f"sweep: {point.name}" + (f" on GPU {','.join(devices)}" if devices else ""))
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})}
        if not console.traces:
            environment.pop(console.TRACE, None)  # this process set it for itself
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if prefixed else {}
        # a group of its own: a signal reaches it once, from here
        with subprocess.Popen(point.command, env=environment, start_new_session=True, **output) as process:
            self.running.add(process)
            if self.stopped is not None:
                _signal(process, self.stopped)
            for line in process.stdout or ():
                shown = line.rstrip("\n").rpartition("\r")[2]
                if shown.strip() and "it/s" not in shown and "s/it" not in shown:
                    print(f"[{point.name}] {shown}", flush=True)
            code = process.wait()
            self.running.discard(process)
        return code

    @contextmanager
    def _ending_together(self) -> Iterator[None]:
        """A signal to this process goes on to every point: each writes its checkpoint and ends."""

        def forward(number: int, frame: Any) -> None:
            self.stopped = number
            for process in list(self.running):
                _signal(process, number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _signal(process: "subprocess.Popen[Any]", number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # it has ended meanwhile


def share_out(gpus: Sequence[str], jobs: int) -> list[list[str]]:
    """The GPUs of each of `jobs` points that run at a time; with fewer GPUs than jobs, some share one."""
    if not gpus:
        return [[] for _ in range(jobs)]
    each = max(len(gpus) // jobs, 1)
    return [[gpus[(job * each + place) % len(gpus)] for place in range(each)] for job in range(jobs)]
