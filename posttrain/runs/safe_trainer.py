"""What every trainer of ours has besides TRL's: whole checkpoints, exact resume, and no step on a broken loss."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import PosttrainError
from posttrain.runs.checkpoint import (
    MANIFEST,
    PART,
    PREFIX,
    RUNNING,
    StopSignals,
    fault,
    file_hashes,
    is_ours,
    log_sizes,
    modes_by_umask,
    newest_whole,
    read_running,
    rotate,
    write_atomically,
    writing,
)
from posttrain.runs.sharding import begin_each_forward_anew, gathered, keep_output_dtype, tie
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
    from transformers import Trainer as _TrainerBase
    from transformers.trainer_utils import TrainOutput
else:
    _TrainerBase = object


PROBE_TOKENS = 64
Batch = dict[str, "Tensor"]
# what TRL counts of each batch, over all processes, that is not a mean
EXTREMES: dict[str, Callable[[list[float]], float]] = {"min_reward": min, "max_reward": max, "num_tokens": max}


class SafeTrainer(_TrainerBase):
    """Mixin for every trainer of ours: whole checkpoints, finite losses, and an orderly end on a signal.

    Put it before the TRL trainer among the bases. `stop_signals` is set by whoever calls `train`.
    """

    stop_signals: StopSignals | None = None
    control: "TrainerControl"
    state: "TrainerState"
    data_collator: Callable[[list[JsonObject]], Batch]
    eval_dataset: "Dataset"
    _saved_step: int | None = None
    _evaluated: tuple[int, dict[str, float]] = (-1, {})  # the step, and what was found after it
    _asked_at, _save_due = -1, False
    _opened = False  # see unwrapped_model
    when_prepared: Callable[[], None] | None = None  # called when the weights are where they are trained
    _evaluation_due = False  # a signal came before it
    before: JsonObject | None = None  # what was found before the first step, kept for a resumed run
    began = 0.0  # when training did
    _earlier_seconds = 0.0  # trained before a resume
    trained_tokens: int = 0  # counted by trainers that make their own data

    def __init__(
        self,
        *,
        model: "PreTrainedModel",
        args: "TrainingArguments",
        named: "Mapping[str, Dataset] | None" = None,
        **more: object,
    ) -> None:
        self.named = dict(named or {})  # further held-out sets
        if args.ddp_find_unused_parameters is None and not _may_skip_weights(model):
            args.ddp_find_unused_parameters = False  # DDP would look for them in each step, and warn that it found none
        super().__init__(model=model, args=args, **more)
        # transformers deletes by modification time, and folders whose names merely begin like a checkpoint's
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            keep_output_dtype(self.accelerator.state.fsdp_plugin)

    @contextmanager
    def unwrapped_model(self, **options: object) -> "Iterator[PreTrainedModel]":
        """The model that the stage leaves behind, without what accelerate has wrapped around it, to be called.

        Entered by all processes, which then make equally many calls. There is no other way to the model, so that none
        meets weights that are shared out.
        """
        if self._opened:
            yield self.accelerator.unwrap_model(self.model, **options)
            return
        with gathered(self.model, self.model_wrapped):
            self._opened = True
            try:
                yield self.accelerator.unwrap_model(self.model, **options)
            finally:
                self._opened = False

    @property
    def shards(self) -> bool:
        """Whether the processes share out among them what one device may have no room for."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: object, resume_from_checkpoint: str | None
    ) -> tuple[object, object]:
        found: tuple[object, object] = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        begin_each_forward_anew(self.model)
        if self.when_prepared is not None:
            self.when_prepared()
        self.began = time.monotonic()
        return found

    @property
    def seconds(self) -> float:
        """How long it has trained, before a resume, too."""
        return self._earlier_seconds + (time.monotonic() - self.began if self.began else 0.0)

    @property
    def rounds_as(self) -> str:
        """`no` (float32), `bf16` or `fp16`: the coarsest precision that this run computes in."""
        mixed = str(self.accelerator.mixed_precision)
        return mixed if mixed != "no" else self.weights_as

    @property
    def weights_as(self) -> str:
        """The same of the weights alone."""
        import torch

        kinds = {weight.dtype for weight in self.model.parameters()}
        return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "no"

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """What `measure` finds and logs, once for the weights as they are."""
        step, metrics = self._evaluated
        if step != self.state.global_step:
            metrics = self.measure()
            self._evaluated = (self.state.global_step, metrics)
        return dict(metrics)

    def measure(self) -> dict[str, float]:
        """The held-out loss and what TRL counts beside it, over the rows of all processes; of named sets, too.

        Not the Trainer's own loop: called before training, as here, that lets accelerate take the model for prepared,
        DDP then never wraps it, and each process trains alone, silently (transformers 5.23, accelerate 1.15).
        """
        training = self.model.training
        self.model.eval()
        found = {name: self._means(name) for name in self.held_out_batches}
        own = found.pop("")
        found |= {name: dict(own) for name in self.named if name not in found}
        metrics = {"eval_loss": own.pop("loss")}
        self._metrics["eval"] |= {name: [value] for name, value in own.items()}
        self.log(metrics)  # TRL adds what it has counted
        named = {f"eval_{name}_{key}": value for name, means in found.items() for key, value in means.items()}
        if named:
            self.log(dict(named))
        metrics |= named
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics

    def _means(self, name: str) -> dict[str, float]:
        """The means over a held-out set."""
        import torch
        from accelerate.data_loader import DataLoaderShard
        from accelerate.utils import gather_object

        (own, common), processes = self.held_out_batches[name], self.accelerator.num_processes
        rows = self.named[name] if name else self.eval_dataset
        loader = DataLoaderShard(rows, batch_sampler=own + common, collate_fn=self.held_out_collator())
        values, sums = defaultdict(list), defaultdict(list)
        for number, batch in enumerate(loader):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                loss = float(self.held_out_loss(inputs))
            counted = {name: noted.pop() for name, noted in self._metrics["eval"].items() if noted}
            for name, value in {"loss": loss, **counted}.items():
                # a batch that all processes read is given by each of them
                weight = self.held_out_weight(name, inputs) / (1 if number < len(own) else processes)
                values[name].append(value)
                sums[name].append((value * weight, weight))
        # what TRL counts of some batches alone may be missing on a process
        names = list(dict.fromkeys(name for each in gather_object([list(sums)]) for name in each))
        added = [[math.fsum(column) for column in zip((0.0, 0.0), *sums[name], strict=True)] for name in names]
        mine = torch.tensor(added, dtype=torch.float64, device=self.args.device)
        found = {
            name: EXTREMES[name](values[name]) if name in EXTREMES else total / weights
            for name, (total, weights) in zip(names, self.accelerator.reduce(mine).tolist(), strict=True)
        }
        if not math.isfinite(found["loss"]):
            self._refuse_weights(f"weights whose held-out loss is {found['loss']}")
        return found

    @cached_property
    def held_out_batches(self) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
        """Of each held-out set ("": the first) the batches of this process alone, and those that all read.

        A set of data.eval that is the first one itself has none of its own.
        """
        others = {name: rows for name, rows in self.named.items() if rows is not self.eval_dataset}
        return {name: self._batches(rows) for name, rows in {"": self.eval_dataset, **others}.items()}

    def _batches(self, rows: "Dataset") -> tuple[list[list[int]], list[list[int]]]:
        """Rows of like lengths, the longest first.

        All processes have equally many batches of equal sizes, as TRL's losses need, and no row stands in for another;
        fewer rows than there are processes are left over, and read by all.
        """
        lengths = rows["length"][:]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        largest, processes = self.args.eval_batch_size, self.accelerator.num_processes
        mine: list[list[int]] = []
        while size := min(largest, len(order) // processes):
            mine.append(order[self.accelerator.process_index : size * processes : processes])
            order = order[size * processes :]
        return mine, [order[start : start + largest] for start in range(0, len(order), largest)]

    def held_out_collator(self) -> Callable[[list[JsonObject]], Batch]:
        """What makes a batch of held-out rows."""
        return self.data_collator

    def held_out_loss(self, inputs: Batch) -> "Tensor":
        """The mean loss of a batch."""
        loss: Tensor = self.compute_loss(self.model, inputs)
        return loss

    def held_out_weight(self, name: str, inputs: Batch) -> float:
        """What a batch weighs in the mean of the loss, or of what TRL counts as `name`: its rows."""
        return len(next(iter(inputs.values())))

    # -- what the logs are made of is part of a checkpoint, so that a resumed run writes the same ones

    def running(self) -> JsonObject:
        """What this process has added up, and trainer_state.json does not hold."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "tokens": self._total_train_tokens,
            "evaluated": self._evaluated,
            "evaluation_due": self._evaluation_due,
            "before": self.before,
            "seconds": self.seconds,
            "logs": log_sizes(Path(self.args.output_dir)),
        }

    def resume(self, running: JsonObject, checkpoint: Path) -> None:
        """Go on from what `running` gave."""
        self._tr_loss.fill_(running["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = running["total_loss"], running["last_logged"]
        self._initial_global_step = 0  # train_loss is a mean over all steps, those before the resume too
        self._metrics["train"] |= running["metrics"]
        self._total_train_tokens = running["tokens"]
        self._evaluated, self._earlier_seconds = running["evaluated"], running["seconds"]
        self.state.compute_steps(self.args, self.state.max_steps)  # save_steps may be another one now
        if running["evaluation_due"]:
            self._determine_best_metric(self._evaluate(None, None), None)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        file = Path(output_dir) / RUNNING.format(self.accelerator.process_index)
        file.write_text(json.dumps(self.running()), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called on every process before the first step after a resume."""
        if checkpoint is not None:
            self.resume(read_running(Path(checkpoint), self.accelerator.process_index), Path(checkpoint))
        super()._load_rng_state(checkpoint)

    def _finalize_training(self, trial: object, num_train_samples: int, start_time: float) -> "TrainOutput":
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)

    def finish(self, checkpoint: Path) -> None:
        """End a run whose last step is in the checkpoint: `train` would take one more."""
        import torch

        self.state = type(self.state).load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.is_local_process_zero = self.is_local_process_zero()  # the file is process 0's
        self.state.is_world_process_zero = self.is_world_process_zero()
        if self.shards:  # their files can be read into shares alone
            self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
        self._tr_loss, self.neftune_noise_alpha = torch.zeros((), device=self.args.device), None
        self.model.train()
        self._load_rng_state(str(checkpoint))
        self._finalize_training(None, self.state.max_steps * self.get_total_train_batch_size(self.args), time.time())

    def train(self, *args: object, **kwargs: object) -> "TrainOutput":
        found = super().train(*args, **kwargs)
        self.check_weights()
        return found

    def training_step(self, *args: object, **kwargs: object) -> "Tensor":
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            self._refuse_step("loss", float(loss))
        return loss

    def _get_grad_norm(
        self, model: "PreTrainedModel", grad_norm: "Tensor | float | None" = None
    ) -> "Tensor | float | None":
        norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with fp16 an overflow is expected now and then: the scaler leaves that step out by itself
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._refuse_step("gradient norm", float(norm))
        return norm

    def _refuse_step(self, what: str, value: float) -> None:
        if fault := self._weights_fault():
            self._refuse_weights(fault)
        raise PosttrainError(
            f"{what} is {value} at step {self.state.global_step + 1}; stopped before the optimizer step "
            f"({self._last_checkpoint()}). Usual causes: {self._too_far()}, precision=fp16 overflows (try bf16 or "
            "fp32), or a row of the data is broken"
        )

    def _refuse_weights(self, fault: str) -> None:
        overflow = ", or float16 overflows (try bfloat16 or float32)" if self.rounds_as == "fp16" else ""
        raise PosttrainError(
            f"step {self.state.global_step} left {fault}; that step was not saved ({self._last_checkpoint()}). "
            f"Usual cause: {self._too_far()}{overflow}"
        )

    def _too_far(self) -> str:
        rate = self.args.learning_rate
        return f"stage.learning_rate={rate:g} is too high (try {rate / 10:g})"

    def _last_checkpoint(self) -> str:
        checkpoint, _ = newest_whole(Path(self.args.output_dir))
        return f"last checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"

    def check_weights(self) -> None:
        """Look at the trained weights, on all processes, before anything relies on them.

        Raises:
            PosttrainError: the last step has broken them.
        """
        import torch

        fault = self._weights_fault()
        broken = torch.tensor(float(fault is not None), device=self.accelerator.device)
        if float(self.accelerator.reduce(broken)) > 0:
            self._refuse_weights(fault or "weights that are not finite on another process")

    def _weights_fault(self) -> str | None:
        """What is wrong with this process's weights: with their values, or with what they make of a training row."""
        import torch

        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        held = [getattr(weight, "_local_tensor", getattr(weight, "ds_tensor", weight)).detach() for weight in trained]
        # the largest absolute values, because a sum of squares overflows in half precision
        largest = torch._foreach_norm([weight for weight in held if weight.numel()], ord=math.inf)
        if not all(math.isfinite(value) for value in torch.stack([each.float() for each in largest]).tolist()):
            return "weights that are NaN or infinite"
        if self.shards:
            return None
        row = self.train_dataset[0]
        ids = next(row[name] for name in ("input_ids", "chosen_ids", "prompt_ids") if name in row)[:PROBE_TOKENS]
        with self.unwrapped_model() as model, torch.no_grad(), self.accelerator.autocast():
            training = model.training
            model.eval()
            outputs = model(input_ids=torch.tensor([ids], device=self.args.device)).logits
            model.train(training)
        return "weights whose outputs are NaN" if bool(outputs.isnan().any()) else None

    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> None:
        if self.stop_signals is not None and self._any_process_stops():
            self.control.should_training_stop = True
            self.control.should_save = True
            self._evaluation_due = self._evaluation_due or self.control.should_evaluate
            self.control.should_evaluate = False
        self._save_after_the_epochs_logs()
        if self.control.should_save or self.control.should_evaluate:
            self.check_weights()
        if self.state.global_step == 1 or self.control.should_save:
            self._check_processes_agree()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_after_the_epochs_logs(self) -> None:
        """An epoch's last step is followed at once by what is due once an epoch: its checkpoint holds both.

        transformers asks twice then; a run resumed from a checkpoint in between would never come back to it.
        """
        at_end = float(self.state.epoch).is_integer() or self.state.global_step >= self.state.max_steps
        if not at_end or "epoch" not in (self.args.eval_strategy, self.args.logging_strategy):
            return
        if self._asked_at == self.state.global_step:
            self.control.should_save |= self._save_due
        else:
            self._asked_at, self._save_due = self.state.global_step, self.control.should_save
            self.control.should_save = False

    def _check_processes_agree(self) -> None:
        """Under DDP all processes hold the same weights; refuse to go on where gradients were not all-reduced."""
        if self.accelerator.num_processes == 1 or self.shards:
            return
        import torch

        trained = [weight.detach() for weight in self.model.parameters() if weight.requires_grad]
        mine = torch.stack([weight.double().abs().sum() for weight in trained]).sum()
        found = self.accelerator.gather(mine).tolist()
        if len(set(found)) > 1:
            raise PosttrainError(
                f"after step {self.state.global_step} the processes no longer hold the same weights (sums of their "
                f"absolute values: {', '.join(f'{value:.9g}' for value in found)}): gradients are not averaged between "
                "them, so results are invalid; a callback or a library has taken the model out of DDP"
            )

    def _any_process_stops(self) -> bool:
        assert self.stop_signals is not None
        if self.accelerator.num_processes == 1:
            return self.stop_signals.received is not None
        import torch

        mine = torch.tensor(self.stop_signals.received or 0, device=self.accelerator.device)
        anyone = int(self.accelerator.gather(mine).max())
        self.stop_signals.received = anyone or None
        return anyone > 0

    def _save_checkpoint(self, model: "PreTrainedModel", trial: object) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        if self._saved_step == self.state.global_step:  # asked for twice: at the end of the step and of the epoch
            return
        if self.args.should_save:
            if folder.exists() and not is_ours(folder) and any(folder.iterdir()):  # a kill may leave it empty
                raise PosttrainError(
                    f"{folder} exists and is not a checkpoint of this run; move it away and start again"
                )
            folder.mkdir(exist_ok=True)
        with writing(folder):
            if self.args.should_save:
                (folder / PART).touch()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                modes_by_umask(folder)
                write_atomically(folder / MANIFEST, json.dumps({"files": file_hashes(folder)}, indent=1))
        self._saved_step = self.state.global_step
        if self.args.should_save:  # older checkpoints go only now that the new one is whole
            rotate(folder.parent, self._limit, self.state.best_model_checkpoint)

    def best_checkpoint(self) -> Path:
        """The checkpoint that load_best_model_at_end ends with.

        Raises:
            PosttrainError: it is not whole; transformers would keep the last weights and warn.
        """
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name  # the run may have been moved
        if problem := fault(best):
            raise PosttrainError(f"{best} was the best checkpoint and cannot be loaded: {problem}")
        return best

    def _load_best_model(self) -> None:
        self._evaluated = (-1, {})
        self.state.best_model_checkpoint = str(self.best_checkpoint())
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # FSDP and DeepSpeed have files of their own in a checkpoint, from which it is resumed; the weights are in them
        if not (_internal_call and self.shards):
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: "dict[str, Tensor] | None" = None) -> None:
        if state_dict is not None:
            tie(state_dict, self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict=state_dict)
        # a pickle of all arguments, secrets among them, that nothing ever reads again
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none beside the checkpoints: TRL's would name the folder, and a base model of None."""


def _may_skip_weights(model: "PreTrainedModel") -> bool:
    """Whether a forward may leave out weights: those of experts, or of another modality than text."""
    experts = any("expert" in name for name, _ in model.named_modules())
    return experts or model.config.get_text_config() is not model.config
