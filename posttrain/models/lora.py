"""The adapter that is trained in place of a model's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from posttrain.config.schema import ModelConfig
from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


def _is_called(module: str, name: str) -> bool:
    """Whether peft takes a module of that path for one that is named so."""
    return module == name or module.endswith(f".{name}")


def lora_config(model: ModelConfig, loaded: "torch.nn.Module", task_type: str = "CAUSAL_LM") -> "LoraConfig | None":
    """The adapter to train, each of whose target names is known to match something.

    Raises:
        ConfigError: lists the names that match no module, and those that would.
    """
    from peft import LoraConfig
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if not model.use_peft:
        return None
    linear = {name: module for name, module in loaded.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    linear.pop("score", None)  # a reward model's head is trained whole, not through an adapter
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    targets = model.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]
    if not isinstance(targets, str):
        counts = {target: sum(_is_called(name, target) for name in linear) for target in targets}
        unmatched = [target for target, count in counts.items() if not count]
        if unmatched:
            matched = ", ".join(f"{target} ({count})" for target, count in counts.items() if count) or "none"
            raise ConfigError(
                f"model.lora_target_modules: {', '.join(unmatched)} match no linear layer (matched: {matched}; "
                f"this model has {', '.join(leaves)}){nearest(unmatched[0], leaves)}"
            )
    for name in model.lora_modules_to_save or []:
        if not any(_is_called(found, name) for found, _ in loaded.named_modules()):
            known = sorted({found.rsplit(".", 1)[-1] for found, _ in loaded.named_modules() if found})
            raise ConfigError(f"model.lora_modules_to_save: {name} matches no module{nearest(name, known)}")
    everything = targets == "all-linear"
    chosen = [module for name, module in linear.items() if everything or name.rsplit(".", 1)[-1] in targets]
    return LoraConfig(
        task_type=task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        # GPT-2 keeps its weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen),
    )


def adapter_layers(model: "torch.nn.Module") -> "list[BaseTunerLayer]":
    """The layers of a model that hold adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def active_adapter(layers: "Sequence[BaseTunerLayer]", adapter: str | None) -> Iterator[None]:
    """Run the base under another adapter, or under none, and leave everything as it was.

    PEFT's own switches also change which weights require gradients, which would silently stop training one of
    several adapters; only what a forward reads is changed here.
    """
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled
