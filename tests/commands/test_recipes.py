"""The recipes that run on the embedded model: their data, their reward functions, and what their READMEs promise."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Posttrain, manifest

RECIPES = ROOT / "recipes"
OWN = ("tools", "reasoning")
SHORT = ("trainer.max_steps=2", "data.max_rows=40", "trainer.eval_strategy=no", "stage.max_length=192")


@pytest.mark.parametrize("recipe", OWN)
def test_the_files_are_what_their_script_writes(recipe: str, tmp_path: Path) -> None:
    runpy.run_path(str(RECIPES / recipe / "world.py"))["write"](tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in (RECIPES / recipe).glob("*.jsonl"))
    assert all((tmp_path / name).read_bytes() == (RECIPES / recipe / name).read_bytes() for name in written)


def said(*texts: str) -> list[list[dict[str, str]]]:
    """Completions as reward functions get them."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_call_is_right_with_the_right_item_alone() -> None:
    world = runpy.run_path(str(RECIPES / "tools" / "world.py"))
    question = next(each for each in world["questions"]() if each.item == "a lamp")
    before, after = world["asked"](question), world["looked_up"](question)
    calls = ('price({"item": "a lamp"})', 'price({"item": "a ship"})', 'stock({"item": "a lamp"})', question.answer)
    asked = {"prompts": [before] * 4, "completions": said(*calls), "price": [question.price] * 4}
    assert world["right"](**asked) == world["right_call"](**asked) == [1, 0, 0, 0]
    assert world["right_answer"](**asked) == [None] * 4
    answers = (question.answer, question.answer.replace(question.price, "zero"), calls[0])
    told = {"prompts": [after] * 3, "completions": said(*answers), "price": [question.price] * 3}
    assert world["right"](**told) == world["right_answer"](**told) == [1, 0, 0]
    assert world["right_call"](**told) == [None] * 3


def test_a_sum_is_right_by_its_answer_and_sound_by_its_thought() -> None:
    world = runpy.run_path(str(RECIPES / "reasoning" / "world.py"))
    texts = (
        "<think>\n3 + 4 = 7. 7 + 5 = 12.\n</think>\n12",
        "<think>\n3 + 4 = 8. 8 + 5 = 12.\n</think>\n12",
        "<think>\n3 + 4 = 7. 7 + 5 = 12.\n</think>\n13",
        "12",
        "<think>\n\n</think>\n12",
    )
    assert world["right"](completions=said(*texts), total=[12] * 5) == [1, 1, 0, 1, 1]
    assert world["sound"](completions=said(*texts)) == [1, 0, 1, 0, 0]


def test_the_stages_of_each_recipe_fit_one_another(posttrain: Posttrain) -> None:
    """Two steps of SFT; the others read their rows through the template that it has saved."""
    for recipe in OWN:
        done = posttrain(f"recipes={recipe}/sft", *SHORT)
        assert done.code == 0, done
        for file in sorted((RECIPES / recipe).glob("*.yaml")):
            if file.stem != "sft":
                plan = posttrain(f"recipes={recipe}/{file.stem}", "dry_run=true")
                assert plan.code == 0, plan
                assert f"outputs/{recipe}/sft" in plan.out


def test_earlier_thoughts_are_not_in_the_prompt(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from posttrain.data.chat import ChatEncoder
    from posttrain.paths import TINY

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = (RECIPES / "reasoning" / "thinking.jinja").read_text()
    first = json.loads((RECIPES / "reasoning" / "conversations.jsonl").read_text().splitlines()[0])["messages"]
    assert len(first) == 4
    prompt, completion = ChatEncoder(tokenizer).segments(first, train_on="last")
    assert "<think>" not in prompt.text
    assert completion.text.startswith("<think>\n")
    assert first[1]["reasoning_content"] not in prompt.text
    twice = [*first[:2], first[0], first[1]]  # the same question again
    prompt, completion = ChatEncoder(tokenizer).segments(twice, train_on="last")
    assert first[1]["reasoning_content"] not in prompt.text
    assert first[1]["reasoning_content"] in completion.text


def promised(recipe: str) -> dict[str, Any]:
    """The numbers of the last line of each row of the README's table: score -> share."""
    text = (RECIPES / recipe / "README.md").read_text()
    return {name: float(share) / 100 for name, share in re.findall(r"`(\w+)` (\d+) %", text)}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "score"), [("tools", "right_call"), ("reasoning", "right")])
def test_each_recipe_reaches_about_what_it_promises(recipe: str, score: str, posttrain: Posttrain, entry: Any) -> None:
    from posttrain.evaluate import main

    for stage in ("sft", "ppo"):
        done = posttrain(f"recipes={recipe}/{stage}")
        assert done.code == 0, done
        assert manifest(Path("outputs") / recipe / stage)
    policies = f"policies=[outputs/{recipe}/sft,outputs/{recipe}/ppo]"
    done = entry(main, policies, f"recipes={recipe}/ppo", "out=found.json")
    assert done.code == 0, done
    sft, ppo = json.loads(Path("found.json").read_text())
