"""How far a run has come: a bar in a terminal, elsewhere a line for each log entry, and metrics.jsonl in any case."""

import json
import math
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.console import log, say
from posttrain.metrics.catalogue import PROGRESS, short_label
from posttrain.runs.checkpoint import step_of, writing

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from posttrain.runs.safe_trainer import SafeTrainer

# the newest numbers stand first: the bar between them and the counts takes what room a narrow terminal leaves
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def show_progress(trainer: "SafeTrainer", metrics: Path, checkpoint: Path | None) -> None:
    """Let the trainer show its progress this way, and log to the file `metrics`."""
    from transformers.trainer_callback import ProgressCallback, TrainerCallback, tqdm

    reached = step_of(checkpoint) if checkpoint else 0

    class Progress(TrainerCallback):
        bar: Any = None
        began, first_step, first_tokens = 0.0, 0, 0
        newest: dict[str, str] = {}  # noqa: RUF012, replaced and never changed

        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: object
        ) -> None:
            self.began, self.first_step = time.monotonic(), state.global_step
            self.first_tokens = state.num_input_tokens_seen
            if state.is_world_process_zero and sys.stderr.isatty():
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=BAR, dynamic_ncols=True)

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: object
        ) -> None:
            if self.bar is not None:
                self.bar.update(state.global_step - self.bar.n)

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: dict[str, float] | None = None,
            **kwargs: object,
        ) -> None:
            # what is found before a resume is in the file already
            if not state.is_world_process_zero or not logs or state.global_step < reached:
                return
            numbers = {name: value for name, value in logs.items() if _is_number(value)}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            with writing(metrics), metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": now, **numbers}) + "\n")
            found = {short_label(key): f"{numbers[key]:.4g}" for key in PROGRESS if key in numbers}
            if found:
                self.show(found, state)

        def show(self, found: dict[str, str], state: "TrainerState") -> None:
            self.newest = {**self.newest, **found}
            words = [f"{label} {value}" for label, value in found.items()]
            line = "  ".join([*self.place(state), *words, *self.speed(state)])
            if self.bar is None:
                say(line)
                return
            log.info(line)
            labels = map(short_label, PROGRESS[:-1])
            kept = [f"{label} {self.newest[label]}" for label in labels if label in self.newest]
            self.bar.set_description_str(", ".join(kept[:2]) + " ")

        def place(self, state: "TrainerState") -> list[str]:
            step, steps = state.global_step, state.max_steps
            return [f"step {step}/{steps}", f"{step / steps:.0%}"] if steps else ["before training"]

        def speed(self, state: "TrainerState") -> list[str]:
            steps, seconds = state.global_step - self.first_step, time.monotonic() - self.began
            if steps == 0:
                return []
            tokens = (state.num_input_tokens_seen - self.first_tokens) / seconds
            left = timedelta(seconds=round(seconds / steps * (state.max_steps - state.global_step)))
            return [f"{tokens:,.0f} tokens/s", f"{left} left"]

        def on_train_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: object
        ) -> None:
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
