"""Supervised fine-tuning: TRL's SFTTrainer on rows whose responses alone carry loss."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config
from posttrain.data.encode import IGNORED, encode_conversations
from posttrain.data.formats import read_instructions
from posttrain.models.generate import ANSWERED, answer, share_ended
from posttrain.models.lora import lora_config
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import Judgement, Prepared, Stage, Work, load_policy, prepare_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Prepared:
    """Read and encode the instruction rows."""
    return prepare_rows(config, tokenizer, read_instructions, encode_conversations)


def judge(work: Work) -> Judgement:
    """Held-out loss and the prompt panel."""
    metrics = {"eval_loss": work.trainer.evaluate()["eval_loss"]} if work.prepared.test else {}
    model = work.trainer.trained()
    answers = answer(model, work.prepared.encoder, work.panel[:ANSWERED], work.new_tokens)
    return Judgement(metrics | {"ended_by_eos": share_ended(answers)}, answers)


def pad_packed(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, "torch.Tensor"]:
    """Pad packed rows to one length; positions start anew with each sequence, which keeps sequences apart.

    Shapes: (rows, longest). Without an attention mask, transformers reads the borders from `position_ids`; the
    padding is one more sequence. TRL would join all rows into one of `rows * max_length` tokens, whose attention
    mask is quadratic in that unless flash attention is used.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        gap = longest - len(row["input_ids"])
        lengths = [*row["seq_lengths"], *([gap] if gap else [])]
        columns["input_ids"].append([*row["input_ids"], *[pad_token_id] * gap])
        columns["labels"].append([*row["labels"], *[IGNORED] * gap])
        columns["position_ids"].append([position for length in lengths for position in range(length)])
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    # the first token of a sequence is predicted from the one before it, which is another sequence's
    batch["labels"][batch["position_ids"] == 0] = IGNORED
    return batch


def build(
    config: Config, prepared: Prepared, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> Any:
    """The trainer: TRL's, with our checkpoints, and a held-out loss that is a mean over tokens."""
    import torch
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from posttrain.runs.safe_trainer import SafeTrainer

    test = prepared.test

    class Trainer(SafeTrainer, SFTTrainer):
        def held_out_collator(self) -> Any:
            return padded  # held-out rows are never packed: each is judged as it would be read

        def held_out_weight(self, name: str, inputs: dict[str, Any]) -> float:
            # means over tokens, whatever the batch size and number of processes
            return float((inputs["labels"][:, 1:] != IGNORED).sum())

        def held_out_loss(self, inputs: dict[str, Any]) -> Any:
            tokens = torch.tensor(self.held_out_weight("loss", inputs), device=self.args.device)
            return self.compute_loss(self.model, inputs, num_items_in_batch=tokens) / self.accelerator.num_processes

    arguments = trainer_arguments(config, folder, test is not None)
    packing = bool(arguments.get("packing"))
    # the rows carry their labels already; only packing is left to TRL
    arguments |= {"dataset_kwargs": None if packing else {"skip_prepare_dataset": True}, "eval_packing": False}
    padded = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    trainer = Trainer(
        model=model,
        args=trl_config(SFTConfig, arguments),
        train_dataset=prepared.train.dataset,
        eval_dataset=test.dataset if test is not None else None,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, model),
    )
    if packing and "flash" not in str(model.config._attn_implementation):
        trainer.data_collator = partial(pad_packed, pad_token_id=tokenizer.pad_token_id)
    return trainer


STAGE = Stage(
    prepare=prepare,
    load=load_policy,
    build=build,
    preflight=lambda work: None,  # the labels have been checked row by row
    judge=judge,
    objective="eval_loss",
    shown={"eval_loss": "held-out loss (per token)", "ended_by_eos": "answers ended by the model itself"},
    swept={"eval_loss": "held-out loss", "train_loss": "train loss", "ended_by_eos": "ended by EOS"},
)
