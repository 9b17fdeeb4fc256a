"""A finished result stays where a user finds it: re-runs, moves, other spellings, kills, several commands at a time."""

import json
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import SHORT_PIPELINE, Posttrain, ended, launched, manifest, same_weights, start, wait_for, write_rows
from filelock import FileLock

from posttrain import evaluate, export, report, run
from posttrain.errors import ConfigError
from posttrain.pipeline import main as pipeline_main
from posttrain.pipeline import read_pipeline
from posttrain.runs.folder import RunFolder, locked

RUN = ("trainer.max_steps=3", "trainer.save_steps=1", "stage.max_length=64", "stage.warmup_steps=0")
SFT = Path("outputs/demo/sft")
PAIRS = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(20)]
PAIR = (*SHORT_PIPELINE, "stages=[sft,dpo]", "trainer.max_steps=2")


def beta(folder: Path) -> float:
    return float(manifest(folder)["config"]["stage"]["beta"])


def whole(folder: Path) -> bool:
    """Whether a folder holds a finished run whose every file is as it was written."""
    found = RunFolder(folder).manifest()
    return found is not None and not RunFolder(folder).damage(found)


def test_what_a_pipeline_re_runs_is_moved_aside_and_still_of_use(pipeline: Posttrain, entry: Posttrain) -> None:
    assert pipeline(*PAIR).code == 0
    other = pipeline(*PAIR, "dpo.beta=0.3", "dpo.learning_rate=1e-2")
    assert other.code == 0, other
    [aside] = Path("outputs/demo/earlier").glob("dpo-*")
    assert f"it is moved to {aside}" in other.out.replace("\n", " ")
    assert (beta(aside), beta(Path("outputs/demo/dpo"))) == (0.1, 0.3)
    assert whole(aside)
    assert len(list(Path("outputs/demo/earlier").glob("evaluation-*.json"))) == 1
    assert entry(export.main, str(aside), "to=exported").code == 0
    assert entry(report.main, str(aside)).code == 0
    prompts = write_rows(Path("own.jsonl"), [{"prompt": f"What is {n}?"} for n in range(7)])
    before = Path("outputs/demo/evaluation.json").read_bytes()
    policies = f"policies=[outputs/demo/sft,{aside}]"
    for number in ("", "-2"):
        done = entry(evaluate.main, policies, f"data.dataset_name={prompts}", "max_new_tokens=4")
        assert done.code == 0, done
        found = json.loads(Path(f"outputs/demo/evaluation-own{number}.json").read_text())
        assert [len(each["answers"]) for each in found] == [7, 7], "all rows of what is named"
    assert Path("outputs/demo/evaluation.json").read_bytes() == before
    refused = entry(evaluate.main, policies, f"data.dataset_name={prompts}", "out=outputs/demo/evaluation.json")
    assert refused.code == 2, refused
    # and back: the old configuration is another one again, so both are kept
    assert pipeline(*PAIR).code == 0
    assert sorted(map(beta, Path("outputs/demo/earlier").glob("dpo-*"))) == [0.1, 0.3]
    assert same_weights(aside / "model", Path("outputs/demo/dpo/model"))
    finished = Path("outputs/demo/dpo/posttrain.json").stat().st_mtime_ns
    bare = entry(pipeline_main)
    assert bare.code == 2, bare
    assert "outputs/demo/sft" in bare.err
    assert entry(run.main).code == 2
    assert Path("outputs/demo/dpo/posttrain.json").stat().st_mtime_ns == finished


@pytest.mark.slow
def test_the_points_of_a_sweep_stay_and_are_moved_aside_themselves(pipeline: Posttrain) -> None:
    sweep = ("-m", *PAIR, "dpo.beta=0.1,0.5")
    assert pipeline(*sweep).code == 0
    assert pipeline(*PAIR).code == 0, "a run of its own beside the points"
    assert pipeline(*PAIR, "dpo.beta=0.2").code == 0
    points = sorted(path.name for path in Path("outputs/demo/dpo").glob("stage.beta=*"))
    assert points == ["stage.beta=0.1", "stage.beta=0.5"]
    changed = pipeline(*sweep, "sft.learning_rate=1e-3")
    assert changed.code == 0, changed
    kept = sorted(path.name.rsplit("-", 1)[0] for path in Path("outputs/demo/earlier").iterdir() if path.is_dir())
    assert kept == ["dpo", "dpo-stage.beta=0.1", "dpo-stage.beta=0.5", "sft"]
    assert all(whole(path) for path in Path("outputs/demo/earlier").iterdir() if path.is_dir())


@pytest.mark.slow
def test_killed_at_any_moment_a_re_run_leaves_the_old_result_or_the_new(pipeline: Posttrain, tmp_path: Path) -> None:
    assert pipeline(*PAIR).code == 0
    moments = random.Random(3)
    dpo = tmp_path / "outputs/demo/dpo"
    for number in range(3):
        process = start(*PAIR, f"dpo.beta={0.2 + number / 10}", cwd=tmp_path, module="posttrain.pipeline")
        wait_for(tmp_path / "outputs/demo/.dpo.lock", process)
        while number and whole(dpo) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2) if number else moments.uniform(4, 12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        results = [dpo, *(tmp_path / "outputs/demo/earlier").glob("dpo-*")]
        assert [beta(folder) for folder in results if whole(folder)].count(0.1) == 1, "the first result is somewhere"
    assert pipeline(*PAIR, "dpo.beta=0.7").code == 0
    assert beta(dpo) == 0.7
    assert whole(dpo)


def test_a_users_folder_beside_the_checkpoints_is_left_alone(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    arguments = (f"data.dataset_name={rows}", *RUN, "trainer.max_steps=30")
    process = start(*arguments, cwd=tmp_path)
    wait_for(tmp_path / SFT / "checkpoint-2/checkpoint.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(SFT.glob("checkpoint-*/checkpoint.json"), key=lambda file: file.stat().st_mtime).parent
    shutil.copytree(newest, SFT / "checkpoint-mybackup")
    for name in ("checkpoint-notes", "checkpoint-best", "checkpoint-7x", "checkpoint-999"):
        (SFT / name).mkdir()
        (SFT / name / "notes.txt").write_text("precious")
    done = posttrain(*arguments)
    assert done.code == 0, done
    assert done.out.count("checkpoint-mybackup") == 1
    for name in ("checkpoint-notes", "checkpoint-best", "checkpoint-7x", "checkpoint-999"):
        assert (SFT / name / "notes.txt").read_text() == "precious"
    assert (SFT / "checkpoint-mybackup/model.safetensors").is_file()
    assert posttrain(*arguments, "overwrite=true").code == 0
    assert (SFT / "checkpoint-notes/notes.txt").read_text() == "precious"


def test_a_finished_run_without_its_model_is_not_called_complete(posttrain: Posttrain, rows: Path) -> None:
    arguments = (f"data.dataset_name={rows}", *RUN)
    assert posttrain(*arguments).code == 0
    weights = SFT / "model/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    changed = posttrain(*arguments)
    assert changed.code == 2, changed
    assert "whose result is not as it was written (model/model.safetensors has changed since" in changed.err
    shutil.rmtree(SFT / "model")
    missing = posttrain(*arguments)
    assert missing.code == 2, missing
    assert "model/model.safetensors is missing" in missing.err
    assert "overwrite=true" in missing.err
    assert posttrain(*arguments, "move_aside=true").code == 0
    assert weights.read_bytes() == kept
    assert len(list(Path("outputs/demo/earlier").glob("sft-*"))) == 1


def test_a_start_that_was_killed_or_failed_before_its_first_step_is_no_obstacle(
    posttrain: Posttrain, rows: Path
) -> None:
    (SFT / "base").mkdir(parents=True)
    (SFT / "base/model.safetensors").write_text("half of it")
    arguments = (f"data.dataset_name={rows}", *RUN)
    assert posttrain(*arguments).code == 0
    (SFT / "posttrain.json").unlink()
    for folder in [*SFT.glob("checkpoint-*"), SFT / "model"]:
        shutil.rmtree(folder)
    corrected = posttrain(*arguments, "stage.learning_rate=1e-3")
    assert corrected.code == 0, corrected
    assert "stage.learning_rate was 0.0002, now 0.001" in corrected.out
    assert not Path("outputs/demo/earlier").exists(), "nothing was there to keep"


def test_a_moved_a_renamed_and_a_copied_run_are_the_same_run(
    posttrain: Posttrain, entry: Posttrain, rows: Path
) -> None:
    arguments = (f"data.dataset_name={rows}", *RUN, "model.use_peft=true")
    assert posttrain(*arguments, "run_name=a").code == 0
    pairs = write_rows(Path("pairs.jsonl"), PAIRS)
    dpo = ("stage=dpo", f"data.dataset_name={pairs}", *RUN, "model.use_peft=true")
    assert posttrain(*dpo, "run_name=a").code == 0
    Path("outputs").rename("elsewhere")
    for stage, command in (("sft", arguments), ("dpo", dpo)):
        done = entry(export.main, f"elsewhere/a/{stage}", f"to={stage}")
        assert done.code == 0, done
        assert "agree within" in done.out
        assert "already complete" in posttrain(*command, "run_name=a", "output_dir=elsewhere").out
    shutil.copytree("elsewhere/a", "elsewhere/c")
    shutil.rmtree("elsewhere/c/sft/base")
    for lost in (
        posttrain(*arguments, "run_name=c", "output_dir=elsewhere"),
        entry(export.main, "elsewhere/c/sft", "to=lost"),
    ):
        assert lost.code == 2, lost
        assert "sft/base/" in lost.err or "(base/" in lost.err
        assert " is missing" in lost.err
    shutil.copytree("elsewhere/a", "elsewhere/b")
    shutil.rmtree("elsewhere/a")
    moved = posttrain(*dpo, "run_name=b", f"output_dir={Path('elsewhere').absolute()}")
    assert "already complete" in moved.out, moved
    adapter = "model.model_name_or_path=elsewhere/b/dpo/adapter"
    assert posttrain(*dpo, "run_name=d", adapter).code == 0


def test_the_same_folder_and_files_spelt_otherwise_are_the_same_run(pipeline: Posttrain, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "pairs.jsonl",
        PAIRS,
    )
    again = (*SHORT_PIPELINE, "stages=[sft,reward,dpo]", "trainer.max_steps=1")
    assert pipeline(*again, "data.preferences=pairs.jsonl").code == 0
    done = pipeline(*again, f"data.preferences={tmp_path}/pairs.jsonl", f"output_dir={tmp_path}/outputs")
    assert done.code == 0, done
    assert done.out.count("already complete: ") == 3
    assert not Path("outputs/demo/earlier").exists()


def test_an_edited_reward_function_is_another_run(posttrain: Posttrain, tmp_path: Path) -> None:
    code = "def f(prompts, completions, **columns):\n    return [{} * len(c[0]['content']) for c in completions]\n"
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"What is {n}?"} for n in range(24)])
    (tmp_path / "r.py").write_text(code.format(1.0))
    ppo = (
        *("stage=ppo", "data.dataset_name=prompts.jsonl", "stage.max_length=64", "stage.max_new_tokens=4"),
        *("stage.rollout_batch_size=8", "stage.batch_size=4", "trainer.max_steps=1"),
        "stage.num_mini_batches=1",
        "model.model_name_or_path=posttrain/tiny",
    )
    assert posttrain(*ppo, "stage.reward_functions=[r.py:f]").code == 0
    assert "already complete" in posttrain(*ppo, f"stage.reward_functions=[{tmp_path}/r.py:f]").out
    (tmp_path / "r.py").write_text(code.format(2.0))
    changed = posttrain(*ppo, "stage.reward_functions=[r.py:f]")
    assert changed.code == 2, changed
    assert "reward function f is not the same" in changed.err


def test_one_pipeline_holds_all_of_its_stages(pipeline: Posttrain, posttrain: Posttrain, tmp_path: Path) -> None:
    process = start(*PAIR, "dpo.trainer.max_steps=200", cwd=tmp_path, module="posttrain.pipeline")
    wait_for(tmp_path / "outputs/demo/sft/posttrain.json", process)
    for done in (pipeline(*PAIR, "sft.learning_rate=1e-3"), posttrain("recipes=quickstart/sft", "overwrite=true")):
        assert done.code == 1, done
        assert "outputs/demo/sft is in use by another process" in done.err
    assert process.poll() is None, "the pipeline was over before the others began"
    process.kill()
    process.communicate()
    assert manifest(SFT)["config"]["stage"]["learning_rate"] == 4e-3


def test_a_lock_may_be_taken_again_by_its_own_process_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "outputs/demo/sft"
    with locked(folder), locked(folder):
        assert (tmp_path / "outputs/demo/.sft.lock").is_file()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with locked(folder):
        pass
    with FileLock(tmp_path / "outputs/demo/.sft.lock", timeout=0):
        pass


def test_overwrite_on_two_processes_is_decided_once(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    arguments = (f"data.dataset_name={rows}", *RUN)
    assert posttrain(*arguments).code == 0
    done = ended(launched(*arguments, "overwrite=true", cwd=tmp_path))
    assert done.code == 0, done
    assert whole(tmp_path / SFT)
    refused = ended(launched(*arguments, "stage.learning_rate=1e-3", cwd=tmp_path))
    assert refused.code != 0
    assert "stage.learning_rate was 0.0002, now 0.001" in refused.err


def test_the_quickstarts_rows_are_never_trained_on_unasked(posttrain: Posttrain, rows: Path) -> None:
    mine = ("run_name=mine", *RUN)
    done = posttrain(f"data.dataset_name={rows}", *mine)
    assert done.code == 0, done
    assert f"rows of {rows}" in done.out
    hints = [line.strip() for line in done.out.splitlines() if line.startswith("  posttrain run stage=")]
    assert hints == [
        "posttrain run stage=reward run_name=mine data.dataset_name=preferences.jsonl",
        "posttrain run stage=dpo run_name=mine data.dataset_name=preferences.jsonl",
        "posttrain run stage=kto run_name=mine data.dataset_name=ratings.jsonl",
    ]
    refused = posttrain("stage=dpo", *mine)
    assert refused.code == 2, refused
    assert '{"prompt": "…", "chosen": "…", "rejected": "…"}' in refused.err
    assert posttrain("stage=dpo", *mine, "dry_run=true").code == 2
    with pytest.raises(ConfigError, match=r"data.preferences is required"):
        read_pipeline(["stages=[sft,dpo]", f"data.instructions={rows}", "run_name=new"])
    write_rows(Path("preferences.jsonl"), PAIRS)
    for hint in hints[:2]:
        assert posttrain(*shlex.split(hint)[2:], *RUN).code == 0


def test_what_is_printed_can_be_pasted(posttrain: Posttrain) -> None:
    short = (*RUN, "data.max_rows=120")
    done = posttrain("recipes=quickstart/sft", *short)
    assert "posttrain chat outputs/demo/sft" in done.out
    assert "  posttrain run recipes=quickstart/dpo\n" in done.out
    bare = posttrain("stage=sft", "run_name=bare", *short)
    assert "  posttrain run stage=dpo run_name=bare\n" in bare.out
    assert posttrain("stage=dpo", "run_name=bare", *short).code == 0, "a model of the quickstart needs no data named"


def test_the_hint_of_a_sweeps_point_leads_to_that_point(
    posttrain: Posttrain, capfd: pytest.CaptureFixture[str]
) -> None:
    point = "outputs/demo/sft/stage.learning_rate=0.001"
    done = posttrain("recipes=quickstart/sft", *RUN, "stage.learning_rate=1e-3", f"hydra.run.dir='{point}'")
    assert done.code == 0, done
    [hint] = [line.strip() for line in done.out.splitlines() if "recipes=quickstart/dpo" in line]
    assert hint == f"posttrain run recipes=quickstart/dpo \"model.model_name_or_path='{point}'\""
    assert posttrain(*shlex.split(hint)[2:], *RUN, "data.max_rows=120").code == 0
    assert manifest("outputs/demo/dpo")["inputs"]["model"]["path"] == point


def test_a_report_about_several_runs_is_no_part_of_any(posttrain: Posttrain, entry: Posttrain, rows: Path) -> None:
    for name in ("a", "b"):
        assert posttrain(f"data.dataset_name={rows}", *RUN, f"run_name={name}").code == 0
    assert entry(report.main, "outputs/a").code == 0
    before = Path("outputs/a/report.html").read_bytes()
    assert entry(report.main, "outputs/a", "outputs/b").code == 0
    assert Path("report-a-b.html").is_file()
    assert entry(report.main, "outputs/b", "outputs/a", "out=both.html").code == 0
    assert Path("both.html").is_file()
    assert Path("outputs/a/report.html").read_bytes() == before
    Path("notes.html").write_text("mine")
    refused = entry(report.main, "outputs/a", "out=notes.html")
    assert refused.code == 2
    assert Path("notes.html").read_text() == "mine"
