"""Rows are read as they stand, or refused with file and line; nothing is dropped, changed or mixed unseen."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, data_config, splits_of, write_rows

from posttrain.config.schema import DataConfig
from posttrain.data.formats import format_instruction, instructions
from posttrain.errors import ConfigError, DataError

GOOD = {"instruction": "Say yes.", "response": "Yes."}


def data(name: Any, **changes: Any) -> DataConfig:
    return data_config(name, "sft", changes.pop("columns", {}), **changes)


def read(path: Path, **changes: Any) -> Any:
    return splits_of(instructions, data(str(path), **changes))


def some(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Say {number}.", "response": str(number)} for number in range(count)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"instruction": "a"}', "line 2: no 'response' (found: instruction); format 'instruction' needs"),
        ('{"instruction": "a", "response": null}', "line 2: 'response' must be a text or a list of messages, got null"),
        ('{"instruction": "a", "response": 5}', "line 2: 'response' must be a text or a list of messages, got int"),
        ('{"instruction": "a", "response": "  \\n"}', "line 2: 'response' is empty"),
        ('{"instruction": "", "response": "b"}', "line 2: 'instruction' is empty"),
        ('{"instruction": "a", "response": "b', "line 2: invalid JSON (Unterminated string"),
        (
            '{"instruction": "a", "instruction": "c", "response": "b"}',
            "line 2: invalid JSON (duplicate key",
        ),
        ('["a", "b"]', "line 2: must be an object, got list"),
        ("null", "line 2: must be an object, got null"),
        ('{"instruction": "a", "response": "\\ud800"}', "line 2: 'response' contains an unpaired surrogate"),
        ('{"question": "a", "answer": "b"}', "try data.columns.instruction=question data.columns.response=answer"),
        ('{"instruction": [{"role": "usr", "content": "a"}], "response": "b"}', "has the role 'usr'"),
        ('{"instruction": [{"role": "user"}], "response": "b"}', "data.messages.content"),
        (
            '{"instruction": [{"role": "assistant", "content": "a"}], "response": "b"}',
            "line 2: the roles are assistant, assistant; user and assistant must take turns",
        ),
        ('{"instruction": "a", "response": "b", "system": 3}', "line 2: 'system' must be a text, got int"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path} line 2" in str(error.value)
    assert told in str(error.value)


def test_five_faults_of_bad_rows_are_told_once_each_and_the_rows_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "response": fault} for fault in ("", 1, None, {}, [], True, [1], "")]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "a", "response": ""}])
    with pytest.raises(DataError) as error:
        read(path)
    assert len(error.value.problems) == 6
    assert error.value.problems[-1] == "... and 4 more rows"


def test_a_csv_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,response\n"one\ntwo\nthree",b\nc,d\n"e\nf",""\n')
    with pytest.raises(DataError, match=r"rows\.csv line 6: 'response' is empty"):
        read(path)
    assert [row.where for row in read(path, bad_rows="drop").train] == [f"{path} line 2", f"{path} line 5"]


def test_values_stay_what_they_are(tmp_path: Path) -> None:
    dates = [{"instruction": f"2024-01-0{day}T00:00:00", "response": f"2024-02-0{day}"} for day in range(1, 6)]
    splits = read(write_rows(tmp_path / "rows.jsonl", dates))
    assert [row.messages[0]["content"] for row in splits.train] == [row["instruction"] for row in dates]


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert [row.where for row in read(path).train] == [f"{path} line 1", f"{path} line 3"]


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [*some(5), {"instruction": 'quoted, "twice"\nand over lines', "response": "naïve ☕"}]
    files = {name: tmp_path / f"rows.{name}" for name in ("jsonl", "json", "csv", "parquet")}
    write_rows(files["jsonl"], rows)
    files["json"].write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_csv(files["csv"], index=False)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files["parquet"])
    files["folder"] = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(files["folder"])
    found = {name: [row.messages for row in read(path).train] for name, path in files.items()}
    assert all(messages == found["jsonl"] for messages in found.values())
    assert len(found["jsonl"]) == 6


def test_a_saved_dataset_dict_brings_its_own_test_split(tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(some(6)), "test": datasets.Dataset.from_list(some(9)[6:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    splits = read(tmp_path / "saved", test_size=0.5)
    assert (len(splits.train), len(splits.test)) == (6, 3)


def test_broken_files_of_other_types_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"instruction": "a"}')
    (tmp_path / "b.csv").write_text("instruction,response\na,b,c\n")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    (tmp_path / "d.jsonl").write_bytes(b'{"instruction": "\xff"}\n')
    (tmp_path / "e.jsonl").write_text("")
    told = ("list of objects", "line 2: has not as many fields", "invalid Parquet", "invalid JSON", "no rows at all")
    for name, words in zip(("a.json", "b.csv", "c.parquet", "d.jsonl", "e.jsonl"), told, strict=True):
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert name in str(error.value)
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "none*.jsonl", "rows.txt"])
def test_a_source_that_cannot_be_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"data\.dataset_name="):
        splits_of(instructions, data(name))


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", some(2))
    write_rows(tmp_path / "b.jsonl", some(4)[2:])
    both = splits_of(instructions, data([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))
    pattern = splits_of(instructions, data(str(tmp_path / "*.jsonl")))
    assert [row.content for row in both.train] == [row.content for row in pattern.train]
    assert len(both.train) == 4


def test_columns_are_mapped_and_others_are_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b", "text": "trap", "labels": [1]}] * 2)
    mapped = {"instruction": "question", "response": "answer"}
    splits = read(path, columns=mapped, ignored_columns=["labels"])
    assert splits.train[0].messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told = ["column 'labels' is ignored (2 rows)", "column 'text' is ignored (2 rows)"]
    assert splits.notes == ["format: instruction and response, 2 rows", *told]
    with pytest.raises(ConfigError, match=r"data.ignored_columns=\[labels\]"):
        read(path, columns=mapped)


def test_a_row_is_never_in_both_splits(tmp_path: Path) -> None:
    rows = some(40) + some(40)[:20]
    splits = read(write_rows(tmp_path / "rows.jsonl", rows), test_size=0.25)
    train, test = ({row.content for row in part} for part in (splits.train, splits.test))
    assert not train & test
    assert len(splits.train) + len(splits.test) == 60
    assert len(splits.test) == 15
    assert splits.counts["train"].duplicates + splits.counts["test"].duplicates == 20


def test_the_split_depends_on_the_rows_alone(tmp_path: Path) -> None:
    rows = some(50)
    one = read(write_rows(tmp_path / "one.jsonl", rows), test_size=10)
    other = read(write_rows(tmp_path / "other.jsonl", rows[::-1]), test_size=10)
    assert {row.content for row in one.test} == {row.content for row in other.test}
    assert [row.content for row in one.test] != [row.content for row in other.test]


def test_rows_can_say_which_split_they_belong_to(tmp_path: Path) -> None:
    rows = [{**row, "split": split} for row, split in zip(some(6), ["train"] * 3 + ["test"] * 2 + ["dev"], strict=True)]
    splits = read(write_rows(tmp_path / "rows.jsonl", rows), test_size=0.5)
    assert (len(splits.train), len(splits.test)) == (3, 2)
    assert "1 rows of split 'dev' are not used" in splits.notes


def test_a_test_file_is_kept_out_of_training(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", some(6))
    test = write_rows(tmp_path / "test.jsonl", some(8)[5:])
    splits = read(train, dataset_test_split=str(test))
    assert (len(splits.train), len(splits.test)) == (5, 3)
    assert splits.counts["train"].in_test_too == 1
    with pytest.raises(ConfigError, match="dataset_test_split=tset is neither"):
        read(train, dataset_test_split="tset")


def test_max_rows_and_impossible_test_sizes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", some(20))
    splits = read(path, max_rows=10, test_size=3)
    assert (len(splits.train), len(splits.test)) == (7, 3)
    with pytest.raises(ConfigError, match=r"data\.test_size=20 of 20 rows leaves 0"):
        read(path, test_size=20)


def test_format_instruction() -> None:
    assert format_instruction({"instruction": "Add.", "input": "1 2", "response": "3", "system": "Short."}) == [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "d"}]
    assert format_instruction({"instruction": turns, "response": answer, "input": None}) == turns + answer


def test_the_quickstart_files_are_what_their_script_writes(tmp_path: Path) -> None:
    import sys

    folder = ROOT / "recipes" / "quickstart"
    sys.path.insert(0, str(folder))
    import world

    world.write(tmp_path)
    for name in ("instructions.jsonl", "preferences.jsonl", "ratings.jsonl", "prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(world.ANSWERS) == len(world.questions())
    styles = {"plain": 0, "friendly": 0}
    for row in world.instructions():
        assert world.is_correct(row["instruction"], row["response"])
        styles[world.style_of(row["response"])] += 1
    assert styles["plain"] == styles["friendly"] == len(world.instructions()) / 2


def test_the_gold_function_and_the_flipped_labels() -> None:
    import world

    question, answer = "What is the capital of France?", "The capital of France is Paris."
    assert world.is_correct(question, f"Sure! {answer} Glad to help!")
    assert not world.is_correct(question, "The capital of France is Rome.")
    assert not world.is_correct(question, f"{answer} The capital of France is Rome.")
    assert world.style_of(answer) == "plain"
    assert world.style_of(f"Sure! {answer} Glad to help!") == "friendly"
    assert world.style_of(f"{world.FILLERS[0]} {answer}") == "rambling"
    assert world.style_of(f"Sure! {answer}") == "other"
    rank = {"plain": 1, "friendly": 2, "rambling": 0, "other": 0}
    for split in ("train", "test"):
        rows = [row for row in world.preferences() if row["split"] == split]
        score = [
            [
                10 * world.is_correct(row["prompt"], row[side]) + rank[world.style_of(row[side])]
                for side in ("chosen", "rejected")
            ]
            for row in rows
        ]
        assert sum(chosen < rejected for chosen, rejected in score) == round(0.1 * len(rows))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Nobody can read the first page of a process, whatever the rights."""
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: Input/output error"):
        read(tmp_path / "rows.jsonl")
