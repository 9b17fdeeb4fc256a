"""The pipeline through its real entry point: what goes to which stage, what is run again and why, and the gate."""

import shutil
import signal
from pathlib import Path

import pytest
from conftest import SHORT_PIPELINE, Posttrain, manifest, start, wait_for
from datasets import Dataset

from posttrain.data.prepared import Encoded
from posttrain.errors import ConfigError
from posttrain.pipeline import asked_in_training, read_pipeline, with_what_came
from posttrain.runs.checkpoint import MANIFEST


def commands(*arguments: str) -> dict[str, list[str]]:
    return {step.stage: step.arguments for step in read_pipeline(list(arguments))}


def test_held_out_prompts_that_were_trained_on_are_counted() -> None:
    columns = {
        "input_ids": [[1, 2, 3], [1, 4, 5], [6]],
        "spans": [[2, 3], [1, 3], []],
    }  # of the last nothing is learned
    rows, asked = Dataset.from_dict(columns), Dataset.from_dict({"prompt_ids": [[1, 2], [6], [1], [1, 2, 3]]})
    trained, held_out = (Encoded(each, None, 0, 0, 0) for each in (rows, asked))  # type: ignore[arg-type]
    assert asked_in_training(trained, held_out) == 2


def test_what_goes_to_which_stage(tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.touch()
    found = commands(
        "recipes=quickstart",
        "run_name=mine",
        "sft.num_epochs=1",
        "dpo.beta=0.3",
        "dpo.trainer.loss_type=[ipo]",
        "ppo.data.test_size=0.2",
        f"data.preferences={rows}",
        "model.use_peft=true",
    )
    assert found["sft"] == [
        *("stage=sft", "move_aside=true", "recipes=quickstart/sft", "run_name=mine", "stage.num_epochs=1"),
        "model.use_peft=true",
    ]
    assert found["dpo"][4:] == [
        *("stage.beta=0.3", "trainer.loss_type=[ipo]", f"data.dataset_name={rows}", "model.use_peft=true"),
    ]
    assert f"data.dataset_name={rows}" in found["reward"]
    assert "data.test_size=0.2" in found["ppo"]
    assert not any("dataset_name" in argument for argument in found["sft"] + found["ppo"])
    assert f"data.ptx={rows}" not in found["ppo"]
    # the recipe's PPO holds on to the rows of SFT: to one's own, where they are given
    own = commands("recipes=quickstart", f"data.instructions={rows}")
    assert (own["sft"][-1], own["ppo"][-1]) == (f"data.dataset_name={rows}", f"data.ptx={rows}")
    assert (
        f"data.ptx={rows}" not in commands("recipes=quickstart", f"data.instructions={rows}", "ppo.data.ptx=a")["ppo"]
    )
    assert list(commands("stages=[dpo,sft]")) == ["sft", "dpo"]
    assert list(commands("stages=[sft,reward]", "stages=[sft,dpo]")) == ["sft", "dpo"]  # the last, as of any key
    start = commands("model.model_name_or_path=posttrain/tiny")
    assert "model.model_name_or_path=posttrain/tiny" in start["sft"]
    assert not any("model_name_or_path" in argument for argument in start["dpo"])
    swept = read_pipeline(["-m", "recipes=quickstart", "dpo.beta=0.1,0.3"])
    assert swept[-1].arguments == ["-m", "stage=dpo", "move_aside=true", "recipes=quickstart/dpo", "stage.beta=0.1,0.3"]
    assert swept[-1].sweeps
    assert swept[-1].config.stage.beta == 0.1
    assert not any(step.sweeps for step in swept[:-1])


def test_pairs_before_dpo_and_the_folders_of_rounds(tmp_path: Path) -> None:
    asked = (
        "stages=[dpo,pairs,reward,sft]",
        "rounds=2",
        "pairs.samples=4",
        "ppo.max_new_tokens=8",
        "trainer.max_steps=3",
    )
    steps = read_pipeline(["recipes=quickstart", "trainer.max_steps=3", *asked])
    names = ["sft", "reward", "pairs", "dpo", "pairs-round2", "dpo-round2"]
    assert [str(step.folder) for step in steps] == [f"outputs/demo/{name}" for name in names]
    [one, two] = [step for step in steps if step.pairs is not None]
    assert one.pairs is not None
    assert (one.pairs.samples, one.round, two.round, one.config.stage.name) == (4, 1, 2, "ppo")
    assert {"stage.max_new_tokens=8", "recipes=quickstart/ppo"} <= {*one.arguments}
    assert "trainer.max_steps=3" in steps[3].arguments
    assert "trainer.max_steps=3" not in one.arguments
    # the second round: DPO's rows, start and reference are those that the first has left behind
    config = with_what_came(steps[5], steps[:5])
    assert config.data.dataset_name == "outputs/demo/pairs-round2/preferences.jsonl"
    assert config.model.model_name_or_path == "outputs/demo/dpo"
    assert with_what_came(steps[3], steps[:3]).data.dataset_name == "outputs/demo/pairs/preferences.jsonl"
    assert [with_what_came(steps[at], steps[:at]).seed for at in (2, 4)] == [42, 43]


REFUSED = {
    "typo": (["sft.lerning_rate=1"], "sft.lerning_rate is unknown for stage=sft; did you mean sft.learning_rate?"),
    "typo in the section": (["dop.beta=1"], "dop.beta is unknown"),
    "value": (["dpo.beta=-1", "sft.num_epochs=0"], "dpo.beta=-1 must be above 0"),
    "stage": (["stage=dpo"], "choose with stages=[sft,reward,ppo,pairs,dpo,kto,grpo]"),
    "stages": (
        ["stages=[sft,pdo]"],
        "stages=pdo is not one of sft, reward, ppo, pairs, dpo, kto, grpo; did you mean ppo?",
    ),
    "no stages": (["stages=[]"], "stages=[] names no stage"),
    "recipe": (["recipes=quikstart"], "quikstart/sft"),
    "several values": (["dpo.beta=0.1,0.2"], "add -m to sweep over them"),
    "a sweep over sft": (["-m", "sft.learning_rate=1e-3,1e-4"], "sweep it alone: posttrain run -m stage=sft"),
    "pairs": (["stages=[sft,reward,pairs,dpo]", "pairs.samples=1"], "samples=1 must be at least 2"),
    "rows of pairs": (["stages=[sft,reward,pairs,dpo]", "pairs.keep=best"], "pairs.keep=best makes no pairs"),
    "options of nothing": (["stages=[sft,dpo]", "pairs.samples=3"], "pairs.samples=3: no pairs are sampled in stages="),
    "rounds of nothing": (["stages=[sft,dpo]", "rounds=2"], "needs stages=[…,pairs,dpo]"),
    "no rounds": (["stages=[sft,reward,pairs,dpo]", "rounds=0"], "rounds=0 must be a whole number from 1 to 99"),
    "far too many rounds": (
        ["stages=[sft,reward,pairs,dpo]", "rounds=1000000000"],
        "rounds=1000000000 must be a whole number from 1 to 99",
    ),
    "no sweep": (["-m", "dpo.beta=0.1"], "-m sweeps over nothing"),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_told_before_anything_runs(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_pipeline(arguments)
    assert told in str(error.value)


def finished(stage: str) -> str:
    return str(manifest(f"outputs/demo/{stage}")["finished"])


def test_all_stages_then_only_what_has_changed(pipeline: Posttrain, trained: str) -> None:
    for place, stage in enumerate(("sft", "reward", "ppo", "dpo"), start=1):
        assert f"[{place} of 4] {stage}" in trained
        assert Path(f"outputs/demo/{stage}/posttrain.json").is_file()
    assert "completions ended by EOS" in trained
    inputs = manifest("outputs/demo/ppo")["inputs"]
    assert inputs["model"]["path"] == "outputs/demo/sft"
    assert inputs["reward_model"]["path"] == "outputs/demo/reward"

    again = pipeline(*SHORT_PIPELINE)
    assert again.code == 0, again
    assert again.out.count("already complete: ") == 4
    assert "and nothing has changed" in again.out

    before = {stage: finished(stage) for stage in ("sft", "reward", "ppo")}
    other = pipeline(*SHORT_PIPELINE, "dpo.beta=0.5")
    assert other.code == 0, other
    assert other.out.count("already complete: ") == 3
    assert "stage.beta was 0.1, now 0.5" in other.out
    [aside] = Path("outputs/demo/earlier").glob("dpo-*")
    assert manifest(aside)["config"]["stage"]["beta"] == 0.1
    assert before == {stage: finished(stage) for stage in before}

    anew = pipeline(*SHORT_PIPELINE, "stages=[sft,reward]", "sft.learning_rate=1e-3")
    assert anew.code == 0, anew
    assert "stage.learning_rate was 0.004, now 0.001" in anew.out
    assert "the weights to start from are not the same" in anew.out
    assert {path.name.split("-")[0] for path in Path("outputs/demo/earlier").iterdir() if path.is_dir()} == {
        *("sft", "reward", "dpo"),
    }


def test_the_gate_stops_the_pipeline_and_leaves_what_is_done(pipeline: Posttrain, trained: str) -> None:
    shutil.rmtree("outputs/demo/ppo")
    done = pipeline(*(word.replace("gate=warn", "gate=stop") for word in SHORT_PIPELINE))
    assert done.code == 2, done
    assert "is not good enough to optimise against" in done.err
    assert "ppo.gate=warn" in done.err
    assert Path("outputs/demo/reward/posttrain.json").is_file()
    assert not Path("outputs/demo/ppo").exists()


@pytest.mark.slow
def test_a_sweep_trains_the_stages_before_it_once(pipeline: Posttrain) -> None:
    small = ("trainer.max_steps=2", "dpo.data.test_size=8")
    done = pipeline("-m", *SHORT_PIPELINE, *small, "stages=[sft,dpo]", "dpo.beta=0.1,0.5")
    assert done.code == 0, done
    assert Path("outputs/demo/dpo/stage.beta=0.1/posttrain.json").is_file()
    assert Path("outputs/demo/dpo/stage.beta=0.5/posttrain.json").is_file()
    assert done.out.count("sft: before and after") == 1


def test_killed_inside_a_stage_the_same_command_goes_on(pipeline: Posttrain, tmp_path: Path) -> None:
    arguments = ("recipes=quickstart", "stages=[sft,reward]", "trainer.max_steps=12", "trainer.save_steps=4")
    arguments += ("data.max_rows=200", "sft.max_length=96")
    process = start(*arguments, cwd=tmp_path, module="posttrain.pipeline")
    wait_for(tmp_path / "outputs/demo/reward/checkpoint-8" / MANIFEST, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = pipeline(*arguments)
    assert done.code == 0, done
    assert "already complete: outputs/demo/sft" in done.out
    assert "resuming from checkpoint-" in done.out
