"""The nearest right name for a wrong one."""

import difflib
from collections.abc import Iterable, Sequence

# what hyperparameters are called elsewhere, to suggest the right name
_ELSEWHERE = {"lr": "learning_rate", "bs": "batch_size", "epochs": "num_epochs", "max_seq_length": "max_length"}


def nearest(word: str, words: Iterable[str]) -> str:
    """'; did you mean …?' with the closest known name, or nothing."""
    words = list(words)
    section, _, name = word.rpartition(".")
    word = f"{section or 'stage'}.{_ELSEWHERE[name]}" if name in _ELSEWHERE else word
    # the last part alone, too, so that a key put into the wrong section finds its own
    # of a short word one wrong letter is a third
    close = [other for other in words if other.lower() == word.lower()]
    close = close or difflib.get_close_matches(word, words, n=1, cutoff=0.75 if len(word) > 5 else 0.6)
    close = close or difflib.get_close_matches(section, words, n=1, cutoff=0.75)  # a key that holds others
    if not close:
        tails = {other.rsplit(".", 1)[-1]: other for other in words}
        close = [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.8)]
    return f"; did you mean {close[0]}?" if close else ""


def one_of(path: str, value: object, choices: Sequence[str]) -> str:
    """Says which values there are, and the nearest one."""
    return f"{path}={value} is not one of {', '.join(choices)}{nearest(str(value), choices)}"
