"""DPO and KTO held to another model than the one that they start from, and pairs left out by their margin."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LORA, Outcome, command, manifest, read_rows, same_weights, splits_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import compute_dpo_loss
from posttrain.cli.command import read_command
from posttrain.data.chat import ChatEncoder
from posttrain.data.formats import preferences
from posttrain.models.generate import completion_logps

Posttrain = Callable[..., Outcome]
PRECOMPUTED = ("+trainer.precompute_ref_log_probs=true",)
HELD_TO = ("stage.reference=outputs/a/sft", "stage.beta=0.3", "trainer.eval_steps=2", "trainer.save_steps=2")


def first_loss(words: list[str], policy: str, reference: str) -> float:
    """The mean loss of the held-out pairs of a command, of two models as anyone loads them."""
    config = read_command(words).config
    rows = splits_of(preferences, config.data).test
    tokenizer = AutoTokenizer.from_pretrained(policy)
    encoder, logps = ChatEncoder(tokenizer), []
    for path in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for answers in ([row.chosen for row in rows], [row.rejected for row in rows]):
            prompts = [encoder.prompt_ids(row.prompt) for row in rows]
            whole = [encoder.conversation_ids([*row.prompt, *said]) for row, said in zip(rows, answers, strict=True)]
            said = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
            logps.append(completion_logps(model, prompts, said, tokenizer.pad_token_id))
    loss, _, _ = compute_dpo_loss(logps[0], logps[1], logps[2], logps[3], beta=0.3)
    return float(loss.mean())


def held(posttrain: Posttrain, name: str, *more: str) -> list[str]:
    """Train DPO from the embedded model, held to the SFT model outputs/a/sft, trained first; check it."""
    if not Path("outputs/a").exists():
        assert posttrain(*command("sft", "a"), "stage.learning_rate=1e-2", "stage.warmup_steps=0").code == 0
    words = [*command("dpo", name), *HELD_TO, *more]
    done = posttrain(*words)
    assert done.code == 0, done
    assert "reference = outputs/a/sft (stage.reference), a frozen copy (two models in memory)" in done.out
    folder = Path("outputs", name, "dpo")
    found, given = manifest(folder)["metrics"], manifest(folder)["inputs"]["reference"]
    assert (given["path"], given["stage"]) == ("outputs/a/sft", "sft")
    assert given["weights"]["model.safetensors"] == manifest("outputs/a/sft")["weights"]["model.safetensors"]
    wanted = first_loss(words, f"{folder}/base", "outputs/a/sft/model")
    assert found["eval_loss_before"] == pytest.approx(wanted, abs=1e-4)
    assert wanted != pytest.approx(0.693147, abs=1e-3)
    assert found["kl_before"] > 0.1  # which is 0 where the reference is the start
    assert {"accuracy_before", "accuracy_low_before", "reward_margin_before"} <= found.keys()
    return words


@pytest.mark.slow
@pytest.mark.parametrize("more", [LORA, PRECOMPUTED], ids=["lora", "precomputed"])
def test_another_reference_with_an_adapter_or_taken_once(
    posttrain: Posttrain, sources: Path, more: tuple[str, ...]
) -> None:
    held(posttrain, "more", *more)


def test_another_reference_and_what_can_be_none(posttrain: Posttrain, sources: Path) -> None:
    held(posttrain, "full")
    start = command("dpo", "x")

    # it is part of the memory plan, of LoRA too
    plan = [posttrain(*start, *LORA, *more, "dry_run=true").out for more in ((), HELD_TO[:1])]
    assert ["reference (frozen copy)" in each for each in plan] == [False, True]

    # one that reads other tokens is refused by name, and so is one that is not there, before anything is trained
    shutil.copytree("outputs/a/sft/model", "other")
    tokenizer = json.loads(Path("other/tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    (one, its), (two, theirs) = list(tokens.items())[40:42]
    tokens[one], tokens[two] = theirs, its
    Path("other/tokenizer.json").write_text(json.dumps(tokenizer))
    # so is a reward model, whose config says what it is
    shutil.copytree("outputs/a/sft/model", "scores")
    scores = json.loads(Path("scores/config.json").read_text()) | {"architectures": ["GPT2ForSequenceClassification"]}
    Path("scores/config.json").write_text(json.dumps(scores))
    for reference, said in (
        ("other", "2 of them others"),
        ("a/b/none", "stage.reference=a/b/none: no such folder"),
        ("scores", "stage.reference=scores is a reward model (GPT2ForSequenceClassification)"),
    ):
        for more in ((), ("dry_run=true",)):
            done = posttrain(*start, f"stage.reference={reference}", *more)
            assert done.code == 2, done
            assert said in done.err
        assert not Path("outputs/x").exists()


@pytest.mark.slow
def test_a_run_goes_on_against_the_reference_that_it_began_with(
    posttrain: Posttrain, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = held(posttrain, "full")
    assert posttrain(*words).out.count("already complete: ") == 1

    # cut after its first checkpoint it goes on, but not against a reference that is another one now
    cut = [each.replace("run_name=full", "run_name=cut") for each in words]
    shutil.copytree("outputs/full", "outputs/cut")
    for name in ("posttrain.json", "model", "checkpoint-4"):
        path = Path("outputs/cut/dpo", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = posttrain(*cut)
    assert done.code == 0, done
    assert "resuming from checkpoint-2" in done.out
    assert same_weights(Path("outputs/full/dpo/model"), Path("outputs/cut/dpo/model"))
    done = posttrain(*[each.replace("outputs/a/sft", "outputs/full/dpo") for each in cut])
    assert done.code == 2, done
    assert "the reference's weights are not the same" in done.err

    # a reference whose weights are not those that were named does not train
    from posttrain.stages import dpo

    calls, read = [], dpo.load_reference

    def changed(*given: Any) -> Any:
        model = read(*given)
        calls.append(1)
        if len(calls) == 1:
            model.get_input_embeddings().weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(dpo, "load_reference", changed)
    done = posttrain(*command("dpo", "x"), *HELD_TO)
    assert done.code == 1, done
    assert "the reference is not stage.reference=outputs/a/sft" in done.err


@pytest.mark.slow
def test_kto_is_held_to_another_reference(posttrain: Posttrain, sources: Path) -> None:
    assert posttrain(*command("sft", "a"), "stage.learning_rate=1e-2", "stage.warmup_steps=0").code == 0
    done = posttrain(*command("kto", "kto"), *HELD_TO)
    assert done.code == 0, done
    assert "step 0: the reference agrees with outputs/a/sft" in done.out
    assert manifest("outputs/kto/kto")["metrics"]["kl_before"] > 0.1


def test_pairs_below_a_margin_are_left_out_and_counted(posttrain: Posttrain, sources: Path) -> None:
    rows = [{**row, "margin": n % 4 / 2} for n, row in enumerate(read_rows("pairs.jsonl"))]
    write_rows(sources / "margins.jsonl", rows)
    for stage in ("dpo", "reward"):
        words = [each.replace("pairs.jsonl", "margins.jsonl") for each in command(stage, "m")]
        done = posttrain(*words, "data.min_margin=1", "dry_run=true")
        assert done.code == 0, done
        left_out = [int(n) for n in re.findall(r"(\d+) \(margin too low\)", done.out)]
        assert sum(left_out) == 20  # 0 and 0.5 of 40 rows
    for given, said in (
        ([*command("dpo", "m"), "data.min_margin=1"], "no 'margin', which data.min_margin=1 needs"),
        ([*words, "data.min_margin=9"], "(margin too low). Lower data.min_margin"),
        ([*command("sft", "m"), "data.min_margin=1"], "data.min_margin=1 is about pairs"),
    ):
        done = posttrain(*given, "dry_run=true")
        assert done.code == 2, done
        assert said in done.err
