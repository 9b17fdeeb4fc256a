"""Several runs of one stage: seeds together, numbers over keys, curves over one another; how charts are drawn."""

import json
import re
from pathlib import Path

import pytest

from posttrain.metrics.charts import Series, card_charts, chart_of, curves, draw
from posttrain.metrics.report_card import ScoredPair, report_card
from posttrain.metrics.several import Run, groups, over_keys, over_kl, over_one_another


def run(name: str, log: Path = Path("none"), reward: float = 0.0, **settings: object) -> Run:
    return Run(name, settings, {"reward": reward, "reward_low": reward - 1, "reward_high": reward + 1}, log)


def test_seeds_are_a_mean_and_its_standard_deviation() -> None:
    runs = [run(f"r{n}", reward=float(n), seed=n, beta=0.1) for n in (1, 2, 3)] + [run("alone", reward=7.0, beta=0.3)]
    one, other = groups(runs)
    assert [len(one.runs), len(other.runs)] == [3, 1]
    assert one.number("reward") == (2.0, 1.0, 3.0)
    assert other.number("reward") == (7.0, 6.0, 8.0)
    assert [one.cell("reward"), other.cell("reward"), other.cell("kl")] == ["2.0 ± 1.0", "7.0 (6.0 to 8.0)", ""]
    assert one.settings == {"beta": 0.1}


def test_a_number_is_drawn_over_its_key_on_a_log_axis_where_that_spans_a_decade() -> None:
    runs = [run(f"{beta} {kind}", reward=beta, beta=beta, kind=kind) for kind in "ab" for beta in (10, 0.1, 1)]
    [chart] = over_keys(groups(runs), ["reward"])
    assert chart.is_log
    assert chart.x == "beta"
    assert [series.name for series in chart.series] == ["kind=a", "kind=b"]
    assert chart.series[0].points == [(0.1, 0.1), (1.0, 1.0), (10.0, 10.0)]
    assert chart.series[0].ends[1] == (0.0, 2.0)
    assert not list(over_keys(groups([run("a", beta=0.1, lr=1), run("b", beta=0.2, lr=2)]), ["reward"]))
    [chart] = over_keys(groups([run("a", beta=0.1), run("b", beta=0.2)]), ["reward"])
    assert not chart.is_log
    assert not list(over_keys(groups([run("a", kind="x"), run("b", kind="y")]), ["reward"]))
    seeds = [run(f"{beta}{seed}", reward=seed, beta=beta, seed=seed) for beta in (1, 2) for seed in (3, 5)]
    [chart] = over_keys(groups(seeds), ["reward"])
    assert chart.series[0].points == [(1.0, 4.0), (2.0, 4.0)]
    assert chart.series[0].ends[0] == pytest.approx((4 - 2**0.5, 4 + 2**0.5))


def test_what_was_gained_is_drawn_over_its_kl() -> None:
    runs = [Run(f"{kl}", {}, {"kl": kl, "reward": kl * 2, "reward_low": 0, "reward_high": 9}, Path()) for kl in (3, 1)]
    [chart] = over_kl(runs, "reward", [(0.0, 0.0), (4.0, 9.0)])
    assert chart.names == ["1", "3"]
    assert [series.points for series in chart.series] == [[(0.0, 0.0), (4.0, 9.0)], [(1, 2), (3, 6)]]
    assert chart.series[1].ends == [(0, 9), (0, 9)]
    assert not list(over_kl(runs[:1], "reward"))
    assert not list(over_kl(runs, "accuracy"))


def test_curves_lie_over_one_another_and_seeds_have_one_colour(tmp_path: Path) -> None:
    runs = []
    for number, (beta, seed) in enumerate([(1, 1), (1, 2), (2, 1)]):
        log = tmp_path / f"{number}.jsonl"
        log.write_text("".join(json.dumps({"step": step, "reward": step * number}) + "\n" for step in range(3)))
        runs.append(run(str(number), log, beta=beta, seed=seed))
    [chart] = over_one_another(groups(runs), ["reward", "kl"])
    assert [series.colour for series in chart.series] == [0, 0, 1]
    assert [bool(series.name) for series in chart.series] == [True, False, True]
    assert chart.series[2].points == [(0, 0), (1, 2), (2, 4)]


def test_a_picture_has_a_title_axes_a_role_and_ids_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    accuracies = "eval_rewards/accuracies"
    entries = [{"step": step, accuracies: min(step, 1) * 0.8, "loss": 3.0 - step} for step in range(3)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    loss, accuracy = curves((("loss",), ("rewards/accuracies", accuracies)), log)
    assert accuracy.series[1].points == [(1, 0.8), (2, 0.8)]  # where all pairs are ties, there is no accuracy
    drawn = [draw([loss]), draw([accuracy])]
    for chart, picture in zip((loss, accuracy), drawn, strict=True):
        assert picture.startswith('<svg role="img"')
        assert f"<title>{chart.title}</title>" in picture
        assert f">{chart.x}<" in picture
        assert f">{chart.y}<" in picture
        assert chart.see
    assert re.search(r">80(\.0)?%<", drawn[1])
    perfect = draw([accuracy._replace(series=[Series("", [(1, 1.0), (2, 1.0)])])])
    ticks = [float(share) for share in re.findall(r">(-?[\d.]+)%<", perfect)]
    assert ticks
    assert max(ticks) <= 100
    ids = [found for picture in drawn for found in re.findall(r' id="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    asked = {found for picture in drawn for found in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', picture)}
    assert {one or other for one, other in asked} == set(ids)
    assert draw([loss]) == drawn[0]
    assert "<b>" not in draw([chart_of("loss", loss.series)._replace(title="<b>")])


def test_a_reward_model_is_drawn_from_its_card() -> None:
    pairs = [
        ScoredPair("q", "a", "b", float(n % 5), float(n % 3) - 1, chosen_length=n, rejected_length=20)
        for n in range(40)
    ]
    card = report_card(pairs)
    assert sum(card["scores"]["chosen"]) == sum(card["scores"]["rejected"]) == 40
    assert len(card["scores"]["edges"]) == len(card["scores"]["chosen"]) + 1
    assert [part["pairs"] for part in card["by_length"]] == [7, 7, 7, 7, 6, 6]
    assert card["by_length"][0]["difference"] == -17.0
    right = sum(part["accuracy"] * part["pairs"] for part in card["by_length"])
    assert right == pytest.approx(card["accuracy"] * 40)
    reliability, scores, by_length = card_charts(card["reliability"], card["scores"], card["by_length"])
    assert len(reliability.series[1].points) == len(reliability.series[1].ends) == len(card["reliability"])
    assert len(by_length.series[0].points) == 6
    assert scores.series[0].is_histogram
    assert draw([reliability, scores, by_length]).count("<svg") == 1
    assert len(list(card_charts(card["reliability"], None, ()))) == 1  # of a card that was written before
