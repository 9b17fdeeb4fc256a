"""The adapter that is trained in place of a model's weights."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from posttrain.config.schema import ModelConfig
from posttrain.config.suggest import nearest
from posttrain.console import say
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def _is_called(module: str, name: str) -> bool:
    """Whether peft takes a module of that path for one that is named so."""
    return module == name or module.endswith(f".{name}")


def _check_names(key: str, names: Iterable[str] | None, known: Collection[str], what: str) -> None:
    for name in names or ():
        if not any(_is_called(found, name) for found in known):
            leaves = sorted({found.rsplit(".", 1)[-1] for found in known if found})
            raise ConfigError(f"model.{key}: {name} matches no {what}{nearest(name, leaves)}")


def _check_numbers(key: str, numbers: Sequence[int], size: int, what: str) -> None:
    if wrong := [number for number in numbers if not 0 <= number < size]:
        raise ConfigError(f"model.{key}: this model has {size} {what}, 0 to {size - 1}; there is no {wrong[0]}")


def _check_choices(model: ModelConfig, loaded: "PreTrainedModel", linear: Collection[str]) -> None:
    _check_names("lora_modules_to_save", model.lora_modules_to_save, dict(loaded.named_modules()), "module")
    _check_names("lora_exclude_modules", model.lora_exclude_modules, linear, "linear layer")
    _check_names("lora_target_parameters", model.lora_target_parameters, dict(loaded.named_parameters()), "parameter")
    if numbers := model.lora_layers_to_transform:
        _check_numbers("lora_layers_to_transform", numbers, loaded.config.get_text_config().num_hidden_layers, "layers")
    if tokens := model.lora_trainable_token_indices:
        embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        _check_numbers("lora_trainable_token_indices", tokens, embeddings.num_embeddings, "tokens")
        if head is not None and head.weight is embeddings.weight:
            raise ConfigError(
                "model.lora_trainable_token_indices: in this model the head is tied to the embeddings, and TRL's loss "
                "takes no single tokens of a head; set model.lora_modules_to_save to train the whole embedding"
            )


def lora_config(model: ModelConfig, loaded: "PreTrainedModel", task_type: str = "CAUSAL_LM") -> "LoraConfig | None":
    """The adapter to train, each of whose target names is known to match something.

    Raises:
        ConfigError: lists the names that match no module, and those that would; or the adapter cannot be built so.
    """
    if not model.use_peft:
        return None
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = {name: module for name, module in loaded.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    linear.pop("score", None)  # a reward model's head is trained whole, not through an adapter
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    _check_choices(model, loaded, linear)
    targets = model.lora_target_modules
    config = LoraConfig(
        task_type=task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=[targets] if isinstance(targets, str) and targets != ALL_LINEAR else targets,
        target_parameters=model.lora_target_parameters,
        exclude_modules=model.lora_exclude_modules,
        trainable_token_indices=model.lora_trainable_token_indices,
        modules_to_save=model.lora_modules_to_save,
        init_lora_weights=model.lora_init_weights if model.lora_init_weights != "default" else True,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )
    try:  # PEFT does it again by itself; what experts were called before transformers 5 becomes their parameters
        convert_peft_config_for_transformers(config, loaded, None)
    except ValueError as error:
        raise ConfigError(f"model.lora_target_modules: {error}") from error
    if model.lora_layers_to_transform is not None:
        config.layers_to_transform = model.lora_layers_to_transform
        if config.target_modules == ALL_LINEAR:  # PEFT takes layers beside names alone
            head = loaded.get_output_embeddings()
            config.target_modules = {name.rsplit(".", 1)[-1] for name in linear if linear[name] is not head}
    named = [] if config.target_modules == ALL_LINEAR else sorted(config.target_modules or ())
    counts = {target: sum(_is_called(name, target) for name in linear) for target in named}
    if unmatched := [target for target, count in counts.items() if not count]:
        matched = ", ".join(f"{target} ({count})" for target, count in counts.items() if count) or "none"
        raise ConfigError(
            f"model.lora_target_modules: {', '.join(unmatched)} match no linear layer (matched: {matched}; "
            f"this model has {', '.join(leaves)}){nearest(unmatched[0], leaves)}"
        )
    chosen = [module for name, module in linear.items() if not named or name.rsplit(".", 1)[-1] in named]
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in chosen)  # GPT-2 keeps its weights transposed
    if config.fan_in_fan_out and model.lora_init_weights == "olora":
        raise ConfigError("model.lora_init_weights=olora: PEFT has it for plain linear layers alone; try pissa")
    if config.target_parameters:
        _fit_to_parameters(config, model)
    return config


def _fit_to_parameters(config: "LoraConfig", model: ModelConfig) -> None:
    """Leave out what PEFT does not have where an adapter is on a parameter, as those of experts are.

    Raises:
        ConfigError: it was asked for.
    """
    asked = {"use_dora": model.use_dora, "lora_layers_to_transform": model.lora_layers_to_transform is not None}
    asked |= {f"lora_init_weights={model.lora_init_weights}": model.lora_init_weights != "default"}
    if without := [name for name, wanted in asked.items() if wanted]:
        names = ", ".join(sorted(config.target_parameters))
        raise ConfigError(
            f"model.{without[0]}: PEFT has it for layers alone, and {names} are parameters of experts and routers; "
            "leave it out, or name layers in model.lora_target_modules, such as [q_proj,k_proj,v_proj,o_proj]"
        )
    if config.lora_dropout:
        say(f"LoRA: no dropout instead of {config.lora_dropout:g}, as PEFT has none for the parameters of experts")
        config.lora_dropout = 0.0


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
