"""One stage from data to manifest: prepare, load, train, judge, save, prove, and only then call it complete."""

import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain import data, lineage, model
from posttrain.checkpoint import StopSignals
from posttrain.config import Config, to_dict
from posttrain.console import is_main_process, logging_to, say, show_table, warn
from posttrain.errors import PosttrainError
from posttrain.evaluation import Answer, answer, panel
from posttrain.lineage import RunFolder
from posttrain.model import load_causal_lm, load_tokenizer, prepare_base, source
from posttrain.preview import show_data, show_dry_run, show_plan
from posttrain.stages import STAGES
from posttrain.stages.base import Prepared

PANEL_SIZE = 16  # prompts answered before and after
PANEL_SHOWN = 3
ANSWER_TOKENS = 96
# A reloaded model must give the logits that it gave before saving, up to float32 rounding of a merge.
RELOAD_TOLERANCE = 1e-3


@dataclass
class Result:
    """What a finished stage left behind."""

    folder: Path
    model: Path
    metrics: dict[str, float]
    objective: float


@contextlib.contextmanager
def _network_only_where_needed(config: Config) -> Iterator[None]:
    """No telemetry ever, and no look at the Hub when model and data are here; what the user set stays."""
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if model.is_local(config.model) and data.is_local(config.data):
        wanted["HF_HUB_OFFLINE"] = "1"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def run_stage(config: Config, path: Path) -> Result | None:
    """Run the stage that `config` describes in the folder `path`; None for a dry run.

    Raises:
        ConfigError, DataError: before any weight is loaded.
        Stopped: a signal came; the checkpoint is written.
        PosttrainError: the run failed, and why.
    """
    untouched = not path.is_dir() or not any(path.iterdir())
    with _network_only_where_needed(config):
        try:
            if config.dry_run:
                with logging_to(None):
                    _, prepared = _prepare(config)
                    show_dry_run(config, prepared, _processes())
                return None
            folder = RunFolder(path)
            with folder.lock() if is_main_process() else contextlib.nullcontext(), logging_to(folder.log):
                return _run(config, folder)
        finally:
            if untouched and is_main_process() and not (path / lineage.IDENTITY).exists():
                _remove(path)  # a command that did not begin a run leaves the disk as it was


def _remove(path: Path) -> None:
    """Delete a folder that this command made, and those above it that it leaves empty."""
    shutil.rmtree(path, ignore_errors=True)
    for parent in path.parents[:2]:
        with contextlib.suppress(OSError):  # not empty: something else lives there
            parent.rmdir()


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _prepare(config: Config) -> tuple[Any, Prepared]:
    say(f"model: {config.model.model_name_or_path}" + (" (random weights)" if _is_random(config) else ""))
    tokenizer, notes = load_tokenizer(config.model)
    for note in notes:
        say(note)
    return tokenizer, STAGES[config.stage.name].prepare(config, tokenizer)


def _is_random(config: Config) -> bool:
    return config.model.from_scratch or config.model.model_name_or_path == "posttrain/tiny"


def _identity(config: Config, prepared: Prepared) -> dict[str, Any]:
    model_folder = Path(source(config.model))
    return {
        "config": to_dict(config),
        "data": {"fingerprint": prepared.splits.fingerprint()},
        "model": lineage.weight_hashes(model_folder) if model_folder.is_dir() else {},
        "processes": _processes(),
        "versions": lineage.versions(),
    }


def _run(config: Config, folder: RunFolder) -> Result:
    stage = STAGES[config.stage.name]
    if config.overwrite and is_main_process():
        folder.clear()
    tokenizer, prepared = _prepare(config)
    identity = _identity(config, prepared)
    state = folder.state(identity)
    if state == "complete":
        manifest = folder.manifest()
        assert manifest is not None
        say(f"already complete: {folder.path} (finished {manifest['finished']}); overwrite=true trains it anew")
        return _result(folder, manifest["metrics"], stage.objective)
    checkpoint, faults = folder.checkpoint() if state == "interrupted" else (None, [])
    for fault in faults:
        warn(fault)
    show_data(prepared, config.stage.max_length)

    base = prepare_base(config.model, tokenizer, folder.base)
    loaded = load_causal_lm(config.model, tokenizer, base)
    trainer = stage.build(config, prepared, loaded, tokenizer, folder.path)
    trainer.remove_callback(_printing_progress())
    trainer.add_callback(_progress(folder))
    if is_main_process():
        folder.begin(identity)
    parameters = list(trainer.model.parameters())
    counts = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    show_plan(config, prepared, _processes(), len(trainer.train_dataset), counts)
    say(f"device: {trainer.args.device}, precision: {trainer.accelerator.mixed_precision.replace('no', 'fp32')}")

    room = min(prepared.positions or sys.maxsize, config.stage.max_length)
    new_tokens = min(ANSWER_TOKENS, max(room // 2, 1))
    rows = prepared.test.rows if prepared.test else prepared.train.rows
    shown = panel(rows, prepared.encoder, PANEL_SIZE, room - new_tokens)
    before_loss = trainer.evaluate().get("eval_loss") if prepared.test else None
    before = answer(trainer.accelerator.unwrap_model(trainer.model), prepared.encoder, shown, new_tokens)

    started = time.monotonic()
    with StopSignals() as signals:
        trainer.stop_signals = signals
        if checkpoint is not None:
            say(f"resuming from {checkpoint.name}")
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    signals.raise_if_received(
        f"at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is written, "
        "and the same command goes on from it"
    )
    seconds = time.monotonic() - started

    say("training is done; judging and saving")
    metrics = {"train_loss": output.training_loss}
    if prepared.test:
        metrics |= {"eval_loss_before": before_loss, "eval_loss": trainer.evaluate()["eval_loss"]}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = answer(trained, prepared.encoder, shown, new_tokens)
    tokens = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    metrics |= {
        "tokens_per_second": tokens / seconds,
        "trained_tokens": round(prepared.train.loss_tokens * trainer.state.epoch),
        "steps": trainer.state.global_step,
        "ended_by_eos_before": _share_ended(before),
        "ended_by_eos": _share_ended(after),
    }
    probe = trainer.train_dataset[0]["input_ids"][:64]
    _save(config, folder, trainer, tokenizer, base, probe)
    if is_main_process():
        samples = [
            {
                "prompt": row.prompt,
                "reference": row.messages[-1]["content"],
                "before": old._asdict(),
                "after": new._asdict(),
            }
            for row, old, new in zip(shown, before, after, strict=True)
        ]
        folder.samples.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")
        folder.finish(_manifest(config, prepared, identity, metrics))
    trainer.accelerator.wait_for_everyone()
    _show_result(config, prepared, folder, metrics, list(zip(shown, before, after, strict=True)))
    return _result(folder, metrics, stage.objective)


def _result(folder: RunFolder, metrics: dict[str, float], objective: str) -> Result:
    return Result(folder.path, folder.model, metrics, metrics.get(objective, math.nan))


def _share_ended(answers: list[Answer]) -> float:
    return sum(reply.ended for reply in answers) / len(answers) if answers else math.nan


def _printing_progress() -> Any:
    from transformers.trainer_callback import ProgressCallback

    return ProgressCallback


def _progress(folder: RunFolder) -> Any:
    """A progress bar that shows loss and learning rate, and metrics.jsonl with a line per log entry."""
    from transformers.trainer_callback import ProgressCallback

    class Progress(ProgressCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            """No second bar for an evaluation."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not logs:
                return
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            with folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
            shown = {name: f"{numbers[name]:.3g}" for name in ("loss", "eval_loss", "learning_rate") if name in numbers}
            if self.training_bar is not None and shown:
                self.last_shown = {**getattr(self, "last_shown", {}), **shown}
                self.training_bar.set_postfix(self.last_shown)

    return Progress()


def _save(config: Config, folder: RunFolder, trainer: Any, tokenizer: Any, base: str, probe: list[int]) -> None:
    """Write model/ (and adapter/), load it again as the next stage will, and compare its logits.

    Raises:
        PosttrainError: the saved model does not give the logits of the trained one.
    """
    import torch
    from accelerate.utils import is_peft_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    quantised = config.model.load_in_4bit or config.model.load_in_8bit
    # without the mixed-precision wrapper: weights are compared, not roundings
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trained.eval()
    ids = torch.tensor([probe], device=trained.device)
    with torch.no_grad():
        expected = trained(input_ids=ids).logits.float().cpu()
    if is_peft_model(trained):
        trainer.save_model(str(folder.adapter))
        if is_main_process():
            fresh = load_causal_lm(config.model, tokenizer, base, quantised=False)
            generation = fresh.generation_config
            merged = PeftModel.from_pretrained(fresh, str(folder.adapter)).merge_and_unload()
            merged.generation_config = generation
            merged.save_pretrained(folder.model)
            tokenizer.save_pretrained(folder.model)
    else:
        trainer.save_model(str(folder.model))
    trainer.accelerator.wait_for_everyone()
    if not is_main_process():
        return
    saved = AutoModelForCausalLM.from_pretrained(folder.model, dtype=config.model.dtype)
    saved.eval()
    with torch.no_grad():
        actual = saved(input_ids=ids.cpu()).logits.float()
    scale = max(float(expected.abs().max()), 1.0)
    difference = float((actual - expected).abs().max()) / scale
    exact = config.model.dtype == "float32" and not quantised
    say(f"saved model: logits within {difference:.1e} of the trained model's")
    if not math.isfinite(difference) or (exact and difference > RELOAD_TOLERANCE):
        raise PosttrainError(
            f"{folder.model} gives other logits than the model that was trained (relative difference {difference:.1e}, "
            f"at most {RELOAD_TOLERANCE:.0e} is rounding); the checkpoint in {folder.path} is whole"
        )


def _manifest(config: Config, prepared: Prepared, identity: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    import torch

    model_folder = Path(source(config.model))
    parent = lineage.parent_of(model_folder)
    return {
        "format": 1,
        "stage": config.stage.name,
        "run_name": config.run_name,
        "command": sys.argv[1:],
        **identity,
        "inputs": {
            "model": {
                "path": config.model.model_name_or_path,
                "stage": parent["stage"] if parent else None,
                "weights": identity["model"],
            }
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
    config: Config,
    prepared: Prepared,
    folder: RunFolder,
    metrics: dict[str, Any],
    answers: list[tuple[Any, Answer, Answer]],
) -> None:
    rows = []
    if prepared.test:
        rows.append(("held-out loss (per token)", f"{metrics['eval_loss_before']:.4f}", f"{metrics['eval_loss']:.4f}"))
    ended = f"{len(answers)} answers ended by the model itself"
    rows.append((ended, f"{metrics['ended_by_eos_before']:.0%}", f"{metrics['ended_by_eos']:.0%}"))
    for row, old, new in answers[:PANEL_SHOWN]:
        question = row.prompt[-1]["content"]
        rows.append((_short(question), _short(old.text), _short(new.text)))
    show_table(f"{config.stage.name}: before and after", ("", "before", "after"), rows)
    more = [
        ("tokens per second", f"{metrics['tokens_per_second']:,.0f}"),
        ("trained tokens", f"{metrics['trained_tokens']:,} that carry loss, in {metrics['steps']:,} steps"),
        ("model", _relative(folder.model)),
    ]
    show_table("result", ("", ""), more, headed=False)
    if answers:
        say(f"ask it:\n  {ask_command(_relative(folder.model), answers[0][0].prompt[-1]['content'])}")


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def ask_command(model: str, question: str) -> str:
    """A line to paste into a shell that asks the model a question through transformers alone."""
    code = (
        f"from transformers import pipeline; print(pipeline('text-generation', '{model}')"
        f"([dict(role='user', content={question!r})], max_new_tokens={ANSWER_TOKENS}, return_full_text=False)"
        "[0]['generated_text'])"
    )
    plain = not set('"$`\\!') & set(code)
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def _short(text: str, limit: int = 100) -> str:
    if not text.strip():
        return "(nothing)" if not text else "(blanks only)"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
