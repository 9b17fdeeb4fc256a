"""The command `posttrain`: help, version, completion and what is only printed, none of which touches anything."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Posttrain, contents, ended, start

from posttrain import __main__ as door
from posttrain import chat, evaluate, export, paths, pipeline, report, run
from posttrain.cli.command import compose_all
from posttrain.cli.help import COMMANDS, docstring
from posttrain.config.stages import STAGES

MODULES = {
    "run": run.main,
    "pipeline": pipeline.main,
    "evaluate": evaluate.main,
    "chat": chat.main,
    "report": report.main,
    "export": export.main,
}


@pytest.fixture
def command(entry: Posttrain) -> Posttrain:
    """`posttrain <arguments>`."""
    return lambda *arguments: entry(door.main, *arguments)


@pytest.fixture
def finished(posttrain: Posttrain, rows: Path) -> Path:
    """A folder with a finished run."""
    assert posttrain(f"data.dataset_name={rows}", "trainer.max_steps=1", "stage.max_length=64").code == 0
    return Path("outputs")


def test_help_and_what_is_only_printed_touch_nothing(command: Posttrain, entry: Posttrain, finished: Path) -> None:
    before = contents(Path())
    for name in COMMANDS:
        for flag in ("--help", "-h"):
            done = command(name, flag)
            assert done.code == 0, done
            assert done.out.startswith(docstring(name).splitlines()[0])
            assert done.out.count("\n  posttrain ") >= 2, "two examples"
            assert "130, 143" in done.out
        wrong = command(name, "--hepl")
        assert wrong.code == 2, wrong
        assert "--hepl is unknown" in wrong.err
        assert command(name, "--version").out.startswith("posttrain 0.")
    for main in MODULES.values():
        assert entry(main, "--help").code == 0
    for name in ("run", "pipeline"):
        for flags in (("--cfg", "job"), ("--cfg", "hydra"), ("--cfg", "all"), ("--info",), ("--hydra-help",)):
            # in a process of its own: --info leaves Hydra's logging on
            shown = ended(start(name, *flags, cwd=Path.cwd(), module="posttrain.__main__"))
            assert shown.code == 0, shown
            assert shown.out
    assert command().out == command("--help").out
    assert all(f"  {name} " in command("-h").out for name in COMMANDS)
    assert command("pipeline").code == 2, "a bare pipeline does not replace what is finished"
    assert command("run").code == 2
    assert contents(Path()) == before


def test_a_word_that_is_no_command_gets_the_right_one(command: Posttrain) -> None:
    done = command("stage=dpo", "stage.beta=0.3")
    assert done.code == 2
    assert "posttrain run stage=dpo stage.beta=0.3" in done.err
    assert "did you mean pipeline?" in command("pipline").err
    assert "posttrain run stage=sft" in command("sft", "--help").err


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_the_help_of_a_stage_names_every_key_with_its_value_and_comment(command: Posttrain, stage: str) -> None:
    done = command("run", f"stage={stage}", "--help")
    assert done.code == 0, done
    composed = compose_all([f"stage={stage}"], None)
    for section in ("stage", "data", "model", "trainer"):
        keys = [key for key in composed[section] if key not in ("name", "columns", "messages", "preference")]
        assert [key for key in keys if f"  {section}.{key}=" not in done.out] == []
    assert "  data.columns.system=system\n" in done.out
    assert "  data.messages.roles={}\n" in done.out
    assert f"  stage.max_length={composed.stage.max_length}\n" in done.out
    assert "  data.dataset_name=null\n" in done.out
    words = " ".join(done.out.split())
    for file in (paths.CONF / f"stage/{stage}.yaml", paths.CONF / "config.yaml", paths.CONF / "model/base.yaml"):
        text = file.read_text()
        for comment in re.findall(r"^# (?!posttrain|what every|the data|a recipe|each point)(.+)", text, re.MULTILINE):
            assert " ".join(comment.split()) in words, comment
    assert "  run_name=demo\n" in done.out
    wrong = command("run", "stage=dop", "--help")
    assert wrong.code == 2
    assert "did you mean dpo?" in wrong.err


def test_the_help_of_a_pipelines_stage_is_in_the_pipelines_words(command: Posttrain) -> None:
    done = command("pipeline", "stages=[sft,dpo]", "--help")
    assert "  dpo.beta=0.1\n" in done.out
    assert "  sft.num_epochs=3\n" in done.out
    assert "ppo." not in done.out.replace("ppo.yaml", "")


def test_the_pipeline_prints_the_configuration_of_each_stage(command: Posttrain) -> None:
    done = command("pipeline", "recipes=quickstart", "dpo.beta=0.7", "--cfg", "job")
    assert done.code == 0, done
    parts = re.split(r"# \[\d of 4\] \w+\n", done.out)[1:]
    found = [yaml.safe_load(part) for part in parts]
    assert [part["stage"]["name"] for part in found] == ["sft", "reward", "ppo", "dpo"]
    assert found[3]["stage"]["beta"] == 0.7
    wrong = command("pipeline", "dpo.bata=0.7", "--cfg", "job")
    assert wrong.code == 2
    assert "did you mean dpo.beta?" in wrong.err


def test_recipes_are_listed_with_what_they_need(command: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "mine/recipes").mkdir(parents=True)
    (tmp_path / "mine/recipes/own.yaml").write_text("# @package _global_\n# my own rows; needs nothing\nseed: 1\n")
    done = command("recipes", "--config-dir", "mine")
    assert done.code == 0, done
    shipped = [str(file.relative_to(paths.RECIPES).with_suffix("")) for file in paths.RECIPES.rglob("*.yaml")]
    for name in shipped:
        [line] = [line for line in done.out.splitlines() if line.startswith(f"│ {name} ")]
        assert "need" in line, name
    assert "my own rows; needs nothing" in done.out


def completed(line: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "-sc", "query=bash"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": line},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_tab_completion(tmp_path: Path) -> None:
    assert completed("posttrain re", tmp_path) == ["report", "recipes"]
    assert set(completed("posttrain run stage=", tmp_path)) == {f"stage={name}" for name in STAGES}
    assert "stage.kl_coef=" in completed("posttrain run stage=ppo stage.kl", tmp_path)
    assert "dpo.beta=" in completed("posttrain pipeline dpo.", tmp_path)
    assert "stages=" in completed("posttrain pipeline s", tmp_path)
    assert "recipes=quickstart" in completed("posttrain pipeline recipes=qu", tmp_path)
    assert "recipes=quickstart/dpo" in completed("posttrain run recipes=quickstart/", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_completion_is_that_of_the_command(
    entry: Posttrain, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/posttrain", "-sc", "install=bash"])
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == 0
    assert capfd.readouterr().out.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion posttrain")
    assert 'eval "$(posttrain -sc install=bash)"' in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "stage=ppo", "--help"], ["recipes"], ["version"]])
def test_help_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.argv = ['posttrain', *{arguments!r}]\nfrom posttrain.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "empty": ("", "holds nothing"),
    "a list": ("# @package _global_\n- seed: 1\n", "holds no mapping"),
    "a text": ("# @package _global_\nseed\n", "holds no mapping"),
    "not yaml": ("# @package _global_\nseed: [1\n", "invalid YAML"),
    "a loop": ("# @package _global_\nstage: &a\n  x: *a\n", "refers to itself"),
    "aliases": (
        "# @package _global_\na0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        "more than 100,000 values",
    ),
    "deep": ("# @package _global_\nseed: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "without its first line": ("seed: 1\n", "# @package _global_"),
    "a recipe that writes files": (
        "# @package _global_\nhydra:\n  job_logging:\n    handlers: {a: {class: logging.FileHandler, filename: bad}}\n",
        "hydra.job_logging.handlers",
    ),
    "a recipe that sets the environment": (
        "# @package _global_\nhydra: {job: {env_set: {A: b}}}\n",
        "hydra.job.env_set",
    ),
    "a recipe that moves the folder": ("# @package _global_\nhydra: {run: {dir: bad}}\n", "hydra.run.dir"),
    "a recipe with a callback": (
        "# @package _global_\nhydra: {callbacks: {a: {_target_: os.system}}}\n",
        "hydra.callbacks.a._target_",
    ),
    "a recipe that makes an object": (
        "# @package _global_\nhydra: {sweeper: {params: {_target_: pathlib.Path}}}\n",
        "a configuration cannot name code to run",
    ),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_recipe_that_is_broken_or_wants_too_much_is_refused(
    command: Posttrain, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "mine/recipes").mkdir(parents=True)
    (tmp_path / "mine/recipes/bad.yaml").write_text(text)
    for more in ((), ("dry_run=true",), ("--cfg", "job")):
        done = command("run", "--config-dir", "mine", "recipes=bad", *more)
        assert done.code == 2, done
        assert said in done.err, done
        assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_recipes_that_include_each_other_are_refused(command: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "mine/recipes").mkdir(parents=True)
    for name, other in (("a", "b"), ("b", "a")):
        text = f"# @package _global_\ndefaults:\n  - /recipes/{other}\n"
        (tmp_path / f"mine/recipes/{name}.yaml").write_text(text)
    done = command("run", "--config-dir", "mine", "recipes=a")
    assert done.code == 2, done
    assert "include each other" in done.err


WRONG = {
    "two things to print": (("run", "--cfg", "job", "--hydra-help"), "only one of --cfg, --info"),
    "a package of nothing": (("run", "--package", "stage"), "go with --cfg"),
    "completion of nothing": (("pipeline", "-sc"), "-sc needs install=bash"),
    "a folder that cannot be": (("run", "output_dir=/proc/x", "trainer.max_steps=1"), "output_dir=/proc/x cannot"),
    "recipes of something": (("recipes", "--info"), "posttrain recipes takes --config-dir alone"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_has_exit_code_2(command: Posttrain, arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments)
    assert done.code == 2, done
    assert said in done.err


def test_a_sweep_prints_the_configuration_of_its_first_point(command: Posttrain) -> None:
    done = command("run", "-m", "stage=dpo", "stage.beta=0.7,0.9", "--cfg", "job")
    assert done.code == 0, done
    assert yaml.safe_load(done.out)["stage"]["beta"] == 0.7


def test_a_recipe_that_is_not_utf8_is_refused(command: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "mine/recipes").mkdir(parents=True)
    (tmp_path / "mine/recipes/bad.yaml").write_bytes(b"# @package _global_\nrun_name: \xff\n")
    done = command("run", "--config-dir", "mine", "recipes=bad")
    assert done.code == 2, done
    assert "bad.yaml: invalid YAML" in done.err


LEAVING = """
import atexit
from torch import distributed
from posttrain.cli.entry import guarded

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("initialized:", distributed.is_initialized()))  # called last
guarded(lambda: None)
"""


def test_processes_take_leave_of_one_another() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=True)
    assert done.stdout == "initialized: False\n"
