"""Every metric that is shown: its name, its unit and how its value is written."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

GOLD = "gold/"  # before the name of each eval reward function of an online stage; alone it stands for all of them

# what stands after a metric's name: its value before training, the ends of its 95 % interval, and on how many prompts
# it is higher and lower than before training
DERIVED = ("_before", "_low", "_high", "_better", "_worse")


class Metric(NamedTuple):
    """How a metric is shown."""

    name: str
    unit: str = ""
    is_share: bool = False  # written as a percentage
    short: str = ""  # in a line of progress, where it is not the name


METRICS = {
    "loss": Metric("loss"),
    "train_loss": Metric("train loss"),
    "learning_rate": Metric("learning rate", short="lr"),
    "accuracy": Metric("accuracy", is_share=True),
    "rewards/accuracies": Metric("accuracy", is_share=True),
    "mean_margin": Metric("mean margin"),
    "calibration_error": Metric("calibration error"),
    "length_correlation": Metric("length correlation"),
    "reward": Metric("reward"),
    "penalised_reward": Metric("reward − kl_coef × KL"),
    **dict.fromkeys(("reward_margin", "rewards/margins"), Metric("reward margin")),
    "kl": Metric("KL from the reference", "nats per completion", short="KL"),
    "kl_bound": Metric("KL from the reference at most, ln N − (N−1)/N", "nats per completion"),
    "entropy": Metric("entropy", "nats per token"),
    "explained_variance": Metric("explained variance of the critic"),
    "frac_reward_zero_std": Metric("prompts whose completions all got the same reward", is_share=True),
    "vllm_difference": Metric("log-probabilities of vLLM and trainer apart", "nats per token"),
    "chosen_logp_change": Metric("chosen: log-probability since the start", "nats"),
    "rejected_logp_change": Metric("rejected: log-probability since the start", "nats"),
    "response_length": Metric("completion length", "tokens"),
    "ended_by_eos": Metric("completions ended by EOS", is_share=True),
    "distinct_1": Metric("distinct words", is_share=True),
    "distinct_2": Metric("distinct pairs of words", is_share=True),
    "perplexity": Metric("perplexity of held-out responses"),
}
# what to look for in a chart
SEE = {
    "loss": "It should fall. Held-out loss that turns up while training loss falls is overfitting.",
    "rewards/accuracies": "The share of pairs ranked as labelled; 50 % is chance.",
    "rewards/margins": "β times how much more likely liked completions have become than the others. It should rise.",
    "reward": "This is what is optimised. A rise counts as far as scores that are not trained on rise, too.",
    GOLD: "Not trained on. If it falls while the reward rises, the reward is over-optimised.",
    "kl": "How far the policy has gone from the reference. A sudden jump is an unstable update.",
    "response_length": "With a steady drift, the reward may be paying for length.",
    "entropy": "Near 0 completions hardly vary, and exploration has ended.",
    "explained_variance": "1: the critic predicts returns exactly. 0: no better than their mean.",
    "frac_reward_zero_std": "Nothing is learned from these prompts: they are too easy or too hard for the policy.",
    "vllm_difference": "It should stay near 0 throughout.",
}
# what a line of progress says, in this order
PROGRESS = ("reward", "kl", "loss", "eval_loss", "eval_reward", "eval_kl", "learning_rate")


OF_NAMED = ("loss", "accuracy", "rewards/accuracies", "reward", "kl")  # what is shown of each set of data.eval


def of_sets(keys: Iterable[str], sets: Iterable[str]) -> list[str]:
    """The same held-out keys of each set of data.eval: `eval_<set>_loss` beside `eval_loss`."""
    return [f"eval_{name}_{key.removeprefix('eval_')}" for name in sets for key in keys]


def label(key: str, sets: Iterable[str] = ()) -> str:
    """The name and unit of a metric: `eval_` before a key says that it is held out, and `gold/` names a function.

    `sets` are those of data.eval, whose name stands between the two.
    """
    for name in sets:
        if key.startswith(f"eval_{name}_"):
            return f"{name}: {label('eval_' + key.removeprefix(f'eval_{name}_'))}"
    metric = metric_of(key)
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{'held-out ' if key.startswith('eval_') else ''}{metric.name}{unit}"


def metric_of(key: str, sets: Iterable[str] = ()) -> Metric:
    """How the metric of a key is shown, held out on one of `sets` or not."""
    for name in sets:
        key = key.replace(f"eval_{name}_", "eval_", 1)
    return METRICS[key.removeprefix("eval_")] if GOLD not in key else Metric(key.rpartition(GOLD)[2])


def lower_is_better(key: str) -> bool:
    """Whether a metric has got better where it fell: losses and KL, held out on a set of data.eval or not."""
    return key.rpartition("_")[2] in ("loss", "kl")


def short_label(key: str) -> str:
    """As `label`, for a line of progress."""
    metric = METRICS[key.removeprefix("eval_")]
    return f"{'held-out ' if key.startswith('eval_') else ''}{metric.short or metric.name}"


def formatted(key: str, value: float | None, spread: float = 0.0) -> str:
    """A value for a table, with the digits that it deserves: two of its uncertainty `spread`, or four of its own.

    Shares are percentages, and what is missing is nothing.
    """
    if value is None or math.isnan(value):
        return ""
    of_named = key.endswith(("_accuracy", "_rewards/accuracies"))
    if of_named or (key in METRICS and METRICS[key].is_share):
        return f"{value:.1%}"
    size, digits = (spread, 2) if spread > 0 else (abs(value), 4)
    places = digits - 1 - math.floor(math.log10(size)) if 0 < size < math.inf else 0
    return f"{value:.{min(max(places, 0), 4)}f}"


def with_gold_apart(shown: Iterable[str], metrics: Collection[str]) -> list[str]:
    """The keys that are shown, each eval reward function that the metrics hold in place of `gold/`."""
    derived = {f"{key}{suffix}" for key in metrics for suffix in DERIVED}
    names = [key.removeprefix(GOLD) for key in metrics if key.startswith(GOLD) and key not in derived]
    return [each for key in shown for each in ([f"{key}{name}" for name in names] if key.endswith(GOLD) else [key])]


def charts_with_gold_apart(charts: Iterable[Sequence[str]], metrics: Collection[str]) -> list[Sequence[str]]:
    """As `with_gold_apart`, a chart for each function."""
    return [
        part
        for keys in charts
        for part in ([[key] for key in with_gold_apart(keys, metrics)] if keys[0].endswith(GOLD) else [keys])
    ]
