"""Instruction rows that PPO learns beside its episodes (stage.ptx_coef): Ouyang et al. 2022, section 3.5."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.chat import IGNORED
from posttrain.data.encode import labels_of
from posttrain.rlhf.rollout_plan import RolloutPlan, prompts_of_rollout

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor


class InstructionBatch(NamedTuple):
    """Rows of an update, padded on the right."""

    inputs: "tuple[Tensor, Tensor, Tensor, Tensor]"  # ids, attention mask, positions; which tokens are of completions
    tokens: int  # of completions in all rows of the update, over all processes


class InstructionRows:
    """Prepared instruction rows, of which an update draws as many as it has episodes, by seed and its own number."""

    def __init__(self, rows: "Dataset", padding: int, seed: int, plan: RolloutPlan) -> None:
        self.ids, self.spans = rows.select_columns("input_ids"), rows.select_columns("spans")
        self.padding, self.seed = padding, seed
        self.plan = replace(plan, prompts=len(rows), rollout=plan.rollout // plan.mini_batches)

    def batch(self, update: int, part: int, parts: int, device: "torch.device") -> InstructionBatch:
        """Every `parts`-th row of an update, from number `part` on."""
        import torch
        from trl.trainer.utils import pad

        numbers = prompts_of_rollout(self.plan, self.seed, update)
        spans = self.spans[numbers]["spans"]
        ids, mine = self.ids[numbers[part::parts]]["input_ids"], spans[part::parts]
        labels = pad([torch.tensor(labels_of(*row)) for row in zip(ids, mine, strict=True)], padding_value=IGNORED)
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], padding_value=0).to(device)
        inputs = pad([torch.tensor(row) for row in ids], padding_value=self.padding).to(device)
        labels[:, 0] = IGNORED  # nothing comes before a text's first token, to say it from
        picked = (labels != IGNORED).flatten().nonzero()[:, 0].to(device)
        pieces = (piece for each in spans for piece in zip(each[::2], each[1::2], strict=True))
        tokens = sum(end - max(start, 1) for start, end in pieces)
        return InstructionBatch((inputs, mask, (mask.cumsum(-1) - 1).clamp(min=0), picked), tokens)
