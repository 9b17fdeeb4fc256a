"""Every picture: line charts as SVG whose colours serve on light and dark pages."""

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.metrics.catalogue import label, of_sets

_GREY = "#808080"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _GREY),
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
TAIL = 2**20  # bytes, more than a line has
POINTS = 400  # of a line, more than its chart has room for
_TRAINING, _HELD_OUT = ("#4c8dd6", ""), ("#e08a2e", "o")  # colour and marker

FloatArray = np.typing.NDArray[np.float64]
Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Points
    is_held_out: bool = False


class Chart(NamedTuple):
    """One chart: its title, its lines, what is on its x-axis, and names of the last line's points."""

    title: str
    series: Sequence[Series]
    x: str = "step"
    names: Sequence[str] = ()


def draw(charts: Sequence[Chart]) -> str:
    """The charts side by side as one SVG, without a date, so that the same numbers give the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": charts[0].title}):
        figure = Figure(figsize=(3.7 * len(charts), 2.3), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            for series in chart.series:
                colour, marker = _HELD_OUT if series.is_held_out else _TRAINING
                if series.points:
                    x, y = zip(*series.points, strict=True)
                    axes.plot(x, y, color=colour, marker=marker, markersize=4, label=series.name)
            if chart.names:
                axes.margins(0.2)
                for point, name in zip(chart.series[-1].points, chart.names, strict=True):
                    axes.annotate(name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
            axes.set_title(chart.title, fontsize=10)
            axes.set_xlabel(chart.x)
            if sum(bool(series.points) for series in chart.series) > 1:
                axes.legend(frameon=False, fontsize=8)
        written = StringIO()
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=unsaid)
    drawn = written.getvalue()
    return drawn[drawn.index("<svg") :]


def thinned(steps: FloatArray, values: FloatArray) -> Points:
    """At most POINTS of them, in order: the first, the last, and the lowest and highest of each stretch."""
    kept = np.arange(len(steps))
    if len(steps) > POINTS:
        stretches = np.array_split(kept, POINTS // 2 - 1)
        extremes = [least(values[at]) + at[0] for at in stretches for least in (np.argmin, np.argmax)]
        kept = np.unique([0, *extremes, len(steps) - 1])
    return list(zip(steps[kept].tolist(), values[kept].tolist(), strict=True))


def read_points(file: Path, keys: Iterable[str]) -> dict[str, Points]:
    """(step, value) of each key in the lines of a metrics.jsonl, thinned; the last line may be cut short."""
    import pyarrow
    import pyarrow.json

    wanted = {"step": pyarrow.float64(), **{key: pyarrow.float64() for key in keys}}
    if not file.is_file() or not file.stat().st_size:
        return {}
    content = pyarrow.memory_map(str(file)).read_buffer()
    end = content.slice(max(content.size - TAIL, 0)).to_pybytes()
    whole = content.slice(0, content.size - len(end) + end.rfind(b"\n") + 1)
    if not whole.size:
        return {}
    options = pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema(wanted), unexpected_field_behavior="ignore")
    table = pyarrow.json.read_json(pyarrow.BufferReader(whole), parse_options=options)
    found: dict[str, Points] = {}
    for key in keys:
        there = table.select(["step", key]).drop_null().combine_chunks()
        if there.num_rows:  # by DLPack, as pyarrow's own conversion imports pandas
            steps, values = (np.from_dlpack(column.chunk(0)).astype(float) for column in there.columns)
            found[key] = thinned(steps, values)
    return found


def curves(groups: Sequence[Sequence[str]], file: Path, sets: Sequence[str] = ()) -> Iterator[Chart]:
    """A chart of each group of metrics over the steps of a run, from its metrics.jsonl.

    Those of the `sets` of data.eval have charts of their own.
    """
    held_out = [[key for key in keys if key.startswith("eval_")] for keys in groups]
    groups = [*groups, *([key] for name in sets for keys in held_out for key in of_sets(keys, [name]))]
    lines = read_points(file, dict.fromkeys(key for keys in groups for key in keys))
    for keys in groups:
        series = [
            Series(
                "held out" if key.startswith("eval_") else "training",
                lines.get(key, []),
                key.startswith("eval_"),
            )
            for key in keys
        ]
        if any(len(each.points) > 1 for each in series):
            title = label(keys[0], sets) if len(keys) == 1 and sets else label(keys[0].removeprefix("eval_"))
            yield Chart(title, series)
