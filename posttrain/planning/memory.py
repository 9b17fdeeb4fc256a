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
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, OnlineStage
from posttrain.config.trl_fields import trainer_arguments
from posttrain.console import say, show_table, warn
from posttrain.devices import mixed_precision
from posttrain.models.meta import Batch, Holdings, give_fake_content
from posttrain.stages.base import stage_named

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

GIB = 2**30
# bytes that an optimizer keeps for each trained number; AdamW's two moments are of the weight's own type
STATES = {"8bit": 2.0, "4bit": 1.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 4.0, "lion": 4.0}
WORTH_SAVING = GIB  # of a smaller peak nothing needs to be saved
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


def plan_memory(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
    completion: int,
    processes: int,
    peak_alone: bool = False,
) -> MemoryPlan:
    """The memory of one process training on sequences of `longest` tokens, of which `completion` are the response.

    With `peak_alone` the logits are counted among the activations, which takes half the time.

    Raises:
        ConfigError: a model's config cannot be read.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    stage = stage_named(config.stage.name)
    holdings = stage.hold(config, tokenizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in holdings.modules:
            give_fake_content(module)
        accumulation = stage.plan(config, 10**6, processes).accumulation
        precision = mixed_precision(config.precision)
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        sequences = config.stage.batch_size * STAGES[config.stage.name].sequences_per_row
        steps = []
        losses = (lambda batch: holdings.loss(batch, completion), holdings.hidden_loss)
        for loss in losses[: 1 if peak_alone else 2]:
            with torch.autocast("cpu", half, enabled=precision != "no"):
                steps.append(_step(config, holdings, loss, (sequences, longest), accumulation > 1))
        trained = [weight for weight in holdings.trained.parameters() if weight.requires_grad]
        gradients = sum(weight.nbytes for weight in trained)
        optimizer = sum(_state(config, weight) for weight in trained)
    weights = sum(size for _, size in holdings.held)
    shares = _shares(processes)
    if processes > 1 and shares == {"weights": 1, "gradients": 1, "optimizer": 1}:
        gradients *= 2  # DDP's buckets
    backward = steps[0]
    logits = 0 if peak_alone else max(backward.activations - steps[1].activations, 0)
    moments = {
        "in the backward pass": {
            "gradients": (gradients if accumulation > 1 else backward.gradients) // shares["gradients"],
            "activations": backward.activations - logits,
            "logits × vocabulary": logits,
        },
        "at the optimizer's step": {"gradients": gradients // shares["gradients"]},
    }
    if isinstance(config.stage, OnlineStage):
        generating = moments.setdefault("while completions are generated", {})
        if config.stage.use_vllm:
            trainer = config.trainer
            colocated = trainer.get("vllm_mode", "colocate") == "colocate"
            share = float(trainer.get("vllm_gpu_memory_utilization", 0.3)) if colocated else 0  # TRL's default
            for each in [generating] if trainer.get("vllm_enable_sleep_mode") else [*moments.values()]:
                each["vLLM, its own weights, keys and values"] = int(share * _capacity()[1])
        else:
            rows = config.stage.rollout_batch_size // processes
            dtype = half if precision != "no" else next(holdings.trained.parameters()).dtype
            text = holdings.trained.config.get_text_config()
            generating["keys and values"] = _generation(text, rows, longest, dtype)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {"weights": weights // shares["weights"], "optimizer": round(optimizer / shares["optimizer"])}
    return MemoryPlan(holdings.held, {**parts, **moments[moment]}, moment)


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
            if counted["alive"] > peak.activations + peak.gradients:
                peak.gradients = counted["gradients"]
                peak.activations = counted["alive"] - peak.gradients

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
    config: Config, holdings: Holdings, loss: Callable[[Batch], Any], shape: tuple[int, int], accumulating: bool
) -> _Peak:
    """Forward and backward of one batch as the stage's trainer does it."""
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
    with _watched(parameters) as peak:
        loss({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).backward()
    return peak


def _state(config: Config, weight: "Tensor") -> float:
    name = str(config.trainer.get("optim", "adamw"))
    per_number = next((size for part, size in STATES.items() if part in name), 2.0 * weight.element_size())
    return float(weight.numel() * per_number)


def _generation(text: "PretrainedConfig", rows: int, longest: int, dtype: "torch.dtype") -> int:
    """Keys and values of a rollout's sequences at their longest, and the numbers of one step over the vocabulary."""
    import torch

    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = torch.empty((), dtype=dtype).element_size()
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
    if limit.is_file() and (written := limit.read_text().strip()).isdigit():
        total = min(total, int(written))
    return "this machine", int(total)


def _changes(config: Config) -> dict[str, Config]:
    """What would hold less, as it is written on the command line, of all that this run does not do already."""
    stage, trainer, settings = config.stage, config.trainer, config.model
    found: dict[str, Config] = {}

    def with_trainer(**more: object) -> Config:
        return replace(config, trainer={**trainer, **more})

    half = stage.batch_size // 2
    if half:
        smaller = replace(config, stage=replace(stage, batch_size=half))
        override = f"stage.batch_size={half}"
        if not isinstance(stage, OnlineStage):
            twice = 2 * int(trainer.get("gradient_accumulation_steps", 1))
            smaller = replace(smaller, trainer={**trainer, "gradient_accumulation_steps": twice})
            override += f" trainer.gradient_accumulation_steps={twice} (the same updates)"
        found[override] = smaller
    if not trainer.get("gradient_checkpointing"):
        override = "trainer.gradient_checkpointing=true (a third more time)"
        found[override] = with_trainer(gradient_checkpointing=True)
    if isinstance(stage, OnlineStage) and stage.use_vllm and not trainer.get("vllm_enable_sleep_mode"):
        found["+trainer.vllm_enable_sleep_mode=true"] = with_trainer(vllm_enable_sleep_mode=True)
    if not settings.use_peft:
        found["model.use_peft=true"] = replace(config, model=replace(settings, use_peft=True))
        if "8bit" not in str(trainer.get("optim", "")) and importlib.util.find_spec("bitsandbytes"):
            found["trainer.optim=adamw_8bit"] = with_trainer(optim="adamw_8bit")
    elif not settings.load_in_4bit and not settings.load_in_8bit:
        found["model.load_in_4bit=true"] = replace(config, model=replace(settings, load_in_4bit=True))
    precomputes = "precompute_ref_log_probs" in trainer_arguments(*STAGES[stage.name].trl_config)
    if precomputes and not settings.use_peft and not trainer.get("precompute_ref_log_probs"):
        found["+trainer.precompute_ref_log_probs=true"] = with_trainer(precompute_ref_log_probs=True)
    return found


def show_memory(
    config: Config, tokenizer: "PreTrainedTokenizerBase", longest: int, completion: int, processes: int
) -> None:
    """Print the plan, whether it fits, and what would help most."""
    plan = plan_memory(config, tokenizer, longest, completion, processes)
    device, capacity = _capacity()
    rows = [(f"holds {name}", _size(size)) for name, size in plan.held]
    rows += [(f"peak: {name}", _size(size)) for name, size in plan.parts.items() if size]
    show_table("memory of one device", ("", ""), rows, headed=False)
    summary = f"memory: about {_size(plan.peak)} {plan.moment}, of {_size(capacity)} on {device}"
    if plan.peak > capacity:
        warn(f"{summary}: it does not fit")
    else:
        say(f"{summary}, excluding Python and library overhead")
    saved = {
        override: plan.peak - plan_memory(changed, tokenizer, longest, completion, processes, peak_alone=True).peak
        for override, changed in (_changes(config) if plan.peak > min(WORTH_SAVING, capacity) else {}).items()
    }
    best = sorted(
        (override for override in saved if saved[override] > WORTH_TELLING * plan.peak),
        key=lambda override: -saved[override],
    )
    if best:
        say("largest savings:\n" + "\n".join(f"  {override}: {_size(saved[override])} less" for override in best[:3]))


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
