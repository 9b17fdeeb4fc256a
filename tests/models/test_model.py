"""A model is whole and finite or refused; tokenizers get what they lack and keep what they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
import torch
from architectures import save_architecture
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from posttrain.cli.command import read_command
from posttrain.config.schema import ModelConfig
from posttrain.errors import ConfigError
from posttrain.models.load import (
    load_causal_lm,
    load_model_and_tokenizer,
    load_reward_model,
    load_tokenizer,
    max_positions,
)
from posttrain.models.lora import lora_config


def model_config(path: Path | str, *more: str) -> ModelConfig:
    return read_command([f"model.model_name_or_path={path}", "data.dataset_name=someone/rows", *more]).config.model


def save(folder: Path, tokenizer: Any, kind: str = "gpt2") -> Path:
    """A tiny random model with its tokenizer."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2)
        )
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**size, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MAKERS = {"gpt2": made.gpt2_like, "qwen2": made.chatml, "llama": made.llama_like}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_pad_token_is_never_eos_and_generation_stops_at_the_end_of_a_turn(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "base", MAKERS[kind](), kind)
    model, tokenizer = load_model_and_tokenizer(model_config(path), tmp_path / "built")
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    stops = model.generation_config.eos_token_id
    end = {"gpt2": "<|endoftext|>", "qwen2": "<|im_end|>", "llama": "</s>"}[kind]
    assert tokenizer.convert_tokens_to_ids(end) in ([stops] if isinstance(stops, int) else stops)
    assert tokenizer.chat_template


def test_an_added_pad_token_starts_as_the_mean_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    model, tokenizer = load_model_and_tokenizer(model_config(path), tmp_path / "built")
    old = load_file(path / "model.safetensors")["transformer.wte.weight"]
    new = model.get_input_embeddings().weight
    assert new.shape[0] == old.shape[0] + 1 == len(tokenizer)
    assert torch.equal(new[:-1], old)
    torch.testing.assert_close(new[-1], old.mean(dim=0))


def broken(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"), "1 missing keys in its weights"),
        (lambda weights: weights["transformer.wpe.weight"][3].fill_(float("nan")), "transformer.wpe.weight holds NaN"),
    ],
)
def test_missing_and_nan_weights_are_errors(tmp_path: Path, change: Any, told: str) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    broken(path, change)
    with pytest.raises(ConfigError, match=told):
        load_model_and_tokenizer(model_config(path), tmp_path / "built")


EXTRA: dict[str, Any] = {
    "a third layer": ("transformer.h.2.mlp.c_fc.weight", 1),
    "a bias": ("transformer.h.0.mlp.gate.bias", 1),
    "a reward head": ("score.weight", 1),
    "a value head of TRL's": ("v_head.summary.weight", 1),
    "a mask of old": ("transformer.h.0.attn.masked_bias", 0),
}


@pytest.mark.parametrize(("name", "refused"), EXTRA.values(), ids=EXTRA)
def test_weights_without_a_place_are_errors(tmp_path: Path, name: str, refused: int) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    broken(path, lambda weights: weights.update({name: torch.zeros(3)}))
    if not refused:
        load_model_and_tokenizer(model_config(path), tmp_path / "built")
        return
    with pytest.raises(ConfigError, match=rf"1 unexpected keys in its weights \({name}\)"):
        load_model_and_tokenizer(model_config(path), tmp_path / "built")


def reward_model(folder: Path, base: Path, outputs: int = 1) -> ModelConfig:
    """The settings of a reward model that has been trained on a base model."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    model.save_pretrained(folder)
    made.chatml().save_pretrained(folder)
    return model_config(folder)


def test_a_head_is_replaced_where_a_reward_model_begins_and_nowhere_else(tmp_path: Path) -> None:
    base = model_config(save(tmp_path / "base", made.llama_like(), "llama"))
    tokenizer, _ = load_tokenizer(base)
    begun = load_reward_model(base, tokenizer, base.start, seed=0)  # lm_head.weight is left out, score.weight is new
    assert begun.config.num_labels == 1
    tied = save(tmp_path / "tied", made.chatml(), "qwen2")
    finished = reward_model(tmp_path / "reward", tied)
    tokenizer, _ = load_tokenizer(finished)
    load_reward_model(finished, tokenizer, finished.start, seed=0, new_head=False)
    with pytest.raises(ConfigError, match=r"is a reward model \(Qwen2ForSequenceClassification\)"):
        load_causal_lm(finished, tokenizer, finished.start)
    broken(tmp_path / "reward", lambda weights: weights.update({"score.bias": torch.tensor([100.0])}))
    with pytest.raises(ConfigError, match=r"unexpected keys in its weights \(score\.bias\)"):
        load_reward_model(finished, tokenizer, finished.start, seed=0, new_head=False)


def test_a_head_that_the_file_has_apart_is_not_said_to_be_tied(tmp_path: Path) -> None:
    path = save_architecture(tmp_path / "model", "qwen2.5", tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded, _ = load_model_and_tokenizer(model_config(path), tmp_path / "built")
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert not torch.equal(head, embeddings)
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    tied, _ = load_model_and_tokenizer(
        model_config(save_architecture(tmp_path / "tied", "qwen2.5", tie_word_embeddings=True)), tmp_path / "built"
    )
    assert tied.config.tie_word_embeddings


@pytest.mark.parametrize("new_head", [False, True], ids=["used", "trained on"])
def test_a_reward_model_has_one_output(tmp_path: Path, new_head: bool) -> None:
    two = reward_model(tmp_path / "two", save(tmp_path / "base", made.chatml(), "qwen2"), outputs=2)
    tokenizer, _ = load_tokenizer(two)
    with pytest.raises(ConfigError, match="it has 2 outputs, one is needed"):
        load_reward_model(two, tokenizer, two.start, seed=0, new_head=new_head)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bloom", "phi3"])
def test_dropout_is_off_but_where_it_is_wanted(tmp_path: Path, name: str) -> None:
    """OPT calls it as a function: no module of it can be switched off."""
    path = save_architecture(tmp_path / "base", name)
    config = model_config(path)
    tokenizer, _ = load_tokenizer(config)
    ids = torch.arange(2, 12)[None]

    def varies(model: Any) -> bool:
        with torch.no_grad():
            one, other = (model.train()(ids).logits for _ in range(2))
        return not torch.equal(one, other)

    wanted = load_causal_lm(config, tokenizer, str(path), dropout=True)
    assert varies(wanted)
    assert wanted.config.to_dict() | {"dtype": None} != load_causal_lm(config, tokenizer, str(path)).config.to_dict()
    assert not varies(load_causal_lm(config, tokenizer, str(path)))
    assert not varies(load_reward_model(config, tokenizer, str(path), seed=0))


def test_invalid_generation_settings_are_mended_and_told(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.chatml(), "qwen2")
    settings = {"eos_token_id": 2, "do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_new_tokens": 7}
    (path / "generation_config.json").write_text(json.dumps(settings))
    model, _ = load_model_and_tokenizer(model_config(path))
    _, notes = load_tokenizer(model_config(path))
    assert [note for note in notes if "temperature=0.9, top_p=0.6" in note]
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert saved["do_sample"] is False
    assert not {"temperature", "top_p"} & saved.keys()
    valid = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "num_beams": 2, "early_stopping": True}
    (path / "generation_config.json").write_text(json.dumps(valid))
    model, _ = load_model_and_tokenizer(model_config(path))
    assert valid.items() <= model.generation_config.to_dict().items()
    assert not [note for note in load_tokenizer(model_config(path))[1] if "generation" in note]


def test_embeddings_that_grow_are_told(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.llama_like(), "llama")
    tokens = len(made.llama_like())
    _, notes = load_tokenizer(model_config(path))  # a pad token is added
    assert [note for note in notes if note.startswith(f"embeddings: {tokens} grow to the tokenizer's {tokens + 1}")]
    _, notes = load_tokenizer(model_config(save(tmp_path / "other", made.chatml(), "qwen2")))
    assert [note for note in notes if note.startswith("embeddings")]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load_model_and_tokenizer(model_config(path), tmp_path / "built")


def test_broken_model_folders_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="weights cannot be loaded"):
        load_model_and_tokenizer(model_config(path), tmp_path / "built")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load_tokenizer(model_config(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither config\.json nor adapter_config\.json"):
        model_config(tmp_path / "empty")


@pytest.mark.parametrize("missing", ["runs/demo", "runs/demo/sft", "runs/nope"])
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/other/sft").mkdir(parents=True)
    assert model_config("runs/nope").start == "runs/nope"  # an id on the Hub, for all that is known
    (tmp_path / "runs/other/sft/posttrain.json").touch()
    with pytest.raises(ConfigError, match=f"{missing}: no such folder"):
        model_config(missing)


def test_lora_targets_are_checked_one_by_one(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    model, _ = load_model_and_tokenizer(model_config(path), tmp_path / "built")
    with pytest.raises(ConfigError, match=r"q_proj match no linear layer \(matched: c_attn \(2\)"):
        lora_config(model_config(path, "model.use_peft=true", "model.lora_target_modules=[c_attn,q_proj]"), model)
    with pytest.raises(ConfigError, match=r"lora_modules_to_save: lm_haed matches no module; did you mean lm_head\?"):
        lora_config(model_config(path, "model.use_peft=true", "model.lora_modules_to_save=[wte,lm_haed]"), model)
    found = lora_config(model_config(path, "model.use_peft=true", "model.lora_target_modules=[c_attn]"), model)
    assert found is not None
    assert found.fan_in_fan_out


def test_an_adapter_given_as_the_model_is_merged_with_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path = save(tmp_path / "base", made.gpt2_like())
    adapted = get_peft_model(
        GPT2LMHeadModel.from_pretrained(path), LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    made.gpt2_like().save_pretrained(tmp_path / "adapter")
    config = model_config(tmp_path / "adapter")
    assert max_positions(config) == 128
    ids = torch.tensor([[5, 6, 7]])
    adapted.eval()
    vocabulary = adapted.config.vocab_size
    for folder in (tmp_path / "built", None):  # to train from, and to read alone
        model, _ = load_model_and_tokenizer(config, folder)
        logits = model.eval()(ids).logits[..., :vocabulary]
        torch.testing.assert_close(logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_evaluation_does_not_stop_gradients_of_quantised_layers(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.llama_like(), "llama")
    config = model_config(path, "model.use_peft=true", "model.load_in_4bit=true")
    tokenizer, _ = load_tokenizer(config)
    model = load_causal_lm(config, tokenizer, str(path))
    embeddings = torch.randn(1, 4, 32, requires_grad=True)
    gradients = []
    for _ in range(2):
        model.train()
        embeddings.grad = None
        model(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append(embeddings.grad)
        model.eval()
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_model_trained_by_us_keeps_its_template(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    (tmp_path / "t.jinja").write_text(made.CHATML.replace("<|im_end|>", "<|endoftext|>"))
    config = model_config(path, f"model.chat_template_path={tmp_path / 't.jinja'}")
    tokenizer, notes = load_tokenizer(config)
    assert "im_start" in tokenizer.chat_template
    assert notes[0].startswith("chat template: ")
    (path / "posttrain.json").write_text("{}")
    with pytest.raises(ConfigError, match="was trained with the template saved beside it"):
        load_tokenizer(config)


def test_a_tokenizer_class_that_splits_otherwise_than_its_file_is_not_used(tmp_path: Path) -> None:
    path = save(tmp_path / "base", made.gpt2_like())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"  # splits numbers into digits
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, notes = load_tokenizer(model_config(path))
    assert len(made.gpt2_like()(" 13").input_ids) == 1
    assert tokenizer(" 13").input_ids == made.gpt2_like()(" 13").input_ids
    assert "tokenizer.json is used" in notes[0]
