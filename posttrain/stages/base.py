"""What a stage is: its data made ready, its model, a trainer for it, and a judge of what it has learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.config.schema import Config, DataConfig
from posttrain.data.encode import ChatEncoder, Encoded, encode_splits
from posttrain.data.formats import Counts, Splits, left_out
from posttrain.data.sources import Problems
from posttrain.errors import ConfigError
from posttrain.models.load import Load, load_causal_lm, max_positions
from posttrain.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ANSWER_TOKENS = 96  # of an answer that is shown, where the stage does not say


@dataclass
class Prepared:
    """Everything that a stage knows before it loads a model."""

    encoder: ChatEncoder
    splits: Splits[Any]
    train: Encoded
    test: Encoded | None
    room: int  # tokens that prompt and response together may have
    new_tokens: int  # the most tokens that a generated answer may have


@dataclass
class Judgement:
    """What a model can do at one moment: numbers, and what else the stage wants to keep or show."""

    metrics: dict[str, float]
    answers: list[Any] = field(default_factory=list)  # evaluation.Answer, one for each row of the panel
    files: dict[str, Any] = field(default_factory=dict)  # file name in the run folder -> JSON content
    table: list[tuple[str, ...]] = field(default_factory=list)  # rows of a table of its own


class Work(NamedTuple):
    """A stage in the middle of a run, as its judge sees it."""

    config: Config
    prepared: Prepared
    trainer: Any
    panel: Sequence[Any]  # held-out rows whose prompts are answered before and after
    base: str  # path of the weights that the stage started from
    folder: RunFolder

    @property
    def new_tokens(self) -> int:
        """The most tokens that an answer may have."""
        return self.prepared.new_tokens


class Stage(NamedTuple):
    """One way to train."""

    prepare: Callable[[Config, "PreTrainedTokenizerBase"], Prepared]  # reads and checks the data, loads no model
    load: Load
    build: Callable[[Config, Prepared, "PreTrainedModel", "PreTrainedTokenizerBase", Path], Any]  # -> Trainer
    preflight: Callable[[Work], None]  # refuses a start that cannot be right
    judge: Callable[[Work], Judgement]  # called before the first step and after the last
    objective: str  # the metric that a sweep compares
    shown: dict[str, str]  # metric -> its name in the table of a run, in this order
    swept: dict[str, str]  # metric -> its name in the table of a sweep
    draw: Callable[[RunFolder], None] | None = None  # the picture of the run's course


def load_policy(
    config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True
) -> "PreTrainedModel":
    """The causal language model of a stage that trains one."""
    return load_causal_lm(config.model, tokenizer, path, quantised)


def prepare_rows(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    read: Callable[[DataConfig], Splits[Any]],
    encode: Callable[[ChatEncoder, Sequence[Any], Counts, int, str, Problems | None], Encoded],
    new_tokens: int | None = None,
) -> Prepared:
    """Read the rows of a format and encode them within stage.max_length, less what is kept free for an answer."""
    room = check_length(config)
    limit = room - (new_tokens or 0)
    encoder = ChatEncoder(tokenizer, config.data.allow_special_tokens)
    splits = read(config.data)
    dropped = Problems() if config.data.bad_rows == "drop" else None
    train, test = encode_splits(
        lambda rows, counts: encode(encoder, rows, counts, limit, config.data.overlength, dropped), splits, room
    )
    splits.notes += left_out(dropped) if dropped else []
    return Prepared(encoder, splits, train, test, room, new_tokens or min(ANSWER_TOKENS, max(room // 2, 1)))


def check_length(config: Config) -> int:
    """stage.max_length, if the model has positions for it.

    Raises:
        ConfigError: it has not.
    """
    limit = max_positions(config.model)
    if limit is not None and config.stage.max_length > limit:
        raise ConfigError(
            f"stage.max_length={config.stage.max_length} exceeds the {limit} positions of "
            f"{config.model.start}; set stage.max_length={limit} or less"
        )
    return int(config.stage.max_length)
