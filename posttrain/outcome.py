"""What a finished stage shows: its numbers before and after, sample completions, and what can be done next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.cli.entry import quoted
from posttrain.cli.next_steps import next_commands, relative
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES
from posttrain.console import say, show_table
from posttrain.metrics.catalogue import OF_NAMED, label, of_sets, with_gold_apart
from posttrain.metrics.comparison import before_and_after
from posttrain.metrics.trackers import Cells
from posttrain.runs.folder import ROUND, RunFolder
from posttrain.stages.base import EvalResult
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from posttrain.data.splits import Example

PANEL_SHOWN = 3


def samples(shown: "Sequence[Example]", before: EvalResult, after: EvalResult) -> JsonObject:
    """The prompt panel as samples.json."""
    return (
        {
            "samples.json": [
                {"prompt": row.prompt, "reference": row.reference, "before": old._asdict(), "after": new._asdict()}
                for row, old, new in zip(shown, before.completions, after.completions, strict=False)
            ]
        }
        if after.completions
        else {}
    )


def tables(shown: "Sequence[Example]", before: EvalResult, after: EvalResult) -> dict[str, Cells]:
    """The tables that trackers are handed."""
    completed = zip(shown, before.completions, after.completions, strict=False)
    shown_rows = [(_question(row), old.text, new.text) for row, old, new in completed]
    return {
        "samples": Cells(("prompt", "before", "after"), shown_rows),
        "report card": Cells(("", "value"), after.table),
    }


def show_result(
    config: Config,
    folder: RunFolder,
    metrics: JsonObject,
    shown: "Sequence[Example]",
    before: EvalResult,
    after: EvalResult,
) -> None:
    """Print all of it."""
    rows: list[tuple[str, ...]] = []
    sets = config.data.eval
    shown_keys = with_gold_apart(STAGES[config.stage.name].shown, after.metrics)
    for name in [*shown_keys, *of_sets(OF_NAMED, sets)]:
        numbers = before_and_after(name, metrics)
        if any(numbers):
            rows.append((label(name, sets), *numbers))
    if rows and metrics["eval_rows"]:
        rows.append(("held-out rows", *[f"{metrics['eval_rows']:,}"] * 2, ""))
    rows += [(f"{name}: held-out rows", *[f"{metrics[f'eval_{name}_rows']:,}"] * 2, "") for name in sets]
    columns = ("", "before", "after", "change")
    name = folder.path.name if ROUND in folder.path.name else config.stage.name
    width = 4 if any(row[3] for row in rows) else 3
    show_table(f"{name}: before and after", columns[:width], [row[:width] for row in rows])
    completed = list(zip(shown, before.completions, after.completions, strict=False))
    shown_rows = [(_question(row), old.text, new.text) for row, old, new in completed[:PANEL_SHOWN]]
    if shown_rows:
        cells = [tuple(map(_short, each)) for each in shown_rows]
        show_table("sample completions, greedy", ("prompt", "before", "after"), cells)
    if after.table:
        show_table("report card", ("", ""), after.table, headed=False)
    more = [
        ("tokens per second", f"{metrics['tokens_per_second']:,.0f}"),
        ("trained tokens", f"{metrics['trained_tokens']:,} of responses, in {metrics['steps']:,} steps"),
        ("model", relative(folder.model)),
    ]
    show_table("result", ("", ""), more, headed=False)
    if completed:
        say(f"try it:\n  posttrain chat {quoted(relative(folder.path))}")
    following = next_commands(config, folder.path)
    if following:
        title = (
            "next, with a file of yours" if any("data.dataset_name=" in command for command in following) else "next"
        )
        say("\n  ".join([f"{title}:", *following]))


def _question(row: "Example") -> str:
    """What the user has asked last; after it a tool may have answered."""
    asked = [message["content"] for message in row.prompt if message["role"] == "user"]
    return str((asked or [row.prompt[-1]["content"]])[-1])


def _short(text: str, limit: int = 100) -> str:
    if not text.strip():
        return "(nothing)" if not text else "(whitespace only)"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
