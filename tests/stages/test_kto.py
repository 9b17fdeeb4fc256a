"""KTO through the real entry point: rated completions and preference rows, its first loss, what it learns, refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHORT, Outcome, logged, manifest, read_rows, write_rows

from posttrain.report import write_report
from posttrain.stages.kto import completions_of
from posttrain.stages.trainers import with_others_completions

Posttrain = Callable[..., Outcome]
KTO = Path("outputs/demo/kto")
FEW = ("stage=kto", *SHORT, "stage.max_length=64", "stage.learning_rate=1e-2", "data.test_size=12")


def rated(count: int) -> list[dict[str, object]]:
    """Sorted by label, as rated rows often are."""
    liked = [{"prompt": f"Say {n}.", "completion": f"{n} it is.", "label": True} for n in range(count)]
    return [*liked, *({"prompt": f"Say {n}.", "completion": f"No {n} for you.", "label": False} for n in range(count))]


def test_rows_taken_apart_and_paired_for_the_kl_term() -> None:
    from datasets import Dataset

    rows = [
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]},
        {"prompt_ids": [5], "chosen_ids": None, "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": None},
    ]
    apart = completions_of(Dataset.from_list(rows)).to_list()
    assert [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in apart] == [
        ([1], [2], None),
        ([7], [8], None),
        ([1], None, [3, 4]),
        ([5], None, [6]),
    ]
    some = completions_of(Dataset.from_list(rows).select([2, 1])).to_list()
    assert [row["prompt_ids"] for row in some] == [[7], [5]]
    alone = [with_others_completions(lambda each: {"rows": each}, apart[::3], [row])["rows"][0] for row in apart[:2]]
    assert [row["KL_completion_ids"] for row in alone] == [[6], [2]]
    batch = with_others_completions(lambda each: {"rows": each}, apart[::3], apart)["rows"]
    assert [row["completion_ids"] for row in batch] == [[2], [8], [3, 4], [6]]
    assert [row["KL_completion_ids"] for row in batch] == [[6], [2], [8], [3, 4]]
    assert [row["label"] for row in batch] == [True, True, False, False]


def test_it_learns_what_was_liked(posttrain: Posttrain, tmp_path: Path) -> None:
    write_rows(tmp_path / "rated.jsonl", rated(30))
    weights = ("stage.desirable_weight=1.2", "stage.undesirable_weight=0.8", "trainer.max_steps=12")
    done = posttrain(*FEW, "data.dataset_name=rated.jsonl", *weights)
    assert done.code == 0, done
    assert "first loss 0.500000 (in theory 0.500000)" in done.out  # four of each kind: (4 · 1.2 + 4 · 0.8) / 8 / 2
    metrics = manifest(KTO)["metrics"]
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["reward_margin_before"] == 0 < metrics["reward_margin"]
    assert metrics["kl_before"] == 0 < metrics["kl"]
    last = [line for line in logged(KTO) if "eval_rewards/margins" in line][-1]
    assert last["eval_rewards/margins"] == pytest.approx(last["eval_rewards/chosen"] - last["eval_rewards/rejected"])
    assert not any("kl" in line for line in logged(KTO))
    assert len(read_rows(KTO / "metrics.jsonl")) > 2
    assert ">reward margin<" in write_report(Path("outputs/demo")).read_text()

    # the same completions as pairs: each row is two of them
    pairs = [
        {"prompt": liked["prompt"], "chosen": liked["completion"], "rejected": other["completion"]}
        for liked, other in zip(rated(30)[:30], rated(30)[30:], strict=True)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    done = posttrain(
        *FEW,
        "data.dataset_name=pairs.jsonl",
        "data.test_size=6",
        "run_name=pairs",
        "dry_run=true",
        "trainer.max_steps=-1",
    )
    assert done.code == 0, done
    assert "24 completions were liked, 24 were not" in done.out
    assert "(1 epoch of 6)" in done.out  # 48 completions, 8 to a batch


@pytest.mark.parametrize("labels", [("True", "False"), ("1", "0")])
def test_labels_of_a_csv_file_are_text(posttrain: Posttrain, tmp_path: Path, labels: tuple[str, str]) -> None:
    lines = [f"Say {n}.,{row['completion']},{labels[not row['label']]}" for n, row in enumerate(rated(20))]
    (tmp_path / "rated.csv").write_text("\n".join(["prompt,completion,label", *lines]))
    done = posttrain(*FEW, "data.dataset_name=rated.csv", "dry_run=true")
    assert done.code == 0, done
    assert "completions were liked, " in done.out


def test_what_it_refuses(posttrain: Posttrain, tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.jsonl", [*rated(8), {"prompt": "a", "completion": "b", "label": "yes"}])
    write_rows(tmp_path / "liked.jsonl", rated(20)[:20])
    write_rows(tmp_path / "others.jsonl", rated(20)[20:])
    for words, said in (
        (("data.dataset_name=bad.jsonl",), "bad.jsonl line 17: 'label' must be true or false, got 'yes'"),
        (("data.dataset_name=liked.jsonl",), "all of the 8 completions to train on were liked"),
        (("data.dataset_name=others.jsonl",), "none of the 8 completions to train on were liked"),
        (("data.dataset_name=bad.jsonl", "stage.batch_size=1"), "stage.batch_size"),
        (("data.dataset_name=bad.jsonl", "+trainer.train_sampling_strategy=random"), "cannot be set: rows are drawn"),
    ):
        done = posttrain(*FEW, *words)
        assert done.code == 2, done
        assert said in done.err
    assert not KTO.exists()
