"""The tables of samples: what a run's files hold, side by side, within a bound."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from posttrain.metrics import samples
from posttrain.metrics.report_card import KEPT, ScoredPair, report_card


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def tables(run: Path, *stages: str) -> dict[str, samples.Table]:
    found = samples.collect(
        [(run, [(stage, run / stage) for stage in stages])], lambda file: json.loads(file.read_text())
    )
    return {table.id: table for table in found}


def column(table: samples.Table, name: str, group: str = "") -> list[Any]:
    [place] = [place for place, each in enumerate(table.columns) if (each.name, each.group) == (name, group)]
    return [row[place] for row in table.rows]


def policy(
    name: str, prompts: str, reward: list[float | None], correct: list[float | None], **more: Any
) -> dict[str, Any]:
    answers = [f"{name} to {prompt}" for prompt in prompts]
    scores = {"reward": reward, "correct": correct}
    return {"policy": name, "metrics": {}, "prompts": list(prompts), "answers": answers, "scores": scores, **more}


def test_policies_side_by_side_with_wins_and_regressions(tmp_path: Path) -> None:
    first = policy("a", "pqrp", [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, None], tokens=[3, 4, 5, 6], ended=[True] * 4)
    # another limit: other prompts in another order, of which the one that occurs twice is known by its place
    other = policy(
        "b", "prps", [2.0, 0.0, 1.0 + 1e-7, 9.0], [0.0, 1.0, None, 1.0], kl=[0.5, -0.25, float("nan"), float("inf")]
    )
    write(tmp_path / "evaluation.json", [first, other])
    table = tables(tmp_path)["evaluation"]
    assert column(table, "prompt") == ["p", "q", "r", "p", "s"]
    assert column(table, "completion", "b") == ["b to p", None, "b to r", "b to p", "b to s"]
    assert column(table, "completion", "a") == ["a to p", "a to q", "a to r", "a to p", None]
    assert column(table, "by reward", "b") == ["win", None, "loss", "tie", None]
    assert column(table, "by gold functions", "b") == ["regression", None, "win", None, None]
    assert column(table, "tokens", "a") == [3, 4, 5, 6, None]
    assert column(table, "ended", "a") == ["yes"] * 4 + [None]
    assert column(table, "KL", "b") == [0.5, None, -0.25, None, "inf"]
    names = {(each.name, each.group) for each in table.columns}
    assert not names & {("tokens", "b"), ("KL", "a"), ("by reward", "a")}, "columns without a value"
    assert json.loads(table.as_json())["rows"][3][0] == "p"


def test_which_scores_are_gold_is_read(tmp_path: Path) -> None:
    """A part of the reward is none, and an evaluation of an older posttrain, without scores, is still shown."""
    scored = [policy(name, "p", [value], [-value], gold=["correct"]) for name, value in (("a", 1.0), ("b", 1.0))]
    for each, part in zip(scored, (1.0, 0.0), strict=True):
        each["scores"]["part"] = [part]
    write(tmp_path / "evaluation.json", scored)
    write(tmp_path / "evaluation-mine.json", [{"policy": "a", "prompts": ["p"], "answers": ["x"]}])
    write(tmp_path / "evaluation-other.json", {"results": {}})
    found = tables(tmp_path)
    assert list(found) == ["evaluation", "evaluation-mine"]
    assert column(found["evaluation"], "by gold functions", "b") == ["tie"]
    assert found["evaluation-mine"].rows == [("p", "x")]
    several = samples.collect([(tmp_path, []), (tmp_path / ".", [])], lambda file: json.loads(file.read_text()))
    assert [table.id for table in several] == [f"{run}/evaluation{name}" for run in (1, 2) for name in ("", "-mine")]
    assert several[0].title == f"{tmp_path}: Evaluation"


def test_the_most_confidently_wrong_pairs_come_first(tmp_path: Path) -> None:
    pairs = [ScoredPair(f"Q{n}", "yes", "no", float(n), 300.0, 1, 1, "kind") for n in range(KEPT + 100)]
    write(tmp_path / "reward/report_card.json", report_card(pairs))
    table = tables(tmp_path, "reward")["reward/report_card"]
    assert column(table, "prompt")[:2] == ["Q0", "Q1"]
    assert len(table.rows) == KEPT
    assert f"{KEPT} of {KEPT + 100} held-out pairs" in table.about
    assert column(table, "margin", "scores")[0] == -300
    assert column(table, "ranked", "scores")[299:302] == ["wrong", "tie", "right"]
    # a card of an older posttrain
    old = {"pairs": 10, "most_confidently_wrong": [vars(pairs[0])]}
    write(tmp_path / "reward/report_card.json", old)
    assert len(tables(tmp_path, "reward")["reward/report_card"].rows) == 1


def rollouts(file: Path, count: int, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    with file.open("w") as lines:
        for number in range(count * 4):
            row = {
                "step": number // 4 * 8,
                "rollout": number // 4,
                "prompt": turns,
                "answer": "a" * (size + number % 7),
            }
            lines.write(json.dumps({**row, "reward": 0.5, "kl": None, "tokens": 1, "ended": False}) + "\n")
        lines.write('{"rollout": 1, "prompt": [{"role": "user", "content": "cut by a kill"}')


def test_a_slider_over_all_rollouts_or_over_some_of_a_long_run(tmp_path: Path) -> None:
    rollouts(tmp_path / "ppo/rollouts.jsonl", 10, 50)
    table = tables(tmp_path, "ppo")["ppo/rollouts"]
    assert column(table, table.slider, "time") == [number // 4 + 1 for number in range(40)]
    assert column(table, "prompt")[0] == "system: S\n\nuser: Q"
    for count, size, least in ((5_000, 30, 190), (300, 1_000, 100), (3, 10**5, 3), (40, 10**5, 8)):
        rollouts(tmp_path / "ppo/rollouts.jsonl", count, size)
        table = tables(tmp_path, "ppo")["ppo/rollouts"]
        found = column(table, "rollout", "time")
        numbers = list(dict.fromkeys(found))
        assert found == [number for number in numbers for _ in range(4)], "each of them whole"
        assert (numbers[0], numbers[-1]) == (1, count)
        assert least <= len(numbers) <= min(samples.PLACES, count)
        steps = [other - one for one, other in pairwise(numbers)]
        assert 1 <= min(steps) <= max(steps) <= 3 * count / len(numbers), "evenly spaced"
        assert len(table.as_json()) < samples.BYTES


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "BYTES", 20_000)
    many = policy("a", "p" * 1000, [1.0] * 1000, [1.0] * 1000)
    panel = [{"prompt": [{"role": "user", "content": "Q"}], "reference": "", "before": {"text": "<b>", "ended": True},
              "after": {"text": "b" * 9000, "ended": False}}]  # fmt: skip
    file = write(tmp_path / "evaluation.json", [many])
    write(tmp_path / "sft/samples.json", panel)
    found = tables(tmp_path, "sft")
    rows = len(found["evaluation"].rows)
    assert 100 < rows < 1000
    assert found["evaluation"].kept == f"{rows} of 1,000 rows; all are in {file}"
    [text] = column(found["sft/samples"], "completion", "after")
    assert samples.CHARACTERS < len(text) < samples.CHARACTERS + 50
    assert "9,000" in text
    assert sum(len(table.as_json()) for table in found.values()) < 20_000 + 2_000
    assert "<" not in found["sft/samples"].as_json()
    assert column(found["sft/samples"], "changed", "after") == ["yes"]
