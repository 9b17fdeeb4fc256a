"""Kahneman-Tversky optimisation: TRL's KTOTrainer on single completions that were liked or not."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.config.stages import KTOStage
from posttrain.console import warn
from posttrain.data.encode import PairEncoding
from posttrain.data.formats import ratings
from posttrain.errors import ConfigError
from posttrain.models.meta import Batch, Holdings
from posttrain.stages import dpo
from posttrain.stages.base import DataSources, StageContext, StageData, prepare_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.data.division import Numbers
    from posttrain.stages.trainers import KTOTrainer

SIDES = ("chosen_ids", "rejected_ids")
EVEN = (0.99, 1.34)  # weighted liked to weighted other completions: Ethayarajh et al. 2024, equation 8, and rounding


def rows_with(pairs: "Dataset", side: str) -> "Numbers":
    """Which rows have a completion of this side."""
    there = pairs.data.column(side).is_valid().to_numpy()
    chosen = pairs._indices  # of a data set of some rows of its table
    numbers: Numbers = (there if chosen is None else there[chosen.column(0).to_numpy()]).nonzero()[0]
    return numbers


def completions_of(pairs: "Dataset") -> "Dataset":
    """A row for each completion, the other side None, the liked ones first; nothing is copied."""
    from datasets import concatenate_datasets

    (one, other) = SIDES
    return concatenate_datasets(
        [
            pairs.select(rows_with(pairs, one)).remove_columns(other),
            pairs.select(rows_with(pairs, other)).remove_columns(one),
        ]
    )


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """Read and encode the rated completions; a preference row is two of them.

    Raises:
        ConfigError: all of them were liked, or none was.
    """
    found = prepare_rows(config, tokenizer, sources, ratings, partial(PairEncoding, learns_tokens=True))
    stage = config.stage
    assert isinstance(stage, KTOStage)
    liked, others = (len(rows_with(found.train.dataset, side)) for side in SIDES)
    if not liked or not others:
        raise ConfigError(
            f"data.dataset_name={config.data.dataset_name}: {'all' if liked else 'none'} of the {liked + others:,} "
            "completions to train on were liked: there is nothing to tell apart; add others"
            + (", or train SFT on them" if liked else "")
        )
    ratio = liked * stage.desirable_weight / (others * stage.undesirable_weight)
    even = stage.desirable_weight / ratio
    found.prepared.notes.append(
        f"{liked:,} completions were liked, {others:,} were not"
        + ("" if EVEN[0] <= ratio <= EVEN[1] else f"; stage.desirable_weight={even:.3g} makes both count alike")
    )

    if found.test is not None and not all(len(rows_with(found.test.dataset, side)) for side in SIDES):
        warn("the held-out completions were all liked, or none was: there is no reward margin")

    # once each, as the first of the named sets may be what is held out
    parts = [part for part in (found.train, found.test, *found.named.values()) if part is not None]
    apart = {id(part): replace(part, dataset=completions_of(part.dataset)) for part in parts}
    found.train, found.named = apart[id(found.train)], {name: apart[id(part)] for name, part in found.named.items()}
    found.test = apart.get(id(found.test))
    return found


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """As DPO, and before it a forward of both models without gradients, of the completions for the KL term."""
    import torch

    held = dpo.hold(config, tokenizer)

    def loss(batch: Batch, completion: int) -> "torch.Tensor":
        with torch.no_grad():
            held.loss(batch, completion)
        return held.loss(batch, completion)

    return replace(held, loss=loss)


def build(context: StageContext, model: "PreTrainedModel") -> "KTOTrainer":
    """The trainer, its reference read from where the policy was."""
    from trl import KTOConfig

    from posttrain.stages.trainers import KTOTrainer

    return dpo.build_as(KTOTrainer, KTOConfig, context, model)


# models, checks and numbers are those of DPO: a policy, and what it starts from as reference
STAGE = dpo.STAGE._replace(prepare=prepare, hold=hold, build=build)
