"""Documented hyperparameters to TRL's arguments: the only place where a name changes."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from posttrain.config.reserved import PATIENCE
from posttrain.config.schema import Config, renamed
from posttrain.config.stages import STAGES
from posttrain.console import say
from posttrain.devices import cpu_only, mixed_precision, sharding_engine, world_size
from posttrain.errors import ConfigError
from posttrain.metrics.catalogue import lower_is_better
from posttrain.values import JsonObject

T = TypeVar("T")


def trainer_arguments(config: Config, folder: Path, has_test: bool) -> JsonObject:
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
    if lower_is_better(str(given.get("metric_for_best_model"))):  # transformers knows of losses alone
        given.setdefault("greater_is_better", False)
    if given.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("trainer.use_liger_kernel=true: not installed; pip install 'posttrain[liger]'")
    if given.get("activation_offloading") and not torch.accelerator.is_available():
        raise ConfigError("trainer.activation_offloading=true needs a GPU: activations are moved away from it")
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: use them all with accelerate=ddp, or show "
            "it one with CUDA_VISIBLE_DEVICES=0"
        )
    precision = mixed_precision(config.precision)
    return {
        "per_device_eval_batch_size": config.stage.batch_size,
        "include_num_input_tokens_seen": "non_padding",
        "restore_callback_states_from_checkpoint": given.pop(PATIENCE, None) is not None,
        "project": "posttrain",
        **given,
        **ours,
        "output_dir": str(folder),
        "run_name": "/".join(folder.parts[-3:]),
        "seed": config.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.accelerator.is_available() or cpu_only(),
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
    }


def with_the_same_updates(config: Config, began_on: int) -> Config:
    """The configuration of a run that began on `began_on` processes, for those of now: each update has the same rows.

    Raises:
        ConfigError: it cannot have them; names numbers of processes that can.
    """
    now = world_size()
    if now == began_on:
        return config
    if STAGES[config.stage.name].is_online:
        say(f"num_processes was {began_on} at first: its rollout is shared out among {now}, which sample the next")
        return config
    accumulation = int(config.trainer.get("gradient_accumulation_steps", 1))
    batches = accumulation * began_on  # of an update
    fitting = [number for number in range(1, batches + 1) if batches % number == 0]
    by_batch_size = config.trainer.get("train_sampling_strategy", "random") not in ("random", "sequential")
    if by_batch_size or sharding_engine():  # whose processes keep parts of the state
        fitting = [began_on]
    if now not in fitting:
        raise ConfigError(
            f"num_processes was {began_on} at first, with {batches} × stage.batch_size={config.stage.batch_size} rows "
            f"in each update, which {now} cannot have: go on with accelerate.num_processes="
            f"{' or '.join(map(str, fitting))}, or start over with move_aside=true or another run_name=…"
        )
    say(
        f"num_processes was {began_on} at first: trainer.gradient_accumulation_steps={batches // now} instead of "
        f"{accumulation} keeps the rows of each update (what fills up the last one of an epoch apart)"
    )
    return replace(config, trainer={**config.trainer, "gradient_accumulation_steps": batches // now})


def trl_config(kind: Callable[..., T], arguments: JsonObject) -> T:
    """TRL's config of these arguments.

    Raises:
        ConfigError: they contradict each other, in the words of TRL or transformers.
    """
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
