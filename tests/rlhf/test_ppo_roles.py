"""Policy and critic as one module, several adapters on one base: values, gradients and memory of separate models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.rlhf.critic import (
    REWARD,
    VALUE,
    PolicyAndValue,
    ValueNetwork,
    add_reward_adapter,
    add_value_adapter,
    critic_trunk,
    log_probs,
)
from posttrain.rlhf.ppo import is_critic
from posttrain.rlhf.rollout import RolloutBuffer, laid_out, spread

WIDTH = 32


def base(kind: str = "gpt2") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=1))
    sizes = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    if kind == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(**sizes, **experts, num_attention_heads=2, max_position_embeddings=64, pad_token_id=1)
        )
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, pad_token_id=1))


def lora(kind: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")


def shake(model: nn.Module, seed: int, name: str = "lora_") -> None:
    """Weights that have been trained: a new adapter alone would change nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for found, weight in model.named_parameters():
            if name in found:
                weight.normal_(std=0.2)


def shared(kind: str) -> PolicyAndValue:
    """Policy, critic and reward as adapters of one base."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    policy = get_peft_model(base(kind), lora(kind))
    add_fused_lm_head(policy.get_base_model(), temperature=0.7, outputs=("log_probs", "entropy"))
    add_value_adapter(policy, lora(kind), like=None)
    roles = PolicyAndValue(policy, ValueNetwork(WIDTH), temperature=0.7, learn_entropy=True)
    shake(roles, 1, ".lora_A.default")
    shake(roles, 2, ".lora_B.default")
    shake(roles, 3, f".lora_A.{VALUE}")
    shake(roles, 4, f".lora_B.{VALUE}")
    shake(roles, 5, "value.head")
    return roles


def separate(roles: PolicyAndValue, kind: str) -> tuple[Any, Any, nn.Linear]:
    """The same policy and critic as two models of their own, each with one adapter."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    models = []
    weights = dict(roles.policy.named_parameters())
    for adapter in ("default", VALUE):
        model = get_peft_model(base(kind), lora(kind))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(weights[name.replace(".default.", f".{adapter}.")])
        models.append(model)
    add_fused_lm_head(models[0].get_base_model(), temperature=0.7, outputs=("log_probs", "entropy"))
    return models[0], models[1], copy.deepcopy(roles.value.head)


ANSWER = torch.tensor([[1, 1, 1], [1, 1, 0]])


def batch(packed: bool = False) -> dict[str, Any]:
    """Two prompts of different lengths, padded on the left, and answers padded on the right."""
    prompt_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.manual_seed(9)
    ids = torch.randint(2, 50, (2, 7))
    ids = ids.masked_fill(torch.cat([prompt_mask, ANSWER], 1) == 0, 1)
    empty = torch.empty(0)
    return laid_out(RolloutBuffer(ids[:, :4], prompt_mask, ids[:, 4:], ANSWER, empty, empty, empty, empty), packed)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_gradients_are_those_of_separate_models(kind: str, checkpointing: bool) -> None:
    """With gradient checkpointing the recomputation would run under whichever adapter is active then."""
    roles = shared(kind)
    policy, critic, head = separate(roles, kind)
    inputs = batch()
    answer = ANSWER.bool()
    roles.train()
    if checkpointing:
        roles.policy.enable_input_require_grads()
        roles.activation_checkpointing_enable()
        assert roles.is_gradient_checkpointing
    now = roles(**inputs)
    (now.logps + 0.1 * now.entropy).sum().add((now.values**2).sum()).backward()

    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    alone = policy(**plain, labels=labels, fused_lm_head=True)
    hidden = critic.get_base_model().base_model(**plain, use_cache=False).last_hidden_state
    values = head(hidden).squeeze(-1)[:, -4:-1]
    torch.testing.assert_close(now.logps, alone.log_probs[:, -3:][answer])  # the fused head's, too
    torch.testing.assert_close(now.entropy, alone.entropy[:, -3:][answer])
    torch.testing.assert_close(now.values, values[answer])
    ((alone.log_probs[:, -3:] + 0.1 * alone.entropy[:, -3:]) * answer).sum().add((values**2 * answer).sum()).backward()

    found = dict(roles.policy.named_parameters())
    compared = 0
    for adapter, model in (("default", policy), (VALUE, critic)):
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                ours = found[name.replace(".default.", f".{adapter}.")].grad
                assert ours is not None, name
                torch.testing.assert_close(ours, weight.grad, rtol=1e-5, atol=5e-6)
                compared += 1
    assert compared >= 16
    assert head.weight.grad is not None
    torch.testing.assert_close(roles.value.head.weight.grad, head.weight.grad, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="would recompute under the wrong adapter"):
        shared("gpt2").activation_checkpointing_enable({"use_reentrant": True})


def test_switching_roles_changes_nothing_but_the_forward() -> None:
    roles = shared("gpt2")
    inputs = {name: value for name, value in batch().items() if name != "picked"}
    before = {name: weight.requires_grad for name, weight in roles.named_parameters()}
    policy = roles.policy(**inputs).logits
    with roles.active_adapter(None):
        assert roles.current_adapter() is None
        reference = roles.policy(**inputs).logits
        with roles.active_adapter(VALUE):
            assert roles.current_adapter() == VALUE
            critic = roles.policy(**inputs).logits
        assert roles.current_adapter() is None
    assert roles.current_adapter() == "default"
    assert torch.equal(roles.policy(**inputs).logits, policy)
    torch.testing.assert_close(reference, base()(**inputs).logits)
    assert not torch.allclose(policy, reference)
    assert not torch.allclose(critic, policy)
    assert before == {name: weight.requires_grad for name, weight in roles.named_parameters()}
    assert any(requires for name, requires in before.items() if f".{VALUE}." in name)


def test_the_value_of_a_token_is_read_before_it() -> None:
    """A change of the last token of an answer changes no value; one of the first token changes all but the first."""
    roles = PolicyAndValue(_patched(), ValueNetwork(WIDTH, critic_trunk(base())))
    shake(roles, 5, "value.head")
    inputs = batch()
    values = spread(roles(**inputs).values, ANSWER)
    last, first = (inputs["input_ids"].clone() for _ in range(2))
    last[0, -1], last[1, -2], first[:, -3] = 7, 7, 7
    assert torch.equal(spread(roles(**inputs | {"input_ids": last}).values, ANSWER), values)
    changed = spread(roles(**inputs | {"input_ids": first}).values, ANSWER)
    assert torch.equal(changed[:, 0], values[:, 0])
    assert not torch.isclose(changed[:, 1:], values[:, 1:])[ANSWER[:, 1:].bool()].any()


def _patched() -> Any:
    from trl.trainer.utils import add_fused_lm_head

    policy = base()
    add_fused_lm_head(policy, outputs=("log_probs", "entropy"))
    return policy


def test_both_ways_to_log_probabilities_agree() -> None:
    """The fused head of GPUs and the logits of an answer, which serve on a CPU; a temperature, padding, gradients."""
    from trl.trainer.utils import add_fused_lm_head

    policy = base()
    add_fused_lm_head(policy, temperature=0.7, outputs=("log_probs", "entropy"))
    found = []
    for fused, packed in ((False, False), (True, False), (False, True), (True, True)):
        policy.zero_grad()
        logps, entropy = log_probs(policy, **batch(packed), temperature=0.7, with_entropy=True, fused=fused)
        (logps + entropy).sum().backward()
        found.append((logps, entropy, policy.transformer.wte.weight.grad.clone()))
    for plain, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


def test_left_padding_changes_no_estimate() -> None:
    roles = PolicyAndValue(_patched(), ValueNetwork(WIDTH, critic_trunk(base())))
    shake(roles, 5, "value.head")
    inputs = batch()
    whole = roles(**inputs)
    alone = {name: value[:1, 2:] for name, value in inputs.items() if name != "picked"}
    single = roles(**alone, picked=torch.tensor([2, 3, 4]))
    torch.testing.assert_close(single.logps, whole.logps[:3])
    torch.testing.assert_close(single.values, whole.values[:3])


@pytest.mark.parametrize("kind", ["gpt2", "lora"])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_a_head_on_the_policy_reads_its_states_and_trains_them(kind: str, fused: bool) -> None:
    """Values and the gradient into the trunk are those of the head on the policy's own hidden states, or stopped."""
    from peft import get_peft_model

    policy = get_peft_model(_patched(), lora("gpt2")) if kind == "lora" else _patched()
    shake(policy, 1)
    roles = PolicyAndValue(policy, ValueNetwork(WIDTH, on_policy=True))
    roles.fused = fused
    shake(roles, 5, "value.head")
    inputs = batch()
    trunk = roles.base.transformer
    hidden = trunk(**{name: value for name, value in inputs.items() if name != "picked"}).last_hidden_state
    values = roles.value.head(hidden).squeeze(-1)[:, -4:-1][ANSWER.bool()]
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad((values**2).sum(), weights, allow_unused=True)
    now = roles(**inputs)
    torch.testing.assert_close(now.values, values)
    got = torch.autograd.grad((now.values**2).sum(), weights, allow_unused=True)
    assert sum(each is not None and bool(each.any()) for each in got) >= 8
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    stopped = torch.autograd.grad((roles(**inputs, detached=True).values ** 2).sum(), [roles.value.head.weight])
    assert stopped[0].any()
    assert roles(**inputs, detached=True).values.grad_fn is not None
    assert not any(
        each is not None
        for each in torch.autograd.grad(roles(**inputs, detached=True).values.sum(), weights, allow_unused=True)
    )
    assert {name for name, weight in roles.named_parameters() if is_critic(name)} == {
        "value.head.weight",
        "value.head.bias",
    }


def test_four_roles_weigh_little_more_than_one_model() -> None:
    def size(model: nn.Module) -> int:
        return sum(weight.numel() for weight in model.parameters())

    roles = shared("gpt2")
    state = {
        name.replace(f".{VALUE}.", "."): weight.detach().clone()
        for name, weight in roles.policy.named_parameters()
        if f".{VALUE}." in name
    }
    state["base_model.model.score.weight"] = torch.ones(1, WIDTH)
    head = add_reward_adapter(roles.policy, lora("gpt2"), state)
    assert head.shape == (1, WIDTH)
    assert not any(weight.requires_grad for name, weight in roles.policy.named_parameters() if f".{REWARD}." in name)
    assert size(roles) < 1.6 * size(base())  # this base is tiny beside its adapters; see benchmarks/ppo_memory.py
    trained = {name for name, weight in roles.named_parameters() if weight.requires_grad}
    assert {name for name in trained if is_critic(name)} == {
        name for name in trained if f".{VALUE}." in name or name.startswith("value.")
    }
    with pytest.raises(ValueError, match="0 heads named"):
        add_reward_adapter(shared("gpt2").policy, lora("gpt2"), {})
    state.popitem()
    state.pop(next(iter(state)))
    state["base_model.model.score.weight"] = torch.ones(1, WIDTH)
    with pytest.raises(ValueError, match="of which this base takes"):
        add_reward_adapter(shared("gpt2").policy, lora("gpt2"), state)


def test_the_buffer_comes_back_from_disk(tmp_path: Path) -> None:
    numbers = torch.randn(2, 3)
    masks = torch.tensor([[1, 1, 1], [1, 1, 0]])
    buffer = RolloutBuffer(*(masks.clone() for _ in range(4)), numbers, numbers * 2, numbers * 3, numbers * 4)
    buffer.save(tmp_path / "rollout.safetensors")
    loaded = RolloutBuffer.load(tmp_path / "rollout.safetensors", "cpu")
    assert all(torch.equal(value, vars(loaded)[name]) for name, value in vars(buffer).items())
