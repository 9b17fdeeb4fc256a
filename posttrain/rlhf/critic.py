"""The critic, and policy and critic as one module, so that one forward trains both under DDP, FSDP and DeepSpeed.

With LoRA all roles share one base model: the policy is the adapter "default", the critic the adapter "critic" and a
head, the reference the base alone, and a reward model that was trained with LoRA on the same base the adapter
"reward" and its head.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.models.lora import active_adapter, adapter_layers
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
    from transformers.generation.utils import GenerateOutput

POLICY, VALUE, REWARD = "default", "critic", "reward"


class ValueNetwork(nn.Module):
    """V before each token: a linear head on the hidden states of a trunk.

    `trunk` is a model without a head (hidden states out), or None when the policy's base is shared: under an adapter of
    the critic's own, or as the policy itself runs on it (`on_policy`). The head begins at zero, so that the first
    advantages are the rewards themselves and not the noise of a random head.
    """

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None, on_policy: bool = False) -> None:
        super().__init__()
        self.trunk, self.on_policy = trunk, on_policy
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, tokens, hidden) -> (rows, tokens), in float32."""
        # a value in bf16 would lose its last digits; FSDP2 and DeepSpeed may hold the head in nothing better
        with torch.autocast(hidden.device.type, enabled=False):
            found: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        return found


class Estimates(NamedTuple):
    """What policy and critic say about the tokens of completions: (K) each, or spread out as (E, C)."""

    logps: Tensor
    entropy: Tensor
    values: Tensor
    instructions: Tensor | None = None  # log π of the tokens of instruction rows at temperature 1, if some are given


class PolicyAndValue(nn.Module):
    """Policy and critic, trained as one module; generation and all that is saved are the policy's.

    `policy` is a causal language model patched by TRL's `add_fused_lm_head`, or a PeftModel around one; `value`
    without a trunk of its own runs on the policy's base under the adapter "critic", or reads the policy's own states;
    None where no critic is learned, and values are 0.
    """

    def __init__(
        self,
        policy: "PreTrainedModel",
        value: ValueNetwork | None,
        temperature: float = 1.0,
        learn_entropy: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.learn_entropy = temperature, learn_entropy
        self.fused: bool | None = None  # see log_probs
        self.policy: PreTrainedModel = policy
        self.value = value
        self.layers = adapter_layers(policy)
        if value is not None and value.trunk is None and not value.on_policy and not self.layers:
            raise ValueError("a critic without a trunk of its own needs a policy with adapters")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        picked: Tensor,
        detached: bool = False,
        instructions: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> Estimates:
        """Estimates (K) for the `picked` tokens of (rows, tokens): see `laid_out`; of `instructions` log π alone.

        `detached` keeps the critic's gradient out of a trunk that is the policy's.
        """
        # in an update, entropy matters only to its bonus
        wanted = self.learn_entropy or not torch.is_grad_enabled()
        states: list[Tensor] = []
        watch = None
        if self.value is not None and self.value.on_policy:
            watch = self.base.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        logps, entropy = log_probs(
            self.policy, input_ids, attention_mask, position_ids, picked, self.temperature, wanted, self.fused
        )
        values = torch.zeros_like(logps, dtype=torch.float32)
        if watch is not None:
            watch.remove()
        elif self.value is not None:
            states.append(self.hidden(VALUE, input_ids, attention_mask, position_ids))
        if self.value is not None:
            # the value of a state is read where the state ends: one token before the one that is chosen in it
            hidden = states[0][before(picked, input_ids)]
            values = self.value(hidden.detach() if detached else hidden)
        if instructions is None:
            return Estimates(logps, entropy, values)
        fused = self.fused if self.temperature == 1 else False  # TRL's head has the temperature of sampling
        return Estimates(logps, entropy, values, log_probs(self.policy, *instructions, 1.0, False, fused)[0])

    @property
    def base(self) -> "PreTrainedModel":
        """The policy without what LoRA has wrapped around it."""
        return self.policy.get_base_model() if self.layers else self.policy

    def hidden(self, role: str, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """The last hidden states (rows, tokens, hidden) of the critic's trunk, or of the base under an adapter."""
        if role == VALUE and self.value is not None and self.value.trunk is not None:
            return last_hidden(self.value.trunk, input_ids, attention_mask, position_ids)
        with self.active_adapter(role):
            return last_hidden(self.base.base_model, input_ids, attention_mask, position_ids)

    def active_adapter(self, adapter: str | None) -> AbstractContextManager[None]:
        """Run the base under another adapter, or under none."""
        return active_adapter(self.layers, adapter)

    def trained_weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the weights of policy and critic that require gradients."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def load_trained(self, file: Path) -> None:
        """Take over the weights that a checkpoint holds.

        Raises:
            PosttrainError: they are not those that are trained here.
        """
        from safetensors.torch import load_file
        from torch.distributed.tensor import DTensor, distribute_tensor

        saved, trained = load_file(file), self.trained_weights()
        if saved.keys() != trained.keys():
            raise PosttrainError(f"{file} does not hold the weights that this run trains")
        with torch.no_grad():
            for name, weight in trained.items():
                kept = saved[name].to(weight.device)
                if isinstance(weight, DTensor):  # of which this process holds a share
                    kept = distribute_tensor(kept, weight.device_mesh, weight.placements)
                weight.copy_(kept)

    def current_adapter(self) -> str | None:
        """The adapter that a forward would use now; None for the base alone."""
        layer = self.layers[0]
        active = layer._active_adapter
        return None if layer._disable_adapters else active if isinstance(active, str) else active[0]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: JsonObject | None = None, **more: object
    ) -> None:
        """Recompute activations in the backward pass, each under the adapter that it was computed under.

        Raises:
            ValueError: use_reentrant=True, which cannot do that.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.get("use_reentrant"):
            raise ValueError("gradient_checkpointing_kwargs.use_reentrant=true would recompute under the wrong adapter")
        options["use_reentrant"] = False
        if self.layers:
            # the backward pass runs when another adapter is active: without this the gradient would be wrong, silently
            options["context_fn"] = lambda: (nullcontext(), self.active_adapter(self.current_adapter()))
        for model in self._models():
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **more)

    def activation_checkpointing_disable(self) -> None:
        for model in self._models():
            model.activation_checkpointing_disable()

    def _models(self) -> "list[PreTrainedModel]":
        trunk = self.value.trunk if self.value is not None else None
        return [model for model in (self.policy, trunk) if model is not None]

    # transformers' older names for the same, which TRL's generation still calls
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: JsonObject | None = None) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.policy.is_activation_checkpointing)

    is_activation_checkpointing = is_gradient_checkpointing

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers' classes, each layer of which FSDP shares out and gathers for itself."""
        return sorted({name for model in self._models() for name in model._no_split_modules or ()})

    @property
    def config(self) -> "PretrainedConfig":
        return self.policy.config

    @property
    def generation_config(self) -> "GenerationConfig":
        return self.policy.generation_config

    @property
    def device(self) -> torch.device:
        found: torch.device = self.policy.device
        return found

    def generate(self, *args: object, **kwargs: object) -> "GenerateOutput":
        return self.policy.generate(*args, **kwargs)

    def generate_batch(self, *args: object, **kwargs: object) -> JsonObject:
        found: JsonObject = self.policy.generate_batch(*args, **kwargs)
        return found


def _inside(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model itself, without accelerate's and LoRA's wrappers."""
    from accelerate.utils import extract_model_from_parallel

    inner: PreTrainedModel = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _positions(model: "PreTrainedModel", position_ids: Tensor) -> dict[str, Tensor]:
    """Positions for models that take them; those without (ALiBi) read the attention mask."""
    # a wrapper's forward takes anything
    takes = "position_ids" in inspect.signature(type(_inside(model)).forward).parameters
    return {"position_ids": position_ids} if takes else {}


def before(picked: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the token before each of the `picked` ones, which is what predicts it."""
    return picked // input_ids.size(1), picked % input_ids.size(1) - 1


def last_hidden(
    trunk: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor
) -> Tensor:
    """(rows, tokens, hidden)."""
    output = trunk(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **_positions(trunk, position_ids)
    )
    found: Tensor = output.last_hidden_state
    return found


def log_probs(
    model: "PreTrainedModel",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    picked: Tensor,
    temperature: float,
    with_entropy: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """log π of each of the `picked` tokens (see `laid_out`), and the entropy of π there, (K), both at `temperature`.

    Without `with_entropy`, entropy may be 0 throughout.

    `fused` (None: on every device but a CPU) takes TRL's head, which never holds the logits as a whole and computes
    them a second time in the backward pass; on a CPU that takes twice as long as holding those of the completion.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **_positions(model, position_ids)}
    if fused is None:
        fused = input_ids.device.type != "cpu"
    places, targets = before(picked, input_ids), input_ids.flatten()[picked]
    if fused:
        labels = torch.full_like(input_ids, -100)
        labels.view(-1)[picked] = targets
        output = model(**inputs, labels=labels, fused_lm_head=True)
        logps = output.log_probs[places]
        return logps, torch.zeros_like(logps) if output.entropy is None else output.entropy[places]
    # the head is handed the states that predict a picked token alone: `logits_to_keep` cannot choose in each row
    hook = _inside(model).get_output_embeddings().register_forward_pre_hook(lambda _, given: given[0][places][None])
    logits = model(**inputs, use_cache=False).logits[0].float()
    hook.remove()
    every = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    logps = every.gather(-1, targets[:, None]).squeeze(-1)
    return logps, -(every.exp() * every).sum(-1) if with_entropy else torch.zeros_like(logps)


def is_of(name: str, adapter: str) -> bool:
    """Whether a weight of that name is an adapter's; those of single tokens end with it."""
    return adapter in name.split(".")


def add_value_adapter(policy: "PreTrainedModel", config: "LoraConfig", like: str | None) -> None:
    """Put the critic's adapter beside the policy's; its weights are those of the adapter `like`, if there is one."""
    _add_adapter(policy, VALUE, config, trainable=True)
    if like is not None:
        weights = dict(policy.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if is_of(name, VALUE):
                    weight.copy_(weights[".".join(like if part == VALUE else part for part in name.split("."))])


def add_reward_adapter(policy: "PreTrainedModel", config: "LoraConfig", state: dict[str, Tensor]) -> Tensor:
    """Put a reward model's adapter beside the policy's and return the weight of its head, (1, hidden).

    `state` is the reward model's adapter_model.safetensors.

    Raises:
        ValueError: it holds other weights than the adapter has.
    """
    from peft import set_peft_model_state_dict

    heads = [name for name in state if name.endswith("score.weight")]
    if len(heads) != 1:
        raise ValueError(f"the reward adapter has {len(heads)} heads named score.weight, not one")
    head = state[heads[0]]
    _add_adapter(policy, REWARD, config, trainable=False)
    kept = {name: value for name, value in state.items() if name not in heads}
    wanted = sum(is_of(name, REWARD) for name, _ in policy.named_parameters())
    unexpected = set_peft_model_state_dict(policy, kept, adapter_name=REWARD).unexpected_keys
    if unexpected or len(kept) != wanted:
        raise ValueError(f"the reward adapter has {len(kept)} weights, of which this base takes {wanted}")
    return head


def _add_adapter(policy: "PreTrainedModel", name: str, config: "LoraConfig", trainable: bool) -> None:
    import copy

    config = copy.deepcopy(config)
    config.task_type, config.modules_to_save, config.lora_dropout = "CAUSAL_LM", None, 0.0
    config.inference_mode = False
    requires = {found: weight.requires_grad for found, weight in policy.named_parameters()}
    active = policy.active_adapter
    policy.add_adapter(name, config)
    policy.set_adapter(active)
    for found, weight in policy.named_parameters():
        weight.requires_grad_(requires.get(found, trainable))


def critic_trunk(model: "PreTrainedModel") -> nn.Module:
    """The trunk of a loaded causal or sequence-classification model, all of it trainable."""
    trunk: nn.Module = model.base_model
    return trunk.requires_grad_(True)


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest), filled up with `value` before each row."""
    longest = max(map(len, rows))
    return torch.tensor([[*[value] * (longest - len(row)), *row] for row in rows])
