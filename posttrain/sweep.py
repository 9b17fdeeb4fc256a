"""The table at the end of a sweep: a line for each point, made from the run folders alone."""

import json
from pathlib import Path
from typing import Any

from posttrain.compose import Command
from posttrain.console import show_table
from posttrain.lineage import IDENTITY, MANIFEST

SHOWN_METRICS = ("eval_loss_before", "eval_loss", "train_loss", "ended_by_eos", "tokens_per_second")


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
    rows = []
    for point, manifest in found:
        metrics = manifest.get("metrics", {})
        begun = (point / IDENTITY).is_file()
        state = "complete" if manifest else f"not finished, see {point / 'run.log'}" if begun else "failed at the start"
        rows.append((point.name, *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names), state))
    show_table(f"sweep in {folder}", ("point", *(name.replace("_", " ") for name in names), "state"), rows)
