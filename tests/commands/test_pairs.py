"""`posttrain pairs` through its real entry point, and as a step of a pipeline with rounds."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    WORDS,
    Outcome,
    contents,
    manifest,
    once,
    read_rows,
    same_weights,
    start,
    wait_for,
    write_rows,
    write_sources,
)

from posttrain import pairs
from posttrain.report import write_report

Posttrain = Callable[..., Outcome]
REWARD = "reward_functions=[my_rewards.vowels]"
WORDS_OF_PAIRS = (
    *("policy=outputs/w/sft", REWARD, "data.dataset_name=asked.jsonl", "data.test_size=5", "samples=3"),
    *("max_new_tokens=24", "max_length=64", "run_name=w"),
)
SFT = ("max_length=64", "batch_size=8", "learning_rate=1e-2", "warmup_steps=0")
ANSWERED = Path("outputs/w/pairs")


@pytest.fixture
def taught(posttrain: Posttrain, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sources`, asked.jsonl, and in outputs/w/sft a policy that ends its answers, trained once."""

    def make(folder: Path) -> None:
        write_sources(folder)
        given = ("data.dataset_name=rows.jsonl", "run_name=w", f"output_dir={folder}/outputs", "data.test_size=4")
        assert posttrain("stage=sft", *given, "trainer.max_steps=40", *(f"stage.{each}" for each in SFT)).code == 0

    folder = once(tmp_path_factory, "taught", make)
    shutil.copytree(folder / "outputs", sources / "outputs")
    asked = [{"prompt": f"What is {a} and {b}?", "topic": a} for a in WORDS[:8] for b in WORDS[8:]]
    write_rows(sources / "asked.jsonl", asked)
    return sources


def vowels(text: str) -> float:
    return float(sum(letter in "aeiou" for letter in text))


def test_pairs_are_sampled_scored_and_known_again(entry: Posttrain, taught: Path) -> None:
    done = entry(pairs.main, *WORDS_OF_PAIRS, "dry_run=true")
    assert done.code == 0, done
    assert "35 prompts" in done.out
    assert not ANSWERED.exists()

    done = entry(pairs.main, *WORDS_OF_PAIRS)
    assert done.code == 0, done
    assert f"model.model_name_or_path=outputs/w/sft data.dataset_name={ANSWERED}/preferences.jsonl" in " ".join(
        done.out.split()
    )
    rows, known = read_rows(ANSWERED / "preferences.jsonl"), manifest(ANSWERED)
    assert len(rows) == known["metrics"]["rows"] > 5
    assert known["metrics"]["prompts"] == 35
    for row in rows:
        [chosen], [rejected] = row["chosen"], row["rejected"]
        assert row["margin"] == vowels(chosen["content"]) - vowels(rejected["content"]) >= 0.1
        assert row["topic"] in row["prompt"][-1]["content"]
    assert len({row["prompt"][-1]["content"] for row in rows}) == len(rows)
    given, made = known["inputs"]["model"]["weights"], manifest("outputs/w/sft")["weights"]
    assert given["model.safetensors"] == made["model.safetensors"]
    assert (known["inputs"]["model"]["stage"], known["pairs"]["samples"]) == ("sft", 3)

    # again: nothing; a finished folder that was cut back to a part of its answers: the same bytes
    first = contents(ANSWERED)
    assert "already complete" in entry(pairs.main, *WORDS_OF_PAIRS).out
    other = entry(pairs.main, *WORDS_OF_PAIRS, "min_margin=2")
    assert (other.code, "pairs.min_margin was 0.5, now 2.0" in " ".join(other.err.split())) == (2, True), other
    assert contents(ANSWERED) == first
    other = entry(pairs.main, *WORDS_OF_PAIRS, "min_margin=0", "move_aside=true")
    assert (other.code, manifest(ANSWERED)["pairs"]["min_margin"]) == (0, 0), other
    assert "answered: " not in other.out  # the answers are the same ones
    [aside] = Path("outputs/w/earlier").glob("pairs-*")
    assert contents(aside) == first
    shutil.rmtree(ANSWERED)
    aside.rename(ANSWERED)
    for name in ("posttrain.json", "preferences.jsonl", "answers/00000032.jsonl"):
        (ANSWERED / name).unlink()
    done = entry(pairs.main, *WORDS_OF_PAIRS)
    assert done.code == 0, done
    assert {name: text for name, text in contents(ANSWERED).items() if name != "posttrain.json"} == {
        name: text for name, text in first.items() if name != "posttrain.json"
    }

    # rows that were edited, and other settings, are another result, which is not replaced unasked
    with (ANSWERED / "preferences.jsonl").open("a") as file:
        file.write("\n")
    done = entry(pairs.main, *WORDS_OF_PAIRS)
    assert done.code == 2, done
    assert "preferences.jsonl has changed since the run finished" in done.err
    done = entry(pairs.main, *WORDS_OF_PAIRS, "samples=2")
    assert done.code == 2, done
    assert "pairs.samples was 3, now 2" in done.err
    done = entry(pairs.main, *WORDS_OF_PAIRS, "samples=2", "move_aside=true")
    assert (done.code, "answered: " in done.out) == (0, True), done
    assert manifest(ANSWERED)["metrics"]["prompts"] == 35
    assert entry(pairs.main, *WORDS_OF_PAIRS, "move_aside=true").code == 0
    shard = ANSWERED / "answers/00000000.jsonl"
    whole = shard.read_text()
    shard.write_text(whole.replace('"text": "', '"text": "edited '))
    done = entry(pairs.main, *WORDS_OF_PAIRS, "min_margin=0", "move_aside=true")
    assert (done.code, "answered: " in done.out) == (0, True), done
    assert (shard.read_text(), "edited" in (ANSWERED / "preferences.jsonl").read_text()) == (whole, False)
    assert entry(pairs.main, *WORDS_OF_PAIRS, "move_aside=true").code == 0

    # rejection sampling: the best alone, as rows of SFT
    done = entry(pairs.main, *WORDS_OF_PAIRS, "keep=best", "out=best")
    assert done.code == 0, done
    best = read_rows("best/instructions.jsonl")
    assert len(best) >= len(rows)
    by_prompt = {row["prompt"][-1]["content"]: row["completion"] for row in best}
    assert all(by_prompt[row["prompt"][-1]["content"]] == row["chosen"] for row in rows)

    # and of these the good ones alone
    rewards = sorted({vowels(row["completion"][-1]["content"]) for row in best})
    done = entry(pairs.main, *WORDS_OF_PAIRS, "keep=best", "out=best", f"min_reward={rewards[-1]}", "move_aside=true")
    assert done.code == 0, done
    good = [row for row in best if vowels(row["completion"][-1]["content"]) == rewards[-1]]
    assert read_rows("best/instructions.jsonl") == good
    assert len(good) < len(best)
    assert re.search(rf"reward of the best too low\W+{len(best) - len(good)}\b", done.out), done.out
    assert "run_name=w-best" in done.out

    for words, said in (
        (("min_margin=1000", "out=none"), "no row can be made of the answers"),
        (("temperature=0.5", "out=none"), "stage.temperature was 1.0, now 0.5"),  # its answers are kept
        (("out=my_rewards.py",), "out=my_rewards.py is no folder"),
        (("out=outputs/w/sft", "overwrite=true"), "outputs/w/sft holds the model that is asked for"),
        (("samples=1",), "samples=1 must be at least 2"),
        (("samples=x",), "samples=x"),
        (("keep=best", "min_margin=1"), "min_margin is about two answers"),
        (("keep=all",), "keep=all is not one of pairs, best"),
        (("sampels=2",), "sampels is unknown"),
        (("gold_filter=true",), "gold_filter=true asks the functions of eval_reward_functions"),
        (("policy=none/of/this",), "none/of/this: no such folder"),
        (("reward_functions=[]",), "needs a reward"),
        (("data.dataset_name=empty.jsonl",), "empty.jsonl"),
        (("out=mine",), "mine holds files that are not of one run"),
    ):
        Path("mine").mkdir(exist_ok=True)
        Path("mine/notes.txt").write_text("keep")
        Path("empty.jsonl").touch()
        done = entry(pairs.main, *WORDS_OF_PAIRS, *words)
        assert done.code == 2, done
        assert said in " ".join(done.err.split()), done
    assert Path("mine/notes.txt").read_text() == "keep"
    assert not Path("none/preferences.jsonl").exists()
    assert Path("outputs/w/sft/model").is_dir()
    assert entry(pairs.main, *WORDS_OF_PAIRS, "min_margin=0", "out=none").code == 0  # other rows of the same answers
    assert len(read_rows("none/preferences.jsonl")) >= len(rows)


def test_damaged_answers_are_named_and_kept(entry: Posttrain, taught: Path) -> None:
    assert entry(pairs.main, *WORDS_OF_PAIRS).code == 0
    shard, manifest_file = ANSWERED / "answers/00000000.jsonl", ANSWERED / "posttrain.json"
    whole, finished = shard.read_bytes(), manifest_file.read_bytes()
    for damaged, text, said in (
        (manifest_file, finished[:99], "posttrain.json is broken"),
        (manifest_file, b"[]", "posttrain.json is broken"),
        (shard, whole[: len(whole) // 2], "holds answers to"),
        (shard, b"", "holds answers to"),
        (shard, whole.replace(b'"answers"', b'"answer"', 1), "00000000.jsonl is broken"),
        (shard, whole.replace(b'"scores"', b'"score"', 1), "00000000.jsonl is broken"),
        (shard, whole.replace(b'{"answers"', b'{"answers', 1), "00000000.jsonl is broken"),
    ):
        manifest_file.write_bytes(finished)
        if damaged == shard:
            manifest_file.unlink()  # answers are read while it is not finished
        damaged.write_bytes(text)
        done = entry(pairs.main, *WORDS_OF_PAIRS)
        assert done.code == 2, done
        assert said in " ".join(done.err.split()), done
        assert "Traceback" not in done.err
        assert damaged.read_bytes() == text


ROUNDS = (
    *("stages=[sft,pairs,dpo]", "rounds=2", "run_name=w", "data.prompts=asked.jsonl", "ppo.data.test_size=5"),
    *("data.instructions=rows.jsonl", "sft.data.test_size=4", "sft.trainer.max_steps=40"),
    *(f"sft.{each}" for each in SFT),
    *(f"ppo.{REWARD}", "ppo.eval_reward_functions=[my_rewards.vowels]", "ppo.max_new_tokens=24", "ppo.max_length=64"),
    *("pairs.samples=3", "dpo.max_length=64", "dpo.trainer.max_steps=4", "dpo.data.test_size=4"),
    *("dpo.trainer.logging_steps=1", "dpo.trainer.save_steps=2"),
)
MADE = ("pairs", "dpo", "pairs-round2", "dpo-round2")


def test_a_dry_run_of_rounds_reads_the_prompts(pipeline: Posttrain, taught: Path) -> None:
    done = pipeline(*ROUNDS, "run_name=unborn", "dry_run=true")
    assert done.code == 0, done
    assert "3 answers to each of 35 prompts, into outputs/unborn/pairs" in " ".join(done.out.split())
    assert not Path("outputs/unborn").exists()
    done = pipeline(*ROUNDS, "run_name=unborn", "dry_run=true", "data.prompts=none.jsonl")
    assert (done.code, "none.jsonl" in done.err) == (2, True), done


@pytest.mark.slow
def test_rounds_follow_one_another_and_go_on_where_they_stopped(pipeline: Posttrain, taught: Path) -> None:
    done = pipeline(*ROUNDS)
    assert done.code == 0, done
    run = Path("outputs/w")
    known = {name: manifest(run / name) for name in MADE}
    given = {name: each["inputs"] for name, each in known.items()}
    assert given["pairs"]["model"]["path"] == given["dpo"]["model"]["path"] == "outputs/w/sft"
    assert "reference" not in given["dpo"]
    assert given["pairs-round2"]["model"]["path"] == given["dpo-round2"]["model"]["path"] == "outputs/w/dpo"
    assert given["dpo-round2"]["reference"]["path"] == "outputs/w/sft"
    assert "dpo-round2: before and after" in done.out
    assert re.search(r"[1-5] of the 5 held-out prompts are asked in rows that sft was", done.out), done.out
    assert done.out.count(": vowels since outputs/w/sft: ") == 2
    assert done.out.count("round 2: vowels since outputs/w/dpo: ") == 1
    assert (known["pairs"]["seed"], known["pairs-round2"]["seed"]) == (42, 43)
    assert [Path(source).parent.name for source in known["dpo-round2"]["data"]["sources"]] == ["pairs-round2"]
    assert known["dpo-round2"]["metrics"]["kl_before"] > 0 == known["dpo"]["metrics"]["kl_before"]
    page = write_report(run).read_text()
    assert "DPO, round 2" in page

    before = contents(run)
    again = pipeline(*ROUNDS)
    assert again.code == 0, again
    assert again.out.count("already complete: ") == 5
    policies = [each["policy"] for each in json.loads((run / "evaluation.json").read_text())]
    first, best, *others = policies
    assert (first, best) == ("outputs/w/sft", "best of 3 of outputs/w/sft")
    assert others == ["outputs/w/dpo", "outputs/w/dpo-round2"]
    after = contents(run)
    assert {name: after[name] for name in after if "report.html" not in name} == {
        name: before[name] for name in before if "report.html" not in name
    }
    # margins are whole numbers: the rows are chosen anew, and are the same ones, so nothing is trained again
    other = pipeline(*ROUNDS, "pairs.min_margin=0.1")
    assert other.code == 0, other
    assert other.out.count("already complete: ") == 3
    assert {each.name.rpartition("-")[0] for each in (run / "earlier").iterdir()} == {"pairs", "pairs-round2"}
    assert manifest(run / "pairs-round2")["pairs"]["min_margin"] == 0.1
    made = run / "dpo/posttrain.json"
    made.write_text(made.read_text().replace(known["dpo"]["weights"]["model.safetensors"], "0" * 64))
    assert "DPO, round 2" not in write_report(run).read_text(), "it is of another DPO model"


@pytest.mark.slow
def test_a_round_in_which_gold_falls_is_the_last(pipeline: Posttrain, taught: Path) -> None:
    """The gold function is the reward with its sign turned, so that what DPO gains it loses."""
    with (taught / "my_rewards.py").open("a") as file:
        file.write("def few(**columns):\n    return [-value for value in vowels(**columns)]\n")
    turned = [word.replace("[my_rewards.vowels]", "[my_rewards.few]") if "eval_" in word else word for word in ROUNDS]
    turned = [word.replace("max_steps=4", "max_steps=24").replace("test_size=5", "test_size=16") for word in turned]
    done = pipeline(*turned, "dpo.learning_rate=2e-3", "dpo.batch_size=8", "pairs.samples=6")
    assert done.code == 0, done
    assert "round 1 is the last of 2: few fell since outputs/w/sft" in " ".join(done.out.split())
    assert Path("outputs/w/dpo/posttrain.json").is_file()
    assert not Path("outputs/w/pairs-round2").exists()


@pytest.mark.slow
def test_pairs_and_rounds_killed_at_any_moment_end_the_same(taught: Path) -> None:
    """The pipeline of two rounds, killed twelve times in pairs and in DPO."""
    whole = start(*ROUNDS, cwd=taught, module="posttrain.pipeline")
    out, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, out + err
    shutil.copytree(taught / "outputs/w/sft", taught / "cut/w/sft")
    cut, moments, killed = (*ROUNDS, "output_dir=cut"), random.Random(0), 0
    folder = taught / "cut/w"
    reached: set[str] = set()
    while killed < 12:
        process = start(*cut, cwd=taught, module="posttrain.pipeline")
        old = {*contents(folder)}
        while process.poll() is None and not ({*contents(folder)} - old):
            time.sleep(0.01)
        try:
            out, err = process.communicate(timeout=moments.uniform(0, 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            reached |= {path.name for path in folder.iterdir() if (path / "run.json").is_file()}
            continue
        assert process.returncode == 0, out + err
        for name in MADE:  # faster than the kill
            shutil.rmtree(folder / name)
    process = start(*cut, cwd=taught, module="posttrain.pipeline")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    print("killed in", sorted(reached))
    for name in MADE:
        one, other = taught / "outputs/w" / name, folder / name
        if name.startswith("pairs"):
            assert (one / "preferences.jsonl").read_bytes() == (other / "preferences.jsonl").read_bytes()
            assert contents(one / "answers") == contents(other / "answers")
        else:
            assert same_weights(one / "model", other / "model")


@pytest.mark.slow
def test_what_is_there_when_it_is_killed_is_whole(taught: Path) -> None:
    process = start(*WORDS_OF_PAIRS, cwd=taught, module="posttrain.pairs")
    wait_for(taught / ANSWERED / "answers/00000000.jsonl", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (taught / ANSWERED / "posttrain.json").exists()
    [shard] = (taught / ANSWERED / "answers").glob("*.jsonl")
    assert [len(json.loads(line)["answers"]) for line in shard.read_text().splitlines()] == [3] * 32
