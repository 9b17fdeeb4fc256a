"""What a tracker gets besides the curves, which the Trainer logs: completions and the report card, and its pictures."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from posttrain.config.check import trackers
from posttrain.metrics.charts import Chart, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import Trainer

PICTURES = "report card, drawn"


class Cells(NamedTuple):
    """One table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def log_tables(trainer: "Trainer", tables: Mapping[str, Cells], charts: Sequence[Chart] = ()) -> None:
    """Log tables and charts to each tracker of the run and end its run there, so that the next stage begins its own."""
    for name in trackers(trainer.args.report_to):
        shown = {title: cells for title, cells in tables.items() if cells.rows}
        _LOGGERS[name](trainer, shown, figure_of(charts) if charts else None)


def _to_wandb(trainer: "Trainer", tables: Mapping[str, Cells], figure: "Figure | None") -> None:
    import wandb

    if wandb.run is None:  # WANDB_DISABLED, or nothing was logged
        return
    for title, cells in tables.items():
        wandb.run.log({title: wandb.Table(columns=list(cells.columns), data=[list(row) for row in cells.rows])})
    if figure is not None:
        wandb.run.log({PICTURES: wandb.Image(figure)})
    wandb.finish()


def _to_trackio(trainer: "Trainer", tables: Mapping[str, Cells], figure: "Figure | None") -> None:
    import pandas
    import trackio
    from PIL import Image

    # the Trainer has ended the run with its last step; this goes on with it
    trackio.init(project=trainer.args.project, name=trainer.args.run_name, resume="allow")
    for title, cells in tables.items():
        trackio.log({title: trackio.Table(dataframe=pandas.DataFrame(list(cells.rows), columns=list(cells.columns)))})
    if figure is not None:
        figure.savefig(drawn := BytesIO(), format="png")
        trackio.log({PICTURES: trackio.Image(Image.open(drawn))})
    trackio.finish()


def _to_tensorboard(trainer: "Trainer", tables: Mapping[str, Cells], figure: "Figure | None") -> None:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    [callback] = [each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
    with SummaryWriter(callback.logging_dir) as writer:
        for title, cells in tables.items():
            lines = [cells.columns, ["---"] * len(cells.columns), *cells.rows]
            written = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
            writer.add_text(title, written, trainer.state.global_step)
        if figure is not None:
            writer.add_figure(PICTURES, figure, trainer.state.global_step)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_LOGGERS = {"wandb": _to_wandb, "trackio": _to_trackio, "tensorboard": _to_tensorboard}
