"""The table at the end of a sweep: a line for each point, made from the run folders alone."""

import json
from pathlib import Path
from typing import Any

from posttrain.compose import Command
from posttrain.console import show_table
from posttrain.lineage import IDENTITY, MANIFEST

SHOWN_METRICS = {"eval_loss": "held-out loss", "train_loss": "train loss", "ended_by_eos": "ended by EOS"}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def show_sweep(command: Command) -> None:
    """Print every point of the sweep's folder, finished or not, also those of earlier sweeps over the same keys."""
    assert command.config is not None
    config = command.config
    folder = Path(config.output_dir) / config.run_name / config.stage.name
    points = sorted(path for path in folder.glob("*=*") if path.is_dir()) if folder.is_dir() else []
    if not points:
        return
    found = [(point, _read(point / MANIFEST)) for point in points]
    names = [name for name in SHOWN_METRICS if any(name in manifest.get("metrics", {}) for _, manifest in found)]
    keys = list(dict.fromkeys(part.partition("=")[0] for point in points for part in point.name.split(",")))
    rows = []
    for point, manifest in found:
        values = dict(part.partition("=")[::2] for part in point.name.split(","))
        metrics = manifest.get("metrics", {})
        begun = (point / IDENTITY).is_file()
        state = "complete" if manifest else "not finished" if begun else "did not begin"
        cells = [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]
        rows.append((*(values.get(key, "") for key in keys), *cells, state))
    rows.sort(key=lambda row: [float(cell) if _is_number(cell) else cell for cell in row[: len(keys)]])
    show_table(f"sweep: {folder}/<point>", (*keys, *(SHOWN_METRICS[name] for name in names), "state"), rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
