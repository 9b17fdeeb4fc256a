"""Every picture: line charts as SVG whose colours serve on light and dark pages."""

import hashlib
import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain.metrics.catalogue import GOLD, SEE, label, metric_of, of_sets
from posttrain.metrics.report_card import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
TRAINING, HELD_OUT = 0, 1  # colours
_COLOURS = ("#4c8dd6", "#e08a2e", "#3a9d6b", "#c2569f", "#8b76d6", "#b8931f", "#d2564f", "#2f9db0")
STEP = "optimizer step"
_COLUMNS = 4  # charts in a row
_LONGEST = 28  # characters of a name in a legend

FloatArray = np.typing.NDArray[np.float64]
Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Points
    colour: int = TRAINING
    marker: str = ""
    line: str = "-"  # "" for points alone, "--" for what is known and not measured
    ends: Points = ()  # of the interval of each point
    is_histogram: bool = False  # points are the middles of the bins and their counts


class Chart(NamedTuple):
    """One chart: its title, its lines, its axes, names of the last line's points, and what to look for in it."""

    title: str
    series: Sequence[Series]
    x: str = STEP
    y: str = ""
    names: Sequence[str] = ()
    see: str = ""
    is_share: bool = False  # the y-axis has percentages
    is_log: bool = False  # the x-axis


def chart_of(key: str, series: Sequence[Series], sets: Iterable[str] = (), x: str = STEP, see: str = "") -> Chart:
    """The chart of a metric, with the name, unit and caption that the catalogue has for it."""
    metric = metric_of(key, sets)
    title = label(key, sets).removesuffix(f" ({metric.unit})")
    see = see or next(
        (words for name, words in SEE.items() if key.endswith(name) or (GOLD in key and name == GOLD)), ""
    )
    return Chart(title, series, x, metric.unit or metric.name, see=see, is_share=metric.is_share)


def figure_of(charts: Sequence[Chart]) -> "Figure":
    """The charts side by side, for whatever can show a figure of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(len(charts), _COLUMNS)
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, chart in zip(places, charts, strict=False):
            _draw_chart(axes, chart)
        for axes in places[len(charts) :]:
            axes.axis("off")
    return figure


def draw(charts: Sequence[Chart]) -> str:
    """The charts side by side as one SVG, without a date, so that the same numbers give the same file."""
    import matplotlib

    written = StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": charts[0].title}):
        figure_of(charts).savefig(written, format="svg", transparent=True, metadata=unsaid)
    drawn = written.getvalue()
    return _for_a_page(drawn[drawn.index("<svg") :], "; ".join(chart.title for chart in charts))


def _draw_chart(axes: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import PercentFormatter

    for series in filter(lambda each: each.points, chart.series):
        x, y = zip(*series.points, strict=True)
        colour = _COLOURS[series.colour % len(_COLOURS)]
        name = series.name[:_LONGEST] + "…" * (len(series.name) > _LONGEST) or None
        if series.is_histogram:
            axes.step(x, y, where="mid", color=colour, label=name)
            axes.fill_between(x, y, step="mid", alpha=0.15, color=colour)
            continue
        axes.plot(x, y, linestyle=series.line or "none", marker=series.marker, markersize=4, color=colour, label=name)
        if series.ends:
            low, high = zip(*series.ends, strict=True)
            axes.vlines(x, low, high, color=colour, alpha=0.5)
    if chart.names:
        axes.margins(0.2)
        for point, name in zip(chart.series[-1].points, chart.names, strict=True):
            axes.annotate(name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if chart.is_log:
        axes.set_xscale("log")
        ticks = sorted({x for series in chart.series for x, _ in series.points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    if chart.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0), min(top, 1))  # the margin around the lines ends where shares do
        for line in axes.lines:
            line.set_clip_on(False)
    axes.set_title(chart.title, fontsize=10)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if sum(bool(series.points and series.name) for series in chart.series) > 1:
        axes.legend(frameon=False, fontsize=8)


def _for_a_page(drawn: str, title: str) -> str:
    """The SVG with a title for screen readers, and ids that no other picture of a page has."""
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', drawn))
    salt = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    drawn = re.sub(r' id="([^"]+)"', lambda found: f' id="{salt}-{found[1]}"' if found[1] in used else "", drawn)
    drawn = re.sub(r'(url\(#|href="#)', rf"\g<1>{salt}-", drawn)
    return re.sub(r"<svg([^>]*)>", rf'<svg role="img"\1><title>{html.escape(title)}</title>', drawn, count=1)


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
            # at the start of DPO all pairs are ties, and there is no accuracy
            later = steps > 0 if key.endswith("rewards/accuracies") else steps >= 0
            found[key] = thinned(steps[later], values[later])
    return found


def curves(groups: Sequence[Sequence[str]], file: Path, sets: Sequence[str] = ()) -> Iterator[Chart]:
    """A chart of each group of metrics over the steps of a run, from its metrics.jsonl.

    Those of the `sets` of data.eval have charts of their own.
    """
    held_out = [[key for key in keys if key.startswith("eval_")] for keys in groups]
    groups = [*groups, *([key] for name in sets for keys in held_out for key in of_sets(keys, [name]))]
    parts = ("", "_low", "_high")
    lines = read_points(file, dict.fromkeys(f"{key}{part}" for keys in groups for key in keys for part in parts))
    for keys in groups:
        series = []
        for key in keys:
            points = lines.get(key, [])
            low, high = (dict(lines.get(f"{key}{part}", ())) for part in parts[1:])
            ends = [(low.get(step, value), high.get(step, value)) for step, value in points]
            is_held_out = key.startswith("eval_")
            held = Series("held out", points, HELD_OUT, "o", ends=ends if low else ())
            series.append(held if is_held_out else Series("training", points))
        if any(len(each.points) > 1 for each in series):
            yield chart_of(keys[0] if len(keys) == 1 and sets else keys[0].removeprefix("eval_"), series, sets)


Bins = Sequence[Mapping[str, float]]


def card_charts(reliability: Bins, scores: Mapping[str, Sequence[float]] | None, by_length: Bins) -> Iterator[Chart]:
    """Pictures of a reward model's report card, those of an older posttrain's being fewer."""
    right = "pairs ranked as labelled"
    measured = [(part["confidence"], part["accuracy"]) for part in reliability]
    ends = [wilson(part["accuracy"] * part["pairs"], int(part["pairs"])) for part in reliability]
    diagonal = Series("calibrated", [(0.5, 0.5), (1, 1)], HELD_OUT, line="--")
    series = [diagonal, Series("measured", measured, marker="o", line="", ends=ends)]
    see = "Below the diagonal the model is surer than it is right. Bars are 95 % intervals."
    yield Chart("reliability", series, "probability that a margin stands for", right, see=see, is_share=True)
    if scores is not None:
        middles = [(low + high) / 2 for low, high in pairwise(scores["edges"])]
        series = [
            Series(name, list(zip(middles, scores[name], strict=True)), colour, is_histogram=True)
            for name, colour in (("chosen", TRAINING), ("rejected", HELD_OUT))
        ]
        yield Chart(
            "scores", series, "score", "completions", see="The less they overlap, the better they are told apart."
        )
    if by_length:
        places = [(part["difference"], part["accuracy"]) for part in by_length]
        series = [Series("", places, marker="o", ends=[(part["low"], part["high"]) for part in by_length])]
        see = "Level is good. High on one side alone: the model goes by length, whatever the completion says."
        yield Chart("accuracy by length", series, "tokens by which chosen is longer", right, see=see, is_share=True)
