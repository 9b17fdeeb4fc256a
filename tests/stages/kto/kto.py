"""Kahneman-Tversky optimisation: TRL's KTOTrainer on single completions that were liked or disliked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import trl

from posttrain.config.schema import Config, DataConfig
from posttrain.data.chat import ChatEncoder, Segment
from posttrain.data.encode import ColumnType, EncodedRow, TokenIds, response_start, room_for
from posttrain.data.formats import Prompt, require_columns
from posttrain.data.messages import as_messages, check_turns
from posttrain.data.splits import Reader
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.runs.safe_trainer import SafeTrainer
from posttrain.stages import dpo, sft
from posttrain.stages.base import DataSources, StageContext, StageData, no_preflight, prepare_rows
from posttrain.values import Fields, JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rated(data: DataConfig) -> Reader[Prompt]:
    """Reads rows of a prompt, its completion, and whether that was liked."""

    def make(row: Fields, where: str, others: Fields) -> Prompt:
        require_columns(row, ("prompt", "completion", "label"), "rating")
        prompt = as_messages(row["prompt"], "user", "prompt")
        completion = as_messages(row["completion"], "assistant", "completion")
        check_turns([*prompt, *completion])
        if not isinstance(row["label"], bool):
            raise ValueError(f"'label' must be true or false, got {row['label']!r}")
        return Prompt(prompt, where, {"completion": completion, "label": row["label"]})

    return Reader(data, make)


@dataclass(frozen=True)
class RatedEncoding:
    """Rows of `prompt_ids`, `completion_ids` and `label`."""

    max_length: int
    overlength: str
    types: ClassVar[dict[str, ColumnType]] = {"prompt_ids": "ids", "completion_ids": "ids", "label": "flag"}

    def segments(self, encoder: ChatEncoder, row: Prompt) -> list[list[Segment]]:
        return [encoder.answer(row.prompt, row.columns["completion"])]

    def columns(self, row: Prompt, encoded: list[TokenIds]) -> EncodedRow:
        [(ids, labels)] = encoded
        start = response_start(labels, 0)
        end = room_for(len(ids), start, self.max_length, self.overlength)
        columns = {"prompt_ids": ids[:start], "completion_ids": ids[start:end], "label": row.columns["label"]}
        return EncodedRow(columns, end, end, end - start, end < len(ids), end < len(ids))


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    return prepare_rows(config, tokenizer, sources, rated, RatedEncoding)


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
