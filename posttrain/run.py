"""`python -m posttrain.run stage=sft ...`: one stage, or with `-m` one run for each point of a sweep.

Every override is checked against the schema before Hydra runs anything, so that a misspelt key is answered
in about the time it takes to import Hydra. torch is imported only when a run begins.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from posttrain import console, paths
from posttrain.checkpoint import StopSignals
from posttrain.compose import read_command
from posttrain.config import check
from posttrain.console import TRACE, fail
from posttrain.errors import AlreadyToldError, PosttrainError, Stopped
from posttrain.launching import refuse_sweep_under_accelerate
from posttrain.sweep import show_sweep


def _report(error: BaseException) -> int:
    """Tell what happened in one paragraph and return the exit code."""
    if isinstance(error, AlreadyToldError):
        return error.exit_code
    if isinstance(error, PosttrainError):
        fail(type(error).__name__, str(error), everywhere=error.exit_code == 1)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        fail("Stopped", str(error) or f"by Ctrl-C outside of training; {StopSignals.outside}")
        return 130
    # a fault of the libraries or of ours: the paragraph here, the rest in the run's log
    where = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{error} (at {Path(where.filename).name}:{where.lineno}; {TRACE}=1 shows the whole traceback)"
    fail(type(error).__name__, told)
    return 1


def _job(composed: DictConfig) -> float | None:
    """What Hydra calls for each run: returns the stage's objective, so that any sweeper can use it."""
    from posttrain.train import run_stage

    try:
        result = run_stage(check(composed), Path(HydraConfig.get().runtime.output_dir))
    except (Stopped, KeyboardInterrupt) as error:
        sys.exit(_report(error))  # not on to the next point of a sweep
    except Exception as error:
        if console.traces:
            raise
        code = _report(error)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(code)
        # Hydra goes on with the other points, and raises the first failure after the last
        raise AlreadyToldError(str(error)) from error
    return result.objective if result is not None else None


def guarded(body: Callable[[], None]) -> int:
    """Run an entry point, tell its failure in one paragraph, and return the exit code.

    0 done, 2 configuration or data invalid, 1 failed, 130 and 143 stopped.
    """
    given = os.environ.get(TRACE)
    console.traces = given == "1"
    os.environ[TRACE] = "1"  # Hydra then hands exceptions on instead of printing and exiting by itself
    try:
        body()
    except (Stopped, KeyboardInterrupt) as error:
        return _report(error)
    except Exception as error:
        if console.traces:
            raise
        return _report(error)
    finally:
        os.environ.pop(TRACE)
        if given is not None:
            os.environ[TRACE] = given
    return 0


def main() -> None:
    """The entry point; see `guarded` for its exit codes."""
    sys.exit(guarded(_main))


def _main() -> None:
    command = read_command(sys.argv[1:])
    if command.sweep:
        refuse_sweep_under_accelerate("posttrain.run", sys.argv[1:])
    sys.argv[1:] = command.arguments
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(_job)()
    finally:
        if command.sweep:
            show_sweep(command)


if __name__ == "__main__":
    main()
