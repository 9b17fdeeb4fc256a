"""What a stage brings: its data made ready, its model, a trainer for it, and numbers of what it has learned."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.config.ptx import ptx_data
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES
from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import Encoding
from posttrain.data.hashes import Hashes, cache_of
from posttrain.data.prepared import Encoded, Prepared, is_whole, key_of, load, prepare
from posttrain.data.reading import Format, Work
from posttrain.data.sources import NOTHING_GIVEN, Given, Source, find_sources
from posttrain.data.splits import Counts, Example, Row
from posttrain.devices import on_each_machine, on_main_process
from posttrain.errors import ConfigError, DataError
from posttrain.models.generate import Completion
from posttrain.models.load import Load, load_causal_lm, max_positions
from posttrain.models.meta import Holdings
from posttrain.runs.folder import RunFolder
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.runs.safe_trainer import SafeTrainer


PANEL_SIZE = 128  # held-out prompts that a stage may have completed, and `posttrain evaluate`: the same ones
COMPLETION_TOKENS = 96  # of a completion that is shown, where the stage does not say


@dataclass(frozen=True)
class DataSources:
    """Where rows come from, found and hashed, and where they are kept once they are prepared."""

    sources: Sequence[Source]
    digests: dict[str, str]  # sources' names -> sha256
    hashes: Hashes
    cache: Path
    scratch: Path | None = None  # where they are made instead, if nothing may be written to the cache
    ptx: Sequence[Source] = ()  # those of data.ptx


def data_sources(config: Config, given: Given = NOTHING_GIVEN) -> DataSources:
    """The sources of a configuration, found and hashed.

    Raises:
        ConfigError, DataError: one is not there, or cannot be read.
    """
    cache = cache_of(config)
    hashes, found = Hashes(cache), find_sources(config.data, given)
    ptx = find_sources(ptx_data(config.data)) if config.data.ptx else []
    return DataSources(found, on_main_process(lambda: hashes.of_sources([*found, *ptx])), hashes, cache, ptx=ptx)


@dataclass
class StageData:
    """The rows of a stage, encoded; known before any model is loaded."""

    encoder: ChatEncoder
    prepared: Prepared
    train: Encoded
    test: Encoded | None  # of the rows held out no more than data.max_eval_rows
    named: dict[str, Encoded]  # the same of each set of data.eval
    room: int  # tokens that prompt and response together may have
    new_tokens: int  # the most tokens that a generated completion may have


@dataclass
class EvalResult:
    """What a model can do at one moment: numbers, and what else the stage wants to keep or show."""

    metrics: dict[str, float]
    completions: list[Completion] = field(default_factory=list)  # one for each row of the panel
    files: JsonObject = field(default_factory=dict)  # file name in the run folder -> JSON content
    table: list[tuple[str, ...]] = field(default_factory=list)  # rows of a table of its own
    # set of held-out prompts ("": the first) -> score -> of each prompt, which later evaluations are compared with
    scores: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext:
    """A run in progress, as its stage sees it."""

    config: Config
    data: StageData
    panel: Sequence[Example]  # held-out rows whose prompts are completed before and after
    panels: Mapping[str, Sequence[Example]]  # of an online stage the same of each set of data.eval
    base: str  # path of the weights that the stage started from
    folder: RunFolder

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The policy's or reward model's."""
        return self.data.encoder.tokenizer

    @property
    def new_tokens(self) -> int:
        """The most tokens that a completion may have."""
        return self.data.new_tokens


@dataclass
class StepPlan:
    """The derived numbers of a run, as transformers will count them."""

    unit: str
    accumulation: int
    batch: int  # units in one update, over all devices
    steps_per_epoch: int
    steps: int
    notes: tuple[str, ...] = ()


class Stage(NamedTuple):
    """One way to train; what is known about it without torch is in config/stages.py."""

    prepare: Callable[[Config, "PreTrainedTokenizerBase", DataSources], StageData]  # reads and checks, no model
    plan: Callable[[Config, int, int], StepPlan]  # of that many rows on that many processes
    hold: Callable[[Config, "PreTrainedTokenizerBase"], Holdings]  # what it keeps in memory
    load: Load
    build: Callable[[StageContext, "PreTrainedModel"], "SafeTrainer"]
    preflight: Callable[[StageContext, Any], None]  # refuses a start that cannot be right
    evaluate_model: Callable[[StageContext, Any], EvalResult]  # called before the first step and after the last


def stage_named(name: str) -> Stage:
    """The `STAGE` of the module of that name in this package.

    Raises:
        TypeError: the module defines none.
    """
    stage = vars(importlib.import_module(f"posttrain.stages.{name}")).get("STAGE")
    if not isinstance(stage, Stage):
        raise TypeError(f"posttrain/stages/{name}.py defines no STAGE")
    return stage


def load_policy(
    config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True
) -> "PreTrainedModel":
    """The causal language model of a stage that trains one."""
    return load_causal_lm(config.model, tokenizer, path, quantised)


def no_preflight(context: StageContext, trainer: object) -> None:
    """For a stage whose start needs no check beyond those of its data."""


def plan_steps(config: Config, rows: int, processes: int) -> StepPlan:
    """What follows from the configuration for `rows` rows (packed ones where rows are packed)."""
    stage, trainer = config.stage, config.trainer
    accumulation = int(trainer.get("gradient_accumulation_steps", 1))
    shares = rows / (stage.batch_size * processes)
    batches = math.floor(shares) if trainer.get("dataloader_drop_last") else math.ceil(shares)
    unit = f"packed {STAGES[stage.name].unit}" if trainer.get("packing") else STAGES[stage.name].unit
    per_epoch = max(math.ceil(batches / accumulation), 1)
    return step_plan(config, unit, accumulation, per_epoch, processes)


def step_plan(config: Config, unit: str, accumulation: int, per_epoch: int, processes: int, *notes: str) -> StepPlan:
    """With the steps of the whole run, which trainer.max_steps may set."""
    stage, max_steps = config.stage, int(config.trainer.get("max_steps", -1))
    steps = max_steps if max_steps > 0 else math.ceil(per_epoch * stage.num_epochs)
    return StepPlan(unit, accumulation, stage.batch_size * accumulation * processes, per_epoch, steps, notes)


def prepare_rows(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    sources: DataSources,
    format: Format[Row],
    encoding: Callable[[int, str], Encoding[Row]],
    new_tokens: int | None = None,
) -> StageData:
    """The rows of a format, encoded within stage.max_length, less what is kept free for a completion.

    They are made once, by one process, and read from the disk by all.

    Raises:
        DataError, ConfigError: rows cannot be used, and which; or none are left to train on.
    """
    room, data = check_length(config), config.data
    encoder = ChatEncoder(tokenizer, data.allow_special_tokens)
    encode = encoding(room - (new_tokens or 0), data.overlength)
    work = Work(data, format, sources.sources, encoder, encode)
    key = key_of(work, sources.digests)
    folder = sources.cache
    if sources.scratch is not None and not is_whole(folder / key, sources.hashes):
        folder = sources.scratch
    on_each_machine(lambda: prepare(work, folder, sources.hashes, key, sources.digests))
    made = load(work, folder, key)
    counts = made.counts["train"]
    if made.train is None:
        raise DataError(f"none of {counts.read:,} rows is left to train on: {counts.left_out}. {_remedy(counts, room)}")
    if sources.scratch is None:
        sources.hashes.save()
    if made.train.loss_tokens and made.train.without_end == len(made.train.dataset):
        raise DataError(
            "every response is cut before its end, so the model could not learn to stop; raise stage.max_length "
            "or set data.overlength=drop"
        )
    if made.train.loss_tokens and (end := encoder.end_of_text()[1]):
        made.notes.append(f"the chat template puts no end behind a response: {end} is put there, to be learned")
    if unread := [name for name in made.options if name not in str(tokenizer.chat_template)]:
        made.notes.append(f"the chat template reads no {', '.join(unread)} of the rows' chat_template_kwargs")
    if made.unlike_generation:
        made.notes.append(
            f"{made.unlike_generation:,} completions do not begin with the <think> that the generation prompt ends "
            "with: the model will generate otherwise than it is trained (data.chat_template_kwargs may turn it off)"
        )
    bounded = {}
    for name, whole in {**({"": made.test} if made.test is not None else {}), **made.named}.items():
        bounded[name] = whole.bounded(data.max_eval_rows)
        if (rows := len(bounded[name].dataset)) < len(whole.dataset):
            made.notes.append(
                f"held-out numbers{f' of {name}' if name else ''} rest on {rows:,} of the {len(whole.dataset):,} "
                "held-out rows (data.max_eval_rows)"
            )
    # where nothing else is held out, the first of the named sets is
    test = bounded.pop("", None) or next(iter(bounded.values()), None)
    shown = new_tokens or min(COMPLETION_TOKENS, max(room // 2, 1))
    return StageData(encoder, made, made.train, test, bounded, room, shown)


def _remedy(counts: Counts, room: int) -> str:
    """What to do about the reason that most rows are left out for."""
    remedies = {
        f"Raise stage.max_length={room}": counts.prompt_too_long + counts.too_long,
        "A tie has chosen and rejected the same: look at data.columns": counts.ties,
        "Lower data.min_margin": counts.low_margin,
    }
    most = max(remedies, key=lambda remedy: remedies[remedy])
    return most if remedies[most] else "Look at the rows and at what is held out of them (data.test_size)"


def check_length(config: Config) -> int:
    """stage.max_length, if the model has positions for it.

    Raises:
        ConfigError: it has not.
    """
    limit = max_positions(config.model)
    if limit is not None and config.stage.max_length > limit:
        raise ConfigError(
            f"stage.max_length={config.stage.max_length} exceeds the {limit} positions of "
            f"{config.model.start}; set stage.max_length={limit} or less"
        )
    return int(config.stage.max_length)
