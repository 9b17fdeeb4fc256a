"""What a run will hold in memory, worked out before any of it is taken.

The models are built on torch's meta device and one training step is run on fake tensors, which have shapes and types
but no content: transformers', PEFT's and TRL's own code says what has to stay alive for the backward pass. (torch's
own MemTracker, with which a test compares, does not take frozen weights and is far slower.)
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, OnlineStage
from posttrain.models.meta import Batch, Holdings, give_fake_content
from posttrain.planning.machines import DDP, FSDP, ZERO, Machine, machine_of
from posttrain.rlhf.rollout_plan import longest_episodes, wider
from posttrain.stages.base import stage_named

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# bytes that an optimizer keeps for each trained number; AdamW's two moments are of the weight's own type
STATES = {"8bit": 2.0, "4bit": 1.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 4.0, "lion": 4.0}
BUCKET = 5e8  # numbers of gradients that ZeRO collects before it shares them out (DeepSpeed's reduce_bucket_size)
LIVE = 1e9  # numbers of weights that ZeRO-3 leaves gathered (its stage3_max_live_parameters)


@dataclass(frozen=True)
class MemoryPlan:
    """What one device holds: each model with its bytes, and the bytes of the peak by what they are for."""

    held: list[tuple[str, int]]
    parts: dict[str, int]
    moment: str
    # floating-point operations for each token of a batch
    forward: float
    backward: float

    @property
    def peak(self) -> int:
        """In bytes, besides what Python, its libraries and the device's context take."""
        return sum(self.parts.values())


def plan_memory(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
    completion: int,
    peak_alone: bool = False,
) -> MemoryPlan:
    """What one device of the machine holds, training on `longest` tokens, of which `completion` are the response.

    With `peak_alone` the logits are counted among the activations, which takes half the time.

    Raises:
        ConfigError: a model's config cannot be read.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from posttrain.rlhf.critic import PolicyAndValue

    stage, machine = stage_named(config.stage.name), machine_of(config)
    holdings = stage.hold(config, tokenizer)
    precision = machine.precision
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    weights, gradients, optimizer = _kept(config, holdings, machine)
    # these engines gather or keep weights in half precision; elsewhere autocast makes copies that are
    halved = machine.engine in (FSDP, ZERO) and precision != "no"
    if isinstance(holdings.trained, PolicyAndValue):
        holdings.trained.fused = machine.is_gpu
    kernels = _kernels_of_a_gpu() if machine.is_gpu else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), kernels:
        for module in holdings.modules:
            give_fake_content(module, half if halved else None)
        accumulation = stage.plan(config, 10**6, machine.devices).accumulation
        sequences = config.stage.batch_size * STAGES[config.stage.name].sequences_per_row
        if isinstance(config.stage, OnlineStage):
            sequences = longest_episodes(config.stage, longest)
        steps = []
        losses = (lambda batch: holdings.loss(batch, completion), holdings.hidden_loss)
        for loss in losses[: 1 if peak_alone else 2]:
            with torch.autocast("cpu", half, enabled=precision != "no"):
                steps.append(_step(config, holdings, loss, (sequences, longest), accumulation > 1, machine.gradients))
        if isinstance(config.stage, OnlineStage):
            rows = wider(config.stage, holdings.trained.config.get_text_config().vocab_size, not machine.is_gpu)
            with torch.no_grad(), torch.autocast("cpu", half, enabled=precision != "no"):
                estimating = _step(config, holdings, losses[0], (rows, longest), False, 0.0).activations
        full = sum(weight.nbytes for weight in holdings.trained.parameters() if weight.requires_grad)
        buckets = full if machine.engine == DDP else 0
        passing = _passing(holdings.trained, machine)
    backward = steps[0]
    there = 1.0 if accumulation > 1 else backward.gradients / full  # as gradients are accumulated, all of them are
    logits = 0 if peak_alone else max(backward.activations - steps[1].activations, 0)
    moments = {
        "in the backward pass": {
            "gradients": round(gradients * there),
            "weights and gradients on their way": passing,
            "activations": backward.activations - logits,
            "logits × vocabulary": logits,
        },
        "at the optimizer's step": {"gradients": gradients},
    }
    if isinstance(config.stage, OnlineStage):
        moments["in a forward without gradients"] = {"activations": estimating}
        generating = moments.setdefault("while completions are generated", {})
        if config.stage.use_vllm:
            trainer = config.trainer
            colocated = trainer.get("vllm_mode", "colocate") == "colocate"
            share = float(trainer.get("vllm_gpu_memory_utilization", 0.3)) if colocated else 0  # TRL's default
            for each in [generating] if trainer.get("vllm_enable_sleep_mode") else [*moments.values()]:
                each["vLLM, its own weights, keys and values"] = int(share * machine.memory)
        else:
            rows = config.stage.rollout_batch_size // machine.devices
            dtype = half if precision != "no" else next(holdings.trained.parameters()).dtype
            text = holdings.trained.config.get_text_config()
            generating["keys and values"] = _generation(text, rows, longest, dtype)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    always = {"weights": weights, "optimizer": optimizer} | ({"buckets of DDP": buckets} if buckets else {})
    parts = {**always, **moments[moment]}
    tokens = sequences * longest
    return MemoryPlan(holdings.held, parts, moment, backward.forward / tokens, backward.backward / tokens)


@contextlib.contextmanager
def _kernels_of_a_gpu() -> Iterator[None]:
    """Let fake tensors on the CPU take the memory that they would take on a GPU.

    There, TRL's head works within its tile, in Triton, and attention with dropout keeps no probabilities.
    """
    from torch.nn import functional
    from trl.kernels import chunked_logprob as head

    forward, backward = head._forward_tile, head._backward_tile
    attention: Callable[..., Tensor] = functional.scaled_dot_product_attention

    def without_dropout(*tensors: "Tensor", dropout_p: float = 0.0, **options: object) -> "Tensor":
        return attention(*tensors, **options)

    head._forward_tile = head._backward_tile = lambda *_, **__: None
    functional.scaled_dot_product_attention = without_dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        head._forward_tile, head._backward_tile = forward, backward
        functional.scaled_dot_product_attention = attention


@dataclass
class _Peak:
    activations: int  # and what is alive only for a moment
    gradients: int
    forward: int = 0  # floating-point operations
    backward: int = 0


@contextlib.contextmanager
def _watched(parameters: Sequence[Any], share: float) -> Iterator[_Peak]:
    """Count the bytes that are alive besides the parameters and the gradients that are there already.

    The peak is where they are most with that share of the gradients.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    # torch's FlopCounterMode keeps tensors alive, so its formulas alone; for three operations it has those of others
    formulas = flop_registry | {
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }
    peak, counted = _Peak(0, 0), {"alive": 0, "gradients": 0}
    known: set[int] = set()
    for weight in parameters:
        known.add(weight.untyped_storage()._cdata)
        if weight.grad is not None:
            known.add(weight.grad.untyped_storage()._cdata)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if formula := formulas.get(func._overloadpacket):
                peak.backward += formula(*args, **(kwargs or {}), out_val=out)
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.count(tensor.untyped_storage())
            return out

        def count(self, storage: "torch.UntypedStorage") -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in known:
                return
            known.add(key)
            counted["alive"] += size

            def gone() -> None:
                known.discard(key)
                counted["alive"] -= size

            weakref.finalize(storage, gone)
            gradients = counted["gradients"]
            activations = counted["alive"] - gradients
            if activations + share * gradients > peak.activations + share * peak.gradients:
                peak.activations, peak.gradients = activations, gradients

    def accumulated(weight: "Tensor") -> None:
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


def _step(
    config: Config,
    holdings: Holdings,
    loss: Callable[[Batch], Any],
    shape: tuple[int, int],
    accumulating: bool,
    share: float,
) -> _Peak:
    """Forward of one batch as the stage's trainer does it, and backward where gradients are enabled."""
    import torch

    trained = holdings.trained
    trained.train()
    if not holdings.keeps_dropout:
        for module in trained.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if config.trainer.get("gradient_checkpointing"):
        trained.activation_checkpointing_enable()
        if hasattr(trained, "enable_input_require_grads"):
            trained.enable_input_require_grads()
    ids = torch.zeros(shape, dtype=torch.long)
    parameters = list(dict.fromkeys(weight for module in holdings.modules for weight in module.parameters()))
    for weight in parameters:
        weight.grad = torch.zeros_like(weight) if accumulating and weight.requires_grad else None
    with _watched(parameters, share) as peak:
        total = loss({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        peak.forward, peak.backward = peak.backward, 0
        if torch.is_grad_enabled():
            total.backward()
    return peak


def _kept(config: Config, holdings: Holdings, machine: Machine) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer on one device between two steps."""
    trained = [weight for weight in holdings.trained.parameters() if weight.requires_grad]
    numbers = sum(weight.numel() for weight in trained)
    weights, gradients = sum(size for _, size in holdings.held), sum(weight.nbytes for weight in trained)
    # where they mix precisions, both engines step in float32
    single = machine.engine in (FSDP, ZERO) and machine.precision != "no"
    optimizer = sum(_state(config, weight, 4 if single else weight.element_size()) for weight in trained)
    if machine.engine == ZERO:
        optimizer += 4 * numbers  # its own copy of the weights
    if machine.engine == ZERO and single:
        quantised = config.model.load_in_4bit or config.model.load_in_8bit
        cast = trained if quantised else holdings.trained.parameters()
        weights -= sum(weight.nbytes - 2 * weight.numel() for weight in cast)
        gradients = 2 * numbers
    elif machine.engine == FSDP and single:
        weights, gradients = weights - gradients + 4 * numbers, 4 * numbers
    return round(weights * machine.weights), round(gradients * machine.gradients), round(optimizer * machine.optimizer)


def _passing(trained: "PreTrainedModel", machine: Machine) -> int:
    """Bytes of what the engine has gathered of a model, or has yet to share out, during the backward pass."""

    def sizes(weights: "Sequence[Tensor]") -> tuple[int, int]:
        learned = [weight for weight in weights if weight.requires_grad]
        return sum(weight.nbytes for weight in weights), sum(weight.nbytes for weight in learned)

    everything = list(trained.parameters())
    weights, gradients = sizes(everything)
    size: int = everything[0].element_size()
    if machine.engine == ZERO:
        return round(min(gradients, BUCKET * size) + (min(weights, LIVE * size) if machine.weights < 1 else 0))
    if machine.engine != FSDP or machine.devices == 1:
        return 0
    names = set(getattr(trained, "_no_split_modules", None) or ())
    layers = [sizes(list(part.parameters())) for part in trained.modules() if type(part).__name__ in names]
    # what is in no layer is gathered until the end; each is there twice, in one piece as it is sent and in its parts
    return 2 * (weights + gradients - sum(map(sum, layers)) + max(map(sum, layers), default=0))


def _state(config: Config, weight: "Tensor", size: int) -> float:
    name = str(config.trainer.get("optim", "adamw"))
    per_number = next((size for part, size in STATES.items() if part in name), 2.0 * size)
    return float(weight.numel() * per_number)


def _generation(text: "PretrainedConfig", rows: int, longest: int, dtype: "torch.dtype") -> int:
    """Keys and values of a rollout's sequences at their longest, and the numbers of one step over the vocabulary."""
    import torch

    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = torch.empty((), dtype=dtype).element_size()
    cache = 2 * rows * longest * text.num_hidden_layers * heads * width * size
    return int(cache + 4 * rows * text.vocab_size * 4)
