"""Model families at two layers, with the settings that make each of them different, and random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers_for_tests import chatml

POSITIONS = 256
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": POSITIONS}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "decoder_sparse_step": 1}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> the class of its config, and what is set in it
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", {**SIZE, "intermediate_size": 64, "max_position_embeddings": POSITIONS}),
    "opt": ("OPTConfig", {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": POSITIONS}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "falcon-alibi": ("FalconConfig", {**SIZE, "alibi": True, "new_decoder_architecture": False}),
    "falcon-rotary": ("FalconConfig", {**SIZE, "alibi": False, "max_position_embeddings": POSITIONS, "hidden_dropout": 0.1}),
    "llama3": ("LlamaConfig", {**LLAMA, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 16}),
    "qwen2.5": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**LLAMA, **EXPERTS, **MOE, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {**GEMMA, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {**LLAMA, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "olmo2": ("Olmo2Config", LLAMA),
    "smollm3": ("SmolLM3Config", {**LLAMA, "no_rope_layers": [1, 0]}),
    "gpt-oss": (
        "GptOssConfig",
        {
            **{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmoe": ("OlmoeConfig", {**LLAMA, **EXPERTS}),
}


def save_architecture(folder: Path, name: str, tokenizer: Any = None, make: Callable[..., Any] | None = None) -> Path:
    """A folder with a small model of the family, its weights drawn at random, and a ChatML tokenizer."""
    tokenizer = tokenizer or chatml()
    kind, settings = ARCHITECTURES[name]
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, kind)(vocab_size=len(tokenizer) + 3, **special, **settings)
    torch.manual_seed(0)
    model = (make or transformers.AutoModelForCausalLM.from_config)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
