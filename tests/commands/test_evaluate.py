"""Benchmarks, and a reward model on pairs of the user's own."""

import json
import sys
from pathlib import Path

import pytest
from architectures import save_architecture
from conftest import Outcome, Posttrain, write_rows

from posttrain import evaluate
from posttrain.models.benchmarks import numbers

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
CHOICE = """doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATED = """generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
POLICIES = "policies=[qwen3,gpt2]"


def saved(entry: Posttrain, tmp_path: Path) -> None:
    """Two policies, of which one brings no chat template."""
    for name in ("qwen3", "gpt2"):
        save_architecture(tmp_path / name, name)
    (tmp_path / "gpt2/chat_template.jinja").unlink()


@pytest.mark.slow
def test_benchmarks_stand_beside_the_other_numbers(entry: Posttrain, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    saved(entry, tmp_path)
    rows = [{"question": f"What is {n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(12)]
    file, tasks = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "tasks"
    tasks.mkdir()
    for name, kind, target, more in (
        ("mine_choice", "multiple_choice", "answer", CHOICE),
        ("mine_free", "generate_until", '"{{choices[0]}}"', GENERATED),
    ):
        text = TASK.format(name=name, file=file, kind=kind, target=target, more=more)
        (tasks / f"{name}.yaml").write_text(text)
    words = (POLICIES, "tasks=[mine_choice,mine_free]", "tasks_folder=tasks")
    done: Outcome = entry(evaluate.main, *words)
    assert done.code == 0, done
    found = json.loads(Path("outputs/demo/evaluation-mine_choice.json").read_text())
    assert [each["policy"] for each in found] == ["qwen3", "gpt2"]
    for each in found:
        assert each["answers"] == []
        choice = each["benchmarks"]["mine_choice"]
        assert 0 <= choice["acc"] <= 1
        assert choice["acc_stderr"] == pytest.approx((choice["acc"] * (1 - choice["acc"]) / 11) ** 0.5)
        assert each["benchmarks"]["mine_free"]["exact_match"] == 0
    assert "qwen3, with its chat template" in done.out
    assert "gpt2, without a chat template" in done.out
    assert "mine_choice: acc" in done.out
    # beside completions, on the first rows alone
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(3)])
    more = (f"data.dataset_name={prompts}", "max_new_tokens=4", "max_length=96", "limit=5", "num_fewshot=1")
    both: Outcome = entry(evaluate.main, *words, *more, "out=both.json")
    assert both.code == 0, both
    for each in json.loads(Path("both.json").read_text()):
        assert len(each["answers"]) == 3
        choice = each["benchmarks"]["mine_choice"]
        assert choice["acc_stderr"] == pytest.approx((choice["acc"] * (1 - choice["acc"]) / 4) ** 0.5)
    wrong: Outcome = entry(evaluate.main, *words, "tasks=[mine_chioce]")
    assert wrong.code == 2
    assert "mine_choice" in wrong.err


def test_a_filter_stays_in_the_name_of_a_metric() -> None:
    given = {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "acc,none": 1}
    assert numbers({**given, "acc_stderr,none": "N/A", "sample_len": 3}) == {
        "exact_match,strict-match": 0.5,
        "exact_match,strict-match_stderr": 0.1,
        "acc": 1.0,
    }


def test_an_evaluation_is_refused_before_anything_is_loaded(
    entry: Posttrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Say 1.", "chosen": "1.", "rejected": "2."}])
    for words, told in (
        ((POLICIES, "tasks=[arc_easy]"), 'pip install "lm-eval>=0.4.13"'),
        ((POLICIES, "tasks=[arc_easy]", "limit=0"), "limit=0 must be a whole number, 1 or more"),
        ((POLICIES, "best_of=1"), "best_of=1 must be a whole number, 2 or more"),
        (("data.preferences=pairs.jsonl",), "reward_model=<folder or Hub id>"),
        (("data.preferences=pairs.jsonl", "reward_model=x", POLICIES), "are a command of their own"),
        (("data.preferences=none.jsonl", "reward_model=x"), "none.jsonl"),
    ):
        done: Outcome = entry(evaluate.main, *words)
        assert done.code == 2, done
        assert told in done.err.replace("\n", " "), done


def test_a_reward_model_is_evaluated_on_pairs_by_sections(entry: Posttrain, tmp_path: Path) -> None:
    import torch
    from tokenizers_for_tests import chatml
    from transformers import AutoModelForSequenceClassification, Qwen2Config

    tokenizer = chatml()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer) + 3, intermediate_size=64, num_labels=1, **sizes, **special)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    # RewardBench's columns; the two sections are of unequal size
    rows = [
        {
            **{"prompt": f"What is {n}?", "chosen": f"It is {n}. " * (n + 1), "rejected": f"No idea about {n}."},
            **{"subset": "hard" if n < 4 else "easy", "chosen_model": "a", "rejected_model": "b", "id": n},
        }
        for n in range(12)
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    words = ("reward_model=reward", "data.preferences=pairs.jsonl", "data.columns.group=subset")
    done: Outcome = entry(evaluate.main, *words)
    assert done.code == 0, done
    card = json.loads(Path("outputs/demo/report_card-pairs.json").read_text())
    right = []
    for row in rows:
        score = []
        for name in ("chosen", "rejected"):
            said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            text = tokenizer.apply_chat_template(said, tokenize=False).rstrip()
            with torch.no_grad():
                score.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())
        right.append(score[0] > score[1])
    assert card["pairs"] == 12, "all rows, however many a run would hold out"
    assert card["accuracy"] == pytest.approx(sum(right) / 12)
    sections = {each["kind"]: (each["pairs"], each["accuracy"]) for each in card["slices"]}
    assert sections["group: hard"] == (4, pytest.approx(sum(right[:4]) / 4))
    assert sections["group: easy"] == (8, pytest.approx(sum(right[4:]) / 8))
    mean = (sum(right[:4]) / 4 + sum(right[4:]) / 8) / 2
    assert f"{mean:.1%}" in done.out
    # a second time to another file, and never over one that is there
    assert "12 of 12 pairs are scored, 0 of them cut" in done.out
    cut: Outcome = entry(evaluate.main, *words, "max_length=64")
    assert cut.code == 0
    assert "0 of them cut" not in cut.out
    assert Path("outputs/demo/report_card-pairs-2.json").is_file()
    assert entry(evaluate.main, *words, "out=outputs/demo/report_card-pairs.json").code == 2
