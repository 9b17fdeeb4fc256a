"""The weights that PPO holds: four roles as four models, and as three adapters on one base.

    python benchmarks/ppo_memory.py

Counts the parameters of GPT-2 (124 million) and of a Llama shape of 1.2 billion, on the meta device: nothing is loaded.
Activations, gradients and the optimizer's state come on top; with LoRA the last two are those of the adapters alone.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANK = 16


def size(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


def shared(model: Any, fan_in_fan_out: bool) -> int:
    """Policy, critic, reference and reward model on one base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from posttrain.rlhf.critic import REWARD, VALUE, PolicyAndValue, ValueNetwork, add_reward_adapter, add_value_adapter

    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
    policy = get_peft_model(model, config)
    add_value_adapter(policy, config, like=None)
    state = {
        name.replace(f".{VALUE}.", "."): weight.detach()
        for name, weight in policy.named_parameters()
        if f".{VALUE}." in name
    }
    hidden = model.config.hidden_size
    head = add_reward_adapter(policy, config, state | {"base_model.model.score.weight": torch.empty(1, hidden)})
    assert any(f".{REWARD}." in name for name, _ in policy.named_parameters())
    return size(PolicyAndValue(policy, ValueNetwork(hidden))) + head.numel()


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    for name, config in (("GPT-2, 124 million", GPT2Config()), ("Llama shape, 1.2 billion", llama)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            one = size(model)
            together = shared(model, fan_in_fan_out=config.model_type == "gpt2")
        print(
            f"{name:<26} one model {one / 1e6:8,.1f} M weights   four roles apart {4 * one / 1e6:8,.1f} M (4.00 ×)   "
            f"on one base {together / 1e6:8,.1f} M ({together / one:.2f} ×)"
        )


if __name__ == "__main__":
    main()
