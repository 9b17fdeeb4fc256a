"""Train one stage, or with -m sweep over its keys.

usage: posttrain run [stage=sft|reward|ppo|dpo|kto|grpo] [recipes=...] [key=value ...] [-m]

Every key is checked before anything runs. The same command again resumes an
interrupted run. Every key of a stage: posttrain run stage=ppo --help

  --cfg job|hydra|all      print the configuration
  --config-dir <folder>    add your own recipes/, model/, data/ and trainer/
  -m                       a run for each of several values: stage.beta=0.1,0.3
  accelerate=<name>        on every GPU: ddp, fsdp2, zero2, zero3, or a file
  --info, --hydra-help     what Hydra does

examples:
  posttrain run recipes=quickstart/sft
  posttrain run -m stage=dpo stage.beta=0.05,0.1,0.3
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from posttrain import console, paths
from posttrain.cli import entry
from posttrain.cli.command import read_command
from posttrain.cli.entry import entry_point, report
from posttrain.cli.launching import is_to_launch, launch, refuse_sweep_under_accelerate
from posttrain.config.check import check
from posttrain.errors import AlreadyToldError, ConfigError, Stopped


def _job(composed: DictConfig) -> float | None:
    """What Hydra calls for each run: returns the stage's objective, so that any sweeper can use it."""
    try:
        config, folder = check(composed), Path(HydraConfig.get().runtime.output_dir)
        if is_to_launch(config):
            from posttrain.cli.sweep import objective_of

            launch(config, "posttrain.run", _words(folder))
            return objective_of(folder)
        from posttrain.train import run_stage

        result = run_stage(config, folder)
    except (Stopped, KeyboardInterrupt) as error:
        sys.exit(report(error))  # not on to the next point of a sweep
    except Exception as error:
        if console.traces:
            raise
        code = report(error)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(code)
        # Hydra goes on with the other points, and raises the first failure after the last
        raise AlreadyToldError(str(error)) from error
    return result.objective if result is not None else None


def _words(folder: Path) -> list[str]:
    """The command of this run: what was typed, or in a job of a sweep what Hydra has made of it."""
    if HydraConfig.get().mode == RunMode.RUN:
        return entry.typed
    return [*HydraConfig.get().overrides.task, f"hydra.run.dir='{folder}'"]


def main() -> None:
    """The entry point of `posttrain run`."""
    entry_point("run", lambda: run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> None:
    """Check a command line and let Hydra do what it asks for: a run, a sweep, or something that is only printed."""
    command = read_command(arguments)
    if command.sweep:
        refuse_sweep_under_accelerate("posttrain.run", arguments)
    try:
        to_hydra(command.arguments)
    except OSError as error:  # Hydra makes the folder before the run, which reports its own failures, begins
        raise ConfigError(f"output_dir={command.config.output_dir} cannot be written: {error}") from error
    finally:
        if command.sweep:
            from posttrain.cli.sweep import show_sweep

            show_sweep(command)


def to_hydra(arguments: Sequence[str]) -> None:
    """Hand a checked command line to Hydra."""
    given = sys.argv
    sys.argv = [given[0], *arguments]
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(_job)()
    finally:
        sys.argv = given


if __name__ == "__main__":
    main()
