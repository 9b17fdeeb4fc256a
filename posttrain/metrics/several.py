"""Several runs of one stage: their numbers side by side, over what was varied, and their curves over one another."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from posttrain.metrics.catalogue import formatted, label
from posttrain.metrics.charts import Chart, Points, Series, chart_of, read_points
from posttrain.metrics.comparison import with_interval

SEED = "seed"
DECADE = 10.0  # a key whose largest value is more than so many times the smallest is drawn on a log axis


class Run(NamedTuple):
    """One finished run of a stage."""

    name: str
    settings: Mapping[str, object]  # those in which the runs differ
    metrics: Mapping[str, float]
    log: Path  # metrics.jsonl


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    settings: Mapping[str, object]  # without the seed
    runs: Sequence[Run]

    def number(self, metric: str) -> tuple[float, float, float]:
        """A metric and the ends of what is known of it: mean ± sd over seeds, or the 95 % interval of the one run."""
        values = [run.metrics.get(metric, math.nan) for run in self.runs]
        mean, spread = fmean(values), stdev(values) if len(values) > 1 else math.nan
        found = self.runs[0].metrics
        if len(values) > 1:
            return mean, mean - spread, mean + spread
        return mean, found.get(f"{metric}_low", math.nan), found.get(f"{metric}_high", math.nan)

    def cell(self, metric: str) -> str:
        """The same for a table."""
        mean, low, _ = self.number(metric)
        if len(self.runs) == 1:
            return with_interval(metric, self.runs[0].metrics)
        return (
            f"{formatted(metric, mean, mean - low)} ± {formatted(metric, mean - low, mean - low)}"
            if mean == mean
            else ""
        )


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by their settings, those that differ in the seed alone together."""
    found: dict[str, Group] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != SEED}
        alike = found.get(repr(settings))
        members = [*alike.runs, run] if alike else [run]
        name = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()) or members[0].name
        found[repr(settings)] = Group(members[0].name if len(members) == 1 else name, settings, members)
    return list(found.values())


def table(found: Sequence[Group], metrics: Sequence[str]) -> list[list[str]]:
    """A heading and a line for each group: its runs, how many they are, its settings, its numbers."""
    keys = list(dict.fromkeys(key for group in found for key in group.settings))
    metrics = [name for name in metrics if any(name in run.metrics for group in found for run in group.runs)]
    counted = any(len(group.runs) > 1 for group in found)
    return [
        ["run", *(["runs"] if counted else []), *keys, *map(label, metrics)],
        *(
            [
                ", ".join(run.name for run in group.runs),
                *([str(len(group.runs))] if counted else []),
                *(str(group.settings.get(key, "")) for key in keys),
                *map(group.cell, metrics),
            ]
            for group in found
        ),
    ]


def _as_number(value: object) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        return math.nan


def over_keys(found: Sequence[Group], metrics: Sequence[str]) -> Iterator[Chart]:
    """Each metric over each key that has several numbers, a line for each combination of the other keys."""
    for key in dict.fromkeys(key for group in found for key in group.settings):
        values = {group.name: _as_number(group.settings.get(key)) for group in found}
        if any(map(math.isnan, values.values())) or len(set(values.values())) < 2:
            continue
        lines: dict[str, list[Group]] = {}
        for group in sorted(found, key=lambda group: values[group.name]):
            others = [f"{name.rpartition('.')[2]}={value}" for name, value in group.settings.items() if name != key]
            lines.setdefault(", ".join(others), []).append(group)
        least, most = min(values.values()), max(values.values())
        seeds = max(len(group.runs) for group in found)
        see = f"Mean ± standard deviation of {seeds} runs." if seeds > 1 else "Bars are 95 % intervals."
        for metric in metrics:
            series = []
            for colour, (name, members) in enumerate(lines.items()):
                numbers = [(values[group.name], *group.number(metric)) for group in members]
                places = [(x, y) for x, y, _, _ in numbers if y == y]
                ends = [(low, high) for _, y, low, high in numbers if y == y]
                series.append(Series(name, places, colour, "o", ends=ends))
            if any(each.points for each in series):
                yield chart_of(metric, series, x=key, see=see)._replace(is_log=least > 0 and most > DECADE * least)


def over_one_another(found: Sequence[Group], keys: Sequence[str]) -> Iterator[Chart]:
    """The curves of all runs, one chart for each metric; those that differ in the seed alone have one colour."""
    lines: list[tuple[int, str, Mapping[str, Points]]] = []
    for colour, group in enumerate(found):
        lines += [
            (colour, "" if place else group.name, read_points(run.log, keys)) for place, run in enumerate(group.runs)
        ]
    for key in keys:
        series = [Series(name, points[key], colour) for colour, name, points in lines if len(points.get(key, ())) > 1]
        if series:
            yield chart_of(key, series)
