"""What a run will do, told before it does it: the data's summary, the derived numbers, one row in colour."""

import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from posttrain.config import Config
from posttrain.console import say, show_markup, show_table, warn
from posttrain.data import Counts
from posttrain.encoding import IGNORED, Encoded
from posttrain.stages.base import Prepared

_BARS = " ▁▂▃▄▅▆▇█"


def _summary(encoded: Encoded | None, counts: Counts) -> list[str]:
    reasons = {
        "also held out": counts.in_test_too,
        "prompt too long": counts.prompt_too_long,
        "too long": counts.too_long,
        "ties": counts.ties,
        "bad": counts.bad,
    }
    left_out = ", ".join(f"{count:,} ({reason})" for reason, count in reasons.items() if count)
    cells = [counts.read, counts.kept if encoded else 0, counts.truncated, left_out or 0, counts.duplicates]
    tokens, loss = (encoded.tokens, encoded.loss_tokens) if encoded else (0, 0)
    share = f"{loss:,} ({loss / tokens:.0%})" if tokens else "0"
    return [cell if isinstance(cell, str) else f"{cell:,}" for cell in [*cells, tokens]] + [share]


def _response_tokens(config: Config) -> str:
    """A reward model reads its score after the last token; elsewhere each token of a response is learned."""
    return "tokens of responses" if config.stage.name == "reward" else "tokens that carry loss"


def show_data(config: Config, prepared: Prepared) -> None:
    """Print what was read, kept, cut and left out, and warn of what should not go unseen."""
    names = ("rows read", "rows kept", "of these cut", "rows left out", "repeated", "tokens", _response_tokens(config))
    train, counts, max_length = prepared.train, prepared.splits.counts["train"], config.stage.max_length
    cells = zip(names, _summary(train, counts), _summary(prepared.test, prepared.splits.counts["test"]), strict=True)
    show_table("data", ("", "train", "held out"), list(cells))
    for note in prepared.splits.notes:
        say(f"data: {note}")
    if counts.truncated:
        warn(
            f"{counts.truncated} of {counts.kept} rows to train on are longer than stage.max_length={max_length} and "
            f"are cut; {train.without_end} of them lose the EOS that ends them (data.overlength=drop leaves them out)"
        )
    if counts.prompt_too_long:
        warn(f"{counts.prompt_too_long} rows are left out: their prompt alone fills stage.max_length={max_length}")
    if counts.ties:
        warn(f"{counts.ties} pairs are left out: chosen and rejected are the same, perhaps only after the cut")
    if counts.duplicates:
        warn(f"{counts.duplicates} of {counts.kept} rows to train on repeat another one exactly")
    if prepared.test is None:
        warn("no rows are held out, so there is no held-out loss (data.test_size, data.dataset_test_split)")


def steps_planned(config: Config, rows: int, processes: int) -> tuple[int, int]:
    """Rows in one update, and updates in the whole run, as transformers will count them."""
    accumulation = int(config.trainer.get("gradient_accumulation_steps", 1))
    batches = math.ceil(rows / (config.stage.batch_size * processes))
    if config.trainer.get("dataloader_drop_last"):
        batches = rows // (config.stage.batch_size * processes)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    max_steps = int(config.trainer.get("max_steps", -1))
    steps = max_steps if max_steps > 0 else math.ceil(per_epoch * config.stage.num_epochs)
    return config.stage.batch_size * accumulation * processes, steps


def show_plan(config: Config, prepared: Prepared, processes: int, rows: int, trainable: tuple[int, int] | None) -> None:
    """Print the numbers that follow from the configuration; `rows` counts packed rows where rows are packed."""
    stage = config.stage
    accumulation = config.trainer.get("gradient_accumulation_steps", 1)
    batch, steps = steps_planned(config, rows, processes)
    unit = "pairs" if config.stage.name != "sft" else "packed rows" if config.trainer.get("packing") else "rows"
    say(
        f"batch: {stage.batch_size} per device × {accumulation} accumulation × {processes} "
        f"{'device' if processes == 1 else 'devices'} = {batch} {unit} per update"
    )
    if config.trainer.get("max_steps", -1) > 0:
        say(f"steps: {steps:,} (trainer.max_steps={config.trainer['max_steps']})")
    else:
        unit = "epoch" if stage.num_epochs == 1 else "epochs"
        say(f"steps: {steps:,} ({stage.num_epochs:g} {unit} of {math.ceil(rows / batch):,})")
    if trainable is not None:
        some, all_of_them = trainable
        say(f"trainable parameters: {some:,} of {all_of_them:,} ({some / all_of_them:.1%})")
    say(f"{_response_tokens(config)}: {prepared.train.loss_tokens:,} per epoch")
    if stage.warmup_steps >= steps:
        warn(
            f"stage.warmup_steps={stage.warmup_steps} is not below the {steps} steps of the run: "
            "the learning rate never reaches its value"
        )


def histogram(lengths: Sequence[int], bins: int = 40) -> str:
    """One line of bars from the shortest to the longest row."""
    low, high = min(lengths), max(lengths)
    bins = min(bins, high - low + 1)
    counts = [0] * bins
    for length in lengths:
        counts[min((length - low) * bins // (high - low + 1), bins - 1)] += 1
    tallest = max(counts)
    return "".join(_BARS[math.ceil(count / tallest * (len(_BARS) - 1))] for count in counts)


def _coloured(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> str:
    pieces = []
    for token, carries in zip(ids, learned, strict=True):
        text = escape(tokenizer.decode([token])).replace("\n", "↵\n")
        pieces.append(f"[black on green]{text}[/]" if carries else f"[dim]{text}[/]")
    return "[dim]·[/]".join(pieces)


def show_example(config: Config, prepared: Prepared, index: int = 0) -> None:
    """Print one row as the model sees it, its responses in green, each token set off."""
    row: dict[str, Any] = prepared.train.dataset[index]
    tokenizer = prepared.encoder.tokenizer
    where = escape(prepared.train.rows[index].where)
    told = "the response" if config.stage.name == "reward" else "these carry loss"
    show_markup(f"\n[bold]{where}[/], as tokens; [black on green]{told}[/]\n")
    if "labels" in row:
        show_markup(_coloured(tokenizer, row["input_ids"], [label != IGNORED for label in row["labels"]]) + "\n")
        return
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_ids"]
        learned = [False] * len(row["prompt_ids"]) + [True] * len(answer)
        show_markup(f"[bold]{side}[/]\n" + _coloured(tokenizer, row["prompt_ids"] + answer, learned) + "\n")


def _end_check(prepared: Prepared, encoded: Encoded) -> str:
    whole = len(encoded.rows) - encoded.without_end
    return f"{prepared.encoder.end_of_turn} ends the response and carries loss in {whole} of {len(encoded.rows)} rows"


def show_dry_run(config: Config, prepared: Prepared, processes: int) -> None:
    """Everything that can be known without loading a model."""
    train, tokenizer = prepared.train, prepared.encoder.tokenizer
    show_data(config, prepared)
    low, high = min(train.lengths), max(train.lengths)
    middle = sorted(train.lengths)[len(train.lengths) // 2]
    say(f"length in tokens: {low} {histogram(train.lengths)} {high}; half of the rows have at most {middle}")
    show_example(config, prepared)
    say(f"EOS: {_end_check(prepared, train)}")
    beginnings = train.dataset["input_ids" if "input_ids" in train.dataset.column_names else "prompt_ids"]
    doubled = sum(ids[:2] == [tokenizer.bos_token_id] * 2 for ids in beginnings)
    brought = f"{doubled} rows begin with two: the template and the data both bring one"
    say(f"BOS: {brought if doubled else 'no row begins with two'}")
    if config.trainer.get("packing"):
        say("packing: rows are packed when training starts; the steps below are those without packing")
    show_plan(config, prepared, processes, len(train.rows), None)
    say("dry run: nothing was trained or written")
