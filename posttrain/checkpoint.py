"""What makes a run safe to lose: checkpoints that prove themselves, exact resume, and no step on a broken loss.

A checkpoint counts when its `checkpoint.json`, written last and atomically, names every file of it with size
and sha256, and they agree. One that a kill or a full disk cut short is never resumed from.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError, Stopped

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

PREFIX = "checkpoint-"
MANIFEST = "checkpoint.json"


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader, whenever it looks, finds the old content, the new, or no file."""
    staged = path.with_name(path.name + ".part")
    with staged.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def sha256(path: Path) -> str:
    """The digest of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and sha256 of every file below a folder, except the manifest itself."""
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a whole one."""
    try:
        recorded = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not finished"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is broken ({error})"
    for name, wanted in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"] or sha256(path) != wanted["sha256"]:
            return f"{name} has changed since it was written"
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 where it is named otherwise."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    faults: list[str] = []
    for checkpoint in sorted(folder.glob(f"{PREFIX}*"), key=step_of, reverse=True):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} is not resumed from: {problem}")
    return None, faults


class StopSignals:
    """While active, SIGTERM and SIGINT ask for a checkpoint at the end of the step; a second one ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_received(self, message: str) -> None:
        if self.received is not None:
            raise Stopped(f"stopped by {signal.Signals(self.received).name} {message}", self.received)


class SafeTrainer(_TrainerBase):
    """Mixin for every trainer of ours: whole checkpoints, finite losses, and an orderly end on a signal.

    Put it before the TRL trainer among the bases. `stop_signals` is set by whoever calls `train`.
    """

    stop_signals: StopSignals | None = None
    _saved_step: int | None = None
    trained_tokens: int = 0  # counted by trainers that make their own data

    def trained(self, **options: Any) -> Any:
        """The model that the stage leaves behind, without what accelerate has wrapped around it."""
        return self.accelerator.unwrap_model(self.model, **options)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            self._refuse_step("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with fp16 an overflow is expected now and then: the scaler leaves that step out by itself
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._refuse_step("gradient norm", float(norm))
        return norm

    def _refuse_step(self, what: str, value: float) -> None:
        checkpoint, _ = newest_whole(Path(self.args.output_dir))
        last = f"last checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"
        raise PosttrainError(
            f"{what} is {value} at step {self.state.global_step + 1}; the weights were not touched by it "
            f"({last}). Usual causes: stage.learning_rate={self.args.learning_rate} is too high (try a tenth), "
            "precision=fp16 overflows (try bf16 or fp32), or a row of the data is broken"
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.stop_signals is not None and self._any_process_stops():
            self.control.should_training_stop = True
            self.control.should_save = True
            self.control.should_evaluate = False
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _any_process_stops(self) -> bool:
        assert self.stop_signals is not None
        if self.accelerator.num_processes == 1:
            return self.stop_signals.received is not None
        import torch

        mine = torch.tensor(self.stop_signals.received or 0, device=self.accelerator.device)
        anyone = int(self.accelerator.gather(mine).max())
        self.stop_signals.received = anyone or None
        return anyone > 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        if self._saved_step == self.state.global_step:  # asked for twice: at the end of the step and of the epoch
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_atomically(folder / MANIFEST, json.dumps({"files": file_hashes(folder)}, indent=1))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self._report_failed_save(folder, error)
        finally:
            self.args.save_total_limit = limit
        self._saved_step = self.state.global_step
        if self.args.should_save:  # older checkpoints go only now that the new one is whole
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _report_failed_save(self, folder: Path, error: Exception) -> None:
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        free = shutil.disk_usage(folder.parent).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free < 2**20
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint only takes room
        last, _ = newest_whole(folder.parent)
        raise PosttrainError(
            f"{'no space left' if full else 'failed'} while writing {folder} ({written / 1e6:.1f} MB written, "
            f"{free / 1e6:.1f} MB free; {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            f"{f'Last whole checkpoint: {last.name}' if last else 'There is no whole checkpoint'}; "
            "the same command goes on from there"
        ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        # a pickle of all arguments, secrets among them, that nothing ever reads again
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none beside the checkpoints: TRL's would name the folder, and a base model of None."""
