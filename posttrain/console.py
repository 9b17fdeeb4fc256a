"""What a person sees: only the first process prints, and everything printed is in the run's log as well."""

import logging
import logging.handlers
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

log = logging.getLogger("posttrain")
log.addHandler(logging.NullHandler())  # without one, Python would print errors a second time

# Warnings of the libraries that are known to be harmless here; shown, they would teach people to ignore warnings.
HARMLESS = (
    "LOAD REPORT",  # missing and unexpected weights are errors of ours, a new reward head apart
    "`loss_type=None` was set in the config",  # transformers' own default for GPT-2
    "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",  # tied to the embeddings
    "The tokenizer has new PAD/BOS/EOS tokens",  # posttrain has set and saved them already
    "The following generation flags are not valid",  # sampling settings that a greedy completion does not use
    "Failed to load CPU gemm_4bit_forward from kernels-community",  # the built-in kernel serves
    "`gradient_checkpointing` is deprecated",  # TRL's own default still uses that name
    "`is_gradient_checkpointing` is deprecated",
    # shares of the steps are compared with their number; what may not differ is refused by posttrain itself
    "The following arguments do not match the ones in the `trainer_state.json`",
    "_pattern keys did not match any targeted module",  # PEFT looks at modules alone, and experts are parameters
    "changes the base weights of the model and should thus not be used",  # it is converted, as the advice goes on
    # urllib3, which asks again; where it gives up, that is an error
    "after connection broken by",
    "Connection pool is full, discarding connection",
    "'pin_memory' argument is set as true but no accelerator is found",
    "barrier(): using the device under current context",  # which accelerate has chosen
)


# Characters that a terminal obeys, and what is shown in their place: data and models may hold any.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
FIRST_SPEAKS = 30.0  # seconds
TRACE = "HYDRA_FULL_ERROR"
traces = False  # whether the user asked for tracebacks


def counted(number: float, unit: str, written: str = ",") -> str:
    """The number, formatted, and its unit, which has an s unless the number is shown as 1."""
    shown = format(number, written)
    return f"{shown} {unit}" if shown == "1" else f"{shown} {unit}s"


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def tame(text: str) -> str:
    """The text with pictures in place of control characters, tabs and line breaks apart."""
    return text.translate(_CONTROLS)


def verbatim(text: str) -> str:
    """The text as it is shown by `show_markup`: neither its brackets nor its control characters are obeyed."""
    return escape(tame(text))


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print one paragraph and log it."""
    log.info(tame(text))
    if is_main_process():
        _console().print(verbatim(text), style=style)


def warn(text: str) -> None:
    """Print a warning and log it as one."""
    log.warning(tame(text))
    if is_main_process():
        _console().print(f"[bold yellow]warning[/] {verbatim(text)}")


def fail(title: str, text: str, everywhere: bool = True) -> None:
    """Print an error's one paragraph to stderr: from whichever process met it, or where all meet it, one a machine."""
    log.error(f"{title}: {tame(text)}")
    processes, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
    if not everywhere and local != "0":
        # The launcher ends all as soon as one has ended; the first of the machine, perhaps a slower one, is to speak.
        time.sleep(FIRST_SPEAKS)
        everywhere = True  # nobody ended this one, so it met what the first did not
    if everywhere and processes != "1":
        text = f"process {os.environ.get('RANK', '0')} of {processes}: {text}"
    _console(stderr=True).print(f"[bold red]{title}[/]: {verbatim(text)}")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], headed: bool = True) -> None:
    """Print a table and log its cells."""
    for row in rows:
        log.info(f"{title}: {tame(' | '.join(row))}")
    if not is_main_process():
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_header=headed, show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(verbatim(cell) for cell in row))
    Console(highlight=False).print(table)


def show_markup(markup: str) -> None:
    """Print text that brings its own colours."""
    if is_main_process():
        Console(highlight=False).print(markup)


class _NotHarmless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in HARMLESS)


class _LogFile(logging.FileHandler):
    """On a full disk the log alone is cut short: the writes that matter say so, each in one paragraph."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's own name
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to_console(verbose: bool = True) -> Iterator[Callable[[Path], None]]:
    """The libraries' warnings on the console; everything from INFO upwards waits for the run's log.

    What is yielded opens that log, once it is known that the run begins; what came before then stands in it, too.
    """
    import datasets
    import transformers

    root = logging.getLogger()
    # holds what is logged until there is a file for it
    waiting = logging.handlers.MemoryHandler(1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    handlers: list[logging.Handler] = [waiting]

    def open_log(file: Path) -> None:
        if is_main_process():
            to_file = _LogFile(file, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            waiting.setTarget(to_file)
            waiting.flush()
            root.removeHandler(waiting)
            root.addHandler(to_file)
            handlers.append(to_file)

    to_console = logging.StreamHandler()
    to_console.setLevel(logging.WARNING if is_main_process() else logging.ERROR)
    to_console.addFilter(_NotHarmless())
    to_console.addFilter(lambda record: not record.name.startswith("posttrain"))
    to_console.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    handlers.append(to_console)
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_info() if verbose else None
    datasets.utils.logging.disable_propagation()
    datasets.disable_progress_bars()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # transformers', which prints by itself
    logging.captureWarnings(True)
    try:
        yield open_log
    finally:
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
