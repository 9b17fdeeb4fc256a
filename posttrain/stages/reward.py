"""Reward modelling: TRL's RewardTrainer on pairs, and a report card of what it has learned."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.config.stages import RewardStage
from posttrain.console import say
from posttrain.data.encode import PairEncoding
from posttrain.data.formats import preferences, preferences_and_ties
from posttrain.data.prepared import Encoded
from posttrain.devices import setup_device
from posttrain.errors import PosttrainError
from posttrain.metrics.report_card import IN_SHORT, ScoredPair, card_table, report_card
from posttrain.models.generate import scores
from posttrain.models.load import load_reward_model, load_tokenizer
from posttrain.models.lora import lora_config
from posttrain.models.meta import hold_model
from posttrain.models.resolve import beside, input_hashes, naming, resolve_path
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import DataSources, EvalResult, Stage, StageContext, StageData, plan_steps, prepare_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.stages.trainers import RewardModelTrainer


STEP_0_ROWS = 8
STEP_0_TOLERANCE = {"no": 1e-3, "bf16": 0.05, "fp16": 0.05}  # of the largest score


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """Read and encode the preference rows, both of each whole conversations."""
    assert isinstance(config.stage, RewardStage)
    halves = config.stage.ties == "half"
    format = preferences_and_ties if halves else preferences
    return prepare_rows(
        config, tokenizer, sources, format, partial(PairEncoding, keeps_ties=halves, min_margin=config.data.min_margin)
    )


def load(config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True) -> "PreTrainedModel":
    return load_reward_model(config.model, tokenizer, path, config.seed, quantised)


def build(context: StageContext, model: "PreTrainedModel") -> "RewardModelTrainer":
    """The trainer on whole conversations."""
    from trl import RewardConfig

    from posttrain.stages.trainers import RewardModelTrainer

    config, data = context.config, context.data
    assert isinstance(config.stage, RewardStage)
    trainer = RewardModelTrainer(
        label_smoothing=config.stage.label_smoothing,
        model=model,
        args=trl_config(RewardConfig, trainer_arguments(config, context.folder.path, data.test is not None)),
        train_dataset=data.train.dataset,
        eval_dataset=data.test.dataset if data.test else None,
        named={name: rows.dataset for name, rows in data.named.items()},
        processing_class=context.tokenizer,
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


def preflight(context: StageContext, trainer: "RewardModelTrainer") -> None:
    """A conversation has one score, in training as in an evaluation.

    Raises:
        PosttrainError: it has several, as with dropout.
    """
    rows = trainer.train_dataset["chosen_ids"][:STEP_0_ROWS]
    found = []
    for training in (False, True):
        trainer.model.train(training)
        with trainer.unwrapped_model() as model, trainer.compute_loss_context_manager():
            found.append(scores(model, rows, context.tokenizer.pad_token_id))
    gap = max(abs(one - other) for one, other in zip(*found, strict=True)) / (max(map(abs, found[0])) or 1)
    if not gap <= STEP_0_TOLERANCE[trainer.rounds_as]:
        raise PosttrainError(
            f"in training a conversation's score is off by up to {gap:.1%} from that in an evaluation: dropout, or "
            "another randomness, is on in this model, and no field of its config.json turns it off"
        )
    say(f"step 0: scores in training within {gap:.1e} of those in an evaluation")


def _pairs(part: Encoded, scores: Sequence[tuple[float, float]]) -> list[ScoredPair]:
    return [
        ScoredPair(
            prompt=row.prompt[-1]["content"],
            chosen=row.chosen[-1]["content"],
            rejected=row.rejected[-1]["content"],
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_length=len(ids["chosen_ids"]) - ids["prompt_length"],
            rejected_length=len(ids["rejected_ids"]) - ids["prompt_length"],
            group=row.group,
        )
        for row, ids, (chosen, rejected) in zip(part.rows, part.dataset, scores, strict=True)
        if not row.tie  # of which neither is right
    ]


def score_pairs(config: Config, sources: DataSources) -> list[ScoredPair]:
    """The scores that a finished reward model, the configuration's model, gives to all rows.

    Raises:
        ConfigError, DataError: the model is no reward model or has changed since its run wrote it; rows cannot be used.
    """
    data = replace(config.data, test_size=0.0)
    config = replace(config, data=data, model=beside(config.model, config.model.start))
    with naming("reward_model"):
        path = resolve_path(config.model)
        input_hashes(Path(path))
        tokenizer, _ = load_tokenizer(config.model)
        model = load_reward_model(config.model, tokenizer, path, config.seed, quantised=False, new_head=False)
    model = model.to(setup_device()).eval()
    prepared = prepare(config, tokenizer, sources).prepared
    found: list[ScoredPair] = []
    for part in (prepared.train, prepared.test):
        if part is not None:
            chosen, rejected = (
                scores(model, part.dataset[name][:], tokenizer.pad_token_id) for name in ("chosen_ids", "rejected_ids")
            )
            found += _pairs(part, list(zip(chosen, rejected, strict=True)))
    read, cut = (sum(vars(each)[name] for each in prepared.counts.values()) for name in ("read", "truncated"))
    say(f"{len(found):,} of {read:,} pairs are scored, {cut:,} of them cut to {config.stage.max_length} tokens")
    return found


def evaluate_model(context: StageContext, trainer: "RewardModelTrainer") -> EvalResult:
    """The report card over held-out pairs."""
    test = context.data.test
    if test is None:
        return EvalResult({})
    trainer.evaluate()
    assert isinstance(context.config.stage, RewardStage)
    pairs = _pairs(test, trainer.scores[""])
    if not pairs:  # ties alone
        return EvalResult({})
    card = report_card(pairs, context.config.stage.best_accuracy)
    named = {name: report_card(_pairs(rows, trainer.scores[name])) for name, rows in context.data.named.items()}
    if named:
        card["named"] = {name: {key: each[key] for key in IN_SHORT} for name, each in named.items()}
    metrics = {
        "eval_loss": card["loss"],
        **{
            name: card[name]
            for name in (
                "accuracy",
                "accuracy_low",
                "accuracy_high",
                "mean_margin",
                "calibration_error",
                "length_correlation",
            )
        },
    }
    return EvalResult(metrics, files={"report_card.json": card}, table=list(card_table(card)))


STAGE = Stage(
    prepare=prepare,
    plan=plan_steps,
    hold=partial(hold_model, scores=True),
    load=load,
    build=build,
    preflight=preflight,
    evaluate_model=evaluate_model,
)
