"""Devices and processes: which process this is, how many there are, and the precision that they compute in."""

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.console import counted
from posttrain.errors import ConfigError, PosttrainError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
Row = TypeVar("Row")


def process_state() -> "PartialState":
    """accelerate's view of the processes of this run, on the CPU where there is no accelerator."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available() or cpu_only())


def setup_device() -> "torch.device":
    """The device of this process: the accelerator that accelerate gives it, or the CPU."""
    device: torch.device = process_state().device
    return device


def world_size() -> int:
    """How many processes were started, known before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of those that `accelerate launch` or torchrun has started."""
    return world_size() > 1 or "LOCAL_RANK" in os.environ


def leave_processes() -> None:
    """Take leave of the other processes: one that merely exits while torch's threads still serve another may abort."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; torch is not imported."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return list(_gpus_of_the_machine())


@cache
def _gpus_of_the_machine() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return tuple(found.stdout.split()) if found.returncode == 0 else ()


def sharding_engine() -> str | None:
    """What accelerate was asked to share weights or optimizer state out with, known before torch is imported."""
    engines = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, flag in engines.items() if os.environ.get(flag, "").lower() == "true"), None)


def on_main_process(decide: Callable[[], T]) -> T:
    """What `decide` gives on process 0, on every process; where it fails, all of them raise its error."""
    from accelerate.utils import broadcast_object_list

    state = process_state()
    found: list[Any] = [None]
    if state.is_main_process:
        try:
            found = [decide()]
        except PosttrainError as error:
            found = [error]
    if state.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], PosttrainError):
        raise found[0]
    decided: T = found[0]
    return decided


def on_each_machine(make: Callable[[], None]) -> None:
    """`make` on one process of each machine while the others wait, for hours if need be; an error is raised by all.

    A group of its own, as the wait of the default one is minutes.
    """
    from torch import distributed

    state = process_state()
    group, errors = None, list[PosttrainError | None]([None] * state.num_processes)
    if state.num_processes > 1:
        group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    if state.is_local_main_process:
        try:
            make()
        except PosttrainError as error:
            errors[state.process_index] = error
    if group is not None:
        distributed.all_gather_object(errors, errors[state.process_index], group=group)
        distributed.destroy_process_group(group)
    for found in filter(None, errors):
        raise found


def on_all_processes(rows: Sequence[Row], find: Callable[[list[Row]], Sequence[T]]) -> list[T]:
    """What `find` gives for each row, in the rows' own order; each process is handed a share of them.

    The shares are of equal size, because forwards of a sharded model wait for one another: some rows may be read twice.
    """
    from accelerate.utils import gather_object

    state, count = process_state(), len(rows)
    share = range(state.process_index, count + -count % state.num_processes, state.num_processes)
    mine = [place % count for place in share]
    found = dict(gather_object(list(zip(mine, find([rows[place] for place in mine]), strict=True)))) if rows else {}
    return [found[place] for place in range(count)]


def mixed_precision(precision: str) -> str:
    """`no`, `fp16` or `bf16` for the device found; a choice made by `accelerate launch` wins over auto.

    Raises:
        ConfigError: the device cannot compute in that precision, or it contradicts accelerate's.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    wanted = wanted_precision(precision, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    if wanted is None:
        wanted = "bf16" if has_gpu and torch.cuda.is_bf16_supported() else "no"
    if wanted == "fp16" and not torch.accelerator.is_available():
        raise ConfigError(
            "precision=fp16 needs a GPU (transformers would train in fp32 without a word); use fp32 or bf16"
        )
    if wanted == "bf16" and has_gpu and not torch.cuda.is_bf16_supported():
        major, minor = torch.cuda.get_device_capability()
        raise ConfigError(
            f"precision=bf16 needs compute capability 8.0, {torch.cuda.get_device_name()} has {major}.{minor}; "
            "use fp32 or fp16"
        )
    return wanted


def wanted_precision(precision: str, launched: str | None) -> str | None:
    """`no`, `fp16` or `bf16` as the configuration or accelerate's says; None where the device decides.

    Raises:
        ConfigError: they contradict each other.
    """
    wanted = {"auto": None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    if launched is not None and wanted is not None and launched != wanted:
        raise ConfigError(
            f"precision={precision} contradicts mixed_precision={launched} of accelerate launch; leave one of them out"
        )
    return wanted or launched


def cpu_only() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def forget_peak_memory() -> None:
    """Let `hardware` count from here on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):  # of Linux
        Path("/proc/self/clear_refs").write_text("5")


def hardware() -> tuple[str, int | None]:
    """What this process computes on, and the bytes that it has held at most: those of tensors on a GPU."""
    import torch

    if torch.cuda.is_available() and not cpu_only():
        return torch.cuda.get_device_name(), int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.is_file() else "")
    threads = counted(torch.get_num_threads(), "thread")
    return f"CPU ({platform.machine()}), {threads}", int(found[1]) * 1024 if found else None
