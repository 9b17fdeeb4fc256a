"""Which rows are trained on and which are held out, decided by their content, a few bytes a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import DataConfig
from posttrain.data.encode import BAD, KEPT, LOW_MARGIN, PROMPT_TOO_LONG, TIE, TOO_LONG
from posttrain.data.sources import HELD_OUT_NAMES, NAMED
from posttrain.data.splits import Counts
from posttrain.errors import ConfigError, DataError

# what is known of a row while the others are read; `content` is the beginning of its sha256, the same of equal rows
FACTS = np.dtype(
    [
        ("content", "S16"),
        ("source", "i2"),
        ("number", "i8"),  # of the row in its source
        ("split", "i2"),
        ("why", "i1"),  # KEPT, or why it is left out
        ("is_cut", "?"),
        ("loses_end", "?"),
        ("repeats_prompt", "?"),
        ("is_optional", "?"),  # it has the column that all rows have or none
        ("tokens", "i4"),
        ("loss_tokens", "i4"),
    ]
)
Numbers = NDArray[np.int64]
Facts = NDArray[np.void]


class Division(NamedTuple):
    """The numbers of the rows in each part, and what is said of the others."""

    parts: dict[str, Numbers]  # train, test (perhaps empty) and the sets of data.eval by name
    splits: dict[str, str]  # part -> the split that it is; test has none where a share of the rows was held out
    in_test_too: int  # left out of training because the same row is held out
    unmixed: int  # left out of training because data.mixture wants fewer of their source
    notes: list[str]


def divide(data: DataConfig, facts: Facts, splits: Sequence[str], entries: Numbers, dropped: Sequence[str]) -> Division:
    """Set the held-out rows apart: the source's own, else a share of those read; `entries` is that of each source.

    Raises:
        DataError: there are no rows to train on.
        ConfigError: the split to hold out is not there, or the share is all of the rows or none.
    """
    found = {name: np.flatnonzero(facts["split"] == code) for code, name in enumerate(splits)}
    found = {name: numbers for name, numbers in found.items() if len(numbers)}
    named = {name: found.pop(f"{NAMED}{name}", None) for name in data.eval}
    train = found.pop(data.dataset_train_split, None)
    if train is None:
        there = ", ".join(found) or "no rows at all"
        wanted = f"no rows of split {data.dataset_train_split} (found: {there})"
        raise DataError(f"data.dataset_name={data.dataset_name}: {wanted}", *dropped)
    if missing := [name for name, numbers in named.items() if numbers is None]:
        raise DataError(f"data.eval.{missing[0]} has no rows", *dropped)
    test_split = data.dataset_test_split or next((name for name in HELD_OUT_NAMES if name in found), None)
    if test_split is None:
        train, test = _held_out(facts["content"], train, data.test_size)
    elif test_split not in found:
        raise ConfigError(
            f"data.dataset_test_split={test_split} is neither a file nor a split of {data.dataset_name} "
            f"(found: {', '.join([data.dataset_train_split, *found])})"
        )
    else:
        test = found.pop(test_split)
    held_out = {name: numbers for name, numbers in named.items() if numbers is not None}
    of_source = np.concatenate([*([test] if test_split is not None else []), *held_out.values(), train[:0]])
    repeated = np.isin(facts["content"][train], facts["content"][of_source])
    train = train[~repeated]
    if not len(train):
        raise DataError("no rows left to train on: every one of them is also among the held-out rows")
    notes = [f"{len(numbers)} rows of split {name!r} are not used" for name, numbers in found.items()]
    before = len(train)
    if data.mixture and data.mixture[0].weight is not None:
        train, shares = _mix(data, facts, train, entries)
        parts = [f"{share:,} rows of {part.name}" for share, part in zip(shares, data.mixture, strict=True)]
        notes.append(f"mixture: {', '.join(parts)} to train on")
    known = {"train": data.dataset_train_split, **({"test": test_split} if test_split is not None else {})}
    return Division(
        {"train": train, "test": test, **held_out},
        known | {name: f"{NAMED}{name}" for name in held_out},
        int(repeated.sum()),
        before - len(train),
        notes,
    )


def _mix(data: DataConfig, facts: Facts, train: Numbers, entries: Numbers) -> tuple[Numbers, list[int]]:
    """As many rows as there can be with each source's share of them exact to a row, chosen by their content.

    Rows that are left out anyway stay, to be counted.

    Raises:
        DataError: a source has no rows left.
    """
    kept = facts["why"][train] == KEPT
    of_entry = entries[facts["source"][train]]
    weights = [float(part.weight) for part in data.mixture]
    mine = [train[kept & (of_entry == entry)] for entry in range(len(weights))]
    parts = [weight / sum(weights) for weight in weights]
    total = min(int(len(numbers) / part) + 1 for numbers, part in zip(mine, parts, strict=True))
    while any(share > len(numbers) for share, numbers in zip(_shares(total, parts), mine, strict=True)):
        total -= 1
    shares = _shares(total, parts)
    for part, numbers in zip(data.mixture, mine, strict=True):
        if not len(numbers):
            raise DataError(f"data.mixture: no rows of {part.name} are left to train on")
    chosen = [
        numbers[np.argsort(facts["content"][numbers], kind="stable")[:share]]
        for numbers, share in zip(mine, shares, strict=True)
    ]
    return np.sort(np.concatenate([train[~kept], *chosen])), shares


def _shares(total: int, parts: Sequence[float]) -> list[int]:
    """A whole number of rows for each part, largest remainders first (Hamilton's method)."""
    shares = [int(total * part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda place: shares[place] - total * parts[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares


def _held_out(contents: NDArray[np.bytes_], rows: Numbers, test_size: float) -> tuple[Numbers, Numbers]:
    """Split by content, so that equal rows stay together and the choice depends on nothing but the rows."""
    if test_size <= 0:
        return rows, rows[:0]
    wanted = int(test_size) if test_size >= 1 else round(test_size * len(rows))
    if not 0 < wanted < len(rows):
        raise ConfigError(
            f"data.test_size={test_size:g} of {len(rows)} rows leaves {len(rows) - wanted} to train on and "
            f"{wanted} held out; data.test_size=0 holds out none"
        )
    _, group, sizes = np.unique(contents[rows], return_inverse=True, return_counts=True)
    chosen, held = np.zeros(len(sizes), dtype=bool), 0
    for number, size in enumerate(sizes):
        if held + size <= wanted:
            chosen[number], held = True, held + size
        if held == wanted:
            break
    is_test = chosen[group]
    return rows[~is_test], rows[is_test]


def count(facts: Facts, lost: Counts, in_test_too: int = 0, unmixed: int = 0) -> Counts:
    """What became of the rows of a part, and of those that were `lost` before."""
    why = {code: int((facts["why"] == code).sum()) for code in (KEPT, TOO_LONG, PROMPT_TOO_LONG, TIE, BAD, LOW_MARGIN)}
    return Counts(
        read=lost.read + len(facts) + in_test_too + unmixed,
        kept=why[KEPT],
        duplicates=len(facts) - len(np.unique(facts["content"])),
        repeats_prompt=int(facts["repeats_prompt"].sum()),
        in_test_too=in_test_too,
        unmixed=unmixed,
        bad=lost.bad + why[BAD],
        ties=lost.ties + why[TIE],
        low_margin=why[LOW_MARGIN],
        truncated=int(facts["is_cut"].sum()),
        prompt_too_long=why[PROMPT_TOO_LONG],
        too_long=why[TOO_LONG],
    )
