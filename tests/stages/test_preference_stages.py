"""Reward modelling and DPO through the real entry point: what they start from, prove, save and refuse."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LORA,
    QLORA,
    SHORT,
    Posttrain,
    logged,
    manifest,
    once,
    read_rows,
    same_weights,
    splits_of,
    start,
    wait_for,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain import compute_dpo_loss
from posttrain.config.stages import LOSS_OPTIONS
from posttrain.runs.checkpoint import MANIFEST
from posttrain.stages import trainers

FEW = (
    *(*SHORT, "stage.max_length=64", "stage.learning_rate=1e-3", "trainer.eval_steps=2"),
    *("data.max_rows=60", "data.test_size=20"),
)
DPO = Path("outputs/demo/dpo")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Sixty pairs that do not say which split they belong to."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": f"No {n} for you, ever."} for n in range(60)]
    return f"data.dataset_name={write_rows(tmp_path / 'pairs.jsonl', rows)}"


def test_smoothed_labels() -> None:
    """One label in ten is wrong: d = 0 costs log 2, d = ln 3 costs 0.9 · log(4/3) + 0.1 · log 4."""
    differences = torch.tensor([0.0, math.log(3)], requires_grad=True)
    plain = -torch.nn.functional.logsigmoid(differences).mean()
    found = plain + trainers.smoothing_loss(differences, 0.1)
    assert float(found) == pytest.approx((math.log(2) + 0.9 * math.log(4 / 3) + 0.1 * math.log(4)) / 2)
    found.backward()
    assert differences.grad is not None
    assert differences.grad.tolist() == pytest.approx([(0.5 - 0.9) / 2, (0.75 - 0.9) / 2])  # best where σ(d) is 0.9
    # the second pair is a tie: -½ log σ(d) - ½ log σ(-d)
    found = plain + trainers.smoothing_loss(differences, torch.tensor([0.0, 0.5]))
    assert float(found) == pytest.approx((math.log(2) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4)) / 2)


def test_ties_are_kept_as_half_a_pair_where_asked(posttrain: Posttrain, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": f"No {n}.", "best": ("a", "b", "both")[n % 3]}
        for n in range(48)
    ]
    rule = {"winner": "best", "a": "a", "b": "b", "tie": "both"}
    named = (f"data.preference.{key}={value}" for key, value in rule.items())
    data = f"data.dataset_name={write_rows(tmp_path / 'pairs.jsonl', rows)}"
    words = ("stage=reward", data, *named, *FEW, "data.test_size=12")
    kept = {}
    for ties in ("drop", "half"):
        done = posttrain(*words, f"stage.ties={ties}", f"run_name={ties}")
        assert done.code == 0, done
        folder = Path("outputs", ties, "reward")
        counts = manifest(folder)["data"]["counts"]
        card = json.loads((folder / "report_card.json").read_text())
        kept[ties] = (
            counts["train"]["kept"],
            counts["train"]["ties"],
            card["pairs"],
            manifest(folder)["metrics"]["eval_rows"],
        )
    assert kept["drop"] == (20, 16, 12, 12)
    assert kept["half"][:2] == (36, 0)
    assert kept["half"][2] < kept["half"][3] == 12  # no tie is right or wrong
    assert "16 ties are kept, each as half a pair either way" in done.out


@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.real_process), LORA, QLORA], ids=["full", "lora", "qlora"]
)
def test_reward_ends_in_a_model_that_scores_when_loaded(
    posttrain: Posttrain, pairs: str, more: tuple[str, ...]
) -> None:
    done = posttrain("stage=reward", pairs, *FEW, *more)
    assert done.code == 0, done
    assert "warning stage=reward expects a model from stage=sft" in done.out
    assert "reloaded, its scores are within" in done.out
    for words in (
        "report card",
        "accuracy (95 % interval)",
        "the longer completion is right",
        "calibration error",
        "verdict",
        "fit means",
    ):
        assert words in done.out
    card = json.loads(Path("outputs/demo/reward/report_card.json").read_text())
    assert card["pairs"] == manifest("outputs/demo/reward")["metrics"]["eval_rows"] == 20
    assert re.search(r"held-out rows\W+20\W+20", done.out)
    assert card["accuracy"] == manifest("outputs/demo/reward")["metrics"]["accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained("outputs/demo/reward/model")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id not in (None, model.config.eos_token_id)
    assert not Path("outputs/demo/reward/model/adapter_config.json").exists()


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_held_out_numbers_are_means_over_all_pairs_whatever_the_batch_size(
    posttrain: Posttrain, tmp_path: Path, stage: str
) -> None:
    """Seven pairs of different lengths in batches of 2, 2, 2 and 1, and all at once."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} it is. " * (n % 5 + 1), "rejected": "No."} for n in range(40)]
    data = f"data.dataset_name={write_rows(tmp_path / 'uneven.jsonl', rows)}"
    found = []
    for size in (2, 7):
        more = (f"+trainer.per_device_eval_batch_size={size}", f"output_dir=by_{size}", "data.test_size=7")
        assert posttrain(f"stage={stage}", data, *FEW, *more).code == 0
        lines = logged(f"by_{size}/demo/{stage}")
        found.append([{name: line[name] for name in line if name.startswith("eval_")} for line in lines])
    small, whole = ([line for line in lines if "eval_loss" in line] for lines in found)
    assert len(small) == len(whole) > 1
    counted = {"reward": {"eval_accuracy", "eval_margin", "eval_min_reward", "eval_mean_reward", "eval_max_reward"}}
    counted["dpo"] = {f"eval_{name}" for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "entropy")}
    assert counted[stage] <= small[-1].keys() == whole[-1].keys()
    assert small == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in whole]
    if stage == "reward":
        card = json.loads(Path("by_2/demo/reward/report_card.json").read_text())
        assert small[-1]["eval_accuracy"] == pytest.approx(card["accuracy"])


def test_a_saved_reward_model_that_scores_otherwise_fails_the_run(
    posttrain: Posttrain, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are changed on disk between saving and the look that a new process takes."""
    from safetensors.torch import load_file, save_file

    from posttrain.models import saving

    look = saving._scores_in_a_new_process

    def after_a_change(folder: Path, rows: Any) -> Any:
        weights = load_file(folder / "model.safetensors")
        weights["score.weight"] *= 2
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return look(folder, rows)

    monkeypatch.setattr(saving, "_scores_in_a_new_process", after_a_change)
    done = posttrain("stage=reward", pairs, *FEW)
    assert done.code == 1, done
    assert "does not give the scores of the trained model" in done.err
    assert not Path("outputs/demo/reward/posttrain.json").exists()


def test_reward_takes_margins_centering_and_smoothed_labels(posttrain: Posttrain, tmp_path: Path, pairs: str) -> None:

    def first_loss(run: str) -> float:
        return next(float(line["loss"]) for line in logged(f"outputs/{run}/reward") if "loss" in line)

    losses = []
    for number, more in enumerate(((), ("+trainer.center_rewards_coefficient=0.5",))):
        assert posttrain("stage=reward", pairs, *FEW, *more, "trainer.max_steps=1", f"run_name=run{number}").code == 0
        losses.append(first_loss(f"run{number}"))
    rows = [row | {"margin": 3.0} for row in read_rows(tmp_path / "pairs.jsonl")]
    write_rows(tmp_path / "pairs.jsonl", rows)
    assert posttrain("stage=reward", pairs, *FEW, "trainer.max_steps=1", "run_name=run2").code == 0
    losses.append(first_loss("run2"))
    assert losses[1] > losses[0]
    assert losses[2] > losses[0] + 1  # -log σ(0 - 3) is 3.05 where -log σ(0) is 0.69
    smoothed = (*FEW, "trainer.max_steps=1", "stage.label_smoothing=0.2", "run_name=run3")
    assert posttrain("stage=reward", pairs, *smoothed).code == 0
    [margin] = [line["margin"] for line in logged("outputs/run2/reward") if "loss" in line]
    assert first_loss("run3") == pytest.approx(losses[2] + 0.2 * (margin - 3), rel=1e-5)
    before = [manifest(f"outputs/run{number}/reward")["metrics"]["eval_loss_before"] for number in (2, 3)]
    assert before[0] == before[1]  # of held-out pairs the loss is the plain one


@pytest.mark.parametrize(
    "more", [(), LORA, QLORA, ("+trainer.precompute_ref_log_probs=true",)], ids=["full", "lora", "qlora", "precomputed"]
)
def test_dpo_starts_at_ln_2_from_its_own_reference(posttrain: Posttrain, pairs: str, more: tuple[str, ...]) -> None:
    done = posttrain("stage=dpo", pairs, *FEW, *more)
    assert done.code == 0, done
    assert "warning stage=dpo expects a model from stage=sft" in done.out
    assert "policy = " in done.out
    assert "reference = " in done.out
    assert "step 0: policy and reference agree within" in done.out
    found = manifest(DPO)["metrics"]
    assert found["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["kl_before"] == pytest.approx(0, abs=1e-4)
    assert found["eval_loss"] < found["eval_loss_before"]
    assert found["accuracy"] > 0.5
    assert any("eval_kl" in line and "eval_chosen_logp_change" in line for line in logged(DPO))


@pytest.fixture
def sft(posttrain: Posttrain, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Put a finished SFT stage into outputs/demo, trained once for each kind."""
    short = ("trainer.max_steps=3", "stage.learning_rate=1e-2", "stage.warmup_steps=0", "stage.max_length=64")

    def put(*more: str) -> None:
        def make(folder: Path) -> None:
            assert posttrain(f"data.dataset_name={rows}", *short, *more, f"output_dir={folder}").code == 0

        shutil.copytree(once(tmp_path_factory, f"sft-{len(more)}", make), "outputs")

    return put


CHAINS = [((), ()), (LORA, LORA), (LORA, ()), ((), LORA)]


@pytest.mark.parametrize(("first", "then"), CHAINS, ids=["full-full", "lora-lora", "lora-full", "full-lora"])
def test_in_every_chain_the_reference_is_the_sft_model(
    posttrain: Posttrain, sft: Callable[..., None], pairs: str, first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    sft(*first)
    done = posttrain("stage=dpo", pairs, *FEW, *then, "trainer.max_steps=1", "data.test_size=4")
    assert done.code == 0, done
    assert "model: outputs/demo/sft (the sft model of this run)" in done.out
    assert "first loss 0.693147" in done.out
    inputs = manifest(DPO)["inputs"]["model"]
    assert inputs["stage"] == "sft"
    assert inputs["weights"]["model.safetensors"] == manifest("outputs/demo/sft")["weights"]["model.safetensors"]


def test_an_adapter_folder_can_be_the_model(posttrain: Posttrain, sft: Callable[..., None], pairs: str) -> None:
    sft(*LORA)
    done = posttrain("stage=dpo", "model.model_name_or_path=outputs/demo/sft/adapter", pairs, *FEW, "data.test_size=4")
    assert done.code == 0, done
    assert "first loss 0.693147" in done.out
    merged, started = (
        AutoModelForCausalLM.from_pretrained(path) for path in ("outputs/demo/sft/model", "outputs/demo/dpo/base")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, started(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_as_the_model_is_told(posttrain: Posttrain, sft: Callable[..., None], pairs: str) -> None:
    sft()
    newest = max(Path("outputs/demo/sft").glob("checkpoint-*"))
    done = posttrain("stage=dpo", f"model.model_name_or_path={newest}", pairs, "dry_run=true")
    assert done.code == 0, done
    assert "is a checkpoint from inside a run, not the result of one; that is outputs/demo/sft" in done.out + done.err


def test_a_wrong_reference_stops_the_run_and_is_named(
    posttrain: Posttrain, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is read from disk while another process has changed the weights there."""
    from posttrain.stages import dpo

    read = dpo.load_causal_lm

    def changed(model: Any, tokenizer: Any, path: str, *rest: Any) -> Any:
        loaded = read(model, tokenizer, path, *rest)
        with torch.no_grad():
            loaded.transformer.h[0].mlp.c_fc.weight.mul_(3)
        return loaded

    monkeypatch.setattr(dpo, "load_causal_lm", changed)
    done = posttrain("stage=dpo", pairs, *FEW)
    assert done.code == 1, done
    assert "the reference is not the model that this stage starts from" in done.err
    assert not Path("outputs/demo/dpo/posttrain.json").exists()


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_dropout_that_is_still_on_stops_the_run(
    posttrain: Posttrain, pairs: str, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Switched on again after the trainer is built, as a new release of a library might do."""
    kind = trainers.DPOTrainer if stage == "dpo" else trainers.RewardModelTrainer
    build = kind.__init__

    def broken(self: Any, **options: Any) -> None:
        build(self, **options)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3

    monkeypatch.setattr(kind, "__init__", broken)
    done = posttrain(f"stage={stage}", pairs, *FEW)
    assert done.code == 1, done
    assert "dropout" in done.err
    assert not Path(f"outputs/demo/{stage}/posttrain.json").exists()


LOSSES = ["hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
LOSSES += ["apo_zero", "apo_down", "discopop", "sigmoid,sft", "sigmoid_norm"]


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_of_trl_is_passed_through(posttrain: Posttrain, pairs: str, kind: str) -> None:
    smoothing = 0.1 if kind in LOSS_OPTIONS["label_smoothing"] else 0
    more = ("trainer.max_steps=2", "data.test_size=4", f"trainer.label_smoothing={smoothing}")
    done = posttrain("stage=dpo", pairs, *FEW, *more, f"+trainer.loss_type=[{kind}]")
    assert done.code == 0, done
    assert math.isfinite(manifest(DPO)["metrics"]["eval_loss"])


def test_compute_dpo_loss_is_what_the_trainer_computes(posttrain: Posttrain, pairs: str) -> None:
    """On held-out pairs of a trained policy; and a case by hand."""
    done = posttrain("stage=dpo", pairs, *FEW)
    assert done.code == 0, done
    from transformers import AutoTokenizer

    from posttrain.data.chat import ChatEncoder
    from posttrain.models.generate import completion_logps

    tokenizer = AutoTokenizer.from_pretrained("outputs/demo/dpo/model")
    encoder = ChatEncoder(tokenizer)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f"outputs/demo/dpo/{name}").eval() for name in ("model", "base")
    )
    import posttrain.cli.command as compose
    from posttrain.data.formats import preferences

    config = compose.read_command(["stage=dpo", pairs, *FEW]).config
    test = splits_of(preferences, config.data).test
    logps = []
    for model in (policy, reference):
        for answers in ([row.chosen for row in test], [row.rejected for row in test]):
            ids = [encoder.conversation_ids([*row.prompt, *answer]) for row, answer in zip(test, answers, strict=True)]
            prompts = [encoder.prompt_ids(row.prompt) for row in test]
            completions = [whole[len(prompt) :] for whole, prompt in zip(ids, prompts, strict=True)]
            logps.append(completion_logps(model, prompts, completions, tokenizer.pad_token_id))
    loss, chosen, rejected = compute_dpo_loss(logps[0], logps[1], logps[2], logps[3], beta=0.1)
    found = manifest(DPO)["metrics"]
    assert float(loss.mean()) == pytest.approx(found["eval_loss"], abs=1e-5)
    assert float((chosen > rejected).float().mean()) == pytest.approx(found["accuracy"])
    assert float((chosen - rejected).mean()) == pytest.approx(found["reward_margin"], abs=1e-5)
    assert float((logps[0] - logps[2]).mean()) == pytest.approx(found["chosen_logp_change"], abs=1e-4)
    assert found["eval_rows"] == len(test)
    hand, chosen, rejected = compute_dpo_loss(*(torch.tensor([value]) for value in (-1.0, -3.0, -2.0, -2.0)), beta=0.5)
    assert (float(chosen), float(rejected)) == (0.5, -0.5)
    assert float(hand) == pytest.approx(math.log(1 + math.exp(-1)))


def test_an_unfinished_sft_run_is_not_started_from(posttrain: Posttrain, sft: Callable[..., None], pairs: str) -> None:
    sft()
    Path("outputs/demo/sft/posttrain.json").unlink()
    done = posttrain("stage=dpo", pairs, *FEW)
    assert done.code == 2, done
    assert "outputs/demo/sft has not finished" in done.err


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_killed_and_resumed_bitwise(posttrain: Posttrain, tmp_path: Path, pairs: str, stage: str) -> None:
    """With LoRA; tests/runs/test_resume.py has the same with all weights."""
    run = [
        f"stage={stage}",
        pairs,
        "trainer.max_steps=16",
        "trainer.save_steps=4",
        "stage.max_length=64",
        "stage.learning_rate=1e-3",
        "data.test_size=10",
        *LORA,
    ]
    assert posttrain(*run, "output_dir=straight").code == 0
    process = start(*run, cwd=tmp_path)
    wait_for(tmp_path / "outputs/demo" / stage / "checkpoint-8" / MANIFEST, process)
    process.kill()
    process.communicate()
    done = posttrain(*run)
    assert done.code == 0, done
    assert "resuming from checkpoint-" in done.out
    assert same_weights(Path(f"straight/demo/{stage}/model"), Path(f"outputs/demo/{stage}/model"))


@pytest.mark.slow
def test_a_beta_sweep_has_a_table_and_a_picture(posttrain: Posttrain, pairs: str) -> None:
    done = posttrain("-m", "stage=dpo", "stage.beta=0.05,0.3", pairs, *FEW, "trainer.max_steps=2", "data.test_size=4")
    assert done.code == 0, done
    table = done.out[done.out.index("sweep: outputs/demo/dpo") :]
    for words in (
        "stage.beta",
        "accuracy",
        "reward margin",
        "KL from the",
        "held-out loss",
        "0.05",
        "0.3",
    ):
        assert words in table
    assert Path("outputs/demo/dpo/sweep.svg").stat().st_size > 5000


def test_message_lists_with_system_prompts_and_several_turns(posttrain: Posttrain, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [
        system,
        *({"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")),
        {"role": "user", "content": "now"},
    ]
    rows = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": f"yes {n}"}],
            "rejected": [{"role": "assistant", "content": f"no {n}"}],
        }
        for n in range(20)
    ]
    write_rows(tmp_path / "chat.jsonl", rows)
    for stage in ("reward", "dpo"):
        done = posttrain(f"stage={stage}", "data.dataset_name=chat.jsonl", "trainer.max_steps=2", "stage.max_length=96")
        assert done.code == 0, done
    shutil.rmtree("outputs")
