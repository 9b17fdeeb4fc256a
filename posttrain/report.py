"""Write a page about runs, from their folders alone.

usage: posttrain report <folder> [<folder> ...] [out=<file>]

Prints what was trained, what got better and what got worse. The page needs
nothing but itself: no network, light and dark as the reader's system is. Samples
can be searched, filtered and sorted. Several runs, or the points of a sweep, are
compared: the settings that differ, the final numbers (mean ± standard deviation
where only the seed differs), and their curves. out= defaults to report.html in the
folder, and for several folders to a file in the current one that is named after
them.

examples:
  posttrain report outputs/demo
  posttrain report outputs/seed1 outputs/seed2 outputs/seed3 out=seeds.html
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, select_autoescape

from posttrain.cli.command import read_words
from posttrain.cli.entry import entry_point
from posttrain.config.check import leaves
from posttrain.config.stages import EVALUATED_AS, PAIRS, STAGES, StageSpec
from posttrain.console import say
from posttrain.errors import ConfigError
from posttrain.metrics import comparison, several, summary
from posttrain.metrics.catalogue import GOLD, OF_NAMED, charts_with_gold_apart, label, of_sets, with_gold_apart
from posttrain.metrics.charts import Chart, card_charts, curves, draw
from posttrain.metrics.report_card import FIT
from posttrain.metrics.samples import collect
from posttrain.paths import PACKAGE
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import IDENTITY, MANIFEST, ROUND, changes, of_round, read_json
from posttrain.values import JsonObject

FILE = "report.html"
FRONTIER = "frontier.json"
GENERATOR = '<meta name="generator" content="posttrain">'
LONGEST = 60  # characters of a setting in the table of those that differ
CURVES = 16  # runs whose curves are drawn over one another


class Node(NamedTuple):
    """A stage in the lineage, and those that started from its model; or a model that no stage here has made."""

    title: str
    anchor: str
    rewarded_by: str
    numbers: Sequence[tuple[str, str, str, str]]
    children: "list[Node]"


def _json(file: Path) -> Any:
    return read_json(file, "run what wrote it again, or delete it")


def stage_folders(path: Path) -> list[Path]:
    """The finished stages below a run's folder, in their order; the folder itself where it is a stage or a point.

    Raises:
        ConfigError: there is none.
    """
    if (path / MANIFEST).is_file() and _json(path / MANIFEST)["stage"] in STAGES:
        return [path]
    found = [path / stage for stage in STAGES if (path / stage / MANIFEST).is_file()]
    later = [each.parent for stage in STAGES for each in path.glob(f"{stage}{ROUND}*/{MANIFEST}")]
    for folder in sorted(later, key=lambda folder: int(folder.name.partition(ROUND)[2])):
        stage, _, number = folder.name.partition(ROUND)
        before = path / of_round(stage, int(number) - 1)
        if before in found and _follows(folder, before):
            found.append(folder)
        else:
            say(f"{folder} is left out: it did not start from {before} as that is now")
    found += [point.parent for stage in (*STAGES, ".") for point in sorted((path / stage).glob(f"*=*/{MANIFEST}"))]
    if not found:
        raise ConfigError(f"{path} is not a finished run (no {MANIFEST} of a stage in it or in its folders)")
    return found


def _follows(folder: Path, before: Path) -> bool:
    """Whether a stage has started from what another one made."""
    return {*_json(folder / MANIFEST)["inputs"]["model"]["weights"].values()} <= _made(_json(before / MANIFEST))


def _made(manifest: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The hashes of all weights that a stage has made."""
    return {*manifest["weights"].values(), *manifest.get("adapter_weights", {}).values()}


def _of_several(name: str) -> str:
    """What tells a point of a sweep or a later round from others of its stage."""
    return f", {name}" if "=" in name else f", round {name.partition(ROUND)[2]}" if ROUND in name else ""


def _stage(folder: Path, number: int, has_curves: bool) -> JsonObject:
    """What the page says of a stage of the run with that number."""
    manifest = _json(folder / MANIFEST)
    name, metrics, given = manifest["stage"], manifest["metrics"], manifest["inputs"]
    sets = list(manifest["config"].get("data", {}).get("eval", {}))
    log = folder / "run.log"
    warnings = [
        line.split(" WARNING posttrain: ", 1)[1]
        for line in (log.read_text(encoding="utf-8").splitlines() if log.is_file() else [])
        if " WARNING posttrain: " in line
    ]
    card = _json(folder / "report_card.json")
    models = [f"the reward model of {Path(given['reward_model']['path']).name}"] if "reward_model" in given else []
    functions = [re.split(r"[:.]", spec)[-1] for spec in manifest["config"]["stage"].get("reward_functions", ())]
    return {
        "name": name,
        "title": STAGES[name].title + _of_several(folder.name),
        "anchor": f"run{number}-{folder.name}",
        "point": "=" in folder.name,
        "folder": str(folder),
        "manifest": manifest,
        "numbers": [
            (label(key, sets), *comparison.before_and_after(key, metrics))
            for key in [*with_gold_apart(STAGES[name].shown, metrics), *of_sets(OF_NAMED, sets)]
            if key in metrics
        ],
        "trained": summary.Trained(
            folder.name,
            name,
            given.get("model", {}).get("path") or manifest["config"]["model"]["base_model"],
            manifest["data"]["counts"]["train"].get("kept", 0),
            manifest.get("cost", {}).get("epochs"),
            [source for source, rows in manifest["data"].get("rows_of", {}).items() if rows.get("train")],
            " and ".join([*models, *functions]),
            metrics,
        ),
        "charts": list(curves(charts_with_gold_apart(STAGES[name].charts, metrics), folder / "metrics.jsonl", sets))
        if has_curves
        else [],
        "card_charts": list(card_charts(card["reliability"], card.get("scores"), card.get("by_length", ())))
        if card
        else [],
        "has_curves": has_curves,
        "card": card,
        "warnings": list(dict.fromkeys(warnings)),
        "settings": [
            (key, value)
            for key, value in leaves(
                {section: manifest["config"][section] for section in ("stage", "trainer", "model")}
            )
            if value is not None
        ],
        "sources": manifest["data"]["sources"],
        "counts": manifest["data"]["counts"],
    }


def _lineage(stages: Sequence[JsonObject]) -> list[Node]:
    """Every stage below the model that it started from, known by its weights; the points of a sweep are one."""
    roots: dict[str, Node] = {}
    nodes: dict[str, Node] = {}
    made = {each["anchor"]: _made(each["manifest"]) for each in stages}
    titles = {each["anchor"]: each["title"] for each in stages}

    def maker(weights: Mapping[str, str]) -> str:
        return next((stage for stage, files in made.items() if weights and files >= {*weights.values()}), "")

    for stage in stages:
        given, count = stage["manifest"]["inputs"], 1
        if stage["point"]:
            count = sum(each["point"] and each["name"] == stage["name"] for each in stages)
        key = stage["anchor"] if count == 1 else stage["name"]
        if key in nodes:
            continue
        title = stage["title"] if count == 1 else f"{STAGES[stage['name']].title}, {count} points"
        # or of the sampled pairs that it was trained on
        beside = (Path(stage["folder"]).parent / Path(source).parent.name / MANIFEST for source in stage["sources"])
        of_pairs = [each for file in beside if (each := _json(file)) is not None and each["stage"] == PAIRS]
        scorers = [each["inputs"].get("reward_model") for each in of_pairs]
        by = given.get("reward_model", next(filter(None, scorers), {"weights": {}, "path": ""}))
        rewarded_by = titles.get(maker(by["weights"]), by["path"])
        nodes[key] = Node(title, stage["anchor"], rewarded_by, stage["numbers"][: 2 if count == 1 else 0], [])
        above = nodes.get(maker(given["model"]["weights"])) if "model" in given else None
        start = stage["trained"].model
        (above or roots.setdefault(start, Node(start, "", "", [], []))).children.append(nodes[key])
    return list(roots.values())


def _runs(named: Sequence[tuple[str, Path]], spec: StageSpec) -> list[several.Run]:
    """The runs of a stage among folders, with the settings in which they differ."""
    manifests = [(name, folder, _json(folder / MANIFEST)) for name, folder in named]
    found = [(name, folder, manifest) for name, folder, manifest in manifests if manifest["stage"] == spec.name]
    identities = [_json(folder / IDENTITY) or {"config": manifest["config"]} for _, folder, manifest in found]
    keys = dict.fromkeys(key for each in identities[1:] for key in changes(identities[0], each))
    flat = [dict(leaves(each)) for each in identities]
    runs = []
    for (name, folder, manifest), values in zip(found, flat, strict=True):
        settings = {
            key.removeprefix("config."): re.sub(r"\b(\w{8})[0-9a-f]{56}\b", r"\1", _shown(values.get(key)))[:LONGEST]
            for key in keys
            if key.startswith(("config.", "data.", "code."))
        }
        for part, given in manifest["inputs"].items():  # what another stage has made differs with that stage's settings
            if given["stage"] is None and any(key.startswith(f"{part}.") for key in keys):
                settings[part] = given["path"]
        if "data.sources" in settings:  # known by their hashes, and named for the reader
            files = ", ".join("/".join(Path(source).parts[-2:]) for source in manifest["data"]["sources"])
            settings["data.sources"] = f"{files} {settings['data.sources']}"
        runs.append(several.Run(name, settings, manifest["metrics"], folder / "metrics.jsonl"))
    return runs


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def _compared(named: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, list[several.Group], list[str], list[Chart]]]:
    """The runs of each stage that has several: its title, groups of runs, the metrics to show, and charts."""
    for spec in STAGES.values():
        runs = _runs(named, spec)
        if len(runs) < 2:
            continue
        found, measured = several.groups(runs), dict.fromkeys(key for run in runs for key in run.metrics)
        shown, swept = (
            [key for key in with_gold_apart(keys, measured) if key in measured] for keys in (spec.shown, spec.swept)
        )
        charts = list(several.over_keys(found, swept))
        if len(runs) <= CURVES:
            keys = dict.fromkeys(key for keys in charts_with_gold_apart(spec.charts, measured) for key in keys)
            charts += several.over_one_another(found, list(keys))
        yield spec.title, found, shown, charts


def _frontiers(path: Path, points: Sequence[tuple[str, Path]], policies: Sequence[several.Run]) -> Iterator[Chart]:
    """What the points of a sweep, and the policies of an evaluation, gained over the KL that they spent.

    Where the best that is possible at each KL is known, as in benchmarks/closed_form.py, <stage>/frontier.json holds it
    as a list of {"kl": ..., <metric>: ...}, and it is drawn as a line.
    """
    runs = [(spec, _runs(points, spec)) for spec in STAGES.values()]
    for spec, found in [*runs, (EVALUATED_AS, policies)]:
        possible = _json(path / spec.name / FRONTIER) or []
        for key in with_gold_apart(spec.frontier, dict.fromkeys(key for run in found for key in run.metrics)):
            yield from several.over_kl(
                several.groups(found), key, [(each["kl"], each[key]) for each in possible if key in each]
            )


def _policies(found: Sequence[JsonObject]) -> list[several.Run]:
    """The policies of an evaluation with their scores as a run has them; the KL of best-of-N is its bound."""
    runs = []
    for each in found:
        metrics = dict(each["metrics"])
        metrics |= {"kl": metrics["kl_bound"]} if "kl_bound" in metrics else {}
        for score, values in each["scores"].items():
            key = score if score == comparison.REWARD else f"{GOLD}{score}"
            metrics |= comparison.measured(key, values)
        runs.append(several.Run(comparison.name_of(each["policy"]), {"policy": each["policy"]}, metrics, Path()))
    return runs


def _evaluated(path: Path, name: str = comparison.FILE) -> list[JsonObject]:
    """The policies of an evaluation; none where there is none, or something else or an older posttrain wrote it."""
    found = _json(path / name)
    if not isinstance(found, list) or not all(isinstance(each, dict) and "policy" in each for each in found):
        return []
    if found and "scores" not in found[0]:
        say(f"{path / name} was written by an older posttrain; evaluate again to see it in the report")
        found = []
    return list(found)


def _between(paths: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, list[str]]]:
    """The same policies of the first run and the others, by prompt, where both were evaluated on the same ones."""
    (first, start), *others = paths
    started = _evaluated(start) if others else []
    for name, path in others:
        for mine in _evaluated(path):
            for its in started:
                policy = comparison.name_of(mine["policy"])
                if policy != comparison.name_of(its["policy"]) or mine["prompts"] != its["prompts"]:
                    continue
                shared = [score for score in mine["scores"] if score in its["scores"]]
                by = {
                    score: comparison.paired(mine["scores"][score], its["scores"][score])
                    for score in shared
                    if score != comparison.REWARD or _rewards(path) == _rewards(start)
                }
                yield from comparison.in_words(
                    [{"policy": f"{first}/{policy}"}, {"policy": f"{name}/{policy}", "against_first": by}]
                )


def _rewards(path: Path) -> list[object]:
    """The weights of the reward models of a run: rewards of different ones are on different scales."""
    manifests = [_json(path / spec.name / MANIFEST) for spec in STAGES.values() if spec.is_classifier]
    return [each["weights"] if each else path for each in manifests]


def _sentences(stages: Sequence[JsonObject], found: Sequence[comparison.Difference]) -> list[summary.Sentence]:
    trained = [stage["trained"] for stage in stages if not stage["point"]]
    if not trained:
        points = [(Path(stage["folder"]).name, Path(stage["folder"])) for stage in stages]
        return summary.of_points(stages[0]["trained"], several.groups(_runs(points, STAGES[stages[0]["name"]])))
    return summary.sentences(trained, found)


def write_report(*paths: Path, out: Path | None = None) -> Path:
    """Write the page about the folders, print its first sentences, and return its path.

    That is report.html in the one folder, if `out` is not given.
    """
    runs, compared, named = [], list[tuple[str, Path]](), []
    distinct = len({path.name for path in paths}) == len(paths)
    labelled = [(path.name if distinct else str(path), path) for path in paths]
    for number, (name, path) in enumerate(labelled):
        folders = stage_folders(path)
        points = [folder for folder in folders if "=" in folder.name]
        within = f"{name}/" if len(paths) > 1 else ""
        by_stage = [len(paths) == 1 or bool(_of_several(each.name)) for each in folders]
        compared += [(f"{within}{each.name}" if by else name, each) for by, each in zip(by_stage, folders, strict=True)]
        stages = [_stage(folder, number, folder not in points or len(points) == 1) for folder in folders]
        named.append((path, [(each["title"], Path(each["folder"])) for each in stages]))
        others = sorted(file.name for file in path.glob("evaluation-*.json"))
        evaluations = [(each, _evaluated(path, each)) for each in (comparison.FILE, *others)]
        evaluation = evaluations[0][1]
        with_best_of = (found for _, found in evaluations if any("kl_bound" in each["metrics"] for each in found))
        swept = [(point.name.removeprefix("stage."), point) for point in points]
        sentences = _sentences(stages, list(comparison.differences(evaluation)))
        runs.append(
            {
                "path": str(path),
                "stages": stages,
                "sentences": sentences,
                "lineage": _lineage(stages),
                "frontiers": list(_frontiers(path, swept, _policies(next(with_best_of, evaluation)))),
                "evaluations": evaluations,
            }
        )
        parts = [(f"  {each.title}:", *(f"    {part}" for part in each.parts)) for each in sentences]
        say("\n".join([f"{path}:", *(line for each in parts for line in each)]))
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    samples = collect(named, _json)
    environment.globals |= {"draw": draw, "label": label, "rows": comparison.rows, "fit": FIT}
    page = environment.get_template("report.html.jinja").render(
        runs=runs, compared=list(_compared(compared)), between=list(_between(labelled)), samples=samples
    )
    together = "-".join(path.resolve().name for path in paths)
    file = out or (paths[0] / FILE if len(paths) == 1 else Path(f"report-{together}.html"))
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
