"""Model families at two layers, each with what makes it different from the others, and random weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers_for_tests import chatml

POSITIONS = 256
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG: dict[str, Any] = {"max_position_embeddings": POSITIONS}
LLAMA: dict[str, Any] = {**SIZE, **LONG, "num_key_value_heads": 2, "intermediate_size": 64}
SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA: dict[str, Any] = {**LLAMA, **SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_LLAMA3: dict[str, Any] = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}

# name -> the class of its config, and what is set in it
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", {**SIZE, **LONG, "intermediate_size": 64}),
    "opt": ("OPTConfig", {**SIZE, **LONG, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}),
    "falcon-alibi": ("FalconConfig", {**SIZE, "alibi": True}),
    "falcon-rotary": ("FalconConfig", {**SIZE, **LONG, "alibi": False, "hidden_dropout": 0.1}),
    "llama3": ("LlamaConfig", {**LLAMA, "rope_parameters": ROPE_LLAMA3}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 16}),
    "qwen2.5": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**LLAMA, **EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**LLAMA, **LOCAL_EXPERTS}),
    "olmoe": ("OlmoeConfig", {**LLAMA, **EXPERTS}),
    "gpt-oss": ("GptOssConfig", {**LLAMA, **SLIDING, **LOCAL_EXPERTS, "head_dim": 8, "rope_parameters": ROPE}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", {**LLAMA, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "olmo2": ("Olmo2Config", LLAMA),
    "smollm3": ("SmolLM3Config", {**LLAMA, "no_rope_layers": [1, 0]}),
}


def save_architecture(folder: Path, name: str, **changes: Any) -> Path:
    """A folder with a model of the family, random weights and a ChatML tokenizer; `changes` are of its config."""
    tokenizer = chatml()
    kind, settings = ARCHITECTURES[name]
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, kind)(vocab_size=len(tokenizer) + 3, **{**special, **settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)  # as different from one token to the next as trained weights are
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
