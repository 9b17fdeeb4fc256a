"""PEFT's options as keys: each reaches the adapter it is meant for, starts from the model itself, or is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_architecture
from conftest import LORA, Posttrain, command, same_weights
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import configure
from posttrain.errors import ConfigError
from posttrain.models.lora import lora_config

RUN = ("stage.warmup_steps=0", "stage.learning_rate=1e-2", "data.max_rows=24", *LORA)


def adapted(path: Path, *more: str) -> Any:
    """The model with a new adapter, as a stage would make it."""
    model = AutoModelForCausalLM.from_pretrained(path)
    settings = configure(f"model.model_name_or_path={path}", "data.dataset_name=x/y", *LORA, *more).model
    config = lora_config(settings, model)
    assert config is not None
    return get_peft_model(model, config)


def adapters(model: Any) -> set[str]:
    """The layers that have one, numbers and names."""
    names = [name.split(".layers.")[-1] for name, _ in model.named_parameters() if "lora_A" in name]
    return {name.split(".lora_A")[0].removesuffix(".base_layer") for name in names}


def test_layers_and_modules_are_chosen_by_number_and_name(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "base", "qwen3")
    assert len(adapters(adapted(path))) == 14
    found = adapters(adapted(path, "model.lora_layers_to_transform=[1]", "model.lora_exclude_modules=[k_proj]"))
    assert {name.split(".")[0] for name in found} == {"1"}
    assert {name.split(".")[-1] for name in found} == {
        "q_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_experts_are_reached_by_their_parameters_and_by_their_old_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oss = save_architecture(tmp_path / "oss", "gpt-oss")
    assert {name.split(".")[-1] for name in adapters(adapted(oss))} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    names = "model.lora_target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    assert adapters(adapted(oss, names, "model.lora_target_modules=[]")) == {"0.mlp.experts", "1.mlp.experts"}
    assert len(adapters(adapted(oss, names))) == 10
    moe = save_architecture(tmp_path / "moe", "qwen3-moe")
    capsys.readouterr()
    model = adapted(moe, "model.lora_target_modules=[q_proj,gate_proj,up_proj,down_proj]", "model.lora_dropout=0.2")
    assert "no dropout instead of 0.2" in capsys.readouterr().out
    assert model.peft_config["default"].lora_dropout == 0
    assert adapters(model) == {f"{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.experts")}


REFUSED = {
    "unknown parameter": ("qwen3", "model.lora_target_parameters=[mlp.experts.gate]", "matches no parameter"),
    "unknown layer": ("qwen3", "model.lora_exclude_modules=[k_porj]", "did you mean k_proj"),
    "layer number": ("qwen3", "model.lora_layers_to_transform=[2]", "2 layers, 0 to 1; there is no 2"),
    "token number": ("llama3", "model.lora_trainable_token_indices=[9999]", "there is no 9999"),
    "tied tokens": ("qwen2.5", "model.lora_trainable_token_indices=[5]", "the head is tied"),
    "half of what is fused": ("mixtral", "model.lora_target_modules=[w1]", "without also targeting w3"),
    "layers of experts": ("mixtral", "model.lora_layers_to_transform=[0]", "model.lora_layers_to_transform: PEFT"),
    "DoRA of experts": ("qwen3-moe", "model.use_dora=true", "model.use_dora: PEFT"),
    "OLoRA of GPT-2": ("gpt2", "model.lora_init_weights=olora", "model.lora_init_weights=olora: PEFT"),
}


@pytest.mark.parametrize(("name", "override", "told"), REFUSED.values(), ids=REFUSED)
def test_what_would_match_nothing_or_cannot_be_is_refused(tmp_path: Path, name: str, override: str, told: str) -> None:
    path = save_architecture(tmp_path / "base", name)
    with pytest.raises(ConfigError) as refused:
        adapted(path, override)
    assert told in str(refused.value)
    assert override.split("=")[0].removeprefix("model.") in str(refused.value)


@pytest.mark.parametrize(
    "more", [("stage=dpo",), ("stage=reward",), ("model.load_in_4bit=true",)], ids=lambda more: more[0]
)
def test_what_changes_the_frozen_weights_is_for_sft_alone(more: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora_init_weights=pissa changes the frozen weights"):
        configure("model.lora_init_weights=pissa", "data.dataset_name=x/y", *LORA, *more)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_out_of_the_weights_resumes_exactly_and_is_saved_for_the_base(
    posttrain: Posttrain, sources: Path, kind: str
) -> None:
    base = save_architecture(sources / "base", "llama3")
    words = command("sft", "run", *RUN, f"model.model_name_or_path={base}", f"model.lora_init_weights={kind}")
    words += ["trainer.save_steps=2", "trainer.save_total_limit=4"]
    done = posttrain(*words)
    assert done.code == 0, done
    folder = Path("outputs/run/sft")
    shutil.copytree(folder / "model", "straight")
    start = AutoModelForCausalLM.from_pretrained(base)
    if start.get_input_embeddings().num_embeddings < (
        size := AutoModelForCausalLM.from_pretrained("straight").vocab_size
    ):
        start.resize_token_embeddings(size)
    ids = torch.arange(2, 12)[None]
    merged = AutoModelForCausalLM.from_pretrained("straight")(ids).logits
    assert (merged - start(ids).logits).abs().max() > 0.01
    apart = PeftModel.from_pretrained(start, str(folder / "adapter")).eval()
    assert apart.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(apart(ids).logits, merged, rtol=1e-3, atol=1e-3)
    for part in ("model", "adapter", "checkpoint-4"):
        shutil.rmtree(folder / part)
    (folder / "posttrain.json").unlink()
    again = posttrain(*words)
    assert "resuming from checkpoint-2" in again.out, again
    assert same_weights(folder / "model", Path("straight"))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_single_tokens_are_trained_in_every_stage(posttrain: Posttrain, sources: Path, stage: str) -> None:
    base = save_architecture(sources / "base", "llama3")
    tokens = "model.lora_trainable_token_indices=[5,7]"
    done = posttrain(*command(stage, "run", *RUN, f"model.model_name_or_path={base}", tokens, "trainer.max_steps=2"))
    assert done.code == 0, done
    name = "model.embed_tokens.weight"
    from safetensors.torch import load_file

    before = load_file(base / "model.safetensors")[name]
    after = load_file(Path(f"outputs/run/{stage}/model/model.safetensors"))[name][: len(before)]
    assert set((before != after).any(1).nonzero().flatten().tolist()) <= {5, 7}
