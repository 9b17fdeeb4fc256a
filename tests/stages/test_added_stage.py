"""A stage is four files: those of KTO under another name are a stage that everything knows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, same_weights, write_rows

FILES = ("conf/stage/{}.yaml", "conf/data/{}.yaml", "posttrain/stages/{}.py")  # and a record in config/stages.py
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHORT = ("trainer.max_steps=4", "trainer.logging_steps=1", "data.test_size=6")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of posttrain with the stage."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("posttrain", "hydra_plugins", "conf", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    spec = copy / "posttrain" / "config" / "stages.py"
    before, order = spec.read_text(), "(SFT, REWARD, PPO, DPO, KTO, GRPO)"
    place = before.index("# in the order in which a pipeline runs them")
    assert order in before[place:]
    added = 'MINE = replace(KTO, name="mine", title="Mine", tag="mine")\n\n'
    text = before[:place] + added + before[place:].replace(order, f"{order[:-1]}, MINE)")
    spec.write_text(text.replace("import dataclass\n", "import dataclass, replace\n"))
    for file in FILES:
        text = (copy / file.format("kto")).read_text()
        (copy / file.format("mine")).write_text(text.replace("name: kto", "name: mine"))
    rated = [
        {"prompt": f"What follows {a}?", "completion": f"{b}.", "label": index % 3 > 0}
        for index, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:4])
    ]
    write_rows(copy / "rated.jsonl", rated)
    write_rows(copy / "told.jsonl", [{"instruction": row["prompt"], "response": row["completion"]} for row in rated])
    write_rows(copy / "asked.jsonl", [{"prompt": f"What follows {word}?"} for word in WORDS])
    return copy


# runs one command after another as `python -m posttrain` would, each with a file for what it prints
IN_TURN = """
import json, os, runpy, sys
ended = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["posttrain", *words]
    with open("printed.txt", "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            runpy.run_module("posttrain", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush(), sys.stderr.flush()
    with open("printed.txt") as file:
        ended.append((code, file.read()))
with open("ended.json", "w") as file:
    json.dump(ended, file)
"""


def start(tree: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "100"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=tree, env=environment, text=True, **pipes)


def in_turn(tree: Path, *commands: tuple[str, ...]) -> list[tuple[int, str]]:
    """Exit code and output of each command."""
    process = start(tree, "-c", IN_TURN, json.dumps(commands))
    _, err = process.communicate()
    assert process.returncode == 0, err
    return [(code, printed) for code, printed in json.loads((tree / "ended.json").read_text())]


ROWS = ("stage=mine", "data.dataset_name=rated.jsonl")
LONG = (*ROWS, "data.test_size=6", "trainer.save_steps=2", "trainer.max_steps=12", "stage.learning_rate=1e-3")
KILLED = {"killed": (*LONG, "model.use_peft=true")}


@pytest.mark.slow
def test_it_goes_the_whole_way(tree: Path) -> None:
    write_rows(tree / "bad.jsonl", [{"prompt": "a", "completion": "b", "label": "yes"}])
    told, prompts = "data.instructions=told.jsonl", "data.prompts=asked.jsonl"
    sweep = ("-m", "stage.beta=0.1,0.3", "run_name=sweep", "model.model_name_or_path=outputs/demo/sft")
    commands = {
        "help": ("run", "stage=mine", "--help"),
        "typo": ("run", "stage=mine", "stage.bta=0.2"),
        "bad row": ("run", "stage=mine", "data.dataset_name=bad.jsonl"),
        "pipeline": ("pipeline", "stages=[sft,mine]", told, prompts, "data.ratings=rated.jsonl", *SHORT),
        "sft": ("run", "data.dataset_name=told.jsonl", "run_name=a", *SHORT),
        "dry run": ("run", *ROWS, "run_name=b", "dry_run=true", *SHORT),
        "sweep": ("run", *ROWS, *sweep, *SHORT),
        "export": ("export", "outputs/demo/mine", "to=exported"),
        **{name: ("run", *words, f"run_name={name}", "output_dir=straight") for name, words in KILLED.items()},
    }
    ended = dict(zip(commands, in_turn(tree, *commands.values()), strict=True))
    refused = {"typo", "bad row"}
    assert {name: code for name, (code, _) in ended.items() if code} == dict.fromkeys(refused, 2), ended
    printed = {name: text for name, (_, text) in ended.items()}
    # 1. help, a typo, a bad row
    assert "stage.beta=0.1" in printed["help"].replace(" ", "")
    assert "did you mean stage.beta" in printed["typo"]
    assert "bad.jsonl line 1" in printed["bad row"]
    # 2. a pipeline with its evaluation and report
    run = tree / "outputs" / "demo"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert [Path(each["policy"]).name for each in evaluation] == ["sft", "mine"]
    assert 'id="run0-mine"' in (run / "report.html").read_text()
    manifest = json.loads((run / "mine" / "posttrain.json").read_text())
    assert manifest["inputs"]["model"]["stage"] == "sft"
    assert manifest["metrics"]["eval_loss"] < 0.5
    assert "posttrain run stage=mine" in printed["sft"]
    # 3. a dry run with its memory plan, where policy and reference are held
    assert "reference (frozen copy)" in printed["dry run"]
    assert not (tree / "outputs" / "b").exists()
    # 4. a sweep with its table, and an export with its card
    assert printed["sweep"].count("complete") >= 2
    assert (tree / "outputs" / "sweep" / "mine" / "sweep.svg").is_file()
    assert "mine" in (tree / "exported" / "README.md").read_text()
    # 5. killed and resumed, it ends with the same weights
    for name, words in KILLED.items():
        process = start(tree, "-m", "posttrain.run", *words, f"run_name={name}")
        while not (tree / "outputs" / name / "mine" / "checkpoint-4" / "checkpoint.json").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = in_turn(tree, *(("run", *words, f"run_name={name}") for name, words in KILLED.items()))
    for (code, text), name in zip(resumed, KILLED, strict=True):
        assert code == 0, text
        assert "resuming from checkpoint-" in text
        assert same_weights(tree / "straight" / name / "mine" / "model", tree / "outputs" / name / "mine" / "model")
