"""What policies are compared by: the numbers' names, and those that need no model to compute."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from posttrain.console import number
from posttrain.report_card import wilson

FILE = "evaluation.json"  # in the folder of the run
COMPARED = {
    "reward": "reward",
    "gold": "gold reward (eval_reward_functions)",
    "win_rate": "wins against the first policy",
    "kl": "KL from the first policy (nats per answer)",
    "response_length": "response length (tokens)",
    "ended_by_eos": "answers ended by the model itself",
    "distinct_1": "distinct words",
    "distinct_2": "distinct pairs of words",
    "perplexity": "perplexity of held-out responses",
}


def distinct(texts: Sequence[str], size: int) -> float:
    """Share of the n-grams of words in all answers that are different ones (Li et al. 2016, distinct-n)."""
    words = [text.split() for text in texts]
    grams = [gram for each in words for gram in (pairwise(each) if size == 2 else each)]
    return len(set(grams)) / len(grams) if grams else 0.0


def win_rate(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Share of prompts on which `mine` has the higher reward, a tie half, with its 95 % interval."""
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine, theirs, strict=True))
    low, high = wilson(wins, len(mine))
    return {"win_rate": wins / len(mine), "win_rate_low": low, "win_rate_high": high}


def rows(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """Each number that any policy has: its name, and a cell for each policy."""
    return [
        (label, [_cell(name, each) for each in metrics])
        for name, label in COMPARED.items()
        if any(name in each for each in metrics)
    ]


def _cell(name: str, metrics: Mapping[str, float]) -> str:
    if name == "win_rate" and name in metrics:
        return f"{metrics[name]:.0%} ({metrics['win_rate_low']:.0%}–{metrics['win_rate_high']:.0%})"
    return number(name, metrics.get(name))
