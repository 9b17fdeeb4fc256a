"""accelerate's part of a start: `accelerate=` starts the command once for each device and says how all of it ended."""

import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from posttrain import console
from posttrain.config.accelerate import accelerate_config
from posttrain.config.schema import Config
from posttrain.devices import launched
from posttrain.errors import AlreadyToldError, ConfigError, PosttrainError, Stopped

STARTED = "POSTTRAIN_STARTED"  # set for the processes that `accelerate=` starts
SECONDS_TO_STOP = "300"  # torch's 30 are too short for the checkpoint of a large model


def is_to_launch(config: Config) -> bool:
    """Whether `accelerate=` has yet to start the processes of a run.

    Raises:
        ConfigError: `accelerate launch` or torchrun has started some already.
    """
    name = config.accelerate["config_file"]
    if name is None or config.dry_run or STARTED in os.environ:
        return False
    if launched():
        raise ConfigError(
            f"accelerate={name} inside accelerate launch or torchrun would start processes within processes; leave out "
            "one of the two"
        )
    return True


def refuse_to_launch(config: Config, what: str) -> None:
    """Refuse `accelerate=` where nothing would come of it.

    Raises:
        ConfigError: it is given.
    """
    if is_to_launch(config):
        name = config.accelerate["config_file"]
        raise ConfigError(f"accelerate={name} is for posttrain run, pipeline and pairs; {what}")


def launch(config: Config, module: str, words: Sequence[str]) -> None:
    """Run `python -m <module> <words>` in the processes of `accelerate=`, and wait for their end.

    Raises:
        Stopped: a signal came; the processes have written a checkpoint if they were training.
        ConfigError: there is no GPU.
        AlreadyToldError: a process failed, and has said why.
        PosttrainError: a process was killed.
    """
    import torch

    content = accelerate_config(config.accelerate)
    if not content.get("use_cpu") and not torch.accelerator.is_available():
        raise ConfigError(
            f"accelerate={config.accelerate['config_file']} is for GPUs, and none is to be seen; accelerate=cpu2 tries "
            "it with two processes on the CPU"
        )
    if content["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"accelerate={config.accelerate['config_file']}: DeepSpeed is not installed; pip install "
            "--no-build-isolation 'posttrain[deepspeed]', or take accelerate=fsdp2"
        )
    console.say(f"accelerate: {config.accelerate['config_file']}, {content.get('num_processes', 1)} processes")
    os.environ.update({STARTED: "1", console.TRACE: str(int(console.traces))})  # guarded has set the latter for itself
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_STOP)
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "accelerate.yaml"
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
        free_port = [] if "main_process_port" in content else ["--main_process_port", "0"]
        args = launch_command_parser().parse_args(["--config_file", str(file), *free_port, "-m", module, *words])
        try:
            if content.get("distributed_type") == "NO":  # accelerate would pass no signal on to a single process
                command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])
                os.execvpe(command[0], command, environment)
            launch_command(args)
        except SignalException as error:
            number = signal.Signals(error.sigval)
            raise Stopped(
                f"stopped by {number.name}, and so were its processes; the same command goes on from the last "
                "checkpoint, if there is one",
                number,
            ) from error
        except ChildFailedError as error:
            # SIGTERM is what the launcher ends the others with
            killed = [found for found in error.failures.items() if 0 > found[1].exitcode != -signal.SIGTERM]
            place, failure = (killed or [error.get_first_failure()])[0]
            code = failure.exitcode
            if code > 0:
                raise AlreadyToldError(str(error), code) from error
            print(error, file=sys.stderr)
            raise PosttrainError(
                f"process {place} of {content['num_processes']} was killed by {signal.Signals(-code).name}"
                f"{' (often: no memory left)' if code == -signal.SIGKILL else ''}, and the others were ended; the same "
                "command goes on from the last checkpoint"
            ) from error
        finally:
            del os.environ[STARTED]


def refuse_sweep_under_accelerate(module: str, arguments: Sequence[str]) -> None:
    """Hydra would run the points of a sweep in every process, which hangs at the second (huggingface/accelerate#582).

    Raises:
        ConfigError: with the command that does what was meant.
    """
    if launched():
        words = " ".join(argument for argument in arguments if argument not in ("-m", "--multirun"))
        raise ConfigError(
            "-m does not work under accelerate launch; let the sweep start accelerate for each point: "
            f"python -m {module} -m {words} accelerate=<name or file>"
        )
