"""The start and the end of every entry point: help, the version, a failure as one paragraph, the exit code."""

import atexit
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from posttrain import __version__, console
from posttrain.cli.completion import complete
from posttrain.cli.help import help_text
from posttrain.console import TRACE, fail, is_main_process
from posttrain.devices import launched, leave_processes
from posttrain.errors import AlreadyToldError, PosttrainError, Stopped
from posttrain.runs.checkpoint import StopSignals

# the entry point of this process and what was typed after it; nothing in a notebook
name = ""
typed: list[str] = []


def entry_point(command: str, body: Callable[[], None]) -> NoReturn:
    """Do what sys.argv asks of `posttrain <command>`: print its help or the version, or run `body`."""
    global name, typed
    name, typed = command, sys.argv[1:]
    if {"-h", "--help"} & set(typed):
        sys.exit(guarded(lambda: print(help_text(command, typed))))
    if {"-sc", "--shell-completion"} & set(typed):
        sys.exit(guarded(lambda: complete([word for word in typed if not word.startswith("-")])))
    if "--version" in typed:
        print(f"posttrain {__version__}")
        sys.exit(0)
    sys.exit(guarded(body))


def command_line() -> str:
    """The command of this process, as it would be typed again."""
    return " ".join(["posttrain", name, *map(quoted, typed)]) if name else "run_stage(…) in Python"


def quoted(word: str) -> str:
    """A word as it can be pasted into a shell, with as few marks as it needs."""
    plain = shlex.quote(word)
    return plain if plain == word or set('"$`\\!') & set(word) else f'"{word}"'


def guarded(body: Callable[[], None]) -> int:
    """Run an entry point, print its failure in one paragraph, and return the exit code.

    0 done, 2 configuration or data invalid, 1 failed, 130 and 143 stopped.
    """
    given = os.environ.get(TRACE)
    console.traces = given == "1"
    os.environ[TRACE] = "1"  # Hydra then hands exceptions on instead of printing and exiting by itself
    try:
        body()
        atexit.register(leave_processes)
    except (Stopped, KeyboardInterrupt) as error:
        return report(error)
    except BrokenPipeError:  # whoever read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if console.traces:
            raise
        return report(error)
    finally:
        os.environ.pop(TRACE)
        if given is not None:
            os.environ[TRACE] = given
    return 0


def report(error: BaseException) -> int:
    """Print what happened in one paragraph and return the exit code."""
    if isinstance(error, AlreadyToldError):
        return error.exit_code
    if isinstance(error, Stopped):
        # all processes end now, each with this exit code: the launcher, which ends the others once one has, comes late
        for number in (signal.SIGTERM, signal.SIGINT) if launched() else ():
            signal.signal(number, signal.SIG_IGN)
        if is_main_process():
            fail("Stopped", str(error), everywhere=False)
        return error.exit_code
    if isinstance(error, PosttrainError):
        fail(type(error).__name__, str(error), everywhere=error.exit_code == 1)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        fail("Stopped", str(error) or f"by Ctrl-C outside of training; {StopSignals.outside}")
        return 130
    # a fault of the libraries or of ours: the paragraph here, the rest in the run's log
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{error} (at {Path(where.filename).name}:{where.lineno}; {TRACE}=1 shows the whole traceback)"
    fail(type(error).__name__, text)
    return 1
