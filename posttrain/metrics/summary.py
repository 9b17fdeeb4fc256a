"""What was trained, what got better, what got worse and where no difference is seen, in a sentence each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.config.stages import PAIRS, STAGES
from posttrain.console import counted
from posttrain.metrics.catalogue import GOLD, label, lower_is_better
from posttrain.metrics.comparison import (
    NO_DIFFERENCE,
    REWARD,
    Difference,
    before_and_after,
    change,
    name_of,
    with_interval,
)
from posttrain.metrics.several import Group

NOTHING = "nothing beyond chance"
UNTESTED = "no significance test"  # two means, of which no spread is known
CHANCE = 0.5  # the accuracy of a guess


class Trained(NamedTuple):
    """A finished stage, as its manifest has it."""

    name: str  # of its folder
    stage: str
    model: str  # it started from
    rows: int
    epochs: float | None  # how often it went through them; unknown of a run of an older posttrain
    sources: Sequence[str]
    rewarded_by: str  # the reward model and the reward functions, if there are any
    metrics: Mapping[str, float]


class Sentence(NamedTuple):
    """One of them, in parts that a page can put one below the other."""

    title: str
    parts: Sequence[str]

    def __str__(self) -> str:
        return f"{self.title}: {'; '.join(self.parts)}."


class Claim(NamedTuple):
    """One number that rose (1) or fell (-1) in what it stands for, or did not change beyond chance (0)."""

    text: str
    way: int


def sentences(trained: Sequence[Trained], differences: Sequence[Difference]) -> list[Sentence]:
    """The sentences about the stages of a run, and what an evaluation of its policies has found."""
    names = [each.name for each in trained]
    differences = [each for each in differences if name_of(each.policy) in names]  # best-of-N was not trained
    evaluated = {name_of(each.policy) for each in differences}
    claims = [claim for each in trained for claim in _claims(each, each.name in evaluated)]
    claims += map(_of_difference, sorted(differences, key=lambda each: each.score == REWARD))
    better, worse, same = ([claim.text for claim in claims if claim.way == way] for way in (1, -1, 0))
    return [
        Sentence("Trained", [f"{trained[0].model} by {_how(trained[0])}", *map(_how, trained[1:])]),
        Sentence("Better", better or [NOTHING]),
        Sentence("Worse", worse or [NOTHING]),
        *([Sentence(NO_DIFFERENCE.capitalize(), same)] if same else []),
    ]


def of_points(one: Trained, points: Sequence[Group]) -> list[Sentence]:
    """The same of a sweep: what each point was, and the best and the worst by the objective, seeds together."""
    key, count = STAGES[one.stage].objective, sum(len(point.runs) for point in points)
    there = sorted((point for point in points if point.cell(key)), key=lambda point: point.number(key)[0])
    ends = [f"{point.name}, {label(key)} {point.cell(key)}" for point in there] or ["unknown"]
    worst, best = (ends[-1], ends[0]) if lower_is_better(key) else (ends[0], ends[-1])
    if there and there[0].number(key)[0] == there[-1].number(key)[0]:
        worst = best = f"none: all points have {label(key)} {there[0].cell(key)}"
    trained = f"{one.model} {count} times by {_how(one._replace(name=one.stage))}"
    return [Sentence("Trained", [trained]), Sentence("Best", [best]), Sentence("Worst", [worst])]


def _how(stage: Trained) -> str:
    spec = STAGES[stage.stage]
    unit = "prompts" if spec.is_online else spec.unit
    rows = counted(stage.rows, unit.removesuffix("s"))
    passes = f", {counted(stage.epochs, 'epoch', '.3g')}" if stage.epochs else ""
    # sampled pairs are told from a file of the same name by their folder
    parts = [Path(source).parts[-2:] for source in stage.sources]
    files = ", ".join("/".join(each if each[0].startswith(PAIRS) else each[-1:]) for each in parts)
    rewarded = f", rewarded by {stage.rewarded_by}" if stage.rewarded_by else ""
    return f"{stage.name} on {rows} of {files}{passes}{rewarded}"


def _claims(stage: Trained, is_evaluated: bool) -> Iterator[Claim]:
    """What a stage has changed by its own held-out numbers: those that a test speaks for, or else its headline.

    Of a stage whose policy `is_evaluated` beside others the evaluation has the former, of more prompts.
    """
    metrics, spec = stage.metrics, STAGES[stage.stage]
    scores = [key.removesuffix("_better") for key in metrics if key.endswith("_better")]
    tested = [key for key in scores if key == REWARD or key.startswith(GOLD)]  # not those of the sets of data.eval
    for key in [] if is_evaluated else sorted(tested, key=lambda key: key == REWARD):
        before, after, words = before_and_after(key, metrics)
        way = {"rose": 1, "fell": -1, NO_DIFFERENCE: 0}[change(key, metrics)]
        optimised = f" (which {spec.title} optimises)" if key == REWARD else ""
        found = f", {words}" if way else words.removeprefix(NO_DIFFERENCE)  # with which their sentence begins
        yield Claim(f"{stage.name}: {label(key)}{optimised} {before} → {after}{found}", way)
    key = spec.headline
    if tested or key not in metrics:
        return
    rows = f" on {counted(int(metrics['eval_rows']), spec.unit.removesuffix('s'))}" if metrics.get("eval_rows") else ""
    before = with_interval(key, metrics, "_before")
    text = f"{stage.name}: {label(key)} {f'{before} → ' if before else ''}{with_interval(key, metrics)}{rows}"
    if f"{key}_low" in metrics:
        low, high = metrics.get(f"{key}_low_before", CHANCE), metrics.get(f"{key}_high_before", CHANCE)
        way = 1 if metrics[f"{key}_low"] > high else -1 if metrics[f"{key}_high"] < low else 0
        yield Claim(text if before else f"{text}, where chance is {CHANCE:.0%}", way)
    elif before and (gain := metrics[key] - metrics[f"{key}_before"]):
        yield Claim(f"{text} ({UNTESTED})", 1 if (gain < 0) == lower_is_better(key) else -1)


def _of_difference(found: Difference) -> Claim:
    by, policy, first = found.by, name_of(found.policy), name_of(found.first)
    wins = f"wins {by['win_rate']:.0%} ({by['win_rate_low']:.0%} to {by['win_rate_high']:.0%}) against {first}"
    score = "the reward that is optimised" if found.score == REWARD else found.score
    return Claim(f"{policy}: {score} {found}, {wins}", found.way)
