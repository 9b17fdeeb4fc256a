"""The points of a sweep, read from their folders: which are complete, and their metrics."""

import re
from pathlib import Path

from omegaconf import DictConfig

from posttrain.cli.command import Command
from posttrain.config.check import check, to_dict
from posttrain.config.stages import STAGES
from posttrain.console import say, show_table
from posttrain.data.hashes import Hashes, cache_of
from posttrain.data.sources import data_files, is_local_data
from posttrain.metrics import several
from posttrain.metrics.catalogue import label, with_gold_apart
from posttrain.metrics.charts import draw
from posttrain.models.resolve import all_reward_functions, code_hashes, resolve, weight_hashes
from posttrain.runs.folder import IDENTITY, MANIFEST, RunFolder, changes, read_object
from posttrain.values import JsonObject

PICTURE = "sweep.svg"
NAMED = 40  # characters of a point's name in it


def _read(file: Path) -> JsonObject:
    return read_object(file, (), f"delete {file.parent} to train this point again") or {}


def is_complete(folder: Path, composed: DictConfig) -> bool:
    """Whether a point has been finished with this configuration, models and functions, torch-free.

    A point of which that cannot be said from files, such as one on a Hub data set, is not; it looks for itself.
    """
    manifest, recorded = _read(folder / MANIFEST), _read(folder / IDENTITY)
    if not manifest or not recorded:
        return False
    resolved = resolve(check(composed))
    config = resolved.config
    if config.overwrite or not is_local_data(config.data):
        return False
    folders = resolved.folders.items()
    now = {**recorded, "config": to_dict(config), **{name: weight_hashes(folder) for name, folder in folders}}
    try:
        now["code"] = code_hashes(all_reward_functions(config))
    except (OSError, ImportError, ValueError):  # a module that this process does not find
        return False
    hashes = Hashes(cache_of(config))
    digests = sorted(hashes.of(Path(file)) for file in data_files(config.data))
    return (
        not changes(recorded, now)
        and digests == sorted(manifest["data"]["sources"].values())
        and not RunFolder(folder).damage(manifest)
    )


def objective_of(folder: Path) -> float | None:
    """The number that the stage of a finished point is judged by."""
    manifest = _read(folder / MANIFEST)
    return manifest["metrics"].get(STAGES[manifest["stage"]].objective) if manifest else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(point: Path) -> dict[str, str]:
    """The swept keys of a point and their values, from its folder's name."""
    return dict(part.partition("=")[::2] for part in re.split(r",(?=[\w.@]+=)", point.name))


def show_sweep(command: Command) -> None:
    """Print every point of the sweep's folder, finished or not, also those of earlier sweeps, and draw them."""
    config = command.config
    folder = Path(config.output_dir) / config.run_name / config.stage.name
    points = sorted(path for path in folder.glob("*=*") if path.is_dir()) if folder.is_dir() else []
    if not points:
        return
    found = [(point, _read(point / MANIFEST).get("metrics")) for point in points]
    measured = dict.fromkeys(name for _, metrics in found for name in metrics or ())
    swept = with_gold_apart(STAGES[config.stage.name].swept, measured)
    names = [name for name in swept if any(metrics and name in metrics for _, metrics in found)]
    keys = list(dict.fromkeys(key for point in points for key in _values(point)))
    rows = []
    for point, metrics in found:
        values = _values(point)
        begun = (point / IDENTITY).is_file()
        state = "complete" if metrics is not None else "not finished" if begun else "did not begin"
        cells = [f"{metrics[name]:.4g}" if metrics and name in metrics else "" for name in names]
        rows.append((*(values.get(key, "") for key in keys), *cells, state))
    runs = [several.Run(_named(_values(point)), _values(point), metrics, point) for point, metrics in found if metrics]
    groups = several.groups(runs)
    rows.sort(
        key=lambda row: [(0, float(cell), "") if _is_number(cell) else (1, 0.0, cell) for cell in row[: len(keys)]]
    )
    for group in groups:
        if (seeds := len(group.runs)) > 1:
            settings = {**group.settings, several.SEED: f"{seeds} seeds"}
            rows.append(
                (*(str(settings.get(key, "")) for key in keys), *map(group.cell, names), "mean ± standard deviation")
            )
    show_table(f"sweep: {folder}/<point>", (*keys, *map(label, names), "state"), rows)
    charts = [chart for name in names if name != "kl" for chart in several.over_kl(groups, name)]
    charts += several.over_keys(groups, names)
    if charts:
        (folder / PICTURE).write_text(draw(charts), encoding="utf-8")
        say(f"picture: {folder / PICTURE}")


def _named(values: dict[str, str]) -> str:
    name = several.short(values)
    return name if len(name) <= NAMED else f"{name[: NAMED - 1]}…"
