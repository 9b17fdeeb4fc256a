"""Several runs of one stage: their numbers side by side, over what was varied, and their curves over one another."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from posttrain.metrics.catalogue import formatted, label
from posttrain.metrics.charts import HELD_OUT, Chart, Points, Series, chart_of, read_points
from posttrain.metrics.comparison import with_interval

SEED = "seed"
DECADE = 10.0  # a key whose largest value is so many times the smallest or more is drawn on a log axis
GAINED = "Higher at the same KL is better; best-of-N costs at most ln N − (N−1)/N nats and no training."


class Run(NamedTuple):
    """One finished run of a stage."""

    name: str
    settings: Mapping[str, object]  # those in which the runs differ
    metrics: Mapping[str, float]
    log: Path  # metrics.jsonl

    def number(self, metric: str) -> tuple[float, float, float]:
        """A metric and the ends of its 95 % interval; NaN where there is none."""
        value, low, high = (self.metrics.get(f"{metric}{end}", math.nan) for end in ("", "_low", "_high"))
        return value, low, high


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    settings: Mapping[str, object]  # without the seed
    runs: Sequence[Run]

    def number(self, metric: str) -> tuple[float, float, float]:
        """A metric and the ends of what is known of it: mean ± sd over seeds, or as of the one run."""
        if len(self.runs) == 1:
            return self.runs[0].number(metric)
        values = [run.number(metric)[0] for run in self.runs]
        mean, spread = fmean(values), stdev(values)
        return mean, mean - spread, mean + spread

    def cell(self, metric: str) -> str:
        """The same for a table."""
        mean, low, _ = self.number(metric)
        if len(self.runs) == 1 or math.isnan(mean):
            return with_interval(metric, self.runs[0].metrics)
        return f"{formatted(metric, mean, mean - low)} ± {formatted(metric, mean - low, mean - low)}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by their settings, those that differ in the seed alone together."""
    found: dict[str, Group] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != SEED}
        alike = found.get(repr(settings))
        members = [*alike.runs, run] if alike else [run]
        found[repr(settings)] = Group(short(settings) if alike else run.name, settings, members)
    return list(found.values())


def short(settings: Mapping[str, object]) -> str:
    """Settings as a name, each key by its last part."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def _as_number(value: object) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        return math.nan


def over_keys(found: Sequence[Group], metrics: Sequence[str]) -> Iterator[Chart]:
    """Each metric over each key that has several numbers, a line for each combination of the other keys."""
    seeds = max((len(group.runs) for group in found), default=0)
    see = f"Mean ± standard deviation of {seeds} runs." if seeds > 1 else "Bars are 95 % intervals."
    for key in dict.fromkeys(key for group in found for key in group.settings):
        values = [_as_number(group.settings.get(key)) for group in found]
        if any(map(math.isnan, values)) or len(set(values)) < 2:
            continue
        lines: dict[str, list[tuple[float, Group]]] = {}
        for value, group in sorted(zip(values, found, strict=True), key=lambda pair: pair[0]):
            others = {name: other for name, other in group.settings.items() if name != key}
            lines.setdefault(short(others), []).append((value, group))
        lines = {name: line for name, line in lines.items() if len(line) > 1}  # runs that differ in it alone
        is_log = min(values) > 0 and max(values) >= DECADE * min(values)
        for metric in metrics if lines else ():
            series = [_measured(name, line, metric, colour) for colour, (name, line) in enumerate(lines.items())]
            yield chart_of(metric, series, x=key, see=see)._replace(is_log=is_log)


def _measured(name: str, line: Sequence[tuple[float, Run | Group]], metric: str, colour: int = 0) -> Series:
    numbers = [(x, *each.number(metric)) for x, each in line if not math.isnan(each.number(metric)[0])]
    return Series(name, [each[:2] for each in numbers], colour, "o", ends=[each[2:] for each in numbers])


def over_kl(found: Sequence[Run | Group], metric: str, possible: Points = ()) -> Iterator[Chart]:
    """What each gained over the KL that it spent, and the best that is possible, where that is known."""
    there = sorted(((each.number("kl")[0], each) for each in found), key=lambda pair: pair[0])
    there = [(kl, each) for kl, each in there if not math.isnan(kl + each.number(metric)[0])]
    if len(there) > 1:
        series = [Series("best possible", possible, HELD_OUT, line="--"), _measured("measured", there, metric)]
        chart = chart_of(metric, [series[0], series[1]._replace(line="")], x=label("kl"), see=GAINED)
        yield chart._replace(names=[each.name for _, each in there])


def over_one_another(found: Sequence[Group], keys: Sequence[str]) -> Iterator[Chart]:
    """The curves of all runs, one chart for each metric; those that differ in the seed alone have one colour."""
    lines = [
        (colour, "" if place else group.name, read_points(run.log, keys))
        for colour, group in enumerate(found)
        for place, run in enumerate(group.runs)
    ]
    for key in keys:
        series = [Series(name, points[key], colour) for colour, name, points in lines if len(points.get(key, ())) > 1]
        if series:
            yield chart_of(key, series)
