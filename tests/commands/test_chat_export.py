"""Talking to a finished model, taking it elsewhere, and the four lines for a notebook."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import tokenizers_for_tests as made
from architectures import save_architecture
from conftest import Outcome, Posttrain, ended, start

from posttrain import export
from posttrain.chat import read_chat
from posttrain.errors import ConfigError
from posttrain.metrics.catalogue import formatted

RUN = ("trainer.max_steps=2", "stage.max_length=64")


# records its arguments
LLAMA_CPP = "import json, sys\nopen(sys.argv[-1], 'w').write(json.dumps(sys.argv[1:]))"


def test_a_conversation_with_two_models(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    assert posttrain(f"data.dataset_name={rows}", *RUN).code == 0

    def talk(*arguments: str) -> Outcome:
        settings = (*arguments, "max_new_tokens=4", "temperature=0")
        typed = "What is one?\n/new\n\n/help\n/system Be brief.\n/hepl\nAnd two?\n/reset\n"
        return ended(start(*settings, cwd=tmp_path, module="posttrain.chat", typed=typed))

    done = talk("outputs/demo/sft", "posttrain/tiny")
    assert done.code == 2, done  # posttrain/tiny has no weights to talk to
    assert "model=posttrain/tiny" in done.err
    done = talk("outputs/demo/sft", "outputs/demo/sft")
    assert done.code == 0, done
    assert done.out.count("outputs/demo/sft") == 4  # two questions, two models
    assert done.out.count("> ") == 9
    assert done.out.count("/system <text>") == 3  # at the start, of /help, and of what is no command


def test_ctrl_c_ends_a_completion_and_not_the_conversation(tmp_path: Path) -> None:
    model = save_architecture(tmp_path / "model", "qwen3")  # its weights are random, and it never ends by itself
    words = (str(model), "max_new_tokens=20000", "temperature=0")
    talk = start(*words, cwd=tmp_path, module="posttrain.chat", typed="What is one?\n/help\n/quit\n")
    end = time.monotonic() + 120
    while talk.files[0].read_text().count("> ") < 1 or len(talk.files[0].read_text().partition("> ")[2]) < 20:
        assert talk.poll() is None, talk.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    talk.send_signal(signal.SIGINT)
    done = ended(talk)
    assert done.code == 0, done
    assert done.out.count("/system <text>") == 2


def test_a_chat_is_refused() -> None:
    for arguments, told in (
        ([], "name one model, or two"),
        (["a", "b", "c"], "name one model, or two"),
        (["a", "temprature=1"], "temprature is unknown; the options are temperature, max_new_tokens, system"),
        (["a", "temperature=hot"], "temperature=hot must be a number"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_chat(arguments)
    assert read_chat(["a", "temperature=0", "system=Be brief."]) == (
        ["a"],
        {"temperature": 0.0, "max_new_tokens": 256.0},
        "Be brief.",
    )


def test_an_exported_model_is_whole_and_has_a_card(posttrain: Posttrain, entry: Posttrain, rows: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert posttrain(f"data.dataset_name={rows}", *RUN, "model.use_peft=true").code == 0
    # an evaluation beside it, and one of another model; llama.cpp's script; a file that others may not read
    number = {"acc": 0.25, "acc_stderr": 0.05}
    each = {"prompts": [], "scores": {}, "against_first": {}, "metrics": {"kl": 0.5}, "benchmarks": {"mine": number}}
    for name in ("sft", "other"):
        content = [{"policy": f"outputs/demo/{name}", **each}]
        Path(f"outputs/demo/evaluation-{name}.json").write_text(json.dumps(content))
    Path("outputs/demo/evaluation-of-mine.json").write_text('{"a": 1}')  # a file of somebody else's
    Path("llama.cpp").mkdir()
    (Path("llama.cpp") / export.CONVERT).write_text(LLAMA_CPP)
    Path("outputs/demo/sft/model/config.json").chmod(0o600)
    mask = os.umask(0o027)
    try:
        done = entry(export.main, "outputs/demo/sft", "to=exported", "to_gguf=q8_0", "llama_cpp=llama.cpp")
    finally:
        os.umask(mask)
    assert done.code == 0, done
    assert json.loads(Path("exported/exported-q8_0.gguf").read_text()) == (
        ["exported", "--outtype", "q8_0", "--outfile", "exported/exported-q8_0.gguf"]
    )
    assert Path("exported/Modelfile").read_text() == "FROM ./exported-q8_0.gguf\n"
    for line in ("vllm serve exported", "transformers serve exported", "ollama create exported -f exported/Modelfile"):
        assert line in done.out
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path("exported").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert oct(Path("exported").stat().st_mode & 0o777) == "0o750"
    assert "merged model and base with adapter agree within" in done.out
    card = Path("exported/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "- sft" in card
    metrics = json.loads(Path("exported/posttrain.json").read_text())["metrics"]
    before, after = (formatted("eval_loss", metrics[name]) for name in ("eval_loss_before", "eval_loss"))
    assert f"| {before} | {after} |" in card
    assert "| data.jsonl | 36 to train on, 4 held out |" in card
    assert "| mine: acc | 0.250 (0.152 to 0.348) |" in card
    assert "evaluation-sft.json" in card
    assert "evaluation-other.json" not in card
    assert "license" not in card
    assert "| base model | posttrain/tiny |" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, str] = {}
    exec(code, {"path": "exported"}, found)
    assert isinstance(found["completion"], str)
    assert "posttrain run " in card
    AutoModelForCausalLM.from_pretrained("exported")
    assert AutoTokenizer.from_pretrained("exported").chat_template
    (Path("llama.cpp") / export.CONVERT).write_text("raise SystemExit('this architecture is unknown')")
    words = ("outputs/demo/sft", "to=second", "license=mit")
    failed = entry(export.main, *words, "to_gguf=q8_0", "llama_cpp=llama.cpp")
    assert failed.code == 1
    assert "this architecture is unknown" in failed.err
    assert '\nlicense: "mit"\n' in Path("second/README.md").read_text()
    again = entry(export.main, "outputs/demo/sft", "to=exported")
    assert again.code == 2
    assert "to=exported is there already" in again.err
    assert entry(export.main, "outputs/demo/sft", "push_to_hub=someone/model").code == 1  # no Hub can be reached here


TOLD = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


@pytest.mark.parametrize("kind", ["plain", "ChatML"])
def test_the_card_of_a_reward_model_scores_as_ppo_does(
    posttrain: Posttrain, entry: Posttrain, tmp_path: Path, kind: str
) -> None:
    import torch

    from posttrain.cli.command import configure
    from posttrain.models.load import load_reward_model, load_tokenizer
    from posttrain.models.resolve import beside
    from posttrain.rlhf.scoring import RewardModel

    template = tmp_path / "chatml.jinja"
    template.write_text(made.CHATML)
    written = [f"model.chat_template_path={template}"] if kind == "ChatML" else []
    assert posttrain("stage=reward", "data.max_rows=60", *RUN, *written).code == 0
    assert entry(export.main, "outputs/demo/reward", "to=exported").code == 0
    [code] = re.findall(r"```python\n(.*?)```", Path("exported/README.md").read_text(), re.DOTALL)
    found: dict[str, float] = {}
    exec(code, {"path": "exported", "messages": TOLD}, found)
    settings = beside(configure().model, "outputs/demo/reward")
    tokenizer, _ = load_tokenizer(settings)
    model = load_reward_model(settings, tokenizer, "outputs/demo/reward/model", 0, quantised=False, new_head=False)
    with torch.no_grad():
        [score] = RewardModel(model.eval(), tokenizer).score([TOLD])
    assert found["score"] == pytest.approx(score, abs=1e-6)


def test_an_export_is_refused(entry: Posttrain) -> None:
    for arguments, told in (
        ((), "name one finished run"),
        (("nowhere", "to=x"), "nowhere is not a finished run"),
        (("nowhere", "too=x"), "too is unknown; the options are to, "),
        ((".", "to=x", "to_gguf=q8_0"), "llama_cpp=<folder of llama.cpp>"),
        ((".", "to=x", "to_gguf=q8_0", "llama_cpp=x"), f"x/{export.CONVERT}"),
    ):
        Path("posttrain.json").touch()  # what makes a folder a finished run
        done = entry(export.main, *arguments)
        assert done.code == 2
        assert told in done.err


def test_four_lines_in_a_notebook(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from posttrain import configure, run_stage

    config = configure("stage=sft", f"data.dataset_name={rows}", *RUN)
    result = run_stage(config)
    assert result is not None
    assert (result.model / "model.safetensors").is_file()
    assert result.objective == result.metrics["eval_loss"]
    with pytest.raises(ConfigError, match="did you mean"):
        configure("stage.lerning_rate=1")
