"""Commands in processes of their own that pay for no imports: forked from a process that has made them and waits."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

STAGES = ("sft", "reward", "dpo", "ppo")
PRELOADED = [
    *(
        "posttrain.run",
        "posttrain.pipeline",
        "posttrain.chat",
        "posttrain.train",
        "posttrain.models.saving",
        "posttrain.rlhf.ppo",
    ),
    *(f"posttrain.stages.{stage}" for stage in STAGES),
    *(f"trl.trainer.{stage}_trainer" for stage in STAGES[:3]),
    *("transformers.trainer", "transformers.generation.utils", "transformers.models.gpt2.modeling_gpt2"),
    *("torch._dynamo", "peft", "datasets", "accelerate.commands.launch", "torch.distributed.run", "matplotlib.figure"),
]
CONTEXT = multiprocessing.get_context("forkserver")


class Forked:
    """`python -m <module> <arguments>`, with what tests use of a Popen."""

    def __init__(
        self, module: str, arguments: Sequence[str], cwd: Path, environment: dict[str, str], **options: Any
    ) -> None:
        """Options: `typed`, what is read from standard input; `file_size`, a limit in bytes; `new_session`."""
        CONTEXT.set_forkserver_preload(PRELOADED)
        given = dict(os.environ)
        os.environ.update(environment)  # what a library reads while it is imported
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(given)
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("out", "err", "in")]
        for file, text in zip(self.files, ("", "", options.pop("typed", "")), strict=True):
            file.write_text(text)
        words = (module, [*arguments], str(cwd), environment, [str(file) for file in self.files])
        self.process = CONTEXT.Process(target=_run, args=words, kwargs=options)
        self.process.start()
        self.pid = self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err, _ = (file.read_text() for file in self.files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    module: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    files: list[str],
    file_size: int | None = None,
    new_session: bool = False,
) -> None:
    """In the new process: as Python begins, calls the module, and ends."""
    for target, (file, how) in enumerate(((files[2], os.O_RDONLY), (files[0], os.O_WRONLY), (files[1], os.O_WRONLY))):
        opened = os.open(file, how)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if new_session:
        os.setsid()
    if file_size is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.path.insert(0, cwd)
    called = importlib.import_module(module)
    sys.argv = [str(called.__file__), *arguments]
    called.main()
