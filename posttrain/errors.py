"""The errors that are printed in one paragraph instead of a traceback, and the exit code of each."""

from collections.abc import Sequence


class PosttrainError(Exception):
    """A run failed for a reason that its message names (exit code 1)."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = problems
        super().__init__("\n".join(problems))


class ConfigError(PosttrainError, ValueError):
    """The configuration, or a file that it names, cannot be used (exit code 2)."""

    exit_code = 2


class DataError(PosttrainError, ValueError):
    """Rows of a data set cannot be used (exit code 2)."""

    exit_code = 2


class AlreadyToldError(PosttrainError):
    """Another process, a point of a sweep or one of several of a run, has failed and printed its error."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(PosttrainError):  # noqa: N818, an orderly end is not an error
    """A signal ended the run after its checkpoint was written (exit code 128 + signal)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
