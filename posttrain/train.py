"""One stage from data to manifest: prepare, load, train, evaluate, save, reload, and only then call it complete."""

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.entry import command_line
from posttrain.cli.launching import refuse_to_launch
from posttrain.config.check import to_dict
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, OnlineStage, other_models
from posttrain.config.suggest import nearest
from posttrain.console import is_main_process, logging_to_console, say, warn
from posttrain.data.hashes import cache_of
from posttrain.data.sources import EVAL, TRAIN, Given, check_given, is_local_data
from posttrain.data.template import keep_in_template
from posttrain.devices import forget_peak_memory, hardware, on_main_process, world_size
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics.catalogue import charts_with_gold_apart
from posttrain.metrics.charts import card_charts, curves, draw
from posttrain.metrics.trackers import log_tables
from posttrain.models.generate import Completion, panel
from posttrain.models.load import load_tokenizer, prepare_base
from posttrain.models.resolve import (
    Resolved,
    all_reward_functions,
    code_hashes,
    input_hashes,
    is_local_model,
    parent_of,
    resolve,
    weight_hashes,
)
from posttrain.models.saving import save_model
from posttrain.outcome import samples, show_result, tables
from posttrain.paths import EMBEDDED
from posttrain.planning.advice import show_advice, show_time
from posttrain.planning.machines import machine_of
from posttrain.planning.preview import show_data, show_dry_run, show_plan
from posttrain.rlhf.rewards import load_function
from posttrain.runs.arguments import with_the_same_updates
from posttrain.runs.checkpoint import MANIFEST as CHECKPOINT
from posttrain.runs.checkpoint import StopSignals, read_running, write_atomically
from posttrain.runs.early_stopping import early_stopping, has_lost_patience
from posttrain.runs.folder import RunFolder, State, first_begun, locked, read_lines, remove_if_empty, run_path, versions
from posttrain.runs.progress import show_progress
from posttrain.stages.base import (
    PANEL_SIZE,
    DataSources,
    EvalResult,
    Stage,
    StageContext,
    StageData,
    data_sources,
    stage_named,
)
from posttrain.values import JsonObject

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from posttrain.runs.safe_trainer import SafeTrainer

SEARCHED = 1000  # rows to train on among which they are looked for where none are held out


@dataclass
class Result:
    """What a finished stage left behind."""

    folder: Path
    model: Path
    metrics: dict[str, float]
    objective: float  # the metric that a sweep compares

    @property
    def history(self) -> "pandas.DataFrame":
        """What was logged, a row for each line of metrics.jsonl."""
        import pandas

        return pandas.DataFrame(read_lines(RunFolder(self.folder).metrics))

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The finished model and its tokenizer, as anyone would load them from `model`."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        manifest = RunFolder(self.folder).manifest()
        assert manifest is not None
        scores = STAGES[manifest["stage"]].is_classifier
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        return kind.from_pretrained(self.model), AutoTokenizer.from_pretrained(self.model)


@contextlib.contextmanager
def _network_only_where_needed(config: Config, has_rows: bool) -> Iterator[None]:
    """No telemetry ever, and no look at the Hub when model and data are here; what the user set stays."""
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if is_local_model(config.model) and (has_rows or is_local_data(config.data)):
        wanted["HF_HUB_OFFLINE"] = "1"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def run_stage(
    config: Config,
    path: Path | None = None,
    to_come: Collection[str] = (),
    *,
    train_dataset: "Dataset | None" = None,
    eval_dataset: "Dataset | None" = None,
    callbacks: "Sequence[TrainerCallback]" = (),
) -> Result | None:
    """Run the stage that `config` describes, in the folder `path` if it is given; None for a dry run.

    Rows of `train_dataset` and `eval_dataset`, in the stage's documented format, stand in for data.dataset_name;
    without `eval_dataset`, data.test_size holds some out. A dry run does without what the stages `to_come` will make.

    Raises:
        ConfigError, DataError: before any weight is loaded.
        Stopped: a signal came; the checkpoint is written.
        PosttrainError: the run failed, and why.
    """
    refuse_to_launch(config, "start this program with accelerate launch")
    folder = RunFolder(path or run_path(config))
    given = check_given({TRAIN: train_dataset, EVAL: eval_dataset})
    if given:
        held_out = EVAL if eval_dataset is not None else None
        data = replace(config.data, dataset_name=TRAIN, dataset_train_split=TRAIN, dataset_test_split=held_out)
        config = replace(config, data=data)
    try:
        with contextlib.ExitStack() as stack:
            resolved = resolve(config, to_come)
            stack.enter_context(_network_only_where_needed(resolved.config, bool(given)))
            open_log = stack.enter_context(logging_to_console(verbose=not config.dry_run))
            if config.dry_run:
                scratch = on_main_process(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
                _dry_run(resolved, given, Path(scratch))
                return None
            on_main_process(lambda: stack.enter_context(locked(folder.path)))
            stack.enter_context(leaving_no_trace(folder))
            return _run(resolved, folder, open_log, given, callbacks)
    finally:
        if is_main_process():
            remove_if_empty(folder.path)  # Hydra makes it before it is known whether a run begins


@contextlib.contextmanager
def leaving_no_trace(folder: RunFolder) -> Iterator[None]:
    """A command that fails before it trains, or samples, leaves the disk as it was."""
    untouched = not folder.path.is_dir() or not any(folder.path.iterdir())
    try:
        yield
    finally:
        if untouched and not folder.trains and is_main_process():
            shutil.rmtree(folder.path, ignore_errors=True)


def _dry_run(resolved: Resolved, given: Given, scratch: Path) -> None:
    """Everything that can be known without loading a model; rows that are not prepared yet are so in `scratch`."""
    config = resolved.config
    tokenizer, _ = load_tokenizer_of(resolved)
    sources = replace(data_sources(config, given), scratch=scratch)
    data = stage_named(config.stage.name).prepare(config, tokenizer, sources)
    show_dry_run(config, data, machine_of(config).devices)
    completion = config.stage.max_new_tokens if isinstance(config.stage, OnlineStage) else 0
    longest = config.stage.max_length if config.trainer.get("packing") else int(data.train.lengths.max()) + completion
    plan = show_advice(config, tokenizer, longest, completion)
    show_time(config, plan, len(data.train.dataset), data.train.tokens)
    say("dry run: nothing was trained or written")


def prepared(config: Config) -> StageData:
    """The rows of a stage, as a run has them; the configuration is a resolved one."""
    return stage_named(config.stage.name).prepare(config, _tokenizer(config)[0], data_sources(config))


def prepare_stage(config: Config) -> None:
    """Prepare the rows of a stage, and say what they are; what it starts from need not have finished.

    Raises:
        ConfigError, DataError: as `run_stage`.
    """
    resolved = resolve(config, STAGES)
    config = resolved.config
    with _network_only_where_needed(config, False), logging_to_console(verbose=True):
        tokenizer, _ = load_tokenizer_of(resolved)
        show_data(config, stage_named(config.stage.name).prepare(config, tokenizer, data_sources(config)))
        say(f"prepared: {cache_of(config)}")


def load_tokenizer_of(resolved: Resolved) -> tuple["PreTrainedTokenizerBase", datetime.datetime]:
    """The tokenizer with what is kept in its template, and when the run began; says what the stage starts from."""
    config = resolved.config
    chosen = config.model.start
    random = config.model.from_scratch or chosen == EMBEDDED
    say(f"model: {chosen} ({resolved.why}{', random weights' if random else ''})")
    before = next(iter(STAGES[config.stage.name].follows), None)
    if before is not None and before not in resolved.to_come and chosen == config.model.base_model:
        warn(
            f"stage={config.stage.name} expects a model from stage={before}, and "
            f"{config.output_dir}/{config.run_name}/{before} is not there: run stage={before} "
            f"run_name={config.run_name} first, or name one with model.model_name_or_path=…"
        )
    if (Path(chosen) / CHECKPOINT).is_file():
        warn(f"{chosen} is a checkpoint from inside a run, not the result of one; that is {Path(chosen).parent}")
    tokenizer, begun, notes = _tokenizer(config)
    for note in filter(None, notes):
        say(note)
    return tokenizer, begun


def _tokenizer(config: Config) -> tuple["PreTrainedTokenizerBase", datetime.datetime, list[str]]:
    tokenizer, notes = load_tokenizer(config.model)
    run = Path(config.output_dir) / config.run_name
    begun = on_main_process(lambda: first_begun(run))
    return tokenizer, begun, [*notes, keep_in_template(tokenizer, begun, config.data.chat_template_kwargs)]


def identity_of(
    resolved: Resolved, sources: DataSources, tokenizer: "PreTrainedTokenizerBase", begun: datetime.datetime
) -> JsonObject:
    config = resolved.config
    return {
        "config": to_dict(config),
        "data": {"sources": list(sources.digests.values())},
        **{name: input_hashes(folder) for name, folder in resolved.folders.items()},
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "code": _code(config),
        "begun": begun.isoformat(),
        "processes": world_size(),
        "versions": versions(),
    }


def _code(config: Config) -> dict[str, str]:
    functions = all_reward_functions(config)
    try:
        return code_hashes(functions)
    except (OSError, ImportError, ValueError):
        for spec in functions:
            load_function("stage.reward_functions or stage.eval_reward_functions", spec)  # says what is wrong with it
        raise


def _run(
    resolved: Resolved,
    folder: RunFolder,
    open_log: Callable[[Path], None],
    given: Given,
    callbacks: "Sequence[TrainerCallback]",
) -> Result:
    config = resolved.config
    stage, spec = stage_named(config.stage.name), STAGES[config.stage.name]
    # 1. see what is in the folder already, and only then prepare the data
    resolved.keep_out_of(folder.path)
    tokenizer, begun = load_tokenizer_of(resolved)
    sources = data_sources(config, given)
    identity = identity_of(resolved, sources, tokenizer, begun)
    state = on_main_process(lambda: folder.look(identity, config.overwrite, config.move_aside))
    if state == "complete":
        manifest = folder.manifest()
        assert manifest is not None
        say(f"already complete: {folder.path}, and nothing has changed (finished {manifest['finished']})")
        return _result(folder, manifest["metrics"], spec.objective)
    began_on = on_main_process(folder.began_on) if state == "interrupted" else None
    if began_on is not None:
        identity["processes"] = began_on
        config = with_the_same_updates(config, began_on)
    data = stage.prepare(config, tokenizer, sources)
    checkpoint = on_main_process(lambda: _begin(folder, identity, state))
    open_log(folder.log)
    show_data(config, data)

    # 2. load, and prove that the start is right
    base = prepare_base(config.model, tokenizer, folder.base)
    some = range(min(SEARCHED, len(data.train.dataset)))
    rows = data.test.rows if data.test else data.train.examples(some)
    shown = panel(rows, data.encoder, PANEL_SIZE, data.room - data.new_tokens)
    panels = {
        name: panel(part.rows, data.encoder, PANEL_SIZE, data.room - data.new_tokens)
        for name, part in (data.named.items() if spec.is_online else ())
    }
    context = StageContext(config, data, shown, panels, base, folder)
    trainer = stage.build(context, stage.load(config, tokenizer, base))
    show_progress(trainer, folder.metrics, checkpoint)
    for callback in (*early_stopping(config), *callbacks):
        trainer.add_callback(callback)
    check_start(resolved, identity)
    folder.trains = True
    parameters = list(trainer.model.parameters())
    counts = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    show_plan(config, data, world_size(), len(trainer.train_dataset), counts)
    say(f"device: {trainer.args.device}, precision: {trainer.accelerator.mixed_precision.replace('no', 'fp32')}")
    start = partial(_judge_start, stage, context, trainer, checkpoint)
    if trainer.shards:  # checked and judged as it is trained
        trainer.when_prepared = start
    else:
        start()

    # 3. train
    forget_peak_memory()
    tokens_per_second = _train(trainer, checkpoint)
    device, peak = hardware()
    cost = {"device": device, "peak_memory": peak, "seconds": trainer.seconds, "epochs": trainer.state.epoch}
    cost["tokens"] = trainer.state.num_input_tokens_seen
    assert trainer.before is not None
    before = EvalResult(trainer.before["metrics"], [Completion(*each) for each in trainer.before["completions"]])

    # 4. evaluate, save, and only then call it finished
    say("training is done; evaluating and saving")
    after = _evaluate(stage, context, trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        **({"train_loss": losses[-1]} if losses else {}),
        **{f"{name}_before": value for name, value in before.metrics.items() if not math.isnan(value)},
        **{name: value for name, value in after.metrics.items() if not math.isnan(value)},
        "tokens_per_second": tokens_per_second,
        "trained_tokens": trainer.trained_tokens or round(data.train.loss_tokens * trainer.state.epoch),
        "steps": trainer.state.global_step,
        "eval_rows": 0 if data.test is None else len(shown) if spec.is_online else len(data.test.dataset),
        **{
            f"eval_{name}_rows": len(panels[name]) if spec.is_online else len(part.dataset)
            for name, part in data.named.items()
        },
    }
    save_model(config, folder, trainer, tokenizer, base, stage.load)
    if is_main_process():
        for name, content in {**after.files, **samples(shown, before, after)}.items():
            write_atomically(folder.path / name, json.dumps(content, indent=1, ensure_ascii=False))
        if spec.is_online:
            groups = charts_with_gold_apart(spec.charts, metrics)
            charts = list(curves(groups, folder.metrics, list(config.data.eval)))
            if charts:
                write_atomically(folder.curves, draw(charts))
        card = after.files.get("report_card.json")
        drawn = list(card_charts(card["reliability"], card["scores"], card["by_length"])) if card else []
        log_tables(trainer, tables(shown, before, after), drawn)
        folder.finish(manifest_of(resolved, sources, data, identity, metrics) | {"cost": cost})
    trainer.accelerator.wait_for_everyone()
    show_result(config, folder, metrics, shown, before, after)
    return _result(folder, metrics, spec.objective)


def _evaluate(stage: Stage, context: StageContext, trainer: "SafeTrainer") -> EvalResult:
    """What the model can do now, and its numbers on each set of data.eval."""
    result = stage.evaluate_model(context, trainer)
    if context.data.named:
        named = tuple(f"eval_{name}_" for name in context.data.named)
        found = {name: value for name, value in trainer.evaluate().items() if name.startswith(named)}
        result.metrics = found | result.metrics
    return result


def _judge_start(stage: Stage, context: StageContext, trainer: "SafeTrainer", checkpoint: Path | None) -> None:
    """Check the start, and keep what the model can do before the first step; a checkpoint has it already."""
    if checkpoint is None or not trainer.shards:  # weights that are shared out are those of the checkpoint
        stage.preflight(context, trainer)
    kept = read_running(checkpoint, trainer.accelerator.process_index).get("before") if checkpoint else None
    if kept is None:
        result = _evaluate(stage, context, trainer)
        kept = {"metrics": result.metrics, "completions": result.completions, "scores": result.scores}
        if trainer.args.load_best_model_at_end and context.data.test is not None:
            _check_best(str(trainer.args.metric_for_best_model), trainer.evaluate())
    trainer.before = kept


def _check_best(wanted: str, found: Mapping[str, float]) -> None:
    """The number that says which checkpoint is the best is there.

    Raises:
        ConfigError: it is not; transformers would say so at the first checkpoint.
    """
    if f"eval_{wanted.removeprefix('eval_')}" not in found:
        raise ConfigError(
            f"trainer.metric_for_best_model={wanted} is none of the held-out numbers{nearest(wanted, found)}; they are "
            f"{', '.join(found)}"
        )


def _begin(folder: RunFolder, identity: JsonObject, state: State) -> Path | None:
    """Write down what the run is, and make room for it; returns the checkpoint to go on from."""
    folder.make_room()
    checkpoint, faults = folder.checkpoint() if state == "interrupted" else (None, [])
    for fault in faults:
        warn(fault)
    folder.begin(identity, checkpoint)
    if others := folder.others():
        say(f"{folder.path} also holds {', '.join(others[:5])}, which no run wrote; left as it is")
    return checkpoint


def check_start(resolved: Resolved, identity: JsonObject) -> None:
    """What has been loaded is what was hashed: another command may have replaced it meanwhile.

    Raises:
        PosttrainError: it is not.
    """
    for name, folder in resolved.folders.items():
        if weight_hashes(folder) != identity[name]:
            raise PosttrainError(f"{folder} has changed while this stage loaded it; start the same command again")


def _train(trainer: "SafeTrainer", checkpoint: Path | None) -> float:
    """Train to the end, from the checkpoint if there is one; returns tokens per second.

    Raises:
        Stopped: a signal came; the checkpoint is written.
    """
    if checkpoint is not None:
        from transformers import TrainerState

        reached = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        say(f"resuming from {checkpoint.name}")
        if reached.global_step >= reached.max_steps or has_lost_patience(reached):
            trainer.finish(checkpoint)
            _tell_best(trainer)
            return 0.0
    with StopSignals(Path(trainer.args.output_dir)) as signals:
        trainer.stop_signals = signals
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    signals.raise_if_received(
        f"at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is written, "
        "and the same command goes on from it"
    )
    _tell_best(trainer)
    tokens = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    return float(tokens / (time.monotonic() - trainer.began))


def _tell_best(trainer: "SafeTrainer") -> None:
    if trainer.args.load_best_model_at_end:
        best, name = Path(trainer.state.best_model_checkpoint).name, trainer.args.metric_for_best_model
        if trainer.state.global_step < trainer.state.max_steps:
            say(f"ended early, at step {trainer.state.global_step} of {trainer.state.max_steps}: no better {name} came")
        say(f"the result is the best checkpoint: {best}, {name} {trainer.state.best_metric:.4g}")


def _result(folder: RunFolder, metrics: dict[str, float], objective: str) -> Result:
    return Result(folder.path, folder.model, metrics, metrics.get(objective, math.nan))


def manifest_of(
    resolved: Resolved, sources: DataSources, data: StageData, identity: JsonObject, metrics: JsonObject
) -> JsonObject:
    import torch

    config = resolved.config
    names = {"model": config.model.start, **other_models(config.stage)}
    parents = {name: parent_of(folder) for name, folder in resolved.folders.items()}
    return {
        "format": 1,
        "stage": config.stage.name,
        "run_name": config.run_name,
        "command": command_line(),
        **identity,
        "inputs": {
            name: {"path": names[name], "stage": parent["stage"] if parent else None, "weights": identity[name]}
            for name, parent in parents.items()
        },
        "data": {
            "sources": sources.digests,
            "counts": {name: asdict(counts) for name, counts in data.prepared.counts.items()},
            "rows_of": data.prepared.rows_of,
            "notes": data.prepared.notes,
            "fingerprint": data.prepared.fingerprint,
        },
        "metrics": metrics,
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
