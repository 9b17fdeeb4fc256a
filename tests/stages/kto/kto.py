"""Kahneman-Tversky optimisation: TRL's KTOTrainer on single completions that were liked or disliked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trl

from posttrain.config.schema import Config
from posttrain.data.chat import ChatEncoder, Segment
from posttrain.data.encode import Encoded, LengthRule, encode_rows, response_start
from posttrain.data.formats import Prompt, require_columns
from posttrain.data.messages import as_messages, check_turns
from posttrain.data.sources import Given, Problems
from posttrain.data.splits import Counts, read_rows
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.runs.safe_trainer import SafeTrainer
from posttrain.stages import dpo, sft
from posttrain.stages.base import StageContext, StageData, no_preflight, prepare_rows
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rated(row: JsonObject, where: str, others: JsonObject) -> Prompt:
    """A checked row: its prompt, its completion, and whether that was liked."""
    require_columns(row, ("prompt", "completion", "label"), "rating")
    prompt = as_messages(row["prompt"], "user", "prompt")
    completion = as_messages(row["completion"], "assistant", "completion")
    check_turns([*prompt, *completion])
    if not isinstance(row["label"], bool):
        raise ValueError(f"'label' must be true or false, got {row['label']!r}")
    return Prompt(prompt, where, {"completion": completion, "label": row["label"]})


def encode(
    encoder: ChatEncoder, rows: Sequence[Prompt], counts: Counts, size: int, overlength: str, dropped: Problems | None
) -> Encoded:
    """Rows of `prompt_ids`, `completion_ids` and `label`."""
    rule = LengthRule(size, overlength, counts)

    def columns(row: Prompt, encoded: list[tuple[list[int], list[int]]]) -> JsonObject | None:
        [(ids, labels)] = encoded
        start = response_start(labels, 0)
        end = rule.room(len(ids), start)
        label = row.columns["label"]
        return None if end is None else {"prompt_ids": ids[:start], "completion_ids": ids[start:end], "label": label}

    def segments(row: Prompt) -> list[list[Segment]]:
        return [encoder.answer(row.prompt, row.columns["completion"])]

    dataset, kept = encode_rows(encoder, rows, segments, columns, counts, dropped)
    counts.kept = len(kept)
    completions = list(dataset["completion_ids"]) if kept else []
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in dataset]
    without_end = sum(ids[-1] != encoder.end_id for ids in completions)
    return Encoded(dataset, kept, lengths, sum(lengths), sum(map(len, completions)), without_end)


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", given: Given) -> StageData:
    return prepare_rows(config, tokenizer, given, lambda data, given: read_rows(data, given, rated), encode)


class KTOTrainer(SafeTrainer, trl.KTOTrainer):
    """TRL's KTOTrainer; a batch's completions, rotated by one, estimate its KL term."""

    def _prepare_dataset(self, dataset: "Dataset", tokenizer: object, args: trl.KTOConfig, name: str) -> "Dataset":
        def rotate(rows: JsonObject) -> JsonObject:
            return {"KL_completion_ids": [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]}

        return dataset.map(rotate, batched=True, batch_size=args.per_device_train_batch_size)


def build(context: StageContext, model: "PreTrainedModel") -> KTOTrainer:
    config, data = context.config, context.data
    return KTOTrainer(
        model=model,
        ref_model=None if config.model.use_peft else load_causal_lm(config.model, context.tokenizer, context.base),
        args=trl_config(trl.KTOConfig, trainer_arguments(config, context.folder.path, data.test is not None)),
        train_dataset=data.train.dataset,
        eval_dataset=data.test.dataset if data.test else None,
        processing_class=context.tokenizer,
        peft_config=lora_config(config.model, model),
    )


# models, memory and steps are those of DPO: a policy, and what it starts from as reference
STAGE = dpo.STAGE._replace(prepare=prepare, build=build, preflight=no_preflight, evaluate_model=sft.evaluate_model)
