"""What a run will hold in memory, worked out before any of it is taken.

The models are built on torch's meta device and one training step is run on fake tensors, which have shapes and types
but no content: transformers', PEFT's and TRL's own code says what has to stay alive for the backward pass. (torch's
own MemTracker, with which a test compares, does not take frozen weights and is far slower.)
"""

import contextlib
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.schema import Config, ModelConfig, PPOStage
from posttrain.console import say, show_table, warn
from posttrain.devices import mixed_precision
from posttrain.models.load import hub_config
from posttrain.models.lora import lora_config
from posttrain.models.resolve import beside
from posttrain.planning.preview import plan_of
from posttrain.rlhf.roles import find_reward

GIB = 2**30
# bytes that an optimizer keeps for each trained number; AdamW's two moments are of the weight's own type
STATES = {"8bit": 2.0, "4bit": 1.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 4.0, "lion": 4.0}
# bits of a quantised weight with its constants: Dettmers et al. 2023, QLoRA, section 3 (double quantisation: 0.127)
BITS = {"nested": 4.127, "4bit": 4.5, "8bit": 8.0}
WORTH_TELLING = 0.05  # of the peak


@dataclass(frozen=True)
class MemoryPlan:
    """What one device holds: each model with its bytes, and the bytes of the peak by what they are for."""

    held: list[tuple[str, int]]
    parts: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        """In bytes, besides what Python, its libraries and the device's context take."""
        return sum(self.parts.values())


def plan_memory(config: Config, tokenizer: Any, longest: int, answer: int, processes: int) -> MemoryPlan:
    """The memory of one process training on sequences of `longest` tokens, of which `answer` are the response.

    Raises:
        ConfigError: a model's config cannot be read.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    roles = _build(config, tokenizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for role in {id(module): module for module in roles.modules}.values():
            _give_fake_content(role)
        accumulation = plan_of(config, 10**6, processes).accumulation
        precision = mixed_precision(config.precision)
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        sequences = config.stage.batch_size * (2 if config.stage.name in ("reward", "dpo") else 1)
        steps = []
        for whole in (True, False):
            with torch.autocast("cpu", half, enabled=precision != "no"):
                steps.append(_step(config, roles, (sequences, longest), answer, accumulation > 1, whole))
        trained = [weight for weight in roles.trained.parameters() if weight.requires_grad]
        gradients = sum(weight.nbytes for weight in trained)
        optimizer = sum(_state(config, weight) for weight in trained)
    weights = sum(size for _, size in roles.held)
    shares = _shares(processes)
    if processes > 1 and shares == {"weights": 1, "gradients": 1, "optimizer": 1}:
        gradients *= 2  # DDP's buckets
    backward, trunk = steps
    logits = max(backward.activations - trunk.activations, 0)
    moments = {
        "in the backward pass": {
            "gradients": (gradients if accumulation > 1 else backward.gradients) // shares["gradients"],
            "activations": backward.activations - logits,
            "logits × vocabulary": logits,
        },
        "at the optimizer's step": {"gradients": gradients // shares["gradients"]},
    }
    if isinstance(config.stage, PPOStage):
        moments["while answers are generated"] = {
            "keys and values": _generation(config, roles.trained, longest, processes, half, precision)
        }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {"weights": weights // shares["weights"], "optimizer": round(optimizer / shares["optimizer"])}
    return MemoryPlan(roles.held, {**parts, **moments[moment]}, moment)


@dataclass
class _Roles:
    trained: Any  # the module whose parameters the optimizer has
    reference: Any  # of DPO: the model that scores the same batch under no_grad; None: none
    modules: list[Any]
    held: list[tuple[str, int]]


def _build(config: Config, tokenizer: Any) -> _Roles:
    """Every model that the stage holds, on the meta device."""
    from peft import get_peft_model

    stage, settings = config.stage, config.model
    name = "reward model" if stage.name == "reward" else "policy"
    trained = base = _model(settings, stage.name == "reward", len(tokenizer))
    adapter = lora_config(settings, base, "SEQ_CLS" if stage.name == "reward" else "CAUSAL_LM")
    size = _weights(base, settings)
    told = "4 or 8 bits" if settings.load_in_4bit or settings.load_in_8bit else "all weights"
    if stage.name != "reward":
        _fuse_head(base)
    if adapter is not None:
        import torch

        with torch.device("meta"):
            trained = get_peft_model(base, adapter)
        told = "frozen, in 4 or 8 bits" if settings.load_in_4bit or settings.load_in_8bit else "frozen"
    held = [(f"{name} ({told})", size)]
    if adapter is not None:
        held.append(("adapter", _weights(trained, settings) - size))
    modules = [trained]
    reference = None
    if stage.name == "dpo" and not config.trainer.get("precompute_ref_log_probs"):
        reference = trained
        if adapter is None:
            reference = _model(settings, False, len(tokenizer))
            _fuse_head(reference)
            modules.append(reference)
            held.append(("reference (frozen copy)", _weights(reference, settings)))
    if isinstance(stage, PPOStage):
        trained = _with_critic(config, tokenizer, trained, adapter, modules, held)
    return _Roles(trained, reference, modules, held)


def _with_critic(
    config: Config, tokenizer: Any, policy: Any, adapter: Any, modules: list[Any], held: list[tuple[str, int]]
) -> Any:
    """Policy and critic as one module, and the two frozen roles of PPO beside them."""
    import torch

    from posttrain.rlhf.critic import PolicyAndValue, ValueNetwork, add_value_adapter, critic_trunk

    stage, settings = config.stage, config.model
    assert isinstance(stage, PPOStage)
    found = find_reward(config, tokenizer)
    theirs = found.settings if found is not None else settings
    shared = found.adapter is not None if found is not None else settings.use_peft
    policy_size = policy.config.get_text_config().hidden_size
    with torch.device("meta"):
        if adapter is None:
            critic = ValueNetwork(policy_size, critic_trunk(_model(settings, False, len(tokenizer))))
            held.append(("critic (all weights)", _weights(critic, settings)))
            held.append(("reference (frozen copy)", held[0][1]))
        else:
            add_value_adapter(policy, adapter, like=None)
            critic = ValueNetwork(policy_size)
            held.append(("critic (an adapter on the same base)", held[1][1]))
    if found is not None or not stage.reward_functions:
        if shared:
            held.append(("reward model (an adapter on the same base)", held[1][1]))
        else:
            size = len(found.tokenizer if found is not None else tokenizer)
            alone = beside(settings, theirs.start)
            held.append(("reward model (frozen)", _weights(_model(alone, True, size), alone)))
    both = PolicyAndValue(policy, critic, stage.temperature, stage.entropy_coef > 0)
    both.fused = torch.cuda.is_available()
    modules[:] = [both]
    return both


def _model(settings: ModelConfig, scores: bool, tokens: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    known = hub_config(settings)
    if scores:
        known.num_labels = 1
        known.get_text_config().pad_token_id = 0
    text = known.get_text_config()
    text.vocab_size = max(text.vocab_size, tokens)
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(known, dtype=None if settings.dtype == "auto" else settings.dtype)


def _fuse_head(causal: Any) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(causal, outputs=("log_probs", "entropy", "is_top1"))


def _weights(module: Any, settings: ModelConfig) -> int:
    """Bytes of a module's weights, its linear layers quantised if the settings say so."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    quantised: set[int] = set()
    if settings.load_in_4bit or settings.load_in_8bit:
        quantised = {
            id(layer.weight)
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, Conv1D))
            and not name.endswith(("lm_head", "score"))
            and ".lora_" not in name
        }
    kind = "8bit" if settings.load_in_8bit else "nested" if settings.use_bnb_nested_quant else "4bit"
    return sum(
        round(weight.numel() * BITS[kind] / 8) if id(weight) in quantised else weight.nbytes
        for weight in module.parameters()
    )


def _give_fake_content(module: Any) -> None:
    """Put every weight from the meta device onto the one in hand; tied weights stay tied."""
    import torch
    from torch import nn

    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if id(weight) not in done:
                    content = torch.empty(weight.shape, dtype=weight.dtype)
                    done[id(weight)] = nn.Parameter(content, requires_grad=weight.requires_grad)
                part._parameters[name] = done[id(weight)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass
class _Peak:
    activations: int  # and what is alive only for a moment
    gradients: int


@contextlib.contextmanager
def _watched(parameters: Sequence[Any]) -> Iterator[_Peak]:
    """Count the bytes that are alive besides the parameters and the gradients that are there already."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    peak, counted = _Peak(0, 0), {"alive": 0, "gradients": 0}
    known: set[int] = set()
    for weight in parameters:
        known.add(weight.untyped_storage()._cdata)
        if weight.grad is not None:
            known.add(weight.grad.untyped_storage()._cdata)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.count(tensor.untyped_storage())
            return out

        def count(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in known:
                return
            known.add(key)
            counted["alive"] += size

            def gone() -> None:
                known.discard(key)
                counted["alive"] -= size

            weakref.finalize(storage, gone)
            if counted["alive"] > peak.activations + peak.gradients:
                peak.gradients = counted["gradients"]
                peak.activations = counted["alive"] - peak.gradients

    def accumulated(weight: Any) -> None:
        counted["gradients"] += weight.nbytes

    hooks = [
        weight.register_post_accumulate_grad_hook(accumulated)
        for weight in parameters
        if weight.requires_grad and weight.grad is None
    ]
    with Watch():  # type: ignore[no-untyped-call]
        yield peak
    for hook in hooks:
        hook.remove()


def _step(config: Config, roles: _Roles, shape: tuple[int, int], answer: int, accumulating: bool, whole: bool) -> _Peak:
    """Forward and backward of one batch as the stage's trainer does it; not `whole`: without the vocabulary."""
    import torch

    trained = roles.trained
    trained.train()
    if config.stage.name != "sft":  # where TRL switches dropout off
        for module in trained.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if config.trainer.get("gradient_checkpointing"):
        trained.activation_checkpointing_enable()
        if hasattr(trained, "enable_input_require_grads"):
            trained.enable_input_require_grads()
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = list(dict.fromkeys(weight for module in roles.modules for weight in module.parameters()))
    for weight in parameters:
        weight.grad = torch.zeros_like(weight) if accumulating and weight.requires_grad else None
    with _watched(parameters) as peak:
        losses: dict[bool, Callable[[], Any]] = {True: lambda: _loss(config, roles, inputs, answer)}
        losses[False] = lambda: _hidden_loss(config, roles, inputs)
        losses[whole]().backward()
    return peak


def _loss(config: Config, roles: _Roles, inputs: dict[str, Any], answer: int) -> Any:
    import torch

    trained, mask = roles.trained, inputs["attention_mask"]
    if isinstance(config.stage, PPOStage):
        said = trained(**inputs, position_ids=mask.cumsum(-1) - 1, completion=answer)
        return said.logps.sum() + said.values.sum() + said.entropy.sum()
    if config.stage.name == "reward":
        return trained(**inputs, use_cache=False).logits.sum()
    output = trained(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    if roles.reference is None:
        return output.loss
    with torch.no_grad():
        reference = roles.reference(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    return (output.log_probs - reference.log_probs).sum()


def _hidden_loss(config: Config, roles: _Roles, inputs: dict[str, Any]) -> Any:
    from posttrain.rlhf.critic import VALUE, last_hidden

    trained, mask = roles.trained, inputs["attention_mask"]
    positions = mask.cumsum(-1) - 1
    if isinstance(config.stage, PPOStage):
        policy = trained.policy
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        hidden = last_hidden(base.base_model, inputs["input_ids"], mask, positions)
        return hidden.sum() + trained.hidden(VALUE, inputs["input_ids"], mask, positions).sum()
    base = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
    return last_hidden(base.base_model, inputs["input_ids"], mask, positions).sum()


def _state(config: Config, weight: Any) -> float:
    name = str(config.trainer.get("optim", "adamw"))
    per_number = next((size for part, size in STATES.items() if part in name), 2.0 * weight.element_size())
    return float(weight.numel() * per_number)


def _generation(config: Config, trained: Any, longest: int, processes: int, half: Any, precision: str) -> int:
    """Keys and values of a rollout's answers at their longest, and the numbers of one step over the vocabulary."""
    import torch

    assert isinstance(config.stage, PPOStage)
    text = trained.policy.config.get_text_config()
    rows = config.stage.rollout_batch_size // processes
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = torch.empty((), dtype=half if precision != "no" else trained.policy.dtype).element_size()
    cache = 2 * rows * longest * text.num_hidden_layers * heads * width * size
    return int(cache + 4 * rows * text.vocab_size * 4)


def _shares(processes: int) -> dict[str, int]:
    """Into how many parts accelerate divides what: FSDP and ZeRO-3 everything, ZeRO-2 all but the weights."""
    environment = os.environ
    stage = 0
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        stage = 3
    elif environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return {
        "weights": processes if stage >= 3 else 1,
        "gradients": processes if stage >= 2 else 1,
        "optimizer": processes if stage >= 1 else 1,
    }


def _capacity() -> tuple[str, int]:
    """The device of this process and its bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container or a Slurm job
    if limit.is_file() and (told := limit.read_text().strip()).isdigit():
        total = min(total, int(told))
    return "this machine", int(total)


def _changes(config: Config) -> dict[str, Config]:
    """What would hold less, as it is written on the command line, of all that this run does not do already."""
    stage, trainer, settings = config.stage, config.trainer, config.model
    found: dict[str, Config] = {}

    def with_trainer(**more: Any) -> Config:
        return replace(config, trainer={**trainer, **more})

    half = stage.batch_size // 2
    if half:
        smaller = replace(config, stage=replace(stage, batch_size=half))
        told = f"stage.batch_size={half}"
        if not isinstance(stage, PPOStage):
            twice = 2 * int(trainer.get("gradient_accumulation_steps", 1))
            smaller = replace(smaller, trainer={**trainer, "gradient_accumulation_steps": twice})
            told += f" trainer.gradient_accumulation_steps={twice} (the same updates)"
        found[told] = smaller
    if not trainer.get("gradient_checkpointing"):
        told = "trainer.gradient_checkpointing=true (a third more time)"
        found[told] = with_trainer(gradient_checkpointing=True)
    if not settings.use_peft:
        found["model.use_peft=true"] = replace(config, model=replace(settings, use_peft=True))
        if "8bit" not in str(trainer.get("optim", "")) and importlib.util.find_spec("bitsandbytes"):
            found["trainer.optim=adamw_8bit"] = with_trainer(optim="adamw_8bit")
    elif not settings.load_in_4bit and not settings.load_in_8bit:
        found["model.load_in_4bit=true"] = replace(config, model=replace(settings, load_in_4bit=True))
    if stage.name == "dpo" and not settings.use_peft and not trainer.get("precompute_ref_log_probs"):
        found["+trainer.precompute_ref_log_probs=true"] = with_trainer(precompute_ref_log_probs=True)
    return found


def show_memory(config: Config, tokenizer: Any, longest: int, answer: int, processes: int) -> None:
    """Print the plan, whether it fits, and what would help most."""
    plan = plan_memory(config, tokenizer, longest, answer, processes)
    device, capacity = _capacity()
    rows = [(f"holds {name}", _size(size)) for name, size in plan.held]
    rows += [(f"peak: {name}", _size(size)) for name, size in plan.parts.items() if size]
    show_table("memory of one device", ("", ""), rows, headed=False)
    told = f"memory: about {_size(plan.peak)} {plan.moment}, of {_size(capacity)} on {device}"
    if plan.peak > capacity:
        warn(f"{told}: it does not fit")
    else:
        say(f"{told}, besides Python and its libraries")
    saved = {
        told: plan.peak - plan_memory(changed, tokenizer, longest, answer, processes).peak
        for told, changed in _changes(config).items()
    }
    best = sorted((told for told in saved if saved[told] > WORTH_TELLING * plan.peak), key=lambda told: -saved[told])
    if best:
        say("what would save most:\n" + "\n".join(f"  {told}: {_size(saved[told])} less" for told in best[:3]))


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
