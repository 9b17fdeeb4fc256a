"""The recipes that run on the embedded model: their data, their reward functions, and what their READMEs promise."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from conftest import ROOT, Posttrain

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
        hints = [line for line in done.out.splitlines() if line.startswith("  posttrain run stage=")]
        assert hints
        assert all(f" run_name={recipe} " in hint for hint in hints), "they name the run that the recipe has named"
        for file in sorted((RECIPES / recipe).glob("*.yaml")):
            if file.stem != "sft":
                plan = posttrain(f"recipes={recipe}/{file.stem}", "dry_run=true")
                assert plan.code == 0, plan
                assert f"outputs/{recipe}/sft" in plan.out


def test_earlier_thoughts_are_not_in_the_prompt() -> None:
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
    prompt, completion = ChatEncoder(tokenizer).segments([*first[:2], *first[:2]], train_on="last")  # asked again
    assert "<think>" not in prompt.text
    assert first[1]["reasoning_content"] in completion.text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OWN)
def test_each_recipe_reaches_about_what_its_readme_says(recipe: str, posttrain: Posttrain, entry: Posttrain) -> None:
    """The README's table has a row for each score, SFT's number in it first; 40 completions may be 15 points off."""
    from posttrain.evaluate import main

    table = re.findall(r"^\| `(\w+)` \| (\d+) % \|", (RECIPES / recipe / "README.md").read_text(), flags=re.MULTILINE)
    done = posttrain(f"recipes={recipe}/sft")
    assert done.code == 0, done
    done = entry(main, f"policies=[outputs/{recipe}/sft]", f"recipes={recipe}/ppo", "out=found.json")
    assert done.code == 0, done
    [found] = json.loads(Path("found.json").read_text())
    assert len(table) == 2
    for name, share in table:
        scores = [score for score in found["scores"][name] if score is not None]
        assert fmean(scores) == pytest.approx(int(share) / 100, abs=0.15), name


@pytest.mark.slow
def test_the_frontier_is_a_table_of_the_methods_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "frontier.py"), "--seeds", "1,2", "--out", str(tmp_path)]
    words = ("--methods", "dpo,kto", "trainer.max_steps=2", "data.max_rows=200")
    first, again = (subprocess.run([*script, *words], capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0, first.stderr[-4000:]
    assert again.stdout == first.stdout
    head, _, *rows = [line.strip("| ").split(" | ") for line in first.stdout.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == ["SFT", "best of 4", "best of 16", "DPO", "KTO"]
    assert all(len(row) == len(head) and all("±" in cell for cell in row[1:]) for row in rows)
