"""What policies are compared by: numbers that need no model to compute, their names, and what they say in words."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from posttrain.metrics import catalogue
from posttrain.metrics.catalogue import GOLD, formatted
from posttrain.metrics.report_card import wilson
from posttrain.values import JsonObject

FILE = "evaluation.json"  # of a pipeline, in the folder of its run
REWARD = "reward"  # the score that is optimised; all others are reward functions that it has not seen
COMPARED = ("kl", "kl_bound", "response_length", "ended_by_eos", "distinct_1", "distinct_2", "perplexity")
ALPHA = 0.05  # above it, a difference may be chance
NO_DIFFERENCE = "no difference seen"
STDERR = "_stderr"  # after the name of a benchmark's metric: its standard error
ROUNDING = 1e-5  # of the largest score: the same completion, scored in another batch, is a tie

Scores = Sequence[float | None]  # of each prompt; None where a reward function does not apply


class Difference(NamedTuple):
    """One score of a policy against the first policy's."""

    policy: str
    first: str
    score: str
    by: Mapping[str, float]  # `paired`

    @property
    def way(self) -> int:
        """1 where the score rose beyond chance, -1 where it fell, else 0."""
        better, worse = self.by["better"], self.by["worse"]
        return 0 if self.by["p"] >= ALPHA or better == worse else 1 if better > worse else -1

    def __str__(self) -> str:
        by = self.by
        counts = f"{by['better']} better, {by['worse']} worse of {by['prompts']} prompts, p = {by['p']:.2g}"
        return f"{by['first']:.3f} → {by['mean']:.3f} ({counts})"


def name_of(policy: str) -> str:
    """What an evaluated policy is called beside others: by its folder, or `best of N`."""
    best = re.match(r"best of \d+", policy)
    return best[0] if best else Path(policy).name


def distinct(texts: Sequence[str], size: int) -> float:
    """Share of the n-grams of words in all completions that are different ones (Li et al. 2016, distinct-n)."""
    words = [text.split() for text in texts]
    grams = [gram for each in words for gram in (pairwise(each) if size == 2 else each)]
    return len(set(grams)) / len(grams) if grams else 0.0


def sign_test(better: int, worse: int) -> float:
    """The exact two-sided p-value that gains and losses are equally likely; of right and wrong it is McNemar's test.

    McNemar 1947, in the exact form of Fagerland et al. 2013, https://doi.org/10.1186/1471-2288-13-91
    """
    count = better + worse
    return float(min(1, 2 * sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean m of n values, and the normal interval for the true one with 95 % confidence: m ± 1.96 sd / √n."""
    if not values:
        return math.nan, math.nan, math.nan
    mean, spread = fmean(values), 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - spread, mean + spread


def measured(name: str, values: Scores, first: Scores | None = None) -> dict[str, float]:
    """Metrics of one score: its mean and interval, and on how many prompts it is better and worse than at `first`."""
    found = zip((name, f"{name}_low", f"{name}_high"), mean_interval([v for v in values if v is not None]), strict=True)
    if first is None:
        return dict(found)
    by = paired(values, first)
    return {**dict(found), f"{name}_better": by["better"], f"{name}_worse": by["worse"]}


def change(name: str, metrics: Mapping[str, float]) -> str:
    """`rose`, `fell` or `no difference seen` since the first evaluation, by the sign test; empty if nothing says it."""
    if not {f"{name}_better", f"{name}_worse"} <= metrics.keys():
        return ""
    better, worse = int(metrics[f"{name}_better"]), int(metrics[f"{name}_worse"])
    return NO_DIFFERENCE if sign_test(better, worse) >= ALPHA else "rose" if better > worse else "fell"


def over_optimised(metrics: Mapping[str, float], prefix: str = "") -> list[str]:
    """The eval reward functions that fell while the reward rose, both beyond chance."""
    if change(f"{prefix}{REWARD}", metrics) != "rose":
        return []
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(f"{prefix}{GOLD}")]
    return [name for name in names if change(f"{prefix}{name}", metrics) == "fell"]


def before_and_after(name: str, metrics: Mapping[str, float]) -> tuple[str, str, str]:
    """Cells of a table: a metric before and after a run with their intervals, and what has changed."""
    words = change(name, metrics)
    if words:
        better, worse = int(metrics[f"{name}_better"]), int(metrics[f"{name}_worse"])
        words += f" ({better} better, {worse} worse, p = {sign_test(better, worse):.2g})"
    return with_interval(name, metrics, "_before"), with_interval(name, metrics), words


def with_interval(name: str, metrics: Mapping[str, float], when: str = "") -> str:
    """A metric and its 95 % interval, where it has one."""
    value, low, high = (metrics.get(f"{name}{end}{when}", math.nan) for end in ("", "_low", "_high"))
    shown, *ends = (formatted(name, each, (high - low) / 2) for each in (value, low, high))
    return f"{shown} ({' to '.join(ends)})" if all(ends) else shown


def signs(mine: Scores, first: Scores) -> list[int | None]:
    """Of each prompt, whether the score is higher (1), lower (-1) or the same (0); None where one of the two is."""
    pairs = list(zip(mine, first, strict=True))
    even = ROUNDING * max((max(abs(a), abs(b)) for a, b in pairs if a is not None and b is not None), default=0)
    return [None if a is None or b is None else (a - b > even) - (b - a > even) for a, b in pairs]


def paired(mine: Scores, first: Scores) -> dict[str, float]:
    """One score of a policy against the first policy's, by prompt: means, wins (a tie is half a win), p-value."""
    pairs = [(a, b) for a, b in zip(mine, first, strict=True) if a is not None and b is not None]
    found = signs(mine, first)
    better, worse = found.count(1), found.count(-1)
    wins = better + (len(pairs) - better - worse) / 2
    low, high = wilson(wins, len(pairs))
    means = (math.fsum(values) / len(pairs) if pairs else math.nan for values in zip(*pairs, strict=True))
    mean, before = means if pairs else (math.nan, math.nan)
    shares = {"win_rate": wins / len(pairs) if pairs else math.nan, "win_rate_low": low, "win_rate_high": high}
    counts = {"better": better, "worse": worse, "prompts": len(pairs), "p": sign_test(better, worse)}
    return {"first": before, "mean": mean, **counts, **shares}


def rows(policies: Sequence[JsonObject]) -> list[tuple[str, list[str]]]:
    """Each number that any policy has: its name, and a cell for each policy; scores first, then wins by each."""
    scores = list(dict.fromkeys(name for each in policies for name in each["scores"]))
    found = [(label(name), [_mean(name, each["scores"].get(name, ())) for each in policies]) for name in scores]
    found += [
        (f"wins by {label(name)}", [_wins(each["against_first"].get(name)) for each in policies])
        for name in scores
        if any(name in each["against_first"] for each in policies)
    ]
    found += _benchmarks([each.get("benchmarks", {}) for each in policies])
    return found + [
        (_label(name), [formatted(name, each["metrics"].get(name)) for each in policies])
        for name in COMPARED
        if any(name in each["metrics"] for each in policies)
    ]


def _benchmarks(policies: Sequence[Mapping[str, Mapping[str, float]]]) -> list[tuple[str, list[str]]]:
    """A row for each metric of each task, with the normal interval of its standard error."""
    names = {(task, name): None for each in policies for task, found in each.items() for name in found}
    shown = [(task, name) for task, name in names if not name.endswith(STDERR)]
    return [(f"{task}: {name}", [_benchmark(name, each.get(task, {})) for each in policies]) for task, name in shown]


def _benchmark(name: str, found: Mapping[str, float]) -> str:
    value, spread = found.get(name, math.nan), 1.96 * found.get(f"{name}{STDERR}", math.nan)
    return with_interval(name, {name: value, f"{name}_low": value - spread, f"{name}_high": value + spread})


def label(score: str) -> str:
    """A score's name in tables."""
    return f"{score} (which is optimised)" if score == REWARD else score


def _label(metric: str) -> str:
    return catalogue.label(metric).replace("the reference", "the first policy")


def differences(policies: Sequence[JsonObject]) -> Iterator[Difference]:
    """Each score of each policy after the first: those that fell, then those that rose, then the rest."""
    for each in policies[1:]:
        found = [
            Difference(each["policy"], policies[0]["policy"], name, by)
            for name, by in each["against_first"].items()
            if by["prompts"]
        ]
        yield from sorted(found, key=lambda one: (-1, 1, 0).index(one.way))


def in_words(policies: Sequence[JsonObject]) -> Iterator[tuple[str, list[str]]]:
    """For each policy after the first: which scores fell, then which rose, then which did not change beyond chance."""
    verbs = {-1: " fell:", 1: " rose:", 0: f": {NO_DIFFERENCE},"}
    for policy, found in groupby(differences(policies), key=lambda each: each.policy):
        phrases = [f"{label(each.score)}{verbs[each.way]} {each}" for each in found]
        yield f"{policy} against {policies[0]['policy']}", phrases


def _mean(score: str, values: Scores) -> str:
    there = [value for value in values if value is not None]
    return with_interval(score, measured(score, there)) if there else ""


def _wins(by: Mapping[str, float] | None) -> str:
    return f"{by['win_rate']:.0%} ({by['win_rate_low']:.0%}–{by['win_rate_high']:.0%})" if by and by["prompts"] else ""
