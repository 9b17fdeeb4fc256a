"""Talking to a finished model, taking it elsewhere, and the four lines for a notebook."""

import json
import re
from pathlib import Path

import pytest
import tokenizers_for_tests as made
from conftest import Outcome, Posttrain, ended, start

from posttrain import export
from posttrain.chat import read_chat
from posttrain.errors import ConfigError

RUN = ("trainer.max_steps=2", "stage.max_length=64")


def test_a_conversation_with_two_models(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    assert posttrain(f"data.dataset_name={rows}", *RUN).code == 0

    def talk(*arguments: str) -> Outcome:
        settings = (*arguments, "max_new_tokens=4", "temperature=0")
        return ended(start(*settings, cwd=tmp_path, module="posttrain.chat", typed="What is one?\n/new\n\nAnd two?\n"))

    done = talk("outputs/demo/sft", "posttrain/tiny")
    assert done.code == 2, done  # posttrain/tiny has no weights to talk to
    assert "model=posttrain/tiny" in done.err
    done = talk("outputs/demo/sft", "outputs/demo/sft")
    assert done.code == 0, done
    assert done.out.count("outputs/demo/sft") == 4  # two questions, two models
    assert done.out.count("> ") == 5


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
    done = entry(export.main, "outputs/demo/sft", "to=exported")
    assert done.code == 0, done
    assert "merged model and base with adapter agree within" in done.out
    card = Path("exported/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "- sft" in card
    assert (
        f"| eval_loss | {json.loads(Path('exported/posttrain.json').read_text())['metrics']['eval_loss']:.6g} |" in card
    )
    assert "posttrain run " in card
    AutoModelForCausalLM.from_pretrained("exported")
    assert AutoTokenizer.from_pretrained("exported").chat_template
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
        (("nowhere", "too=x"), "too is unknown; the options are to, push_to_hub, private"),
    ):
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
