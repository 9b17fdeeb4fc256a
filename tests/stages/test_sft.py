"""The stage through its real entry point: what it trains, prints, saves and refuses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from architectures import save_architecture
from conftest import SHORT, Posttrain, contents, logged, manifest, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

SFT = Path("outputs/demo/sft")
SMALL = (*SHORT, "stage.max_length=96", "data.max_rows=120")


def test_a_bare_run_trains_the_embedded_default(posttrain: Posttrain) -> None:
    done = posttrain(*SHORT)
    assert done.code == 0, done
    assert "4 per device × 1 accumulation × 1 device = 4 rows per update" in done.out
    assert "steps: 4 (trainer.max_steps=4)" in done.out
    assert "trainable parameters: 777,856 of 777,856 (100.0%)" in done.out
    assert "tokens that carry loss: 5,547 per epoch" in done.out
    for words in (
        "held-out loss",
        "tokens per second",
        "trained tokens",
        "outputs/demo/sft/model",
        "try it",
    ):
        assert words in done.out
    folder = Path("outputs/demo/sft")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "run.json", "run.log", "metrics.jsonl", "samples.json", "model", "posttrain.json"} <= names
    assert not list(folder.rglob("training_args.bin"))
    found = manifest(SFT)
    assert found["stage"] == "sft"
    assert found["metrics"]["steps"] == 4
    assert found["metrics"]["eval_loss"] < found["metrics"]["eval_loss_before"]
    assert found["data"]["counts"]["train"]["kept"] == 450
    assert set(found["weights"]) >= {"model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert found["versions"]["trl"].startswith("1.16")
    assert yaml.safe_load((folder / "config.yaml").read_text())["stage"]["learning_rate"] == 2e-4
    assert sum("loss" in line for line in logged(folder)) == 4


def test_the_held_out_loss_is_the_mean_over_tokens(posttrain: Posttrain, rows: Path) -> None:
    """Recomputed row by row: not a mean of batch means, whatever the batch size."""
    long = {"instruction": "Count.", "response": " ".join(map(str, range(60)))}
    test = write_rows(
        rows.parent / "test.jsonl", [{"instruction": "Say a.", "response": "a"}, long, long | {"input": "x"}]
    )
    done = posttrain(f"data.dataset_name={rows}", f"data.dataset_test_split={test}", *SHORT, "stage.batch_size=2")
    assert done.code == 0, done
    model = AutoModelForCausalLM.from_pretrained("outputs/demo/sft/model")
    tokenizer = AutoTokenizer.from_pretrained("outputs/demo/sft/model")
    total, count = 0.0, 0
    for line in test.read_text().splitlines():
        row = json.loads(line)
        question = row["instruction"] + (f"\n\n{row['input']}" if "input" in row else "")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(prompt).input_ids
        answer = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert manifest(SFT)["metrics"]["eval_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "qlora"])
def test_lora_ends_in_a_merged_model_and_an_adapter(posttrain: Posttrain, quantised: bool) -> None:
    more = ["model.load_in_4bit=true"] if quantised else []
    done = posttrain("model.use_peft=true", "stage.learning_rate=1e-2", "stage.warmup_steps=0", *SMALL, *more)
    assert done.code == 0, done
    folder = Path("outputs/demo/sft")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "model" / "adapter_config.json").exists()
    plain, base = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("model", "base"))
    assert plain.keys() == base.keys()
    assert not torch.equal(plain["transformer.h.0.attn.c_attn.weight"], base["transformer.h.0.attn.c_attn.weight"])
    assert torch.equal(plain["transformer.wte.weight"], base["transformer.wte.weight"])


def test_packing_keeps_rows_apart(posttrain: Posttrain) -> None:
    """The packed loss equals the loss of the same rows one by one."""
    from functools import partial

    from posttrain.stages.sft import pad_packed

    done = posttrain("+trainer.packing=true", *SMALL)
    assert done.code == 0, done
    assert "packed rows per update" in done.out
    model = AutoModelForCausalLM.from_pretrained("outputs/demo/sft/model").eval()
    rows = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    labels = [[-100, 6, 7, 8], [-100, 10, 11], [-100, -100, 14, 15, 16]]
    packed = {"input_ids": rows[0] + rows[1], "labels": labels[0] + labels[1], "seq_lengths": [4, 3]}
    batch = partial(pad_packed, pad_token_id=1)(
        [packed, {"input_ids": rows[2], "labels": labels[2], "seq_lengths": [5]}]
    )
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]]
    assert batch["labels"].tolist() == [labels[0] + labels[1], [*labels[2], -100, -100]]
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(together[0, :4], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[0, 4:7], alone[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1, :5], alone[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "gpt-oss", "mixtral", "gemma3", "falcon-rotary"])
def test_packing_is_refused_where_rows_would_see_each_other(
    posttrain: Posttrain, rows: Path, tmp_path: Path, name: str
) -> None:
    """BLOOM takes no positions, and gpt-oss masks without them (transformers 5.24); the others keep rows apart."""
    base = save_architecture(tmp_path / "base", name)
    more = (f"model.model_name_or_path={base}", "stage.max_length=96", "trainer.max_steps=2")
    done = posttrain("+trainer.packing=true", f"data.dataset_name={rows}", *more)
    if name in ("bloom", "gpt-oss"):
        assert done.code == 1, done
        assert "trainer.packing=true" in done.err
        [off] = re.findall(r"off by up to ([\d.e+-]+) nats", done.err)
        assert float(off) > 0.01
        return
    assert done.code == 0, done
    [gap] = re.findall(r"in packed rows within ([\d.e+-]+)", done.out)
    assert float(gap) < 1e-4


def test_a_router_is_balanced_in_training_and_left_out_of_the_held_out_loss(
    posttrain: Posttrain, rows: Path, tmp_path: Path
) -> None:
    base = save_architecture(tmp_path / "base", "qwen3-moe")
    found = {}
    for coefficient in (0.0, 10.0):
        done = posttrain(
            *(f"model.model_name_or_path={base}", f"data.dataset_name={rows}", "stage.max_length=96", "overwrite=true"),
            *("trainer.max_steps=1", "trainer.logging_steps=1", f"+trainer.router_aux_loss_coef={coefficient}"),
        )
        assert done.code == 0, done
        found[coefficient] = next(line for line in logged(SFT) if "loss" in line) | manifest(SFT)["metrics"]
    assert found[10.0]["loss"] == pytest.approx(found[0.0]["loss"] + 10 * found[10.0]["aux_loss"], rel=1e-4)
    assert found[10.0]["eval_loss_before"] == found[0.0]["eval_loss_before"]


def test_a_dry_run_shows_the_data_and_writes_nothing(posttrain: Posttrain, tmp_path: Path) -> None:
    done = posttrain("dry_run=true")
    assert done.code == 0, done
    for words in (
        "rows kept",
        "length in tokens: 21",
        "these carry loss",
        "⟦Happy·",  # what carries loss, in a file as well
        "<|endoftext|>⟧",
        "<|endoftext|> ends the response and carries loss in 450 of 450 rows",
        "BOS: no row begins with two",
        "steps: 339 (3 epochs of 113)",
    ):
        assert words in done.out, done
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_has_a_folder_for_each_point_and_a_table(posttrain: Posttrain) -> None:
    done = posttrain("-m", "stage.learning_rate=1e-4,4e-4", *SMALL)
    assert done.code == 0, done
    losses = [
        manifest(f"outputs/demo/sft/stage.learning_rate={rate}")["metrics"]["eval_loss"]
        for rate in ("0.0001", "0.0004")
    ]
    assert losses[0] != losses[1]
    table = done.out[done.out.index("sweep: outputs/demo/sft") :]
    assert all(f"{loss:.4g}" in table for loss in losses)


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_point(posttrain: Posttrain, rows: Path) -> None:
    (rows.parent / "bad.jsonl").write_text('{"instruction": "a"}\n')
    done = posttrain("-m", f"data.dataset_name={rows.parent / 'bad.jsonl'},{rows}", *SMALL)
    assert done.code == 1, done
    assert "bad.jsonl line 1: no 'response'" in done.err
    assert "complete" in done.out


def test_bad_data_leaves_the_disk_as_it_was(posttrain: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n')
    done = posttrain("data.dataset_name=bad.jsonl")
    assert done.code == 2, done
    assert "bad.jsonl line 1: no 'response'" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("stage.max_length=1024",), "stage.max_length=1024 exceeds the 512 positions of posttrain/tiny"),
        (
            ("stage.max_length=12",),
            "450 (prompt too long). Raise stage.max_length=12",
        ),
        (("precision=fp16",), "precision=fp16 needs a GPU"),
        (("model.use_peft=true", "model.lora_target_modules=[nope]"), "nope match no linear layer"),
        (("trainer.report_to=mlflow",), "trainer.report_to=mlflow is not one of none, tensorboard"),
        (("model.chat_template_path=nope.jinja",), "model.chat_template_path=nope.jinja"),
    ],
)
def test_what_cannot_work_is_refused_with_exit_code_2(
    posttrain: Posttrain, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = posttrain(*arguments)
    assert done.code == 2, done
    assert told in done.err
    assert contents(tmp_path) == {}


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(posttrain: Posttrain) -> None:
    done = posttrain(
        "stage.learning_rate=900", "stage.warmup_steps=0", "+trainer.max_grad_norm=0", "trainer.max_steps=60"
    )
    assert done.code == 1, done
    assert "stopped before the optimizer step" in done.err or "left weights" in done.err
    assert "stage.learning_rate=900" in done.err
    assert not Path("outputs/demo/sft/posttrain.json").exists()


def test_warnings_tell_what_would_go_unseen(posttrain: Posttrain, rows: Path) -> None:
    echo = {"instruction": "What is the first colour?", "response": "What is the first colour? Red."}
    rows.write_text(rows.read_text() * 2 + json.dumps(echo) + "\n")
    done = posttrain(
        f"data.dataset_name={rows}", "data.test_size=0", "stage.max_length=40", "model.dtype=bfloat16", "dry_run=true"
    )
    assert done.code == 0, done
    assert "model.dtype=bfloat16 trains all weights in it, where small updates round to nothing" in done.out
    assert "rows to train on repeat another one exactly" in done.out
    assert "no rows are held out" in done.out
    assert "in 1 of 81 rows to train on the completion begins with its prompt" in done.out
    assert "lose the EOS" in done.out or "are cut" not in done.out


def test_trackers_write_where_they_are_told(posttrain: Posttrain) -> None:
    recipe = ("recipes=quickstart/reward", "model.model_name_or_path=posttrain/tiny", "data.max_rows=120")
    done = posttrain("trainer.report_to=tensorboard", *recipe, *SHORT)
    assert done.code == 0, done
    written = b"".join(file.read_bytes() for file in Path("outputs/demo/reward/runs").rglob("events.out.tfevents.*"))
    assert b"report card/text_summary" in written
    assert b"report card, drawn" in written
    assert manifest("outputs/demo/reward")["cost"].keys() == {"device", "seconds", "tokens", "epochs", "peak_memory"}


def test_low_memory_trains_with_checkpointed_activations_and_an_8_bit_optimizer(posttrain: Posttrain) -> None:
    done = posttrain("trainer=low_memory", *SMALL)
    assert done.code == 0, done
    assert manifest(SFT)["config"]["trainer"]["optim"] == "paged_adamw_8bit"


def test_a_model_on_the_hub_that_cannot_be_had_is_named(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    done = posttrain("model=gpt2", f"data.dataset_name={rows}")
    assert done.code == 2, done
    assert "model.model_name_or_path=openai-community/gpt2: its tokenizer cannot be loaded" in done.err
    assert list(tmp_path.iterdir()) == [rows]


def test_bf16_trains_on_a_cpu_when_asked(posttrain: Posttrain) -> None:
    done = posttrain("precision=bf16", *SMALL)
    assert done.code == 0, done
    assert "precision: bf16" in done.out
    assert math.isfinite(manifest(SFT)["metrics"]["eval_loss"])
