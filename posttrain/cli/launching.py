"""accelerate's part of a start: which configurations are shipped, and what cannot be asked of several processes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain import paths
from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError


def under_accelerate() -> bool:
    """Whether this process is one of several that `accelerate launch` or torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_command(name: str, gpus: int = 0) -> list[str]:
    """`accelerate launch` with a shipped configuration or a file, on a free port; `gpus`: as many processes.

    Raises:
        ConfigError: the configuration does not exist.
    """
    shipped = {file.stem: file for file in paths.ACCELERATE_CONFIGS.glob("*.yaml")}
    file = shipped.get(name, Path(name))
    if not file.is_file():
        names = sorted(shipped)
        raise ConfigError(
            f"hydra.launcher.accelerate_config={name} is neither a file nor one of {', '.join(names)}"
            f"{nearest(name, names)}"
        )
    processes = ["--num_processes", str(gpus)] if gpus else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launch, "--main_process_port", "0", *processes]


def refuse_sweep_under_accelerate(module: str, arguments: Sequence[str]) -> None:
    """Hydra would run the points of a sweep in every process, which hangs at the second (huggingface/accelerate#582).

    Raises:
        ConfigError: with the command that does what was meant.
    """
    if under_accelerate():
        words = " ".join(argument for argument in arguments if argument not in ("-m", "--multirun"))
        raise ConfigError(
            "-m does not work under accelerate launch; let the sweep start accelerate for each point: "
            f"python -m {module} -m {words} hydra.launcher.accelerate_config=<name or file>"
        )
