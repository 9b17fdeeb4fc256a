"""What a run will do, told before it does it: the data's summary, the derived numbers, one row in colour."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.schema import Config, PPOStage
from posttrain.console import say, show_markup, show_table, verbatim, warn
from posttrain.data.encode import IGNORED, Encoded
from posttrain.data.formats import Counts
from posttrain.rlhf.rollout_plan import schedule
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


def _sources(prepared: Prepared) -> list[tuple[str, str, str]]:
    """Each source with its rows."""
    parts = (prepared.splits.train, prepared.splits.test)
    train, test = (Counter(row.where.rsplit(" ", 2)[0] for row in rows) for rows in parts)
    return [(f"rows of {name}", f"{train[name]:,}", f"{test[name]:,}") for name in train | test]


def _response_tokens(config: Config) -> str:
    """A reward model reads its score after the last token; elsewhere each token of a response is learned."""
    return "tokens of responses" if config.stage.name == "reward" else "tokens that carry loss"


def show_data(config: Config, prepared: Prepared) -> None:
    """Print what was read and from where, kept, cut and left out, and warn of what may be a mistake."""
    names = ("rows read", "rows kept", "of these cut", "rows left out", "repeated", "tokens", _response_tokens(config))
    train, counts, max_length = prepared.train, prepared.splits.counts["train"], config.stage.max_length
    cells = zip(names, _summary(train, counts), _summary(prepared.test, prepared.splits.counts["test"]), strict=True)
    table = [*_sources(prepared), *list(cells)[: len(names) if train.loss_tokens else -1]]
    show_table("data", ("", "train", "held out"), table)
    for note in prepared.splits.notes:
        say(f"data: {note}")
    if counts.truncated:
        warn(
            f"{counts.truncated} of {counts.kept} rows to train on are longer than stage.max_length={max_length} and "
            f"are cut; {train.without_end} of them lose the EOS that ends them (data.overlength=drop leaves them out)"
        )
    if counts.prompt_too_long:
        kept_free = "" if train.loss_tokens else f", of which stage.max_new_tokens={prepared.new_tokens} are kept free"
        warn(
            f"{counts.prompt_too_long} rows are left out: their prompt alone fills stage.max_length={max_length}"
            f"{kept_free}"
        )
    if counts.ties:
        warn(f"{counts.ties} pairs are left out: chosen and rejected are the same, perhaps only after the cut")
    if counts.duplicates:
        warn(f"{counts.duplicates} of {counts.kept} rows to train on repeat another one exactly")
    if counts.repeats_prompt:
        warn(
            f"in {counts.repeats_prompt} of {counts.kept} rows to train on the answer begins with its whole prompt: "
            "the model would learn to say it again; take it out of the data unless that is meant"
        )
    if prepared.test is None:
        warn("no rows are held out, so there is no held-out loss (data.test_size, data.dataset_test_split)")


@dataclass
class Plan:
    """The derived numbers of a run, as transformers will count them."""

    unit: str
    accumulation: int
    batch: int  # units in one update, over all devices
    steps_per_epoch: int
    steps: int


def plan_of(config: Config, rows: int, processes: int) -> Plan:
    """What follows from the configuration for `rows` rows (packed ones where rows are packed)."""
    stage, trainer = config.stage, config.trainer
    if isinstance(stage, PPOStage):
        rollouts = schedule(stage, rows, processes)
        unit, accumulation = "episodes", rollouts.accumulation
        per_epoch = rollouts.rollouts_per_epoch * rollouts.steps_per_rollout
    else:
        unit = "pairs" if stage.name != "sft" else "packed rows" if trainer.get("packing") else "rows"
        accumulation = int(trainer.get("gradient_accumulation_steps", 1))
        shares = rows / (stage.batch_size * processes)
        batches = math.floor(shares) if trainer.get("dataloader_drop_last") else math.ceil(shares)
        per_epoch = max(math.ceil(batches / accumulation), 1)
    max_steps = int(trainer.get("max_steps", -1))
    steps = max_steps if max_steps > 0 else math.ceil(per_epoch * stage.num_epochs)
    return Plan(unit, accumulation, stage.batch_size * accumulation * processes, per_epoch, steps)


def show_plan(config: Config, prepared: Prepared, processes: int, rows: int, trainable: tuple[int, int] | None) -> None:
    """Print the numbers that follow from the configuration; `rows` counts packed rows where rows are packed."""
    stage = config.stage
    plan = plan_of(config, rows, processes)
    if isinstance(stage, PPOStage):
        say(
            f"rollout: {stage.rollout_batch_size} prompts answered, learned from in {stage.ppo_epochs} passes of "
            f"{stage.num_mini_batches} updates"
        )
    say(
        f"batch: {stage.batch_size} per device × {plan.accumulation} accumulation × {processes} "
        f"{'device' if processes == 1 else 'devices'} = {plan.batch} {plan.unit} per update"
    )
    if config.trainer.get("max_steps", -1) > 0:
        say(f"steps: {plan.steps:,} (trainer.max_steps={config.trainer['max_steps']})")
    else:
        unit = "epoch" if stage.num_epochs == 1 else "epochs"
        say(f"steps: {plan.steps:,} ({stage.num_epochs:g} {unit} of {plan.steps_per_epoch:,})")
    if trainable is not None:
        some, all_of_them = trainable
        say(f"trainable parameters: {some:,} of {all_of_them:,} ({some / all_of_them:.1%})")
    if prepared.train.loss_tokens:
        say(f"{_response_tokens(config)}: {prepared.train.loss_tokens:,} per epoch")
    if stage.warmup_steps >= plan.steps:
        warn(
            f"stage.warmup_steps={stage.warmup_steps} is not below the {plan.steps} steps of the run: "
            "the learning rate never reaches its value"
        )
    if config.model.dtype in ("bfloat16", "float16") and not config.model.use_peft:
        warn(
            f"model.dtype={config.model.dtype} trains all weights in it, where small updates round to nothing; "
            "model.dtype=float32 precision=bf16 keeps them and computes as fast"
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
        text = verbatim(tokenizer.decode([token])).replace("\n", "↵\n")
        pieces.append(f"[black on green]{text}[/]" if carries else f"[dim]{text}[/]")
    return "[dim]·[/]".join(pieces)


def show_example(config: Config, prepared: Prepared, index: int = 0) -> None:
    """Print one row as the model sees it, its responses in green, each token set off."""
    row: dict[str, Any] = prepared.train.dataset[index]
    tokenizer = prepared.encoder.tokenizer
    where = verbatim(prepared.train.rows[index].where)
    if isinstance(config.stage, PPOStage):
        show_markup(f"\n[bold]{where}[/], as tokens; the policy goes on from its end\n")
        show_markup(_coloured(tokenizer, row["prompt_ids"], [False] * len(row["prompt_ids"])) + "\n")
        return
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
    """Data, one row, the tokens at its ends, and the plan."""
    train, tokenizer = prepared.train, prepared.encoder.tokenizer
    show_data(config, prepared)
    low, high = min(train.lengths), max(train.lengths)
    middle = sorted(train.lengths)[len(train.lengths) // 2]
    say(f"length in tokens: {low} {histogram(train.lengths)} {high}; half of the rows have at most {middle}")
    show_example(config, prepared)
    if train.loss_tokens:
        say(f"EOS: {_end_check(prepared, train)}")
    beginnings = train.dataset["input_ids" if "input_ids" in train.dataset.column_names else "prompt_ids"]
    doubled = sum(ids[:2] == [tokenizer.bos_token_id] * 2 for ids in beginnings)
    brought = f"{doubled} rows begin with two: the template and the data both bring one"
    say(f"BOS: {brought if doubled else 'no row begins with two'}")
    if config.trainer.get("packing"):
        say("packing: rows are packed when training starts; the steps below are those without packing")
    show_plan(config, prepared, processes, len(train.rows), None)
