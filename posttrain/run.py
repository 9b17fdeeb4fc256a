"""`python -m posttrain.run stage=sft ...`: one stage, or with `-m` one run for each point of a sweep.

Every override is checked against the schema before Hydra runs anything, so that a misspelt key is answered
in about the time it takes to import Hydra. torch is imported only when a run begins.
"""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from posttrain import paths
from posttrain.compose import read_command
from posttrain.config import check
from posttrain.console import fail
from posttrain.errors import PosttrainError, Stopped
from posttrain.sweep import show_sweep

TRACE = "HYDRA_FULL_ERROR"
_trace_wanted = os.environ.get(TRACE, "0") != "0"


def _report(error: BaseException) -> int:
    """Tell what happened in one paragraph and return the exit code."""
    if isinstance(error, PosttrainError):
        fail(type(error).__name__, str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        fail("Stopped", "by a second signal; the last whole checkpoint stands")
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
    except (Exception, KeyboardInterrupt) as error:
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN and not isinstance(error, (Stopped, KeyboardInterrupt))
        if _trace_wanted and not sweeping:
            raise
        code = _report(error)
        if sweeping:  # Hydra goes on with the other points
            raise
        sys.exit(code)
    return result.objective if result is not None else None


def main() -> None:
    """The entry point: exit code 0 done, 2 configuration or data invalid, 1 failed, 130 and 143 stopped."""
    # set, Hydra hands exceptions on instead of printing and exiting by itself
    os.environ[TRACE] = "1"
    command = None
    try:
        command = read_command(sys.argv[1:])
        sys.argv[1:] = command.arguments
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(_job)()
    except Exception as error:
        if _trace_wanted:
            raise
        # a failed point of a sweep has been told already; Hydra raises it again after the last one
        sys.exit(1 if command is not None and command.sweep else _report(error))
    finally:
        if command is not None and command.sweep:
            show_sweep(command)


if __name__ == "__main__":
    main()
