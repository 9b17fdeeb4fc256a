"""Supervised fine-tuning: TRL's SFTTrainer on rows whose responses alone carry loss."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.data.encode import IGNORED, encode_conversations
from posttrain.data.formats import read_instructions
from posttrain.data.sources import Given
from posttrain.models.generate import COMPLETED, complete, share_ended
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.models.meta import Holdings, hold_model
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import (
    EvalResult,
    Stage,
    StageContext,
    StageData,
    no_preflight,
    plan_steps,
    prepare_rows,
)
from posttrain.values import JsonObject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.stages.trainers import SFTTrainer


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", given: Given) -> StageData:
    """Read and encode the instruction rows."""
    return prepare_rows(config, tokenizer, given, read_instructions, encode_conversations)


def load(config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True) -> "PreTrainedModel":
    """The policy, its dropout as its config has it."""
    return load_causal_lm(config.model, tokenizer, path, quantised, dropout=True)


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """The policy, its dropout on."""
    return replace(hold_model(config, tokenizer), keeps_dropout=True)


def evaluate_model(context: StageContext, trainer: "SFTTrainer") -> EvalResult:
    """Held-out loss and the prompt panel."""
    metrics = {"eval_loss": trainer.evaluate()["eval_loss"]} if context.data.test else {}
    completions = complete(
        trainer.unwrapped_model(), context.data.encoder, context.panel[:COMPLETED], context.new_tokens
    )
    return EvalResult(metrics | {"ended_by_eos": share_ended(completions)}, completions)


def pad_packed(rows: list[JsonObject], pad_token_id: int) -> dict[str, "torch.Tensor"]:
    """Pad packed rows to one length; positions start again with each sequence, which keeps sequences apart.

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


def build(context: StageContext, model: "PreTrainedModel") -> "SFTTrainer":
    """The trainer; of the rows, which carry their labels already, only packing is left to TRL."""
    from trl import SFTConfig

    from posttrain.stages.trainers import SFTTrainer

    config, data = context.config, context.data
    arguments = trainer_arguments(config, context.folder.path, data.test is not None)
    packing = bool(arguments.get("packing"))
    arguments |= {"dataset_kwargs": None if packing else {"skip_prepare_dataset": True}, "eval_packing": False}
    trainer = SFTTrainer(
        model=model,
        args=trl_config(SFTConfig, arguments),
        train_dataset=data.train.dataset,
        eval_dataset=data.test.dataset if data.test is not None else None,
        processing_class=context.tokenizer,
        peft_config=lora_config(config.model, model),
    )
    if packing and "flash" not in str(model.config._attn_implementation):
        trainer.data_collator = partial(pad_packed, pad_token_id=context.tokenizer.pad_token_id)
    return trainer


STAGE = Stage(
    prepare=prepare,
    plan=plan_steps,
    hold=hold,
    load=load,
    build=build,
    preflight=no_preflight,  # the labels have been checked row by row
    evaluate_model=evaluate_model,
)
