"""TRL's trainers as the stages use them: whole checkpoints, held-out means over tokens or pairs, rows encoded ahead."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.models import prepare_deepspeed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.data.chat import IGNORED
from posttrain.data.encode import labels_of
from posttrain.runs.safe_trainer import SafeTrainer
from posttrain.values import Fields, JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

Batch = dict[str, Tensor]


@contextmanager
def without_router_loss(trainer: "SFTTrainer | ReferenceTrainer") -> Iterator[None]:
    """A mixture of experts judged by what it says, and not by how evenly its router deals out the tokens."""
    before = trainer.aux_loss_enabled
    trainer.aux_loss_enabled = False
    yield
    trainer.aux_loss_enabled = before


def with_labels(collator: Callable[[list[JsonObject]], Batch], rows: list[JsonObject]) -> Batch:
    """A batch of rows that say in `spans` which of their tokens carry loss; packed rows have `labels` already."""
    return collator(
        [row if "labels" in row else {**row, "labels": labels_of(row["input_ids"], row["spans"])} for row in rows]
    )


class SFTTrainer(SafeTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on rows of `input_ids` and `spans`; the held-out loss is a mean over tokens."""

    def __init__(self, *, model: "PreTrainedModel", **options: Any) -> None:
        super().__init__(model=model, **options)
        self.data_collator = partial(with_labels, self.data_collator)
        if self.aux_loss_enabled:  # TRL's loss asks for the router's logits itself; generation fails over them
            model.config.get_text_config().output_router_logits = False

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "spans", "labels", "seq_lengths"]

    def held_out_collator(self) -> Callable[[list[JsonObject]], Batch]:
        # held-out rows are never packed: each is scored as it would be read
        return partial(with_labels, DataCollatorForLanguageModeling(pad_token_id=self.processing_class.pad_token_id))

    def held_out_weight(self, name: str, inputs: Batch) -> float:
        # means over tokens, whatever the batch size and number of processes
        return float((inputs["labels"][:, 1:] != IGNORED).sum())

    def held_out_loss(self, inputs: Batch) -> Tensor:
        tokens = torch.tensor(self.held_out_weight("loss", inputs), device=self.args.device)
        with without_router_loss(self):
            loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=tokens)
        mean: Tensor = loss / self.accelerator.num_processes
        return mean


def smoothing_loss(differences: Tensor, label_smoothing: "float | Tensor") -> Tensor:
    """What is added to the mean of -log σ(d) for a share ε of wrong labels, from d (pairs): the mean of ε d.

    Of a tie ε is one half.

    Because log σ(d) - log σ(-d) = d, the sum is the mean of -(1 - ε) log σ(d) - ε log σ(-d): Mitchell 2023, equation 3,
    https://ericmitchell.ai/cdpo.pdf
    """
    return (label_smoothing * differences).mean()


def with_ties(collator: Callable[[list[Fields]], Batch], rows: list[Fields]) -> Batch:
    """A batch of pairs that says which of them are ties."""
    return collator(rows) | {"tie": torch.tensor([bool(row["tie"]) for row in rows])}


class RewardModelTrainer(SafeTrainer, trl.RewardTrainer):
    """TRL's RewardTrainer on rows of `chosen_ids` and `rejected_ids`, whole conversations, and perhaps `margin`.

    Held-out losses are without `label_smoothing`, so that they can be compared.
    """

    def __init__(self, *, label_smoothing: float = 0.0, **options: Any) -> None:
        self.label_smoothing = label_smoothing
        # of each held-out set, the scores of chosen and rejected of each pair at the last evaluation
        self.scores: dict[str, list[tuple[float, float]]] = {}
        super().__init__(**options)
        if "tie" in self.train_dataset.column_names:
            self.data_collator = partial(with_ties, self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "tie"]

    def _prepare_dataset(self, dataset: "Dataset", *args: object, **kwargs: object) -> "Dataset":
        return dataset  # encoded and cut already

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> "Tensor | tuple[Tensor, SequenceClassifierOutput]":
        ties = inputs.pop("tie", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share: float | Tensor = self.label_smoothing if self.model.training else 0.0
        if ties is not None:
            share = torch.where(ties, 0.5, share)
        if ties is not None or share:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            loss = loss + smoothing_loss(chosen - rejected - inputs.get("margin", 0), share)
        return (loss, outputs) if return_outputs else loss

    def held_out_loss(self, inputs: Batch) -> Tensor:
        loss: Tensor
        loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.float().view(2, -1).tolist()
        self._scored += zip(chosen, rejected, strict=True)
        return loss

    def measure(self) -> dict[str, float]:
        self._scored: list[tuple[float, float]] = []
        metrics = super().measure()
        scored, self.scores = iter(self._scored), {}
        for name, both in self.held_out_batches.items():
            rows = [row for batches in both for batch in batches for row in batch]
            by_row = dict(gather_object(list(zip(rows, islice(scored, len(rows)), strict=True))))
            self.scores[name] = [by_row[row] for row in sorted(by_row)]
        self.scores |= {name: self.scores[""] for name in self.named if name not in self.scores}
        return metrics

    def running(self) -> JsonObject:
        return super().running() | {"scores": self.scores}

    def resume(self, running: JsonObject, checkpoint: Path) -> None:
        self.scores = running["scores"]
        super().resume(running, checkpoint)


class ReferenceTrainer(SafeTrainer):
    """What trainers share that compare the policy with a frozen reference.

    `more_metrics` is handed the trainer and its held-out metrics at every evaluation, and returns more of them.
    """

    ref_model: "PreTrainedModel | None"
    aux_loss_enabled: bool

    def __init__(
        self,
        *,
        more_metrics: Callable[["ReferenceTrainer", dict[str, float]], dict[str, float]] | None = None,
        **options: Any,
    ) -> None:
        self.more_metrics = more_metrics
        self.start: tuple[float, float] | None = None  # held-out log π of chosen and rejected completions at step 0
        super().__init__(**options)

    def first_loss(self, rows: Sequence[Fields], ratios: Tensor) -> float | None:
        """The loss of some rows at step 0; None where theory does not say it.

        `ratios` are log π/π_ref of their completions, of shape (completions), all chosen ones first; 0 where policy and
        reference agree.
        """
        return None

    def measure(self) -> dict[str, float]:
        metrics = super().measure()
        return metrics | self.more_metrics(self, metrics) if self.more_metrics is not None else metrics

    def running(self) -> JsonObject:
        return super().running() | {"start": self.start}

    def resume(self, running: JsonObject, checkpoint: Path) -> None:
        self.start = running["start"]
        super().resume(running, checkpoint)


class DPOTrainer(ReferenceTrainer, trl.DPOTrainer):
    """TRL's DPOTrainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    precompute_ref_logps: bool

    @cached_property
    def _references(self) -> list[tuple[Tensor, Tensor]]:
        """The reference's log-probabilities of each held-out batch, as they are computed."""
        return []

    def _prepare_dataset(self, dataset: "Dataset", *args: object, **kwargs: object) -> "Dataset":
        return dataset  # encoded already

    def _precompute_ref_logps(self, dataset: "Dataset", name: str, batch_size: int) -> "Dataset":
        """On every process, in memory: TRL's file is where the first process alone finds it (TRL 1.16)."""
        rows: Any = dataset
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator)
        whole = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            whole = prepare_deepspeed(self.model, self.accelerator)
        found = [
            self.accelerator.gather_for_metrics(self.compute_ref_log_probs(whole, batch))
            for batch in self.accelerator.prepare_data_loader(loader)
        ]
        for side, logps in zip(("chosen", "rejected"), zip(*found, strict=True), strict=True):
            dataset = dataset.add_column(f"ref_{side}_logps", torch.cat(logps).float().tolist())
        return dataset

    def first_loss(self, rows: Sequence[Fields], ratios: Tensor) -> float | None:
        if self.loss_types != ["sigmoid"] or self.use_weighting:
            return None
        if not ratios.any():
            return math.log(2)
        if self.ld_alpha is not None or self.f_divergence_type != "reverse_kl":
            return None
        chosen, rejected = ratios.chunk(2)
        return float(-nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean())  # as in compute_dpo_loss

    def held_out_loss(self, inputs: Batch) -> Tensor:
        precomputed = self.precompute_ref_logps
        if not precomputed:  # the reference says the same of a batch at every evaluation
            if self._batch == len(self._references):
                self._references.append(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self._references[self._batch]
            self._batch += 1
        self.precompute_ref_logps = True
        with without_router_loss(self):
            loss = super().held_out_loss(inputs)
        self.precompute_ref_logps = precomputed
        return loss

    def held_out_weight(self, name: str, inputs: Batch) -> float:
        # what TRL takes over the tokens of completions; all else over pairs
        chosen, rejected = (float(half.sum()) for half in inputs["completion_mask"][:, 1:].chunk(2))
        tokens = {"logits/chosen": chosen, "mean_token_accuracy": chosen, "logits/rejected": rejected}
        return (tokens | {"entropy": chosen + rejected}).get(name, super().held_out_weight(name, inputs))

    def measure(self) -> dict[str, float]:
        self._batch = 0
        return super().measure()


def said_in(row: Fields) -> object:
    """The completion of a rated row."""
    return row["chosen_ids"] or row["rejected_ids"]


def with_others_completions(
    collator: Callable[[list[Fields]], Batch], spare: Sequence[Fields], rows: Sequence[Fields]
) -> Batch:
    """A batch of rated completions, in which each prompt also has another row's, from which KTO estimates KL.

    A row that is alone in its batch takes one of the `spare` rows'.
    """
    said = [said_in(row) for row in rows]
    others = said[-1:] + said[:-1]
    if len(rows) == 1:
        others = [next((other for other in map(said_in, spare) if other != said[0]), said[0])]
    return collator(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": mine,
                "KL_completion_ids": other,
                "label": row["chosen_ids"] is not None,
            }
            for row, mine, other in zip(rows, said, others, strict=True)
        ]
    )


class KTOTrainer(ReferenceTrainer, trl.KTOTrainer):
    """TRL's KTOTrainer on rows of `prompt_ids` and either `chosen_ids` or `rejected_ids`.

    TRL pairs prompts and completions for KL before training, in batches of a fixed order, so data sorted by label stay
    sorted. Here each batch is paired as it is drawn, in a random order.
    """

    def __init__(self, *, args: trl.KTOConfig, **options: Any) -> None:
        args.train_sampling_strategy = "sequential"  # TRL insists on it
        super().__init__(args=args, **options)
        args.train_sampling_strategy = "random"
        spare = [self.train_dataset[place] for place in (0, len(self.train_dataset) - 1)]
        self.data_collator = partial(with_others_completions, self.data_collator, spare)

    def _prepare_dataset(self, dataset: "Dataset", *args: object, **kwargs: object) -> "Dataset":
        return dataset  # encoded already

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def first_loss(self, rows: Sequence[Fields], ratios: Tensor) -> float | None:
        if ratios.any():
            return None
        weights = {True: self.desirable_weight, False: self.undesirable_weight}
        return fmean(weights[row["chosen_ids"] is not None] / 2 for row in rows)

    def held_out_loss(self, inputs: Batch) -> Tensor:
        with without_router_loss(self):
            return super().held_out_loss(inputs)

    def held_out_weight(self, name: str, inputs: Batch) -> float:
        """What is of one kind is a mean over that kind: over its tokens of logits, else over its completions."""
        kind, tokens = name.partition("/")[2], inputs["completion_mask"][:, 1:].sum(-1)
        each = tokens if name.startswith("logits/") or name == "entropy" else torch.ones_like(tokens)
        liked = inputs["label"].to(tokens)
        return float((each * {"chosen": liked, "rejected": 1 - liked}.get(kind, torch.ones_like(liked))).sum())

    def _means(self, name: str) -> dict[str, float]:
        found = super()._means(name)
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():  # batches without one of them have no margin
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def log(self, *args: object, **kwargs: object) -> None:
        # the loss's own, of mismatched completions and clipped at 0: no estimate of what is called kl elsewhere
        for counted in self._metrics.values():
            if "kl" in counted:
                counted["kl_term"] = counted.pop("kl")
        super().log(*args, **kwargs)
