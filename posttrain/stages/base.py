"""What a stage is: its data made ready, and a trainer for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.config import Config
from posttrain.data import Splits
from posttrain.encoding import ChatEncoder, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Prepared:
    """Everything that a stage knows before it loads a model."""

    encoder: ChatEncoder
    splits: Splits
    train: Encoded
    test: Encoded | None
    positions: int | None  # the model's limit on prompt and response together


class Stage(NamedTuple):
    """One way to train.

    prepare: (config, tokenizer) -> Prepared; reads and checks the data, loads no model.
    build: (config, prepared, model, tokenizer, folder) -> a trainer, ready to train.
    objective: the metric that a sweep compares.
    """

    prepare: Callable[[Config, "PreTrainedTokenizerBase"], Prepared]
    build: Callable[[Config, Prepared, "PreTrainedModel", "PreTrainedTokenizerBase", Path], Any]
    objective: str
