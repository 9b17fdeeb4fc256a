"""Several sources in exact shares, and several held-out sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
from conftest import Posttrain, data_config, manifest, prepared, read_rows, write_rows

from posttrain import configure
from posttrain.config.schema import SourceConfig
from posttrain.data.division import _shares
from posttrain.data.encode import ConversationEncoding
from posttrain.data.formats import instructions
from posttrain.errors import ConfigError, DataError
from posttrain.report import write_report


def some(name: str, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"{name} {number}", "response": f"It is {number}."} for number in range(count)]


def mixed(tmp_path: Path, mixture: list[SourceConfig], cache: str = "cache", **changes: Any) -> Any:
    data = data_config([part.name for part in mixture], "sft", mixture=mixture, **changes)
    return prepared(instructions, ConversationEncoding(64, "drop"), made.chatml(), data, tmp_path / cache)


def test_shares_are_exact_to_a_row(tmp_path: Path) -> None:
    a, b = (str(write_rows(tmp_path / f"{name}.jsonl", some(name, count))) for name, count in (("a", 100), ("b", 60)))
    mixture = [SourceConfig(name=a, weight=0.7), SourceConfig(name=b, weight=0.3)]
    found = mixed(tmp_path, mixture, test_size=0.1)
    trained, held_out = ([found.rows_of[name][part] for name in (a, b)] for part in ("train", "test"))
    assert sum(held_out) == 16
    assert trained == _shares(sum(trained), [0.7, 0.3])
    one_more = _shares(sum(trained) + 1, [0.7, 0.3])
    assert one_more[0] > 100 - held_out[0] or one_more[1] > 60 - held_out[1], "there could be more rows"
    assert found.counts["train"].unmixed == 160 - 16 - sum(trained) > 0
    assert found.counts["train"].read + found.counts["test"].read == 160
    assert f"mixture: {trained[0]} rows of {a}, {trained[1]} rows of {b} to train on" in found.notes
    again = mixed(tmp_path, mixture, "other", test_size=0.1)
    assert list(again.train.dataset) == list(found.train.dataset)
    assert _shares(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert _shares(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    for total in range(50):
        assert sum(_shares(total, [0.61, 0.29, 0.1])) == total


def test_each_source_has_columns_and_a_bound_of_its_own(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", some("a", 30))
    b = write_rows(tmp_path / "b.jsonl", [{"q": f"b {n}", "r": f"{n}"} for n in range(30)])
    columns: dict[str, str | None] = {"instruction": "q", "response": "r"}
    found = mixed(tmp_path, [SourceConfig(name=str(a), max_rows=10), SourceConfig(name=str(b), columns=columns)])
    assert len(found.train.dataset) == 40
    assert [row.where for row in found.train.examples([9, 10])] == [f"{a} line 10", f"{b} line 1"]
    assert found.train.examples([10])[0].messages[0]["content"] == "b 0"
    assert any(note.startswith("max_rows: the rows after the first 10") for note in found.notes)


def test_no_row_is_trained_and_held_out(tmp_path: Path) -> None:
    a = str(write_rows(tmp_path / "a.jsonl", some("a", 30)))
    held = str(write_rows(tmp_path / "held.jsonl", [*some("a", 3), {**some("h", 1)[0], "split": "train"}]))
    found = mixed(tmp_path, [SourceConfig(name=a)], eval={"helpful": SourceConfig(name=held)}, test_size=5)
    assert len(found.named["helpful"].dataset) == 4
    trained = {row.content for row in found.train.rows}
    assert not trained & {row.content for row in found.named["helpful"].rows}
    assert not trained & {row.content for row in found.test.rows}
    assert found.counts["helpful"].kept == 4
    empty = str(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match=r"data\.eval\.helpful has no rows"):
        mixed(tmp_path, [SourceConfig(name=a)], eval={"helpful": SourceConfig(name=empty)})
    with pytest.raises(DataError, match=r"no rows of .*empty\.jsonl are left to train on"):
        mixed(tmp_path, [SourceConfig(name=a, weight=1.0), SourceConfig(name=empty, weight=1.0)])
    with pytest.raises(ConfigError, match=r"a\.jsonl is a file and has no split 'test'"):
        mixed(tmp_path, [SourceConfig(name=a, split="test")])
    twice = mixed(tmp_path, [SourceConfig(name=a), SourceConfig(name=a)], "twice", test_size=5)
    assert sum(twice.rows_of[a].values()) == 60


def test_a_row_cannot_put_itself_into_a_named_set(tmp_path: Path) -> None:
    rows = some("a", 20)
    rows[3]["split"] = "eval.helpful"
    a, held = (str(write_rows(tmp_path / f"{name}.jsonl", each)) for name, each in (("a", rows), ("h", some("h", 4))))
    found = mixed(tmp_path, [SourceConfig(name=a)], eval={"helpful": SourceConfig(name=held)})
    assert len(found.named["helpful"].dataset) == 4
    assert len(found.train.dataset) == 20


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.mixture=[{nme: a.jsonl}]"], r"data\.mixture\[0\]\.nme is unknown; did you mean name"),
        (["data.mixture=[{name: a.jsonl, weight: 0.5}, {name: b.jsonl}]"], "give each source a weight"),
        (["data.mixture=[{name: a.jsonl, weight: -1}]"], r"data\.mixture\[0\]\.weight=-1"),
        (["data.mixture=[{name: a.jsonl, columns: {instrction: q}}]"], r"columns\.instrction is unknown"),
        (["data.mixture=[{weight: 1}]"], r"data\.mixture\[0\]\.name is required"),
        (["data.mixture=[{name: a.jsonl}]", "data.dataset_name=b.jsonl"], "leave one out"),
        (["data.eval={a/b: c.jsonl}", "data.dataset_name=a.jsonl"], r"data\.eval\.a/b: a name"),
        (["data.eval.train=a.jsonl", "data.dataset_name=a.jsonl"], r"data\.eval\.train: a name"),
        (["data.eval.test=a.jsonl", "data.dataset_name=a.jsonl"], r"data\.eval\.test: a name"),
        (
            ["data.eval.helpful=nope.jsonl", "data.dataset_name=a.jsonl"],
            r"data\.eval\.helpful=nope\.jsonl: no such file",
        ),
        (["data.mixture=[{name: nope.jsonl}]"], r"data\.mixture\[0\]\.name=nope\.jsonl: no such file"),
        (["data.mixture=[{name: a.jsonl, weight: x}]"], r"data\.mixture\[0\]\.weight: "),
        (["data.mixture=[{nme: a.jsonl}, {nam: a.jsonl}]"], r"(?s)\[0\]\.nme.*\[1\]\.nam is unknown"),
        (["data.eval=a.jsonl", "data.dataset_name=a.jsonl"], r"data\.eval='a\.jsonl' must be dict \{name: value, …\}"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a.jsonl"), some("a", 3))
    write_rows(Path("b.jsonl"), some("b", 3))
    with pytest.raises(ConfigError, match=told):
        configure("stage=sft", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["stage=sft", "data.ptx=a.jsonl"],
            r"data\.ptx=a\.jsonl is read with stage=ppo or stage=grpo; in a pipeline write ppo\.data",
        ),
        (["stage=ppo", "data.ptx=a.jsonl"], r"data\.ptx=a\.jsonl is read with stage\.ptx_coef above 0"),
        (["stage=ppo", "stage.ptx_coef=0.5"], r"stage\.ptx_coef=0\.5 needs data\.ptx="),
        (
            ["stage=ppo", "stage.ptx_coef=1", "data.ptx=nope.jsonl", "stage.reward_functions=[a.b]"],
            r"data\.ptx=nope\.jsonl: no such file",
        ),
        (["stage=ppo", "stage.ptx_coef=1", "data.ptx=[a.jsonl,3]"], r"data\.ptx\[1\]=3 must be a path"),
        (["stage=ppo", "stage.ptx_coef=1", "data.ptx=[{name: a.jsonl, columns: {chosen: x}}]"], r"chosen is unknown"),
    ],
)
def test_instruction_rows_beside_ppo_go_with_their_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a.jsonl"), some("a", 3))
    with pytest.raises(ConfigError, match=told):
        configure("data.dataset_name=a.jsonl", *words)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_each_held_out_set_has_numbers_of_its_own(posttrain: Posttrain, tmp_path: Path, stage: str) -> None:
    for name, count in (("a", 30), ("b", 5), ("c", 9)):
        rows = [{**row, "prompt": row["instruction"]} for row in some(name, count)]
        pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "No."} for row in rows]
        write_rows(tmp_path / f"{name}.jsonl", pairs if stage in ("reward", "dpo") else rows)
    words = [f"stage={stage}", "data.dataset_name=a.jsonl", "data.test_size=4", "trainer.max_steps=2"]
    words += ["data.eval.helpful=b.jsonl", "data.eval.maths={name: c.jsonl, max_rows: 7}", "trainer.eval_steps=1"]
    words += ["trainer.eval_strategy=steps"]
    if stage == "ppo":
        (tmp_path / "rewards_of_length.py").write_text(
            "def length(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        )
        words += ["stage.reward_functions=[rewards_of_length.py:length]", "stage.max_new_tokens=4"]
        words += ["stage.rollout_batch_size=4", "stage.batch_size=4", "stage.num_mini_batches=1"]
    done = posttrain(*words)
    assert done.code == 0, done
    number = {"sft": "loss", "reward": "accuracy", "dpo": "rewards/accuracies", "ppo": "reward"}[stage]
    metrics = manifest(f"outputs/demo/{stage}")["metrics"]
    entries = read_rows(f"outputs/demo/{stage}/metrics.jsonl")
    for name in ("helpful", "maths"):
        key = f"eval_{name}_{number}"
        assert [entry["step"] for entry in entries if key in entry] == [0, 1, 2]
        assert metrics[key] == [entry[key] for entry in entries if key in entry][-1]
        before = next(entry[key] for entry in entries if key in entry)
        assert metrics.get(f"{key}_before") == (before if stage != "dpo" else None)  # all are ties then
        assert f"{name}: held-out rows" in " ".join(done.out.split())
        assert metrics[f"eval_{name}_rows"] == {"helpful": 5, "maths": 7}[name]
    other = "reward" if stage == "ppo" else "loss"
    assert metrics[f"eval_helpful_{other}"] != metrics[f"eval_maths_{other}"]
    if stage == "reward":
        card = json.loads(Path("outputs/demo/reward/report_card.json").read_text())
        assert {name: each["pairs"] for name, each in card["named"].items()} == {"helpful": 5, "maths": 7}
        assert card["named"]["maths"]["accuracy"] == pytest.approx(metrics["eval_maths_accuracy"])
    page = write_report(Path("outputs/demo"))
    assert page.read_text().count("maths: held-out") >= 2  # the numbers and a curve


def test_a_mixture_trains_and_says_what_came_from_where(posttrain: Posttrain, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", some(name, 20))
    words = ("data.mixture=[{name: a.jsonl, weight: 3}, {name: b.jsonl, weight: 1}]", "data.test_size=4")
    done = posttrain(*words, "trainer.max_steps=1")
    assert done.code == 0, done
    data = manifest("outputs/demo/sft")["data"]
    trained = [data["rows_of"][name]["train"] for name in ("a.jsonl", "b.jsonl")]
    assert trained == _shares(sum(trained), [0.75, 0.25])
    assert sum(trained) == data["counts"]["train"]["kept"]
    assert data["counts"]["test"]["kept"] == 4
    assert posttrain(*words, "trainer.max_steps=1").code == 0


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_stage_without_held_out_rows_trains_and_saves(posttrain: Posttrain, tmp_path: Path, stage: str) -> None:
    rows = [{**row, "prompt": row["instruction"]} for row in some("a", 12)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "No."} for row in rows]
    write_rows(tmp_path / "a.jsonl", pairs if stage in ("reward", "dpo") else rows)
    words = [f"stage={stage}", "data.dataset_name=a.jsonl", "data.test_size=0", "trainer.max_steps=2"]
    if stage == "ppo":
        (tmp_path / "rewards_of_lengths.py").write_text(
            "def length(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        )
        words += ["stage.reward_functions=[rewards_of_lengths.py:length]", "stage.max_new_tokens=4"]
        words += ["stage.rollout_batch_size=4", "stage.batch_size=4", "stage.num_mini_batches=1"]
    done = posttrain(*words, "trainer.save_steps=1")
    assert done.code == 0, done
    assert manifest(f"outputs/demo/{stage}")["metrics"]["eval_rows"] == 0
