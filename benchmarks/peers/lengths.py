"""Log-normal lengths of prompts and completions, the same ones for posttrain and for TRL's PPO."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMPLETION = (20.0, 0.7, 64)  # median, σ of the logarithm, the most; tokens
PROMPT = (16.0, 0.6, 48)


def draw(count: int, seed: int, median: float, sigma: float, most: int) -> list[int]:
    """Lengths of at least 2."""
    import numpy as np

    found = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return [min(max(int(length), 2), most) for length in found]


@contextmanager
def ended_completions(at_all: bool) -> Iterator[None]:
    """Let whatever GPT-2 generates meanwhile end with its EOS after drawn numbers of tokens, row by row."""
    import torch
    from transformers import GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

    generate, lengths = GPT2LMHeadModel.generate, iter(draw(10**6, 0, *COMPLETION))

    class End(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, rows: int, width: int) -> None:
            self.ends, self.width = torch.tensor([next(lengths) for _ in range(rows)]), width

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            due = self.ends <= input_ids.size(1) - self.width + 1
            scores[due] = -torch.inf
            scores[due, 0] = 0.0
            return scores

    def ended(self: Any, input_ids: Any, **options: Any) -> Any:
        ending = LogitsProcessorList([End(*input_ids.shape)])
        return generate(self, input_ids=input_ids, logits_processor=ending, **options)

    if at_all:
        GPT2LMHeadModel.generate = ended
    yield
    GPT2LMHeadModel.generate = generate
