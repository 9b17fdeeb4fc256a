"""Instruction rows that PPO learns beside its episodes, which keeps what SFT has taught (stage.ptx_coef).

PPO-ptx: Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155
"""

from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.chat import IGNORED
from posttrain.data.encode import labels_of
from posttrain.rlhf.rollout_plan import drawn

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor


class Instructions(NamedTuple):
    """What a forward pass over instruction rows takes: (R, T) each, padded on the right, and C."""

    input_ids: "Tensor"
    attention_mask: "Tensor"
    position_ids: "Tensor"
    completion: int  # tokens from the first one that is learned to the end of the longest row


class InstructionBatch(NamedTuple):
    """Some of an update's instruction rows."""

    inputs: Instructions
    mask: "Tensor"  # (R, C), 1 on the tokens of completions
    tokens: int  # of completions in all of the update's rows, over all processes


class InstructionRows:
    """Prepared instruction rows, drawn in an order that is a function of seed and update."""

    def __init__(self, rows: "Dataset", padding: int, seed: int) -> None:
        self.ids, self.spans = rows.select_columns("input_ids"), rows.select_columns("spans")
        self.padding, self.seed = padding, seed

    def batch(self, update: int, size: int, part: int, parts: int, device: "torch.device") -> InstructionBatch:
        """Every `parts`-th of the `size` rows of an update, from number `part` on."""
        import torch
        from trl.trainer.utils import pad

        numbers = drawn(len(self.ids), size, self.seed, update)
        spans = self.spans[numbers]["spans"]
        ids, mine = self.ids[numbers[part::parts]]["input_ids"], spans[part::parts]
        first = max(min(each[0] for each in mine), 1)  # nothing comes before a text's first token, to say it from
        labels = pad([torch.tensor(labels_of(*row)) for row in zip(ids, mine, strict=True)], padding_value=IGNORED)
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], padding_value=0).to(device)
        inputs = pad([torch.tensor(row) for row in ids], padding_value=self.padding).to(device)
        learned = (labels[:, first:] != IGNORED).long().to(device)
        pieces = (piece for each in spans for piece in zip(each[::2], each[1::2], strict=True))
        tokens = sum(end - max(start, 1) for start, end in pieces)
        return InstructionBatch(
            Instructions(inputs, mask, (mask.cumsum(-1) - 1).clamp(min=0), learned.size(1)), learned, tokens
        )
