"""Write a page about runs, from their folders alone.

usage: posttrain report <folder> [<folder> ...] [out=<file>]

The page needs nothing but itself: no network, no script, light and dark as the
reader's system is. out= defaults to report.html in the folder, and for several
folders to a file in the current one that is named after them.

examples:
  posttrain report outputs/demo
  posttrain report outputs/demo outputs/other out=both.html
"""

import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from posttrain.cli.command import read_words
from posttrain.cli.entry import entry_point
from posttrain.console import number, say
from posttrain.errors import ConfigError
from posttrain.metrics import comparison
from posttrain.paths import PACKAGE
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import MANIFEST, read_json, read_lines
from posttrain.stages import STAGES

FILE = "report.html"
FRONTIER = "frontier.json"
GENERATOR = '<meta name="generator" content="posttrain">'
TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
}
# what is drawn of each stage: (title, unit, series of metrics.jsonl)
CURVES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "sft": [("loss per token", ("loss", "eval_loss"))],
    "reward": [("loss (Bradley–Terry)", ("loss", "eval_loss"))],
    "ppo": [
        ("reward", ("reward", "eval_reward")),
        ("gold reward", ("eval_gold",)),
        ("KL from the reference (nats per answer)", ("kl", "eval_kl")),
        ("response length (tokens)", ("response_length", "eval_response_length")),
        ("entropy (nats per token)", ("entropy",)),
        ("explained variance of the critic", ("explained_variance",)),
    ],
    "dpo": [
        ("loss", ("loss", "eval_loss")),
        ("accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
        ("KL from the reference (nats per answer)", ("eval_kl",)),
    ],
}
SAMPLES = 4
ANSWERS = 6  # of the evaluation, side by side


def _json(file: Path) -> Any:
    return read_json(file, "run what wrote it again, or delete it")


def stage_folders(path: Path) -> list[Path]:
    """The finished stages below a run's folder, in their order; the folder itself where it is a stage or a point.

    Raises:
        ConfigError: there is none.
    """
    if (path / MANIFEST).is_file():
        return [path]
    found = [path / stage for stage in STAGES if (path / stage / MANIFEST).is_file()]
    found += [point.parent for stage in (*STAGES, ".") for point in sorted((path / stage).glob(f"*=*/{MANIFEST}"))]
    if not found:
        raise ConfigError(f"{path}: no finished stage is there ({MANIFEST} ends one)")
    return found


def chart(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], labels: Sequence[str] = ()) -> str:
    """A small line chart as SVG whose colours serve on light and dark pages; `labels` name the points of a frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#808080"
    style: Any = {
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), grey),
        **{"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": title},
        **{"axes.spines.top": False, "axes.spines.right": False},
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(3.7, 2.3), layout="constrained")
        for (label, points), (colour, marker) in zip(series, (("#4c8dd6", ""), ("#e08a2e", "o")), strict=False):
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
        for (x, y), label in zip(series[-1][1] if labels else [], labels, strict=False):
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_title(title, fontsize=10)
        if len([points for _, points in series if points]) > 1:
            axes.legend(frameon=False, fontsize=8)
        if labels:
            axes.set_xlabel("KL from the reference (nats per answer)")
            axes.margins(0.2)
        written = StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    drawn = written.getvalue()
    return drawn[drawn.index("<svg") :]


def _curves(stage: str, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    for title, names in CURVES[stage]:
        series = [
            (
                "held out" if name.startswith("eval_") else "training",
                [(entry["step"], entry[name]) for entry in entries if name in entry],
            )
            for name in names
        ]
        if any(len(points) > 1 for _, points in series):
            both = series if len(series) == 2 else [("", []), *series] if names[0].startswith("eval_") else series
            yield chart(title, both)


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stage(folder: Path) -> dict[str, Any]:
    manifest = _json(folder / MANIFEST)
    name, metrics = manifest["stage"], manifest["metrics"]
    log = folder / "run.log"
    warnings = [
        line.split(" WARNING posttrain: ", 1)[1]
        for line in (log.read_text(encoding="utf-8").splitlines() if log.is_file() else [])
        if " WARNING posttrain: " in line
    ]
    card = _json(folder / "report_card.json")
    rollouts = read_lines(folder / "rollouts.jsonl")
    return {
        "name": name,
        "title": TITLES[name] + ("" if "=" not in folder.name else f", {folder.name}"),
        "anchor": folder.name,
        "point": "=" in folder.name,
        "folder": str(folder),
        "manifest": manifest,
        "numbers": [
            (label, number(key, metrics.get(f"{key}_before")), number(key, metrics.get(key)))
            for key, label in comparison.shown_apart(STAGES[name].shown, metrics).items()
            if key in metrics
        ],
        "curves": list(_curves(name, read_lines(folder / "metrics.jsonl"))),
        "samples": (_json(folder / "samples.json") or [])[:SAMPLES],
        "card": card,
        "rollouts": rollouts[:2] + rollouts[-4:] if len(rollouts) > 6 else rollouts,
        "warnings": list(dict.fromkeys(warnings)),
        "settings": [
            (key, value)
            for key, value in _flat({section: manifest["config"][section] for section in ("stage", "trainer", "model")})
            if value is not None
        ],
        "sources": manifest["data"]["sources"],
        "counts": manifest["data"]["counts"],
    }


def _frontiers(path: Path, stages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each point of a sweep gained, over the KL that it cost.

    Where the best that is possible at each KL is known, as in benchmarks/closed_form.py, <stage>/frontier.json holds it
    as a list of {"kl": ..., <metric>: ...}, and it is drawn as a line.
    """
    for name, key in (("ppo", "reward"), ("ppo", "gold"), ("dpo", "accuracy")):
        points = [s for s in stages if s["name"] == name and s["point"] and "kl" in s["manifest"]["metrics"]]
        points = [point for point in points if key in point["manifest"]["metrics"]]
        points.sort(key=lambda point: point["manifest"]["metrics"]["kl"])
        if len(points) > 1:
            places = [(p["manifest"]["metrics"]["kl"], p["manifest"]["metrics"][key]) for p in points]
            labels = [point["anchor"].removeprefix("stage.") for point in points]
            theory = [(each["kl"], each[key]) for each in _json(path / name / FRONTIER) or [] if key in each]
            series = [("best possible", theory), ("measured", places)]
            yield chart(f"{TITLES[name]}: {STAGES[name].shown[key]}", series, labels)


def _evaluation(path: Path) -> dict[str, Any] | None:
    found = _json(path / comparison.FILE)
    if not found:
        return None
    if "scores" not in found[0]:
        say(f"{path / comparison.FILE} was written by an older posttrain; evaluate again to see it in the report")
        return None
    return {
        "policies": [each["policy"] for each in found],
        "rows": comparison.rows(found),
        "changes": list(comparison.in_words(found)),
        "answers": [
            (prompt, [each["answers"][index] for each in found])
            for index, prompt in enumerate(found[0]["prompts"][:ANSWERS])
        ],
    }


def write_report(*paths: Path, out: Path | None = None) -> Path:
    """Write the page about the folders and return its path: report.html in the one folder, if `out` is not given."""
    runs = []
    for path in paths:
        stages = [_stage(folder) for folder in stage_folders(path)]
        runs.append(
            {
                "path": str(path),
                "stages": stages,
                "frontiers": list(_frontiers(path, stages)),
                "evaluation": _evaluation(path),
            }
        )
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(runs=runs, order=list(STAGES), titles=TITLES)
    names = "-".join(path.resolve().name for path in paths)
    file = out or (paths[0] / FILE if len(paths) == 1 else Path(f"report-{names}.html"))
    if file.is_file() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise ConfigError(f"out={file} is there already and is not a report; choose another file")
    write_atomically(file, page)
    return file


def main() -> None:
    """The entry point of `posttrain report`."""
    entry_point("report", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    words, options = read_words(arguments, ["out"])
    paths = [Path(word) for word in words]
    if not paths:
        raise ConfigError("name a run's folder, for example: posttrain report outputs/demo")
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder")
    out = Path(options["out"]) if "out" in options else None
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"out={out}: {'a folder, not a file' if out.is_dir() else f'no folder {out.parent}'}")
    say(f"report: {write_report(*paths, out=out)}")


if __name__ == "__main__":
    main()
