"""Reward modelling: TRL's RewardTrainer on pairs, and a report card of what it has learned."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config
from posttrain.data.encode import Encoded, encode_pairs
from posttrain.data.formats import read_preferences
from posttrain.metrics.report_card import ScoredPair, card_table, report_card
from posttrain.models.generate import scores
from posttrain.models.load import load_reward_model
from posttrain.models.lora import lora_config
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import Judgement, Prepared, Stage, Work, prepare_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_pairs(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Prepared:
    """Read and encode the preference rows, for the reward model and for DPO alike."""
    return prepare_rows(config, tokenizer, read_preferences, encode_pairs)


def load(config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True) -> "PreTrainedModel":
    return load_reward_model(config.model, tokenizer, path, config.seed, quantised)


def conversations(encoded: Encoded) -> "Dataset":
    """The ids of both whole conversations of each pair: what a reward model reads, in training and ever after."""

    def join(row: dict[str, Any]) -> dict[str, list[int]]:
        return {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}

    return encoded.dataset.map(join, remove_columns="prompt_ids")


def build(
    config: Config, prepared: Prepared, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> Any:
    """The trainer: TRL's, with our checkpoints."""
    from trl import RewardConfig, RewardTrainer

    from posttrain.runs.safe_trainer import SafeTrainer

    class Trainer(SafeTrainer, RewardTrainer):
        pass

    trainer = Trainer(
        model=model,
        args=trl_config(RewardConfig, trainer_arguments(config, folder, prepared.test is not None)),
        train_dataset=conversations(prepared.train),
        eval_dataset=conversations(prepared.test) if prepared.test else None,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, model, "SEQ_CLS"),
    )
    if config.model.load_in_4bit or config.model.load_in_8bit:
        # TRL puts all that is trained beside quantised weights into bf16, the head among it, which reads what the model
        # computes in
        dtype = trainer.model.get_input_embeddings().weight.dtype
        for name, weight in trainer.model.named_parameters():
            if "score" in name and weight.requires_grad:
                weight.data = weight.data.to(dtype)
    return trainer


def judge(work: Work) -> Judgement:
    """The report card over held-out pairs."""
    test = work.prepared.test
    if test is None:
        return Judgement({})
    trainer = work.trainer
    model = trainer.trained()
    training = model.training
    model.eval()
    pad = work.prepared.encoder.tokenizer.pad_token_id
    read = trainer.eval_dataset
    found = {side: scores(model, list(read[side]), pad) for side in ("chosen_ids", "rejected_ids")}
    model.train(training)
    pairs = [
        ScoredPair(
            prompt=row.prompt[-1]["content"],
            chosen=row.chosen[-1]["content"],
            rejected=row.rejected[-1]["content"],
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_length=len(ids["chosen_ids"]),
            rejected_length=len(ids["rejected_ids"]),
        )
        for row, ids, chosen, rejected in zip(
            test.rows, test.dataset, found["chosen_ids"], found["rejected_ids"], strict=True
        )
    ]
    card = report_card(pairs, work.config.stage.best_accuracy)
    metrics = {
        "eval_loss": card["loss"],
        **{
            name: card[name]
            for name in ("accuracy", "accuracy_low", "mean_margin", "calibration_error", "length_correlation")
        },
    }
    return Judgement(metrics, files={"report_card.json": card}, table=list(card_table(card)))


STAGE = Stage(
    prepare=prepare_pairs,
    load=load,
    build=build,
    preflight=lambda work: None,  # a new head is to give scores of its own
    judge=judge,
    objective="accuracy",
    shown={"eval_loss": "held-out loss (Bradley–Terry)", "accuracy": "held-out accuracy", "mean_margin": "mean margin"},
    swept={
        "accuracy": "held-out accuracy",
        "mean_margin": "mean margin",
        "calibration_error": "calibration error",
        "length_correlation": "length correlation",
        "eval_loss": "held-out loss",
    },
)
