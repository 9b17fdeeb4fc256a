"""An end of training before its last step, once evaluations get no better: transformers' own, and its resume."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from posttrain.config.reserved import PATIENCE
from posttrain.config.schema import Config

if TYPE_CHECKING:
    from transformers import EarlyStoppingCallback, TrainerState


def early_stopping(config: Config) -> "Iterator[EarlyStoppingCallback]":
    """The callback, if the configuration asks for it; checkpoints keep how often it has waited."""
    from transformers import EarlyStoppingCallback

    patience = config.trainer.get(PATIENCE)
    if patience is not None:
        yield EarlyStoppingCallback(patience)


def has_lost_patience(state: "TrainerState") -> bool:
    """Whether a checkpoint is that of the step at which training was ended early."""
    kept = (state.stateful_callbacks or {}).get("EarlyStoppingCallback")
    return kept is not None and kept["attributes"][f"{PATIENCE}_counter"] >= kept["args"][PATIENCE]
