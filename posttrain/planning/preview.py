"""What a run will do, before it does it: the data's summary, the derived numbers, one row in colour."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from posttrain.config.schema import Config
from posttrain.config.stages import STAGES
from posttrain.console import counted, say, show_markup, show_table, verbatim, warn
from posttrain.data.chat import IGNORED
from posttrain.data.division import Numbers
from posttrain.data.encode import labels_of
from posttrain.data.prepared import Encoded
from posttrain.data.splits import Counts
from posttrain.stages.base import PANEL_SIZE, StageData, stage_named
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS = " ▁▂▃▄▅▆▇█"


def _summary(encoded: Encoded | None, counts: Counts) -> list[str]:
    cells = [counts.read, counts.kept if encoded else 0, counts.truncated, counts.left_out or 0, counts.duplicates]
    tokens, loss = (encoded.tokens, encoded.loss_tokens) if encoded else (0, 0)
    share = f"{loss:,} ({loss / tokens:.0%})" if tokens else "0"
    return [cell if isinstance(cell, str) else f"{cell:,}" for cell in [*cells, tokens]] + [share]


def _parts(data: StageData) -> dict[str, Encoded | None]:
    """What the rows are for -> those of them that are kept; named sets are held out, but for `ptx`."""
    made = data.prepared
    whole = {"train": made.train} | ({"test": made.test} if made.test is not None or not made.named else {})
    return whole | made.named | ({"ptx": made.ptx} if made.ptx is not None else {})


def _response_tokens(config: Config) -> str:
    """A reward model reads its score after the last token; elsewhere each token of a response is learned."""
    scores = STAGES[config.stage.name].is_classifier
    return "tokens of responses" if scores else "tokens that carry loss"


def show_data(config: Config, data: StageData) -> None:
    """Print what was read and from where, kept, cut and left out, and warn of what may be a mistake."""
    names = ("rows read", "rows kept", "of these cut", "rows left out", "repeated", "tokens", _response_tokens(config))
    train, counts, max_length = data.train, data.prepared.counts["train"], config.stage.max_length
    parts, rows_of = _parts(data), data.prepared.rows_of
    cells = zip(names, *(_summary(part, data.prepared.counts[name]) for name, part in parts.items()), strict=True)
    sources = [(f"readable rows of {name}", *(f"{rows[part]:,}" for part in parts)) for name, rows in rows_of.items()]
    loss_tokens = sum(part.loss_tokens for part in parts.values() if part is not None)
    table = [*sources, *list(cells)[: len(names) if loss_tokens else -1]]
    show_table("data", ("", *("held out" if name == "test" else name for name in parts)), table)
    for note in data.prepared.notes:
        say(f"data: {note}")
    if counts.truncated:
        warn(
            f"{counts.truncated} of {counts.kept} rows to train on are longer than stage.max_length={max_length} and "
            f"are cut; {train.without_end} of them lose the EOS that ends them (data.overlength=drop leaves them out)"
        )
    if counts.prompt_too_long:
        kept_free = "" if train.loss_tokens else f", of which stage.max_new_tokens={data.new_tokens} are kept free"
        warn(
            f"{counts.prompt_too_long} rows are left out: their prompt alone fills stage.max_length={max_length}"
            f"{kept_free}"
        )
    if counts.ties:
        warn(
            f"{counts.ties} pairs are left out as ties: chosen and rejected are the same, perhaps only after the cut, "
            "or data.preference.tie says so"
        )
    if counts.duplicates:
        warn(f"{counts.duplicates} of {counts.kept} rows to train on repeat another one exactly")
    if counts.repeats_prompt:
        warn(
            f"in {counts.repeats_prompt} of {counts.kept} rows to train on the completion begins with its prompt: "
            "the model would learn to say it again; take it out of the data unless that is meant"
        )
    if data.test is None:
        warn("no rows are held out, so there is no held-out loss (data.test_size, data.dataset_test_split)")


def show_plan(config: Config, data: StageData, processes: int, rows: int, trainable: tuple[int, int] | None) -> None:
    """Print the numbers that follow from the configuration; `rows` counts packed rows where rows are packed."""
    stage = config.stage
    plan = stage_named(stage.name).plan(config, rows, processes)
    for note in plan.notes:
        say(note)
    say(
        f"batch: {stage.batch_size} per device × {plan.accumulation} accumulation × "
        f"{counted(processes, 'device')} = {plan.batch} {plan.unit} per update"
    )
    if data.test is not None:
        bound = f" (data.max_eval_rows={config.data.max_eval_rows})" if config.data.max_eval_rows is not None else ""
        most = PANEL_SIZE if STAGES[stage.name].is_online else sys.maxsize  # completions take longer than losses
        sizes = [f"{min(len(data.test.dataset), most):,}"] if data.prepared.test is not None else []
        sizes += [f"{min(len(part.dataset), most):,} of {name}" for name, part in data.named.items()]
        say(f"held-out rows at each evaluation: {', '.join(sizes)}{bound}")
    if config.trainer.get("max_steps", -1) > 0:
        say(f"steps: {plan.steps:,} (trainer.max_steps={config.trainer['max_steps']})")
    else:
        say(f"steps: {plan.steps:,} ({counted(stage.num_epochs, 'epoch', 'g')} of {plan.steps_per_epoch:,})")
    if trainable is not None:
        some, all_of_them = trainable
        say(f"trainable parameters: {some:,} of {all_of_them:,} ({some / all_of_them:.1%})")
    if data.train.loss_tokens:
        say(f"{_response_tokens(config)}: {data.train.loss_tokens:,} per epoch")
    if stage.warmup_steps >= plan.steps:
        warn(
            f"stage.warmup_steps={stage.warmup_steps} is not below the {plan.steps} steps of the run: "
            "the learning rate never reaches its value; lower it, or train for longer"
        )
    if config.model.dtype in ("bfloat16", "float16") and not config.model.use_peft:
        warn(
            f"model.dtype={config.model.dtype} trains all weights in it, where small updates round to nothing; "
            "model.dtype=float32 precision=bf16 keeps them and computes as fast"
        )


def histogram(lengths: Numbers, bins: int = 40) -> str:
    """One line of bars from the shortest to the longest row."""
    low, high = int(lengths.min()), int(lengths.max())
    counts = np.histogram(lengths, bins=min(bins, high - low + 1), range=(low, high + 1))[0].tolist()
    tallest = max(counts)
    return "".join(_BARS[math.ceil(count / tallest * (len(_BARS) - 1))] for count in counts)


def _coloured(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], learned: Sequence[bool]) -> str:
    """The tokens; those that are learned in green and in brackets, which a file keeps as well."""
    pieces = []
    around = [False, *learned, False]
    for token, (before, carries, after) in zip(ids, zip(around, learned, around[2:], strict=False), strict=True):
        text = verbatim(tokenizer.decode([token])).replace("\n", "↵\n")
        framed = f"{'' if before else '⟦'}{text}{'' if after else '⟧'}"
        pieces.append(f"[black on green]{framed}[/]" if carries else f"[dim]{text}[/]")
    return "[dim]·[/]".join(pieces)


def show_example(config: Config, data: StageData, index: int = 0) -> None:
    """Print one row as the model sees it, its responses in green, each token set off."""
    row: JsonObject = data.train.dataset[index]
    tokenizer = data.encoder.tokenizer
    where = verbatim(data.train.examples([index])[0].where)
    sides = [name for name in ("chosen_ids", "rejected_ids") if row.get(name) is not None]
    if "spans" not in row and not sides:
        show_markup(f"\n[bold]{where}[/], as tokens; the policy goes on from its end\n")
        show_markup(_coloured(tokenizer, row["prompt_ids"], [False] * len(row["prompt_ids"])) + "\n")
        return
    learned_part = "the response" if STAGES[config.stage.name].is_classifier else "these carry loss"
    show_markup(f"\n[bold]{where}[/], as tokens; [black on green]⟦{learned_part}⟧[/]\n")
    if "spans" in row:
        learned = [label != IGNORED for label in labels_of(row["input_ids"], row["spans"])]
        show_markup(_coloured(tokenizer, row["input_ids"], learned) + "\n")
        return
    for side in sides:
        ids = row.get("prompt_ids", []) + row[side]
        prompt = row["prompt_length"] if "prompt_length" in row else len(row["prompt_ids"])
        coloured = _coloured(tokenizer, ids, [place >= prompt for place in range(len(ids))])
        show_markup(f"[bold]{side.removesuffix('_ids')}[/]\n{coloured}\n")


def _end_check(data: StageData, encoded: Encoded) -> str:
    rows = len(encoded.dataset)
    whole = rows - encoded.without_end
    return f"{data.encoder.end_of_turn} ends the response and carries loss in {whole} of {rows} rows"


def _doubled(encoded: Encoded, token: int | None) -> int:
    """How many rows begin with that token twice; of each no more than its first two tokens are read."""
    from pyarrow import compute

    names = ("input_ids", "prompt_ids", "chosen_ids")
    name = next(name for name in names if name in encoded.dataset.column_names)
    batches = encoded.dataset.select_columns(name).with_format("arrow").iter(10_000)
    return sum(ids == [token] * 2 for batch in batches for ids in compute.list_slice(batch[name], 0, 2).to_pylist())


def show_dry_run(config: Config, data: StageData, processes: int) -> None:
    """Data, one row, the tokens at its ends, and the plan."""
    train, tokenizer = data.train, data.encoder.tokenizer
    show_data(config, data)
    lengths = train.lengths
    low, high, middle = lengths.min(), lengths.max(), np.sort(lengths)[len(lengths) // 2]
    say(f"length in tokens: {low} {histogram(lengths)} {high}; half of the rows have at most {middle}")
    show_example(config, data)
    if train.loss_tokens:
        say(f"EOS: {_end_check(data, train)}")
    doubled = _doubled(train, tokenizer.bos_token_id)
    brought = f"{doubled} rows begin with two: the template and the data both bring one"
    say(f"BOS: {brought if doubled else 'no row begins with two'}")
    if config.trainer.get("packing"):
        say("packing: rows are packed when training starts; the steps below are those without packing")
    show_plan(config, data, processes, len(train.dataset), None)
