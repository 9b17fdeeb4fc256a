"""One stage from data to manifest: prepare, load, train, judge, save, prove, and only then call it complete."""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.cli.entry import command_line
from posttrain.cli.next_steps import next_commands, quoted, relative
from posttrain.config.check import to_dict
from posttrain.config.schema import Config, PPOStage
from posttrain.console import is_main_process, logging_to_console, number, say, show_table, warn
from posttrain.data.sources import is_local_data
from posttrain.devices import on_main_process
from posttrain.errors import PosttrainError
from posttrain.metrics.comparison import shown_apart
from posttrain.metrics.trackers import Cells, log_tables
from posttrain.models.generate import panel
from posttrain.models.load import load_tokenizer, prepare_base
from posttrain.models.resolve import (
    all_reward_functions,
    code_hashes,
    input_folders,
    input_hashes,
    is_local_model,
    parent_of,
    weight_hashes,
    with_inputs,
)
from posttrain.models.saving import save_model
from posttrain.paths import EMBEDDED
from posttrain.planning.memory import show_memory
from posttrain.planning.preview import show_data, show_dry_run, show_plan
from posttrain.runs.checkpoint import MANIFEST as CHECKPOINT
from posttrain.runs.checkpoint import StopSignals, write_atomically
from posttrain.runs.folder import RunFolder, State, locked, remove_if_empty, run_path, versions
from posttrain.runs.progress import show_progress
from posttrain.stages import STAGES
from posttrain.stages.base import Judgement, Prepared, Work

PANEL_SIZE = 64  # held-out prompts that a stage may have answered
PANEL_SHOWN = 3


@dataclass
class Result:
    """What a finished stage left behind."""

    folder: Path
    model: Path
    metrics: dict[str, float]
    objective: float


@contextlib.contextmanager
def _network_only_where_needed(config: Config, to_come: Collection[str]) -> Iterator[None]:
    """No telemetry ever, and no look at the Hub when model and data are here; what the user set stays."""
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    resolved, _ = with_inputs(config, to_come)
    if is_local_model(resolved.model) and is_local_data(resolved.data):
        wanted["HF_HUB_OFFLINE"] = "1"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def run_stage(config: Config, path: Path | None = None, to_come: Collection[str] = ()) -> Result | None:
    """Run the stage that `config` describes, in the folder `path` if it is given; None for a dry run.

    A dry run does without what the stages `to_come` will make.

    Raises:
        ConfigError, DataError: before any weight is loaded.
        Stopped: a signal came; the checkpoint is written.
        PosttrainError: the run failed, and why.
    """
    folder = RunFolder(path or run_path(config))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_network_only_where_needed(config, to_come))
            open_log = stack.enter_context(logging_to_console(verbose=not config.dry_run))
            if config.dry_run:
                _dry_run(config, to_come)
                return None
            on_main_process(lambda: stack.enter_context(locked(folder.path)))
            stack.enter_context(_leaving_no_trace(folder))
            return _run(config, folder, open_log)
    finally:
        if is_main_process():
            remove_if_empty(folder.path)  # Hydra makes it before it is known whether a run begins


@contextlib.contextmanager
def _leaving_no_trace(folder: RunFolder) -> Iterator[None]:
    """A command that fails before it trains leaves the disk as it was."""
    untouched = not folder.path.is_dir() or not any(folder.path.iterdir())
    try:
        yield
    finally:
        if untouched and not folder.trains and is_main_process():
            shutil.rmtree(folder.path, ignore_errors=True)


def _dry_run(config: Config, to_come: Collection[str]) -> None:
    """Everything that can be known without loading a model."""
    config, why = with_inputs(config, to_come)
    tokenizer, prepared = _prepare(config, why, "sft" not in to_come)
    show_dry_run(config, prepared, _processes())
    answer = config.stage.max_new_tokens if isinstance(config.stage, PPOStage) else 0
    longest = config.stage.max_length if config.trainer.get("packing") else max(prepared.train.lengths) + answer
    show_memory(config, tokenizer, longest, answer, _processes())
    say("dry run: nothing was trained or written")


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _prepare(config: Config, why: str, expects_sft: bool = True) -> tuple[Any, Prepared]:
    chosen = config.model.start
    random = config.model.from_scratch or chosen == EMBEDDED
    say(f"model: {chosen} ({why}{', random weights' if random else ''})")
    if expects_sft and config.stage.name != "sft" and chosen == config.model.base_model:
        warn(
            f"stage={config.stage.name} expects an SFT model, and {config.output_dir}/{config.run_name}/sft is not "
            f"there: run stage=sft run_name={config.run_name} first, or name one with model.model_name_or_path=…"
        )
    if (Path(chosen) / CHECKPOINT).is_file():
        warn(f"{chosen} is a checkpoint from inside a run, not the result of one; that is {Path(chosen).parent}")
    tokenizer, notes = load_tokenizer(config.model)
    for note in notes:
        say(note)
    return tokenizer, STAGES[config.stage.name].prepare(config, tokenizer)


def _identity(config: Config, prepared: Prepared) -> dict[str, Any]:
    return {
        "config": to_dict(config),
        "data": {"fingerprint": prepared.splits.fingerprint()},
        **{name: input_hashes(folder) for name, folder in input_folders(config).items()},
        "chat_template": hashlib.sha256(str(prepared.encoder.tokenizer.chat_template).encode()).hexdigest(),
        "code": code_hashes(all_reward_functions(config)),
        "processes": _processes(),
        "versions": versions(),
    }


def _run(config: Config, folder: RunFolder, open_log: Callable[[Path], None]) -> Result:
    config, why = with_inputs(config)
    stage = STAGES[config.stage.name]
    tokenizer, prepared = _prepare(config, why)
    identity = _identity(config, prepared)
    state = on_main_process(lambda: folder.claim(identity, config.overwrite, config.move_aside))
    if state == "complete":
        manifest = folder.manifest()
        assert manifest is not None
        say(f"already complete: {folder.path}, and nothing has changed (finished {manifest['finished']})")
        return _result(folder, manifest["metrics"], stage.objective)
    checkpoint = on_main_process(lambda: _begin(folder, identity, state))
    open_log(folder.log)
    show_data(config, prepared)

    base = prepare_base(config.model, tokenizer, folder.base)
    loaded = stage.load(config, tokenizer, base)
    trainer = stage.build(config, prepared, loaded, tokenizer, folder.path)
    show_progress(trainer, folder.metrics, checkpoint)
    _check_start(config, identity)
    folder.trains = True
    parameters = list(trainer.model.parameters())
    counts = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    show_plan(config, prepared, _processes(), len(trainer.train_dataset), counts)
    say(f"device: {trainer.args.device}, precision: {trainer.accelerator.mixed_precision.replace('no', 'fp32')}")

    rows = prepared.test.rows if prepared.test else prepared.train.rows
    shown = panel(rows, prepared.encoder, PANEL_SIZE, prepared.room - prepared.new_tokens)
    work = Work(config, prepared, trainer, shown, base, folder)
    stage.preflight(work)
    before = stage.judge(work)

    tokens_per_second = _train(trainer, checkpoint)

    say("training is done; evaluating and saving")
    after = stage.judge(work)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        **({"train_loss": losses[-1]} if losses else {}),
        **{f"{name}_before": value for name, value in before.metrics.items() if not math.isnan(value)},
        **{name: value for name, value in after.metrics.items() if not math.isnan(value)},
        "tokens_per_second": tokens_per_second,
        "trained_tokens": trainer.trained_tokens or round(prepared.train.loss_tokens * trainer.state.epoch),
        "steps": trainer.state.global_step,
    }
    save_model(config, folder, trainer, tokenizer, base, stage.load)
    if is_main_process():
        for name, content in {**after.files, **_samples(shown, before, after)}.items():
            write_atomically(folder.path / name, json.dumps(content, indent=1, ensure_ascii=False))
        if stage.draw is not None:
            stage.draw(folder)
        log_tables(trainer, _tables(shown, before, after))
        folder.finish(_manifest(config, prepared, identity, metrics))
    trainer.accelerator.wait_for_everyone()
    _show_result(config, folder, metrics, shown, before, after)
    return _result(folder, metrics, stage.objective)


def _begin(folder: RunFolder, identity: dict[str, Any], state: State) -> Path | None:
    """Write down what the run is; returns the checkpoint to go on from."""
    checkpoint, faults = folder.checkpoint() if state == "interrupted" else (None, [])
    for fault in faults:
        warn(fault)
    folder.begin(identity, checkpoint)
    if others := folder.others():
        say(f"{folder.path} also holds {', '.join(others[:5])}, which no run wrote; left as it is")
    return checkpoint


def _check_start(config: Config, identity: dict[str, Any]) -> None:
    """What has been loaded is what was hashed: another command may have replaced it meanwhile.

    Raises:
        PosttrainError: it is not.
    """
    for name, folder in input_folders(config).items():
        if weight_hashes(folder) != identity[name]:
            raise PosttrainError(f"{folder} has changed while this stage loaded it; start the same command again")


def _train(trainer: Any, checkpoint: Path | None) -> float:
    """Train to the end, from the checkpoint if there is one; returns tokens per second.

    Raises:
        Stopped: a signal came; the checkpoint is written.
    """
    if checkpoint is not None:
        from transformers import TrainerState

        reached = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        say(f"resuming from {checkpoint.name}")
        if reached.global_step >= reached.max_steps:
            trainer.finish(checkpoint)
            _tell_best(trainer)
            return 0.0
    started = time.monotonic()
    with StopSignals(Path(trainer.args.output_dir)) as signals:
        trainer.stop_signals = signals
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    signals.raise_if_received(
        f"at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is written, "
        "and the same command goes on from it"
    )
    _tell_best(trainer)
    tokens = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    return float(tokens / (time.monotonic() - started))


def _tell_best(trainer: Any) -> None:
    if trainer.args.load_best_model_at_end:
        best, name = Path(trainer.state.best_model_checkpoint).name, trainer.args.metric_for_best_model
        say(f"the result is the best checkpoint: {best}, {name} {trainer.state.best_metric:.4g}")


def _samples(shown: list[Any], before: Judgement, after: Judgement) -> dict[str, Any]:
    """The prompt panel as samples.json."""
    return (
        {
            "samples.json": [
                {"prompt": row.prompt, "reference": row.reference, "before": old._asdict(), "after": new._asdict()}
                for row, old, new in zip(shown, before.answers, after.answers, strict=False)
            ]
        }
        if after.answers
        else {}
    )


def _tables(shown: list[Any], before: Judgement, after: Judgement) -> dict[str, Cells]:
    answered = zip(shown, before.answers, after.answers, strict=False)
    samples = [(row.prompt[-1]["content"], old.text, new.text) for row, old, new in answered]
    return {
        "samples": Cells(("prompt", "before", "after"), samples),
        "report card": Cells(("", "value"), after.table),
    }


def _result(folder: RunFolder, metrics: dict[str, float], objective: str) -> Result:
    return Result(folder.path, folder.model, metrics, metrics.get(objective, math.nan))


def _manifest(config: Config, prepared: Prepared, identity: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    import torch

    names = {"model": config.model.start}
    if isinstance(config.stage, PPOStage):
        names["reward_model"] = str(config.stage.reward_model)
    parents = {name: parent_of(folder) for name, folder in input_folders(config).items()}
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
            "sources": prepared.splits.sources,
            "counts": {name: asdict(counts) for name, counts in prepared.splits.counts.items()},
            "notes": prepared.splits.notes,
            **identity["data"],
        },
        "metrics": metrics,
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _show_result(
    config: Config, folder: RunFolder, metrics: dict[str, Any], shown: list[Any], before: Judgement, after: Judgement
) -> None:
    rows: list[tuple[str, ...]] = []
    for name, label in shown_apart(STAGES[config.stage.name].shown, after.metrics).items():
        values = [number(name, judgement.metrics.get(name)) for judgement in (before, after)]
        if any(values):
            rows.append((label, *values))
    show_table(f"{config.stage.name}: before and after", ("", "before", "after"), rows)
    answered = list(zip(shown, before.answers, after.answers, strict=False))
    samples = [(row.prompt[-1]["content"], old.text, new.text) for row, old, new in answered[:PANEL_SHOWN]]
    if samples:
        cells = [tuple(map(_short, each)) for each in samples]
        show_table("sample completions", ("prompt", "before", "after"), cells)
    if after.table:
        show_table("report card", ("", ""), after.table, headed=False)
    more = [
        ("tokens per second", f"{metrics['tokens_per_second']:,.0f}"),
        ("trained tokens", f"{metrics['trained_tokens']:,} of responses, in {metrics['steps']:,} steps"),
        ("model", relative(folder.model)),
    ]
    show_table("result", ("", ""), more, headed=False)
    if answered:
        say(f"try it:\n  posttrain chat {quoted(relative(folder.path))}")
    following = next_commands(config, folder.path)
    if following:
        title = (
            "next, with a file of yours" if any("data.dataset_name=" in command for command in following) else "next"
        )
        say("\n  ".join([f"{title}:", *following]))


def _short(text: str, limit: int = 100) -> str:
    if not text.strip():
        return "(nothing)" if not text else "(whitespace only)"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
