"""Every stage on every family of models, whole and with LoRA: it starts right, learns, and saves what it was.

`pytest -m slow -n 0 -s tests/models/test_architectures.py` runs the whole matrix and prints it as a table.
"""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, save_architecture
from conftest import STAGES, Posttrain, command, logged, same_weights
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain import configure, load_model_and_tokenizer
from posttrain.data.encode import ChatEncoder
from posttrain.data.formats import Prompt
from posttrain.models.generate import generate

# what transformers has no class for: how the run ends instead
WITHOUT = {("olmoe", "reward")}
# one of each kind that was once broken, and those that differ most from GPT-2; the others are slow
FAST = {
    *(("opt", stage, "full") for stage in ("ppo", "dpo")),
    *(("mixtral", "sft", "lora"), ("qwen3-moe", "ppo", "lora"), ("gpt-oss", "sft", "lora"), ("olmoe", "dpo", "lora")),
    *(
        ("olmoe", "reward", "full"),
        ("gemma3", "ppo", "lora"),
        ("bloom", "ppo", "full"),
        ("falcon-rotary", "dpo", "full"),
    ),
}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(ARCHITECTURES, STAGES, ("full", "lora"))
]
LN_2 = math.log(2)


@pytest.fixture(scope="module")
def matrix() -> Iterator[dict[tuple[str, str, str], str]]:
    """Of each run, how far the model read again is from the trained one."""
    found: dict[tuple[str, str, str], str] = {}
    yield found
    columns = list(itertools.product(STAGES, ("full", "lora")))
    print("\n" + f"{'':14}" + "".join(f"{f'{stage} {how}':>13}" for stage, how in columns))
    for name in dict.fromkeys(name for name, _, _ in found):
        print(f"{name:14}" + "".join(f"{found.get((name, *column), ''):>13}" for column in columns))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"within ([\d.e+-]+)", text)]


@pytest.mark.parametrize(("name", "stage", "how"), CASES)
def test_a_stage_starts_right_learns_and_saves_what_it_has_learned(
    posttrain: Posttrain, sources: Path, name: str, stage: str, how: str, matrix: dict[tuple[str, str, str], str]
) -> None:
    base = save_architecture(sources / "base", name)
    more = ["stage.warmup_steps=0", "stage.learning_rate=1e-3", "data.max_rows=24", "trainer.save_strategy=no"]
    more += [f"model.model_name_or_path={base}", "trainer.max_steps=2", f"model.use_peft={str(how == 'lora').lower()}"]
    more += ["stage.max_length=96"]
    done = posttrain(*command(stage, "run", *more))
    if (name, stage) in WITHOUT:
        matrix[name, stage, how] = "refused"
        assert done.code == 2, done
        assert "no reward model (sequence classifier) of the architecture" in done.err
        return
    assert done.code == 0, done
    # the start: what the stage compares, in numbers
    [said, *_] = [line for line in done.out.splitlines() if line.startswith("step 0: ")] if stage != "sft" else [""]
    assert all(number <= 1e-3 for number in numbers(said)), said
    folder = Path(f"outputs/run/{stage}")
    first = next(line for line in logged(folder) if "loss" in line)
    if stage == "dpo":
        router = AutoConfig.from_pretrained(base).to_dict().get("router_aux_loss_coef", 0.0)
        assert first["loss"] - router * first.get("aux_loss", 0.0) == pytest.approx(LN_2, abs=1e-4)
    # the end: another model than the base, and the same one when it is read again
    [again] = [line for line in done.out.splitlines() if line.startswith("saved model: ")]
    [gap] = numbers(again)
    assert gap <= 1e-5
    matrix[name, stage, how] = f"{gap:.0e}"
    if stage == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        assert model.num_labels == 1
        return
    assert not same_weights(folder / "model", base)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert model.config.to_dict().get("output_router_logits", False) is False
    if how == "lora":
        ids = torch.arange(2, 12)[None]
        start = AutoModelForCausalLM.from_pretrained(base)
        if model.get_input_embeddings().num_embeddings != start.get_input_embeddings().num_embeddings:
            start.resize_token_embeddings(model.get_input_embeddings().num_embeddings)
        apart = PeftModel.from_pretrained(start, str(folder / "adapter")).eval()
        torch.testing.assert_close(model(ids).logits, apart(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_the_left_changes_no_completion(name: str, tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "base", name)
    model, tokenizer = load_model_and_tokenizer(
        configure(f"model.model_name_or_path={path}", "data.dataset_name=x/y").model
    )
    encoder = ChatEncoder(tokenizer)
    rows = [Prompt([{"role": "user", "content": "hello " * count}], f"row {count}", {}) for count in (1, 6, 25)]
    together = generate(model, encoder, rows, 12).completions
    assert together == [generate(model, encoder, [row], 12).completions[0] for row in rows]
    sampled = generate(model, encoder, rows, 12, 1.0, (3, 4, 5)).completions
    alone = [generate(model, encoder, [row], 12, 1.0, [seed]) for seed, row in enumerate(rows, 3)]
    assert sampled == [each.completions[0] for each in alone] != together
