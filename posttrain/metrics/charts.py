"""The course of a PPO run as a picture, from its metrics.jsonl alone: reward, gold reward, KL and length by step."""

from pathlib import Path

from posttrain.runs.folder import read_lines

PANELS = {
    "reward": "reward",
    "gold": "gold reward",
    "kl": "KL from the reference (nats per answer)",
    "response_length": "response length (tokens)",
}


def draw_curves(metrics: Path, file: Path) -> None:
    """One panel each: the rollouts' own numbers, and those of answers to held-out prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read_lines(metrics)
    series = {
        name: {
            label: [(entry["step"], entry[key]) for entry in entries if key in entry]
            for label, key in (("rollouts", name), ("held-out prompts", f"eval_{name}"))
        }
        for name in PANELS
    }
    shown = [name for name, lines in series.items() if any(lines.values())]
    if not shown:
        return
    figure, panels = pyplot.subplots(1, len(shown), figsize=(3.6 * len(shown), 3), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], shown, strict=True):
        for (label, points), style in zip(series[name].items(), ("C0-", "C1o-"), strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set_title(PANELS[name], fontsize=10)
        axes.set_xlabel("step")
    panels[0][0].legend(fontsize=8)
    figure.savefig(file)
    pyplot.close(figure)
