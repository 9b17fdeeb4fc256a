"""Documented hyperparameters to TRL's arguments: the only place where a name changes."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.errors import ConfigError, PosttrainError
from posttrain.schema import Config, renamed

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def process_state() -> "PartialState":
    """accelerate's view of the processes of this run, on the CPU where there is no accelerator."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available() or _told_to_use_cpu())


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


def _told_to_use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def mixed_precision(precision: str) -> str:
    """`no`, `fp16` or `bf16` for the device found; a choice made by `accelerate launch` wins over auto.

    Raises:
        ConfigError: the device cannot compute in that precision, or it contradicts accelerate's.
    """
    import torch

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    wanted = {"auto": None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    if launched is not None and wanted is not None and launched != wanted:
        raise ConfigError(
            f"precision={precision} contradicts mixed_precision={launched} of accelerate launch; leave one of them out"
        )
    has_gpu = torch.cuda.is_available()
    if wanted is None:
        wanted = launched or ("bf16" if has_gpu and torch.cuda.is_bf16_supported() else "no")
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


def trainer_arguments(config: Config, folder: Path, has_test: bool) -> dict[str, Any]:
    """The keyword arguments of the stage's TRL config.

    Raises:
        ConfigError: an option asks for what is not there (a tracker, a package, a GPU, several GPUs in one process).
    """
    import torch

    ours = {trl: vars(config.stage)[name] for trl, name in renamed(config.stage).items()}
    given = dict(config.trainer)
    if not has_test and given.get("eval_strategy", "no") != "no":
        given |= {"eval_strategy": "no"}
        given.pop("eval_steps", None)
    if given.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("trainer.use_liger_kernel=true: not installed; pip install 'posttrain[liger]'")
    if given.get("activation_offloading") and not torch.accelerator.is_available():
        raise ConfigError("trainer.activation_offloading=true needs a GPU: activations are moved away from it")
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start with `accelerate launch -m "
            "posttrain.run ...` to use them all, or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    precision = mixed_precision(config.precision)
    return {
        "per_device_eval_batch_size": config.stage.batch_size,
        "include_num_input_tokens_seen": "non_padding",
        "project": "posttrain",
        **given,
        **ours,
        "output_dir": str(folder),
        "run_name": "/".join(folder.parts[-3:]),
        "seed": config.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.accelerator.is_available() or _told_to_use_cpu(),
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
    }


def trl_config(kind: Callable[..., T], arguments: dict[str, Any]) -> T:
    """TRL's config of these arguments.

    Raises:
        ConfigError: they contradict each other, in the words of TRL or transformers.
    """
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
