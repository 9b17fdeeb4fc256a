"""The machine that a dry run plans for, which `plan` describes or which is this one, and what a device holds of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.accelerate import accelerate_config
from posttrain.config.machines import DEVICES, bytes_of
from posttrain.config.schema import Config
from posttrain.devices import mixed_precision, wanted_precision, world_size

DDP, FSDP, ZERO = "DDP", "FSDP", "DEEPSPEED"  # the latter as accelerate calls them


@dataclass(frozen=True)
class Machine:
    """Devices, and how accelerate's engine shares out among them."""

    name: str  # of a device
    is_gpu: bool
    devices: int
    memory: int  # of a device, in bytes
    tflops: float | None  # peak of a device in the precision of the run, if it is known
    precision: str  # no, bf16 or fp16, as accelerate's mixed_precision
    engine: str
    # the share that each device holds, 0 where it is kept in the CPU's memory
    weights: float
    gradients: float
    optimizer: float


def machine_of(config: Config) -> Machine:
    """The machine of a configuration.

    Raises:
        ConfigError: the precision contradicts accelerate's.
    """
    import torch

    plan, file, environment = config.plan, accelerate_config(config.accelerate), os.environ
    devices = plan.devices or int(file.get("num_processes", world_size()))
    launched = file.get("mixed_precision", environment.get("ACCELERATE_MIXED_PRECISION"))
    precision = wanted_precision(config.precision, launched)
    elsewhere = bool(plan.device or plan.memory or plan.tflops)
    if precision is None:
        precision = "bf16" if elsewhere else mixed_precision(config.precision)
    name, memory = _here()
    tflops = plan.tflops
    if plan.device is not None:
        device = DEVICES[plan.device]
        name, memory = plan.device, int(device.memory * 2**30)
        if precision != "no" or config.model.dtype in ("bfloat16", "float16"):
            tflops = tflops or device.tflops
    if plan.memory is not None:
        name, memory = plan.device or "the planned device", bytes_of(plan.memory)
    engine, weights, gradients, optimizer = _shares(file, devices)
    is_gpu = elsewhere or torch.cuda.is_available()
    return Machine(name, is_gpu, devices, memory, tflops, precision, engine, weights, gradients, optimizer)


def _shares(file: dict[str, object], devices: int) -> tuple[str, float, float, float]:
    """The engine, and what it leaves each device: FSDP and ZeRO-3 share everything, ZeRO-2 all but the weights."""
    sections = [part for part in file.values() if isinstance(part, dict)]
    given = {key: value for section in sections for key, value in section.items()}
    environment = {} if file else os.environ  # of accelerate launch

    def told(key: str, variable: str, otherwise: str) -> str:
        return str(given.get(key, environment.get(variable, otherwise))).lower()

    engine, share = str(file.get("distributed_type", "")), 1 / devices
    if engine == FSDP or environment.get("ACCELERATE_USE_FSDP") == "true":
        kept = 0.0 if told("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "false") == "true" else share
        shared = told("fsdp_reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
        return FSDP, kept if shared else 1.0, kept, kept
    if engine == ZERO or environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = int(told("zero_stage", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        weights, gradients, optimizer = (share if stage >= least else 1.0 for least in (3, 2, 1))
        if told("offload_param_device", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none":
            weights = 0.0
        if told("offload_optimizer_device", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
            optimizer = 0.0
        return ZERO, weights, gradients, optimizer
    return DDP if devices > 1 else "", 1.0, 1.0, 1.0


def _here() -> tuple[str, int]:
    """The device of this process and its bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container or a Slurm job
    if limit.is_file() and (written := limit.read_text().strip()).isdigit():
        total = min(total, int(written))
    return "this machine", int(total)
