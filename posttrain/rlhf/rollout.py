"""The rollout buffer: what was generated, scored and estimated once, and is then learned from several times."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TRACED = 256  # tokens of a completion that are kept with their numbers
Trace = list[tuple[str, float | None, float]]  # each token with its log π/π_ref in nats, if known, and its advantage


def _nothing() -> "Tensor":
    import torch

    return torch.empty(0)


@dataclass
class RolloutBuffer:
    """The episodes of one process. P is the longest prompt, C the longest completion, E the number of episodes."""

    prompt_ids: "Tensor"  # (E, P), padded on the left
    prompt_mask: "Tensor"  # (E, P)
    completion_ids: "Tensor"  # (E, C), padded on the right
    completion_mask: "Tensor"  # (E, C)
    logps: "Tensor"  # (E, C), log π_old of each token of the completion
    values: "Tensor"  # (E, C), V_old before each token of the completion
    advantages: "Tensor"  # (E, C)
    returns: "Tensor"  # (E, C)
    ref_logps: "Tensor" = field(default_factory=_nothing)  # (E, C), log π_ref, where KL is part of the loss

    def take(self, episodes: Sequence[int]) -> "RolloutBuffer":
        """Some of the episodes, without the columns that are padding in all of them.

        What has not been computed yet stays empty.
        """
        import torch

        index = torch.tensor(list(episodes), device=self.prompt_ids.device)
        whole = {item.name: self.__dict__[item.name] for item in fields(self)}
        kept = {name: value[index] if len(value) else value.view(0, 0) for name, value in whole.items()}
        prompt = int(kept["prompt_mask"].sum(-1).max())
        completion = int(kept["completion_mask"].sum(-1).max())
        for name, value in kept.items():
            kept[name] = value[:, value.size(1) - prompt :] if name.startswith("prompt") else value[:, :completion]
        return RolloutBuffer(**kept)

    @classmethod
    def joined(cls, parts: "Sequence[RolloutBuffer]") -> "RolloutBuffer":
        """The episodes of several, as wide as the widest."""
        import torch

        def padded(name: str, value: "Tensor") -> "Tensor":
            if not len(value):
                return value
            room = max(vars(part)[name].size(1) for part in parts) - value.size(1)
            return torch.nn.functional.pad(value, (room, 0) if name.startswith("prompt") else (0, room))

        names = [item.name for item in fields(cls)]
        return cls(**{name: torch.cat([padded(name, vars(part)[name]) for part in parts]) for name in names})

    def traces(self, tokenizer: "PreTrainedTokenizerBase", log_ratio: "Tensor | None", episodes: int) -> list[Trace]:
        """Of the first episodes, the first tokens of the completion."""
        found = []
        for row, length in enumerate(self.completion_mask[:episodes].sum(-1).clamp(max=TRACED).tolist()):
            texts = [str(tokenizer.decode([token])) for token in self.completion_ids[row, :length].tolist()]
            ratios = [None] * length if log_ratio is None else [round(x, 4) for x in log_ratio[row, :length].tolist()]
            advantages = [round(x, 4) for x in self.advantages[row, :length].tolist()]
            found.append(list(zip(texts, ratios, advantages, strict=True)))
        return found

    @property
    def lengths(self) -> list[int]:
        """The tokens of each episode, prompt and completion together."""
        found: list[int] = (self.prompt_mask.sum(-1) + self.completion_mask.sum(-1)).tolist()
        return found

    @property
    def tokens(self) -> int:
        """How many tokens the completions have."""
        return int(self.completion_mask.sum())

    def save(self, path: Path) -> None:
        """As safetensors."""
        from safetensors.torch import save_file

        save_file({item.name: self.__dict__[item.name].contiguous() for item in fields(self)}, path)

    @classmethod
    def load(cls, path: Path, device: "torch.device") -> "RolloutBuffer":
        """What `save` wrote."""
        from safetensors.torch import load_file

        return cls(**{name: value.to(device) for name, value in load_file(path).items()})


def join(prompt_mask: "Tensor", completion_mask: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The attention mask of prompt and completion together, and each token's position counted from the first real one.

    Both (E, P + C). Models with learned positions (GPT-2) would otherwise count the padding on the left as well.
    """
    import torch

    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


class Inputs(TypedDict):
    """What a forward pass over episodes takes, (rows, tokens) each."""

    input_ids: "Tensor"
    attention_mask: "Tensor | None"
    position_ids: "Tensor"
    picked: "Tensor"  # (K), where the completions' tokens are in all rows, one after another, as in `completion_mask`


def laid_out(buffer: RolloutBuffer, packed: bool = False) -> Inputs:
    """A row to an episode, or all `packed` into one row without padding.

    A packed row has no attention mask: positions begin again with each episode, which keeps them apart.
    """
    import torch

    mask, positions = join(buffer.prompt_mask, buffer.completion_mask)
    ids = torch.cat([buffer.prompt_ids, buffer.completion_ids], dim=1)
    said = torch.cat([torch.zeros_like(buffer.prompt_mask), buffer.completion_mask], dim=1)
    if packed:
        ids, positions, said = (each[mask.bool()][None] for each in (ids, positions, said))
    return {
        "input_ids": ids,
        "attention_mask": None if packed else mask,
        "position_ids": positions,
        "picked": said.flatten().nonzero()[:, 0],
    }


def spread(picked: "Tensor", mask: "Tensor") -> "Tensor":
    """(K) values of the completions' tokens as (E, C), 0 on padding."""
    import torch

    return torch.zeros_like(mask, dtype=picked.dtype).masked_scatter(mask.bool(), picked)
