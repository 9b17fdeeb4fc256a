"""What a stranger gets: commands that run as written, a wheel that runs from anywhere, no network, no secrets."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Outcome, write_rows

Posttrain = Callable[..., Outcome]
SHORT = ["+trainer.max_steps=2", "data.max_rows=120"]
# Put in place of what has to come from the Hub, or from the reader.
LOCAL = ["model=tiny", "data.dataset_name=local.jsonl", "data.test_size=0.2", "stage.max_length=128"]
LOCAL += ["data.dataset_train_split=train", "data.dataset_test_split=null", "model.base_model=posttrain/tiny"]
LOCAL += ["model.model_name_or_path=null"]
OWN = ("quickstart", "tools", "reasoning")  # recipes that bring their model and their data
RECIPES = sorted({str(file.relative_to(ROOT / "recipes").with_suffix("")) for file in ROOT.glob("recipes/*/*.yaml")})
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "accelerate_configs" / "README.md",
    *sorted((ROOT / "recipes").rglob("README.md")),
]
LINKED = [*DOCUMENTS, ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"]
PYTHON = {
    f"{page.relative_to(ROOT)} {number}": block
    for page in DOCUMENTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), start=1)
}


def commands(document: Path) -> list[str]:
    """Every command in the fenced sh blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [line.replace("python -m posttrain.", "posttrain ") for line in shown]


def runs() -> list[str]:
    """The runs of posttrain in all pages, without what stands before `&&`."""
    found = [part.strip() for page in DOCUMENTS for line in commands(page) for part in line.split("&&")]
    # what accelerate starts on several GPUs runs here in one process
    under = [line[line.index("-m posttrain.run") :] for line in launches() if "-m posttrain.run" in line]
    found += [line.replace("-m posttrain.run", "posttrain run") for line in under]
    return sorted({re.sub(r" accelerate\S+", "", part) for part in found if part.startswith("posttrain run")})


def pipelines() -> list[str]:
    """The pipelines in all pages."""
    found = [part.strip() for page in DOCUMENTS for line in commands(page) for part in line.split("&&")]
    return sorted({re.sub(r" accelerate\S+", "", part) for part in found if part.startswith("posttrain pipeline")})


def launches() -> list[str]:
    """The runs under accelerate in all pages."""
    found = {line for page in DOCUMENTS for line in commands(page)}
    return sorted(line for line in found if line.startswith("accelerate launch") or " accelerate=" in line)


@pytest.mark.parametrize("command", launches())
def test_every_documented_launch_is_one(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_launch.py runs what they start, with two processes on a CPU."""
    from posttrain.cli.command import read_command
    from posttrain.pipeline import read_pipeline

    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("posttrain ", "-m posttrain."))
    at = words.index("-m")
    assert "--config_file" not in words or (ROOT / words[words.index("--config_file") + 1]).is_file()
    read = {"posttrain.run": read_command, "posttrain.pipeline": read_pipeline}[words[at + 1]]
    assert read(words[at + 2 :])


def test_every_recipe_is_run_by_some_page() -> None:
    shown = " ".join([*runs(), *launches()])
    assert not [name for name in RECIPES if f"recipes={name}" not in shown]


def test_the_pages_hold_commands() -> None:
    assert "pip install -e . && posttrain pipeline recipes=quickstart" in commands(ROOT / "README.md")
    assert len(pipelines()) >= 4
    assert 'pip install -e ".[dev]" && pytest' in commands(ROOT / "README.md")
    assert len(runs()) >= 8
    assert PYTHON


@pytest.mark.parametrize("name", PYTHON)
def test_every_documented_python_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = PYTHON[name].replace('"run_name=notebook"', f'"run_name=notebook", {SHORT[0]!r}')
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_points_at_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_the_other_commands_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_report.py also runs evaluate, report and export as README has them."""
    from posttrain.chat import read_chat
    from posttrain.cli.command import read_command, read_words
    from posttrain.config.stages import EVALUATED_AS
    from posttrain.evaluate import own_options, read_evaluation
    from posttrain.export import OPTIONS
    from posttrain.pairs import OPTIONS as OF_PAIRS

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say 1."}])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Say 1.", "chosen": "1.", "rejected": "2."}])
    read = {
        "evaluate": lambda words: read_command(read_evaluation(words).words, to_come=None),
        "pairs": lambda words: read_command(
            own_options(words, EVALUATED_AS, ("policy", "out", *OF_PAIRS))[1], to_come=None, needs_data=False
        ),
        "chat": read_chat,
        "report": lambda words: read_words(words, ["out"]),
        "data": lambda words: read_command([*words[1:], "data.dataset_name=prompts.jsonl"], to_come=None),
        "export": lambda words: read_words(words, OPTIONS),
    }
    lines = {line for page in DOCUMENTS for line in commands(page) if line.startswith("posttrain ")}
    found = [shlex.split(line)[1:] for line in lines if line.split()[1] not in ("run", "pipeline")]
    assert {name for name, *_ in found} == read.keys()
    for name, *words in found:
        assert read[name](words)


def slow_if(slow: Callable[[str], bool], found: list[str]) -> list[Any]:
    """The commands as cases, those that take long and do what another one does as slow ones."""
    return [pytest.param(command, marks=pytest.mark.slow if slow(command) else ()) for command in found]


def takes_long(command: str) -> bool:
    """Sweeps, and the recipes that tests/commands/test_recipes.py takes through their stages."""
    return " -m " in command or any(f"recipes={name}/" in command for name in OWN[1:])


@pytest.mark.parametrize("command", slow_if(takes_long, runs()))
def test_every_documented_run_runs(posttrain: Posttrain, tmp_path: Path, command: str) -> None:
    arguments = shlex.split(command.removeprefix("posttrain run"))
    names = {"instruction": "Say", "response": "It is", "question": "Say", "answer": "It is", "output": "It is"}
    names |= {"prompt": "Say", "chosen": "It is", "rejected": "Not", "completion": "It is"}
    text: list[dict[str, Any]] = [{name: f"{words} {n}." for name, words in names.items()} for n in range(30)]
    for row in text:
        said = (("user", row["prompt"]), ("assistant", row["chosen"]))
        row["messages"] = [{"role": role, "content": content} for role, content in said]
    if "gpt2-hh" in command:  # the layout of Anthropic/hh-rlhf
        beginning = "\n\nHuman: Say {n}.\n\nAssistant: "
        text = [
            {"chosen": beginning.format(n=n) + f"It is {n}.", "rejected": beginning.format(n=n) + "Not."}
            for n in range(30)
        ]
    if "zephyr-7b/sft" in command:  # ultrachat_200k's columns
        text = [{"prompt": row["prompt"], "messages": row["messages"]} for row in text]
    if "zephyr-7b/dpo" in command:  # ultrafeedback_binarized's: whole conversations beside their prompt
        text = [
            {
                "prompt": row["prompt"],
                "chosen": row["messages"],
                "rejected": [row["messages"][0], {"role": "assistant", "content": "Not."}],
            }
            for row in text
        ]
    write_rows(tmp_path / "local.jsonl", text)
    for name in ("mine", "chat", "maths", "helpful"):
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "system": name} for row in text])
    remote = ("model=gpt2", "model=qwen3_8b", "data.dataset_name=yahma")
    remote += tuple(f"recipes={name}" for name in RECIPES if name.partition("/")[0] not in OWN)
    more = LOCAL if any(argument.startswith(remote) for argument in arguments) else []
    if "data.mixture" in command:
        more = [word for word in more if not word.startswith("data.dataset_name=")]
    kept = [argument for argument in arguments if not argument.startswith("model=") or argument not in remote]
    if any(argument.startswith("trainer.report_to=") for argument in arguments):
        more = [*more, "trainer.report_to=tensorboard"]
    mine = next((name for name in OWN[1:] if f"recipes={name}/" in command), None)
    if mine:  # what it starts from has its template
        assert posttrain(f"recipes={mine}/sft", *SHORT).code == 0
    elif "ppo" in command or "stage=grpo" in command or "/grpo" in command:
        (tmp_path / "my_rewards.py").write_text(
            "def concise(prompts, completions, **columns):\n"
            "    return [-len(completion[0]['content']) / 100 for completion in completions]\n"
        )
        if more:  # another recipe's: its reward model is not there, and its rollouts are for a GPU
            small = ("rollout_batch_size=8", "batch_size=4", "num_mini_batches=1", "max_new_tokens=8", "num_epochs=1")
            more = [*more, "stage.reward_functions=[my_rewards.concise]", *(f"stage.{each}" for each in small)]
        elif "my_rewards" not in command:
            assert posttrain("recipes=quickstart/reward", *SHORT).code == 0
            more = [*more, "stage.gate=warn"]  # two steps make no fit reward model
    done = posttrain(*kept, *more, *SHORT)
    assert done.code == 0, done


@pytest.mark.parametrize("command", slow_if(lambda command: " -m " in command or "ppo.kl_coef" in command, pipelines()))
def test_every_documented_pipeline_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, posttrain: Posttrain
) -> None:
    from posttrain import pipeline

    arguments = shlex.split(command.removeprefix("posttrain pipeline"))
    local = ["model=tiny"] if "model=gpt2" in arguments else []
    write_rows(tmp_path / "mine.jsonl", [{"instruction": f"Say {n}.", "response": f"It is {n}."} for n in range(30)])
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "Not."} for n in range(30)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    kept = [argument for argument in arguments if argument != "model=gpt2"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *kept, *local, *SHORT, "ppo.gate=warn"])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    assert not ended.value.code


def test_a_wheel_made_from_the_sdist_runs_from_another_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "posttrain/conf/config.yaml" in names
    assert "posttrain/recipes/quickstart/instructions.jsonl" in names
    assert "posttrain/tiny/tokenizer.json" in names
    assert not [name for name in names if name.startswith(("conf/", "recipes/", "tests/"))]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.run", "recipes=quickstart/sft", "accelerate=cpu2", *SHORT],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "× 2 devices = 32 rows" in done.stdout
    assert (empty / "outputs/demo/sft/posttrain.json").is_file()
    assert str(tmp_path / "site") in (empty / "outputs/demo/sft/config.yaml").read_text()


def test_a_bare_run_opens_no_connection_and_writes_no_secret(tmp_path: Path) -> None:
    code = (
        "import socket, sys, runpy\n"
        "def refuse(*a, **k): raise RuntimeError('the network was used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        f"sys.argv = ['posttrain', {SHORT[0]!r}]\nrunpy.run_module('posttrain.run', run_name='__main__')"
    )
    secrets = {"HF_TOKEN": "hf_thesecretvalue", "WANDB_API_KEY": "wandbsecretvalue"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    environment |= {"PYTHONPATH": str(ROOT)} | secrets
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets.values()), path


def test_the_readme_is_a_page_and_its_tree_is_complete() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    tree = re.search(r"```\n(posttrain/\n.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    for path in (ROOT / "posttrain").rglob("*.py"):
        assert path.name in tree.group(1) or path.name == "__init__.py", path


def test_ci_is_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet --disable-pip-version-check -e ".[dev]"' in script
    assert script.rstrip().endswith("pytest")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft, full", ""], ids=["one case", "every case"])
def test_the_gpu_benchmark_runs_at_a_cpus_size(tmp_path: Path, case: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--small", "--steps", "2", "--repeats", "1"]
    environment = {**os.environ, "THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--only", case], env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("small, ")]
    assert len(lines) == (1 if case else 10)
    assert all(float(line.split()[-1]) > 0 for line in lines)


def test_the_install_line_for_a_cpu_names_a_torch_that_the_project_takes() -> None:
    """A newer one would be replaced at once, by one with CUDA."""
    [ours] = re.findall(r'"torch>=[\d.]+,(<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert re.findall(r'pip install "torch(\S+)" --index-url', (ROOT / "README.md").read_text()) == [ours]
