"""Whether a reward model is good enough to optimise against, from its scores of held-out pairs."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev, quantiles

import numpy as np

from posttrain.values import JsonObject

# A model is fit when, of held-out pairs, the lower end of its accuracy's interval, its calibration error and the
# part of its score that length explains are within these.
THRESHOLDS = {"accuracy_low": 0.6, "calibration_error": 0.15, "length_correlation": 0.7}
# A kind of pair speaks against a model where its accuracy's interval reaches down to CHANCE, if it has ENOUGH pairs: a
# model that is right about 75 % would be called weak by chance in 3 % of cases with 50 pairs, in 20 % with 30.
CHANCE, ENOUGH = 0.5, 50
FIT = "fit to optimise against"
BINS = 10
GROUP = "group: "  # how the kind of a pair begins that the data name
FEW_GROUPS = 30
SCORE_BINS, LENGTH_PARTS = 24, 6  # of the pictures
KEPT = 500  # held-out pairs with their texts, the most confidently wrong first


@dataclass
class ScoredPair:
    """The rewards that a model gave to the two completions of one held-out pair, and their lengths in tokens."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    group: str | None = None  # which kind of pair, where the data says so

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    @property
    def kinds(self) -> list[str]:
        """The kinds of pair that it is of; the same if chosen and rejected change places."""
        longer = max(self.chosen_length, self.rejected_length, 1)
        apart = abs(self.chosen_length - self.rejected_length) / longer
        one, other = (Counter(text.split()) for text in (self.chosen, self.rejected))
        words = max((one - other).total(), (other - one).total())
        return [
            *([f"{GROUP}{self.group}"] if self.group is not None else []),
            f"lengths: {'0 to 10 %' if apart <= 0.1 else '10 to 50 %' if apart <= 0.5 else 'over 50 %'} apart",
            f"words that differ: {'0 or 1' if words <= 1 else '2 to 5' if words <= 5 else 'over 5'}",
        ]


@dataclass
class Slice:
    """A reward model's accuracy on one kind of pair, with its 95 % interval."""

    kind: str
    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.accuracy_low:.1%} to {self.accuracy_high:.1%}) of {self.pairs:,} pairs"


def wilson(successes: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence (Wilson 1927), for `successes` of `count`."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's r; 0 where either does not vary."""
    mean_one, mean_other = fmean(one), fmean(other)
    covariance = sum((x - mean_one) * (y - mean_other) for x, y in zip(one, other, strict=True))
    scale = math.sqrt(sum((x - mean_one) ** 2 for x in one) * sum((y - mean_other) ** 2 for y in other))
    return covariance / scale if scale > 0 else 0.0


def sigmoid(value: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def reliability(margins: Sequence[float]) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error of σ(|margin|) as the probability of being right, and its bins (Guo et al. 2017)."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for margin in margins:
        if margin != 0:
            confidence = sigmoid(abs(margin))
            bins[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append(margin)
    rows = [
        {
            "pairs": len(held),
            "confidence": fmean(sigmoid(abs(margin)) for margin in held),
            "accuracy": fmean(margin > 0 for margin in held),
        }
        for held in bins
        if held
    ]
    total = sum(row["pairs"] for row in rows)
    error = sum(row["pairs"] / total * abs(row["accuracy"] - row["confidence"]) for row in rows) if total else 0.0
    return error, rows


def _distribution(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "mean": fmean(values),
        "sd": pstdev(values),
        "min": min(values),
        "quartile_1": low,
        "median": middle,
        "quartile_3": high,
        "max": max(values),
    }


def _histograms(pairs: Sequence[ScoredPair]) -> dict[str, list[float]]:
    """How many chosen and rejected completions have a score in each of SCORE_BINS bins of equal width."""
    scores = {"chosen": [pair.chosen_score for pair in pairs], "rejected": [pair.rejected_score for pair in pairs]}
    _, edges = np.histogram([*scores["chosen"], *scores["rejected"]], SCORE_BINS)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in scores.items()}
    return {"edges": edges.tolist(), **counts}


def _by_length(pairs: Sequence[ScoredPair]) -> list[dict[str, float]]:
    """The accuracy of pairs that are alike in how many tokens chosen is longer than rejected: parts of equal size."""
    ordered = sorted(pairs, key=lambda pair: pair.chosen_length - pair.rejected_length)
    found = []
    for part in np.array_split(np.arange(len(pairs)), min(LENGTH_PARTS, len(pairs))):
        mine = [ordered[place] for place in part]
        right = sum(pair.margin > 0 for pair in mine)
        low, high = wilson(right, len(mine))
        apart = fmean(pair.chosen_length - pair.rejected_length for pair in mine)
        found.append({"difference": apart, "pairs": len(mine), "accuracy": right / len(mine), "low": low, "high": high})
    return found


def _first_wins(pair: ScoredPair) -> bool:
    """What a rule scores that knows nothing: the completion whose text happens to come first by its hash."""
    first, second = (hashlib.sha256(text.encode()).digest() for text in (pair.chosen, pair.rejected))
    return first < second


def slices(pairs: Sequence[ScoredPair]) -> Iterator[Slice]:
    """The accuracy on each kind of pair that not all of them are of."""
    found: dict[str, list[bool]] = {}
    for pair in pairs:
        for kind in pair.kinds:
            found.setdefault(kind, []).append(pair.margin > 0)
    for kind, right in sorted(found.items()):
        if len(right) < len(pairs):
            yield Slice(kind, len(right), fmean(right), *wilson(sum(right), len(right)))


def report_card(pairs: Sequence[ScoredPair], best_accuracy: float | None = None) -> JsonObject:
    """Judge a reward model by its scores of held-out pairs.

    Shares are over pairs, not over batches; a tie is neither right nor wrong but counts among the pairs.
    `best_accuracy` is the share of labels known to be right, where it is known.
    """
    count = len(pairs)
    margins = [pair.margin for pair in pairs]
    right, ties = sum(margin > 0 for margin in margins), sum(margin == 0 for margin in margins)
    low, high = wilson(right, count)
    lengths = [pair.chosen_length - pair.rejected_length for pair in pairs]
    longer = fmean(0.5 if length == 0 else float(length > 0) for length in lengths)
    error, bins = reliability(margins)
    by_length = correlation(
        [score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)],
        [float(length) for pair in pairs for length in (pair.chosen_length, pair.rejected_length)],
    )
    card: JsonObject = {
        "pairs": count,
        "accuracy": right / count,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": ties,
        "mean_margin": fmean(margins),
        "loss": fmean(math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0) for margin in margins),
        "best_accuracy": best_accuracy,
        "baselines": {"longer_wins": longer, "shorter_wins": 1 - longer, "first_wins": fmean(map(_first_wins, pairs))},
        "length_correlation": by_length,
        "calibration_error": error,
        "reliability": bins,
        "chosen": _distribution([pair.chosen_score for pair in pairs]),
        "rejected": _distribution([pair.rejected_score for pair in pairs]),
        "scores": _histograms(pairs),
        "by_length": _by_length(pairs),
        "lowest_margins": [asdict(pair) for pair in sorted(pairs, key=lambda pair: pair.margin)[:KEPT]],
        "thresholds": THRESHOLDS | {"chance": CHANCE, "enough_pairs": ENOUGH},
    }
    by_kind = list(slices(pairs))
    words, reasons = verdict(card, by_kind)
    return card | {"slices": [asdict(each) for each in by_kind], "verdict": words, "reasons": reasons}


def verdict(card: JsonObject, by_kind: Iterable[Slice] = ()) -> tuple[str, list[str]]:
    """The verdict in words, and what speaks against the model, the worst kinds of pair first."""
    null = max(card["baselines"]["longer_wins"], card["baselines"]["shorter_wins"])
    if card["accuracy_low"] <= null:
        return "no better than length", [
            f"its accuracy may be as low as {card['accuracy_low']:.0%}, and length alone is right about {null:.0%}"
        ]
    reasons = []
    failed = [each for each in by_kind if each.pairs >= ENOUGH and each.accuracy_low <= CHANCE]
    for each in sorted(failed, key=lambda each: each.accuracy_low)[:3]:
        reasons.append(f"on {each.kind} it is right in {each}, which may be chance")
    if card["accuracy_low"] < THRESHOLDS["accuracy_low"]:
        reasons.append(f"its accuracy may be as low as {card['accuracy_low']:.0%}")
    if card["calibration_error"] > THRESHOLDS["calibration_error"]:
        reasons.append(f"its margins are off as probabilities by {card['calibration_error']:.2f}")
    if abs(card["length_correlation"]) > THRESHOLDS["length_correlation"]:
        reasons.append(f"its score follows length (correlation {card['length_correlation']:.2f})")
    return ("weak" if reasons else FIT), reasons


# what is kept of the card of a set of data.eval
IN_SHORT = ("pairs", "accuracy", "accuracy_low", "accuracy_high", "ties", "mean_margin", "loss")


def card_table(card: JsonObject) -> list[tuple[str, str]]:
    """The card's lines for a person."""
    accuracy = f"{card['accuracy']:.1%} ({card['accuracy_low']:.1%} to {card['accuracy_high']:.1%})"
    rows = [
        ("pairs", f"{card['pairs']:,}, {card['ties']} of them ties"),
        ("accuracy (95 % interval)", accuracy),
    ]
    if card["best_accuracy"] is not None:
        rows.append(("best possible accuracy", f"{card['best_accuracy']:.1%}, so {_near(card)}"))
    for name, each in card.get("named", {}).items():
        interval = f"{each['accuracy']:.1%} ({each['accuracy_low']:.1%} to {each['accuracy_high']:.1%})"
        rows.append((f"{name}: accuracy", f"{interval} of {each['pairs']:,} pairs"))
    by_kind = [Slice(**each) for each in card.get("slices", ())]
    groups = [each for each in by_kind if each.kind.startswith(GROUP)]
    few = groups if len(groups) <= FEW_GROUPS else []  # the sections of a benchmark: each is shown
    rows += [(each.kind, f"accuracy {each}") for each in by_kind if each.pairs >= ENOUGH or each in few]
    if groups:
        mean = fmean(each.accuracy for each in groups)
        rows.append(("mean of the groups", f"accuracy {mean:.1%} of {len(groups)} groups, each counted once"))
    base = card["baselines"]
    rows += [
        ("the longer completion is right", f"{base['longer_wins']:.1%} (the shorter: {base['shorter_wins']:.1%})"),
        ("a guess, by a hash of the text, is right", f"{base['first_wins']:.1%}"),
        ("mean margin", f"{card['mean_margin']:.3f}"),
        ("reward against length", f"correlation {card['length_correlation']:+.2f}"),
        ("calibration error", f"{card['calibration_error']:.3f}"),
        ("score of chosen", f"{card['chosen']['mean']:.2f} ± {card['chosen']['sd']:.2f}"),
        ("score of rejected", f"{card['rejected']['mean']:.2f} ± {card['rejected']['sd']:.2f}"),
        ("verdict", card["verdict"] + (f": {'; '.join(card['reasons'])}" if card["reasons"] else "")),
        (
            "fit means",
            f"accuracy surely ≥ {THRESHOLDS['accuracy_low']:.0%} and above length alone, calibration error ≤ "
            f"{THRESHOLDS['calibration_error']}, correlation with length within ±{THRESHOLDS['length_correlation']}, "
            f"accuracy surely above {CHANCE:.0%} on each kind of pair of which there are at least {ENOUGH}",
        ),
    ]
    return rows


def _near(card: JsonObject) -> str:
    reached = (card["accuracy"] - 0.5) / (card["best_accuracy"] - 0.5)
    return f"{reached:.0%} of the way there from guessing"
