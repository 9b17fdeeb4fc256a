"""Prepared rows: made once, whole or made again, flat in memory, and known by hashes before anything is tokenised."""

import datetime
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers_for_tests as made
from conftest import ROWS, Posttrain, data_config, manifest, prepared, read_rows, same_weights, write_rows

from posttrain import prepare
from posttrain.data import hashes
from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import ConversationEncoding, from_text, to_text
from posttrain.data.formats import instructions
from posttrain.data.hashes import Hashes
from posttrain.data.prepared import key_of
from posttrain.data.prepared import prepare as prepare_rows
from posttrain.data.reading import Work
from posttrain.data.sources import find_sources
from posttrain.errors import ConfigError, DataError

CACHE = Path("outputs/.cache")
ENCODING = ConversationEncoding(64, "truncate")


def some(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Say {number}.", "response": f"It is {number}."} for number in range(count)]


def test_what_is_remembered_of_files_has_the_mode_that_the_umask_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "YOUNG", -1.0)
    remembered = Hashes(tmp_path)
    remembered.of(write_rows(tmp_path / "rows.jsonl", some(1)))
    mask = os.umask(0o027)
    try:
        remembered.save()
    finally:
        os.umask(mask)
    assert oct(remembered.file.stat().st_mode & 0o777) == "0o640"


def sets(cache: Path = CACHE) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else []


def made_of(path: Path, cache: Path, **changes: Any) -> Any:
    return prepared(instructions, ENCODING, made.chatml(), data_config(str(path), "sft", **changes), cache)


def test_rows_are_prepared_once_and_every_later_start_reads_them(posttrain: Posttrain, rows: Path) -> None:
    command = (f"data.dataset_name={rows}", "trainer.max_steps=2", "stage.learning_rate=1e-3")
    assert posttrain(*command).code == 0
    [first] = sets()
    content = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in first.iterdir()}
    assert posttrain(*command, "run_name=again").code == 0
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sets()[0].iterdir()} == content
    assert same_weights(Path("outputs/demo/sft/model"), Path("outputs/again/sft/model"))
    assert posttrain(*command, "run_name=shorter", "stage.max_length=48").code == 0
    assert len(sets()) == 2
    assert manifest("outputs/demo/sft")["data"]["rows_of"][str(rows)]["train"] > 0


def test_hashes_answer_before_anything_is_tokenised(posttrain: Posttrain, entry: Posttrain, rows: Path) -> None:
    command = (f"data.dataset_name={rows}", "trainer.max_steps=2")
    assert posttrain(*command).code == 0
    keep = CACHE / "mine.txt"
    keep.write_text("not ours")
    pruned = entry(prepare.main, "prune")
    assert pruned.code == 0, pruned
    assert [path.name for path in CACHE.iterdir()] == ["mine.txt"]
    again = posttrain(*command)
    assert again.code == 0
    assert "already complete" in again.out
    assert posttrain(*command, "stage.learning_rate=1e-3").code == 2
    rows.write_text(rows.read_text() + "not JSON\n")
    changed = posttrain(*command)
    assert changed.code == 2
    assert "rows are not the same" in changed.err
    assert sets() == []


def test_prepared_ahead_by_the_words_of_the_run(posttrain: Posttrain, entry: Posttrain, rows: Path) -> None:
    command = (f"data.dataset_name={rows}", "trainer.max_steps=2", "data.cache_dir=kept")
    done = entry(prepare.main, "prepare", "stage=sft", *command)
    assert done.code == 0, done
    assert not Path("outputs").exists()
    [ahead] = sets(Path("kept"))
    assert posttrain(*command).code == 0
    assert sets(Path("kept")) == [ahead]
    assert entry(prepare.main, "prun").code == 2
    assert entry(prepare.main, "prune", "dry_run=true").code == 2
    assert entry(prepare.main, "prune", "data.dataset_name=nope.jsonl").code == 2
    assert entry(prepare.main, "prepare", *command, "dry_run=true").code == 2
    assert sets(Path("kept")) == [ahead]
    assert entry(prepare.main, "prepare", "data.dataset_name=nope.jsonl").code == 2


@pytest.mark.parametrize("broken", ["prepared.json", "rows.arrow", "of-train.arrow"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_what_is_broken_is_made_again(tmp_path: Path, broken: str, how: str) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", some(40)), tmp_path / "cache"
    before = list(made_of(path, cache).train.dataset)
    whole = {file.name: file.read_bytes() for file in sets(cache)[0].iterdir()}
    file = sets(cache)[0] / broken
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if how == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    again = made_of(path, cache)
    if broken != "prepared.json" or how != "changed":  # a digit of it may be another one, which is as good
        assert {file.name: file.read_bytes() for file in sets(cache)[0].iterdir()} == whole
    assert list(again.train.dataset) == before


def test_several_processes_make_the_same_rows_and_name_errors_in_order(tmp_path: Path) -> None:
    rows = some(3500)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, two = (made_of(path, tmp_path / f"cache-{number}", num_proc=number, test_size=0.1) for number in (1, 2))
    assert list(one.train.dataset) == list(two.train.dataset)
    assert (one.counts, one.notes, one.fingerprint) == (two.counts, two.notes, two.fingerprint)
    for line in (3100, 1200, 2300):
        rows[line] = {"instruction": "a"}
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as error:
        made_of(bad, tmp_path / "cache-bad", num_proc=2)
    assert str(error.value).splitlines()[0].startswith(f"{bad} line 1201: no 'response'")
    assert "and 2 more rows" in str(error.value)
    assert not (tmp_path / "cache-bad").exists(), "nothing is left of what failed"
    rows[2300] = {**some(1)[0], "label": 1}
    with pytest.raises(ConfigError, match=r"data\.ignored_columns=\[label\]"):
        made_of(write_rows(bad, rows), tmp_path / "cache-bad", num_proc=2)


def test_a_killed_preparation_is_in_nobodys_way(tmp_path: Path) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", some(40)), tmp_path / "cache"
    before = list(made_of(path, cache).train.dataset)
    [folder] = sets(cache)
    folder.rename(cache / f".making-{folder.name}")
    again = made_of(path, cache)
    assert sets(cache) == [folder]
    assert list(again.train.dataset) == before


def test_a_digest_is_taken_anew_where_a_file_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    young = Hashes(tmp_path)
    first = young.of(file)
    assert young.known == {}, "a file that has just been written is not remembered"
    monkeypatch.setattr(hashes, "YOUNG", -1.0)
    known = Hashes(tmp_path)
    known.of(file)
    known.save()
    remembered = Hashes(tmp_path)
    assert list(remembered.known) == [str(file.resolve())]
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and mtime are the same again; ctime is not
    assert remembered.of(file) != first
    for broken in ("{broken", "[]", '{"a": 3}', '{"a": [1]}', "3"):
        (tmp_path / hashes.HASHES).write_text(broken)
        assert Hashes(tmp_path).known == {}


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_rows(tmp_path: Path) -> None:
    held, peaks = {}, {}
    for count in (1_000, 6_000):
        path, cache = write_rows(tmp_path / f"{count}.jsonl", some(count)), tmp_path / f"cache-{count}"
        tracemalloc.start()
        made_of(path, cache, num_proc=1, test_size=0.1)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tracemalloc.start()
        found = made_of(path, cache, num_proc=1, test_size=0.1)
        assert found.train.dataset[count // 2]["length"] > 0
        held[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert (held[6_000] - held[1_000]) / 5_000 < 50
    assert (peaks[6_000] - peaks[1_000]) / 5_000 < 250  # of a row its text alone has 60, its ids as a list 400


def test_held_out_rows_are_bounded_by_their_content(tmp_path: Path) -> None:
    rows = some(400)
    one = made_of(write_rows(tmp_path / "one.jsonl", rows), tmp_path / "one", test_size=200)
    other = made_of(write_rows(tmp_path / "other.jsonl", rows[::-1]), tmp_path / "other", test_size=200)
    chosen, again = ({row.content for row in each.test.bounded(50).rows} for each in (one, other))
    assert len(chosen) == 50
    assert chosen == again
    assert one.train.lengths.tolist() == [row["length"] for row in one.train.dataset]
    assert one.test.bounded(50).lengths.tolist() == [row["length"] for row in one.test.bounded(50).dataset]
    assert one.test.bounded(None) is one.test.bounded(200) is one.test
    assert [row.where for row in one.test.bounded(50).rows] == sorted(
        (row.where for row in one.test.bounded(50).rows), key=lambda where: int(where.rsplit(" ", 1)[1])
    )


def test_only_what_was_prepared_is_pruned(tmp_path: Path, entry: Posttrain) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", some(20)), tmp_path / "cache"
    made_of(path, cache)
    [ours] = sets(cache)
    (cache / "elsewhere").mkdir()
    shutil.copytree(ours, cache / "mine")  # not called by its key
    shutil.copytree(ours, cache / ("0" * 32))
    for name in ("hashes.json", ".poetry.lock", ".making-plan.txt", "elsewhere/prepared.json"):
        (cache / name).write_text("mine")
    (cache / ("1" * 32)).symlink_to(ours)
    (cache / f".making-{'2' * 32}").mkdir()
    before = {entry.name for entry in cache.iterdir()}
    assert entry(prepare.main, "prune", f"data.cache_dir={cache}").code == 0
    assert before - {entry.name for entry in cache.iterdir()} == {
        ours.name,
        f".{ours.name}.lock",
        f".making-{'2' * 32}",
    }
    assert entry(prepare.main, "prune", f"data.cache_dir={path}").code == 0
    assert path.is_file()
    refused = entry(prepare.main, "prepare", f"data.dataset_name={path}", f"data.cache_dir={path}")
    assert refused.code == 2
    assert "data.cache_dir" in refused.err


def test_a_source_that_changes_while_it_is_prepared_is_refused(tmp_path: Path) -> None:
    data = data_config(str(write_rows(tmp_path / "rows.jsonl", some(20))), "sft")
    sources, known = find_sources(data), Hashes(tmp_path / "cache")
    work = Work(data, instructions, sources, ChatEncoder(made.chatml()), ENCODING)
    digests = known.of_sources(sources)
    write_rows(tmp_path / "rows.jsonl", some(21))
    with pytest.raises(DataError, match="has changed while it was read"):
        prepare_rows(work, tmp_path / "cache", known, key_of(work, digests), digests)
    assert not (tmp_path / "cache").exists()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", some(10))
    found = made_of(path, tmp_path / "cache")
    assert [row.where for row in found.train.examples([2, 0])] == [f"{path} line 3", f"{path} line 1"]
    for other in (some(2), [*some(2), {"instruction": "Other", "response": "row."}]):
        write_rows(path, other)
        with pytest.raises(DataError, match="line 3 has changed"):
            found.train.examples([2])


def test_what_reward_functions_are_handed_is_what_the_source_holds(posttrain: Posttrain, tmp_path: Path) -> None:
    value = {"day": datetime.date(2026, 7, 3), "at": datetime.datetime(2026, 7, 3, 4, 5), "raw": b"\x00\xff", "n": [1]}
    assert from_text(to_text(value)) == value
    with pytest.raises(ValueError, match="a column holds a complex"):
        to_text({"a": 1j})
    rows = [{"prompt": f"Say {n}.", "day": datetime.date(2026, 7, n % 28 + 1)} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    (tmp_path / "rewards_of_days.py").write_text(
        "import datetime\n\n\ndef on_a_day(prompts, completions, day, **columns):\n"
        "    assert all(type(each) is datetime.date for each in day)\n    return [float(each.day) for each in day]\n"
    )
    done = posttrain(
        *("stage=ppo", "data.dataset_name=prompts.parquet", "stage.reward_functions=[rewards_of_days.py:on_a_day]"),
        *("stage.rollout_batch_size=4", "stage.batch_size=4", "stage.num_mini_batches=1", "trainer.max_steps=1"),
        *("stage.max_new_tokens=4", "stage.max_length=64"),
    )
    assert done.code == 0, done


def test_the_bound_is_told_and_kept(posttrain: Posttrain, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some(60))
    done = posttrain(f"data.dataset_name={rows}", "data.test_size=30", "data.max_eval_rows=7", "trainer.max_steps=1")
    assert done.code == 0, done
    assert "7 of the 30 held-out rows" in " ".join(done.out.split())
    assert len(read_rows(Path("outputs/demo/sft/metrics.jsonl"))) > 0
    assert any(
        "max_eval_rows" in note
        for note in json.loads(Path("outputs/demo/sft/posttrain.json").read_text())["data"]["notes"]
    )
    assert len(ROWS) > 0
