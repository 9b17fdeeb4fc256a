"""Supervised fine-tuning: TRL's SFTTrainer on rows whose responses alone carry loss."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.console import say
from posttrain.data.chat import IGNORED
from posttrain.data.encode import ConversationEncoding, labels_of
from posttrain.data.formats import instructions
from posttrain.devices import process_state
from posttrain.errors import PosttrainError
from posttrain.models.generate import COMPLETED, complete, share_ended
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.models.meta import Holdings, hold_model
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import (
    DataSources,
    EvalResult,
    Stage,
    StageContext,
    StageData,
    plan_steps,
    prepare_rows,
)
from posttrain.values import JsonObject

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.stages.trainers import SFTTrainer

PACKED_ROWS = 64  # among which the fullest and the emptiest are compared with their sequences alone
PACKING_TOLERANCE = {"no": 1e-3, "bf16": 0.15, "fp16": 0.05}  # nats at a token


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """Read and encode the instruction rows."""
    encoding = partial(ConversationEncoding, train_on=config.data.train_on)
    return prepare_rows(config, tokenizer, sources, instructions, encoding)


def load(config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True) -> "PreTrainedModel":
    """The policy, its dropout as its config has it."""
    return load_causal_lm(config.model, tokenizer, path, quantised, dropout=True)


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """The policy, its dropout on."""
    return replace(hold_model(config, tokenizer), keeps_dropout=True)


def evaluate_model(context: StageContext, trainer: "SFTTrainer") -> EvalResult:
    """Held-out loss and the prompt panel."""
    metrics = {"eval_loss": trainer.evaluate()["eval_loss"]} if context.data.test else {}
    with trainer.unwrapped_model() as model:
        completions = complete(model, context.data.encoder, context.panel[:COMPLETED], context.new_tokens)
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


def _with_labels(dataset: "Dataset") -> "Dataset":
    """The columns that TRL packs."""

    def labels(rows: JsonObject) -> JsonObject:
        columns = zip(rows["input_ids"], rows["spans"], strict=True)
        return {"input_ids": rows["input_ids"], "labels": [labels_of(ids, spans) for ids, spans in columns]}

    with process_state().main_process_first():
        return dataset.map(labels, batched=True, remove_columns=dataset.column_names)


def build(context: StageContext, model: "PreTrainedModel") -> "SFTTrainer":
    """The trainer; of the rows, which know what carries loss already, only packing is left to TRL."""
    from trl import SFTConfig

    from posttrain.stages.trainers import SFTTrainer

    config, data = context.config, context.data
    arguments = trainer_arguments(config, context.folder.path, data.test is not None)
    packing = bool(arguments.get("packing"))
    arguments |= {"dataset_kwargs": None if packing else {"skip_prepare_dataset": True}, "eval_packing": False}
    trainer = SFTTrainer(
        model=model,
        args=trl_config(SFTConfig, arguments),
        train_dataset=_with_labels(data.train.dataset) if packing else data.train.dataset,
        eval_dataset=data.test.dataset if data.test is not None else None,
        named={name: rows.dataset for name, rows in data.named.items()},
        processing_class=context.tokenizer,
        peft_config=lora_config(config.model, model),
    )
    if packing and "flash" not in str(model.config._attn_implementation):
        trainer.data_collator = partial(pad_packed, pad_token_id=context.tokenizer.pad_token_id)
    return trainer


def preflight(context: StageContext, trainer: "SFTTrainer") -> None:
    """Packed rows do not see each other: each token is as likely as in its row alone.

    Raises:
        PosttrainError: they do, as in models that take no positions or read them in a way of their own.
    """
    import torch

    if not trainer.args.packing:
        return
    some = trainer.train_dataset.select(range(min(PACKED_ROWS, len(trainer.train_dataset))))
    by_count = sorted(some, key=lambda row: len(row["seq_lengths"]))
    trainer.model.eval()

    def logps(**batch: "torch.Tensor") -> "torch.Tensor":
        with trainer.unwrapped_model() as model, torch.no_grad(), trainer.compute_loss_context_manager():
            found: torch.Tensor = model(**batch, fused_lm_head=True).log_probs
        return found

    batch = trainer._prepare_inputs(trainer.data_collator([by_count[-1], by_count[0]]))
    first = batch["position_ids"] == 0
    together = logps(**batch | {"labels": batch["input_ids"].masked_fill(first, IGNORED)})
    worst = 0.0
    for row, ids in enumerate(batch["input_ids"]):
        starts = [*first[row].nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            sequence = ids[start:end][None]
            if end - start > 1 and bool((sequence != context.tokenizer.pad_token_id).any()):
                alone = logps(input_ids=sequence, labels=sequence)[0]
                worst = max(worst, float((together[row, start : end - 1] - alone).abs().max()))
    trainer.model.train()
    if worst > PACKING_TOLERANCE[trainer.rounds_as]:
        raise PosttrainError(
            f"trainer.packing=true: in this model ({trainer.model.config.model_type}) packed rows see each other: a "
            f"token's log-probability is off by up to {worst:.3g} nats from that in its row alone. Set "
            "trainer.packing=false"
        )
    say(f"step 0: log-probabilities in packed rows within {worst:.1e} of those in each row alone")


STAGE = Stage(
    prepare=prepare,
    plan=plan_steps,
    hold=hold,
    load=load,
    build=build,
    preflight=preflight,
    evaluate_model=evaluate_model,
)
