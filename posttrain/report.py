"""Write a page about runs, from their folders alone.

usage: posttrain report <folder> [<folder> ...] [out=<file>]

The page needs nothing but itself: no network, light and dark as the reader's
system is. Samples can be searched, filtered and sorted. out= defaults to
report.html in the folder, and for several folders to a file in the current one
that is named after them.

examples:
  posttrain report outputs/demo
  posttrain report outputs/demo outputs/other out=both.html
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from posttrain.cli.command import read_words
from posttrain.cli.entry import entry_point
from posttrain.config.stages import STAGES, followers
from posttrain.console import say
from posttrain.errors import ConfigError
from posttrain.metrics import comparison
from posttrain.metrics.catalogue import OF_NAMED, charts_with_gold_apart, label, of_sets, with_gold_apart
from posttrain.metrics.charts import Chart, Series, curves, draw
from posttrain.metrics.samples import collect
from posttrain.paths import PACKAGE
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import MANIFEST, read_json
from posttrain.values import JsonObject

FILE = "report.html"
FRONTIER = "frontier.json"
GENERATOR = '<meta name="generator" content="posttrain">'
CURVES = 8  # points of a sweep whose curves are drawn


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
        raise ConfigError(f"{path} is not a finished run (no {MANIFEST} in it or in its folders)")
    return found


def _flat(node: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stage(folder: Path, has_curves: bool) -> JsonObject:
    manifest = _json(folder / MANIFEST)
    name, metrics = manifest["stage"], manifest["metrics"]
    sets = list(manifest["config"].get("data", {}).get("eval", {}))
    log = folder / "run.log"
    warnings = [
        line.split(" WARNING posttrain: ", 1)[1]
        for line in (log.read_text(encoding="utf-8").splitlines() if log.is_file() else [])
        if " WARNING posttrain: " in line
    ]
    card = _json(folder / "report_card.json")
    return {
        "name": name,
        "title": STAGES[name].title + ("" if "=" not in folder.name else f", {folder.name}"),
        "anchor": folder.name,
        "point": "=" in folder.name,
        "folder": str(folder),
        "manifest": manifest,
        "numbers": [
            (label(key, sets), *comparison.before_and_after(key, metrics))
            for key in [*with_gold_apart(STAGES[name].shown, metrics), *of_sets(OF_NAMED, sets)]
            if key in metrics
        ],
        "curves": [
            draw([each])
            for each in curves(charts_with_gold_apart(STAGES[name].charts, metrics), folder / "metrics.jsonl", sets)
        ]
        if has_curves
        else [],
        "has_curves": has_curves,
        "card": card,
        "warnings": list(dict.fromkeys(warnings)),
        "settings": [
            (key, value)
            for key, value in _flat({section: manifest["config"][section] for section in ("stage", "trainer", "model")})
            if value is not None
        ],
        "sources": manifest["data"]["sources"],
        "counts": manifest["data"]["counts"],
    }


def _frontiers(path: Path, stages: Sequence[JsonObject]) -> Iterator[str]:
    """What each point of a sweep gained, over the KL that it spent.

    Where the best that is possible at each KL is known, as in benchmarks/closed_form.py, <stage>/frontier.json holds it
    as a list of {"kl": ..., <metric>: ...}, and it is drawn as a line.
    """
    measured = dict.fromkeys(key for stage in stages for key in stage["manifest"]["metrics"])
    for spec, key in [(each, key) for each in STAGES.values() for key in with_gold_apart(each.frontier, measured)]:
        points = [s for s in stages if s["name"] == spec.name and s["point"]]
        points = [point for point in points if {"kl", key} <= point["manifest"]["metrics"].keys()]
        points.sort(key=lambda point: point["manifest"]["metrics"]["kl"])
        if len(points) > 1:
            theory = [(each["kl"], each[key]) for each in _json(path / spec.name / FRONTIER) or [] if key in each]
            places = [(p["manifest"]["metrics"]["kl"], p["manifest"]["metrics"][key]) for p in points]
            series = [Series("best possible", theory), Series("measured", places, True)]
            names = [point["anchor"].removeprefix("stage.") for point in points]
            yield draw([Chart(f"{spec.title}: {label(key)}", series, label("kl"), names)])


def _evaluation(path: Path) -> JsonObject | None:
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
    }


def _columns() -> list[list[str]]:
    """The stages from left to right, each after what it follows; those that nothing follows stand last, together."""
    inner = [[spec.name] for spec in STAGES.values() if followers(spec.name)]
    return [*inner, [spec.name for spec in STAGES.values() if not followers(spec.name)]]


def write_report(*paths: Path, out: Path | None = None) -> Path:
    """Write the page about the folders and return its path: report.html in the one folder, if `out` is not given."""
    runs, named = [], []
    for path in paths:
        folders = stage_folders(path)
        points = [folder for folder in folders if "=" in folder.name]
        stages = [_stage(folder, folder not in points or len(points) <= CURVES) for folder in folders]
        named.append((path, [(each["title"], Path(each["folder"])) for each in stages]))
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
    samples = collect(named, _json)
    page = environment.get_template("report.html.jinja").render(runs=runs, columns=_columns(), samples=samples)
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
