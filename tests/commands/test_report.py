"""Policies compared, and the page about a run: the right numbers, nothing from elsewhere, no torch."""

import html
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHORT_PIPELINE, Posttrain, documented, manifest

from posttrain import evaluate, export, report
from posttrain.metrics import charts
from posttrain.metrics.comparison import distinct, in_words, paired, sign_test


def test_distinct_n() -> None:
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct([""], 1) == 0


def test_a_policy_against_the_first() -> None:
    found = paired([1.0, 2.0, 3.0, 4.0, None], [0.0, 2.0, 5.0, 1.0, 9.0])
    assert (found["better"], found["worse"], found["prompts"]) == (2, 1, 4)
    assert found["win_rate"] == 2.5 / 4
    assert found["win_rate_low"] < 2.5 / 4 < found["win_rate_high"]
    assert (found["first"], found["mean"]) == (2.0, 2.5)
    assert paired([None], [None])["prompts"] == 0


def test_the_sign_test() -> None:
    """13 of 15 changes for the worse: 2 (1 + 15 + 105) / 2^15."""
    assert sign_test(2, 13) == pytest.approx(242 / 32768)
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 5) == 2 / 32


def test_what_fell_is_said_as_plainly_as_what_rose() -> None:
    first = {"policy": "a", "scores": {}, "against_first": {}}
    right = [1.0] * 20
    other = {
        "policy": "b",
        "against_first": {
            "reward": paired([2.0] * 20, right),
            "correct": paired([0.0] * 12 + [1.0] * 8, right),
            "short": paired(right, right),
        },
    }
    [(title, lines)] = in_words([first, other])
    assert title == "b against a"
    assert lines[0] == "correct fell: 1.000 → 0.400 (0 better, 12 worse of 20 prompts, p = 0.00049)"
    assert lines[1].startswith("reward (which is optimised) rose: 1.000 → 2.000 (20 better, 0 worse")
    assert lines[2].startswith("short: no difference seen, 1.000 → 1.000 (0 better, 0 worse")


def test_a_pipeline_ends_in_an_evaluation_and_a_page(trained: str, entry: Posttrain) -> None:
    assert "report: outputs/demo/report.html" in trained
    found = json.loads(Path("outputs/demo/evaluation.json").read_text())
    assert [each["policy"] for each in found] == [f"outputs/demo/{stage}" for stage in ("sft", "ppo", "dpo")]
    first, *others = (each["metrics"] for each in found)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    for metrics in (first, *others):
        assert {"kl", "response_length", "ended_by_eos", "distinct_1", "perplexity"} <= metrics.keys()
    for each in found:
        assert set(each["scores"]) == {"reward", "correct", "style"}
        assert {len(values) for values in each["scores"].values()} == {len(each["answers"])}
        assert {len(each[name]) for name in ("tokens", "kl", "ended")} == {len(each["answers"])}
        assert sum(each["tokens"]) / len(each["tokens"]) == pytest.approx(each["metrics"]["response_length"])
        assert each["gold"] == ["correct", "style"]
    assert found[0]["against_first"] == {}
    for each in found[1:]:
        for by in each["against_first"].values():
            assert 0 <= by["win_rate_low"] <= by["win_rate"] <= by["win_rate_high"] <= 1
            assert by["better"] + by["worse"] <= by["prompts"] == len(each["answers"])
    for words in ("correct", "style", "wins by correct", "wins by reward"):
        assert words in trained
    assert "outputs/demo/ppo against outputs/demo/sft:\n" in trained

    page = Path("outputs/demo/report.html").read_text()
    for words in (
        "Supervised fine-tuning",
        "Reward model",
        "PPO",
        "DPO",
        "Policies side by side",
        "Versions and hashes",
    ):
        assert words in page, words
    assert "posttrain pipeline recipes=quickstart" in page
    said = trained[trained.rindex("  Trained:\n") :].split("\nreport: ")[0].splitlines()
    assert [line.strip() for line in said if not line.startswith("    ")][:3] == ["Trained:", "Better:", "Worse:"]
    assert said[1].startswith("    posttrain/tiny by sft on ")
    for line in said[1:]:
        assert html.escape(line.strip().removesuffix(":"), quote=False) in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    cost = manifest("outputs/demo/ppo")["cost"]
    assert cost["tokens"] > 0
    assert cost["seconds"] > 0
    assert cost["epochs"] > 0
    assert "CPU" in cost["device"]
    assert manifest("outputs/demo/sft")["weights"]["model.safetensors"] in page
    assert page.count("<svg") == page.count('role="img"') >= 10
    assert not re.search(r"(?:src|href)=\"(?!#)", page), "the page would fetch something"
    assert page.count("<script") == 2, "the samples, and what shows them"
    shown = page[page.index('id="samples-data">') + 18 :].split("</script>")[0]
    tables = {table["id"]: table for table in json.loads(shown)}
    assert list(tables) == [
        "evaluation",
        "sft/samples",
        "reward/report_card",
        "ppo/rollouts",
        "ppo/samples",
        "dpo/samples",
    ]
    assert len(tables["evaluation"]["rows"]) == len(found[0]["answers"])
    columns = [tuple(each[:2]) for each in tables["evaluation"]["columns"]]
    for name in ("completion", "reward", "correct", "style", "tokens", "KL", "ended", "by reward", "by gold functions"):
        assert (name, "outputs/demo/ppo") in columns, name

    # again by hand: the same policies, the same numbers
    again = entry(
        evaluate.main,
        "policies=[outputs/demo/sft,outputs/demo/ppo]",
        "recipes=quickstart/ppo",
        "reward_model=outputs/demo/reward",
        "max_new_tokens=8",
        "data.max_rows=200",
        "run_name=again",
        "best_of=3",
    )
    assert again.code == 0, again
    repeated = json.loads(Path("outputs/again/evaluation-prompts.json").read_text())
    assert repeated[2]["scores"]["reward"] == pytest.approx(found[1]["scores"]["reward"])
    assert repeated[2]["answers"] == found[1]["answers"]
    # and the best of three completions of the first policy, of which it has given the first one
    assert repeated[1]["policy"] == "best of 3 of outputs/demo/sft"
    assert repeated[1]["metrics"]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert "kl" not in repeated[1]["metrics"]
    alone, best = (repeated[place]["scores"]["reward"] for place in (0, 1))
    assert all(one <= other for one, other in zip(alone, best, strict=True))
    assert sum(best) > sum(alone)
    assert repeated[1]["against_first"]["reward"]["worse"] == 0
    # a run's own table has the prompts and the numbers of the evaluation
    metrics = manifest("outputs/demo/ppo")["metrics"]
    assert metrics["reward_before"] == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    assert metrics["eval_rows"] == len(alone)
    mains = {"evaluate": evaluate.main, "report": report.main, "export": export.main}
    for name, main in mains.items():
        [line] = [line for line in documented(ROOT / "README.md") if line.startswith(f"posttrain {name} ")]
        shown = entry(main, *shlex.split(line)[2:])
        assert shown.code == 0, shown
    alone = entry(report.main, "outputs/demo/dpo")
    assert alone.code == 0, alone
    assert "Reward model" not in Path("outputs/demo/dpo/report.html").read_text()


def test_the_lineage_is_what_each_stage_started_from(trained: str) -> None:
    stages = [report._stage(folder, 0, False) for folder in report.stage_folders(Path("outputs/demo"))]
    [root] = report._lineage(stages)
    assert root.title == "posttrain/tiny"
    [sft] = root.children
    assert [node.title for node in sft.children] == ["Reward model", "PPO", "DPO"]
    assert [node.rewarded_by for node in sft.children] == ["", "Reward model", ""]
    assert not any(node.children for node in sft.children)
    stages[0]["manifest"]["weights"] = {"model.safetensors": "another"}  # trained again since
    assert [root.title for root in report._lineage(stages)] == ["posttrain/tiny", "outputs/demo/sft"]


def test_several_runs_are_compared(trained: str, entry: Posttrain) -> None:
    def changed(file: str, change: Callable[[Any], None]) -> None:
        content = json.loads(Path(file).read_text())
        change(content)
        Path(file).write_text(json.dumps(content))

    for number, name in enumerate("abc"):
        for part in ("reward", "ppo"):
            shutil.copytree(f"outputs/demo/{part}", f"outputs/{name}/{part}")
        shutil.copy("outputs/demo/evaluation.json", f"outputs/{name}")
        changed(f"outputs/{name}/ppo/run.json", lambda run, n=number: run["config"].update(seed=n))
        changed(f"outputs/{name}/ppo/posttrain.json", lambda run, n=number: run["metrics"].update(reward=float(n)))
    changed("outputs/c/ppo/run.json", lambda run: run["config"]["stage"].update(kl_coef=0.5))
    count = len(json.loads(Path("outputs/a/evaluation.json").read_text())[1]["answers"])
    changed("outputs/a/evaluation.json", lambda found: found[1]["scores"].update(correct=[0.0] * count))
    changed("outputs/b/evaluation.json", lambda found: found[1]["scores"].update(correct=[1.0] * count))
    changed("outputs/c/reward/posttrain.json", lambda run: run.update(weights={"model.safetensors": "another"}))
    done = entry(report.main, *(f"outputs/{name}" for name in "abc"), "out=all.html")
    assert done.code == 0, done
    assert done.out.count("Trained:\n") == 3
    page = Path("all.html").read_text()
    lines = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)
    [alike, other] = [line for line in lines if ">a, b (2 runs)<" in line or ">c<" in line]
    assert ">0.50 ± 0.71<" in alike
    assert ">0.05<" in alike
    assert ">0.5<" in other
    between = re.sub(r"<[^>]+>", "\n", page[page.index("Between runs") : page.index("All about")])
    assert f"correct rose: 0.000 → 1.000 ({count} better, 0 worse of {count} prompts" in between
    b, c = (between[between.index(f"{name}/ppo against a/ppo") :].split("against")[1] for name in "bc")
    assert "reward (which is optimised): no difference seen" in b
    assert "reward (which" not in c, "rewards of different models"


def test_text_of_models_and_data_cannot_write_the_page(tmp_path: Path, trained: str) -> None:
    samples = tmp_path / "outputs/demo/sft/samples.json"
    content = json.loads(samples.read_text())
    content[0]["after"]["text"] = "<script>alert(1)</script>"
    samples.write_text(json.dumps(content))
    page = report.write_report(tmp_path / "outputs/demo").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_wrong_folders_are_told(tmp_path: Path, entry: Posttrain) -> None:
    for arguments, told in (
        ((), "name a run's folder"),
        ((str(tmp_path / "nowhere"),), "no such folder"),
        ((str(tmp_path),), "is not a finished run"),
    ):
        done = entry(report.main, *arguments)
        assert done.code == 2
        assert told in done.err
    done = entry(evaluate.main, "data.max_rows=3")
    assert done.code == 2
    assert "policies=[…] is required" in done.err


def test_the_report_needs_no_torch() -> None:
    code = "import sys, posttrain.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_sweep_ends_in_a_frontier_and_is_drawn_on_what_is_possible(posttrain: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [float(sum(letter in 'aeiou' for letter in c[0]['content'])) for c in completions]\n"
    )
    sweep = ("-m", "stage=ppo", "recipes=quickstart/ppo", "stage.kl_coef=0.1,1", "stage.max_new_tokens=4")
    more = ("stage.reward_functions=[my_rewards.vowels]", "trainer.max_steps=2", "data.max_rows=200")
    done = posttrain(*sweep, *more, "model.model_name_or_path=posttrain/tiny")
    assert done.code == 0, done
    folder = Path("outputs/demo/ppo")
    assert (folder / "stage.kl_coef=0.1/posttrain.json").is_file()
    assert (folder / "stage.kl_coef=1/posttrain.json").is_file()
    assert "KL from the reference" in done.out
    assert "KL from the reference" in (folder / "sweep.svg").read_text() or (folder / "sweep.svg").stat().st_size > 5000
    without = report.write_report(tmp_path / "outputs/demo").read_text()
    assert "best possible" not in without
    possible = [{"kl": 0.0, "reward": 1.0}, {"kl": 1.0, "reward": 2.0}]
    (tmp_path / "outputs/demo/ppo/frontier.json").write_text(json.dumps(possible))
    assert "best possible" in report.write_report(tmp_path / "outputs/demo").read_text()


def finished(folder: Path, entries: int, **settings: float) -> None:
    """A PPO run as it is left: its manifest, and logs of that many lines of two kilobytes."""
    folder.mkdir(parents=True)
    config: dict[str, object] = {"stage": {"name": "ppo", **settings}, "trainer": {}, "model": {"base_model": "x"}}
    known = {"stage": "ppo", "metrics": {"kl": 1.0}, "config": config, "data": {"sources": {}, "counts": {"train": {}}}}
    more = {"finished": "2026-01-01", "inputs": {}, "versions": {}, "weights": {}, "command": "posttrain run"}
    (folder / "posttrain.json").write_text(json.dumps(known | more))
    with (folder / "metrics.jsonl").open("w") as lines:
        for step in range(entries):
            numbers = {"step": step, "reward": 1000.0 if step == 777 else step % 7, "kl": 0.5, "more": "m" * 2000}
            lines.write(json.dumps(numbers) + "\n")
    with (folder / "rollouts.jsonl").open("w") as lines:
        for number in range(entries):
            answer = f"answer {number} \u2028" + "a" * 2000
            sample = {"rollout": number, "prompt": [{"content": "Q"}], "answer": answer, "reward": 1.0, "kl": 0.1}
            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")
        lines.write('{"rollout": 1, "pro')  # a kill


def test_the_logs_of_a_long_run_are_not_held_in_memory(tmp_path: Path) -> None:
    finished(tmp_path / "short" / "ppo", 3)
    finished(tmp_path / "long" / "ppo", 10_000)
    assert "answer 2 " in report.write_report(tmp_path / "short").read_text()  # and matplotlib is imported
    tracemalloc.start()
    file = report.write_report(tmp_path / "long")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20 < (tmp_path / "long" / "ppo" / "rollouts.jsonl").stat().st_size / 3
    page = file.read_text()
    shown = [number for number in range(10_000) if f"answer {number} " in page]
    assert {shown[0], shown[-1]} == {0, 9999}
    assert 100 < len(shown) <= 200
    assert len(page) < 600_000


def test_a_thinned_line_keeps_its_ends_and_its_extremes(tmp_path: Path) -> None:
    entries = [
        {"step": step, "loss": 1000.0 if step == 777 else -5.0 if step == 54_321 else 1.0} for step in range(10**5)
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)) + '\n{"step": 3, "lo')  # a kill
    [chart] = charts.curves((("loss", "eval_loss"),), file)
    points = chart.series[0].points
    assert len(points) <= charts.POINTS
    assert {(0, 1.0), (777, 1000.0), (54_321, -5.0), (99_999, 1.0)} <= set(points)
    assert points == sorted(points)
    assert charts.thinned(*np.array(points).T) == points


def test_the_curves_of_a_wide_sweep_are_left_to_a_report_of_each_point(tmp_path: Path) -> None:
    for number in range(50):
        finished(tmp_path / "wide" / "ppo" / f"stage.beta={number}", 3, beta=number)
    page = report.write_report(tmp_path / "wide").read_text()
    assert page.count("<svg") == 1, "KL over beta"
    point = tmp_path / "wide" / "ppo" / "stage.beta=7"
    assert f"posttrain report {point}" in page
    assert "<svg" in report.write_report(point).read_text()
    assert len(page) < 3 * 2**20


def test_policies_without_ppo_are_compared(pipeline: Posttrain, trained: str) -> None:
    for stage in ("reward", "ppo"):
        shutil.rmtree(f"outputs/demo/{stage}")
    Path("outputs/demo/evaluation.json").unlink()
    done = pipeline(*SHORT_PIPELINE, "stages=[sft,dpo]")
    assert done.code == 0, done
    assert "held-out prompts are asked" not in done.out  # the quickstart's rows have splits
    found = json.loads(Path("outputs/demo/evaluation.json").read_text())
    assert [each["policy"] for each in found] == ["outputs/demo/sft", "outputs/demo/dpo"]
    assert set(found[1]["scores"]) == {"correct", "style"}
