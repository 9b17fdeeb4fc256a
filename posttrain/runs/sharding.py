"""Models whose weights FSDP2 or DeepSpeed ZeRO-3 shares out among the processes, called from outside of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin
    from torch import Tensor, nn


def keep_output_dtype(plugin: "FullyShardedDataParallelPlugin") -> None:
    """Let FSDP2 hand out what a model gives as the model gives it.

    accelerate (1.15) has it rounded to the precision of the weights, also log-probabilities and losses, which TRL
    computes in float32: in bf16 the log-probability of a completion is then off by up to a nat.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def begin_each_forward_anew(model: "nn.Module") -> None:
    """Let FSDP2 take each forward of the whole model for a new one.

    Before 2.13, torch waits for a head that is tied to the embeddings and that TRL's loss reads without calling it:
    after a forward without gradients it takes the next one for the same, and does not gather what it needs.
    """
    from torch.distributed.fsdp import FSDPModule

    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]

    def begin(*_: object) -> None:
        for state in states:
            state._modules_to_run_forward.clear()

    if states:
        model.register_forward_pre_hook(begin)


@contextmanager
def gathered(model: "nn.Module", prepared: "nn.Module") -> Iterator[None]:
    """While parts of a model are called past its own forward; does nothing where each process holds all weights.

    Entered by all processes; `prepared` is the model as accelerate has wrapped it. Under FSDP2 each layer gathers its
    own weights when it is called, and what is around the layers is gathered here. Under ZeRO-3 all weights are, as TRL
    gathers them to generate: with the layers' own hooks, processes would have to make the same calls in one order.
    """
    from torch.distributed.fsdp import FSDPModule

    shared = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # torch takes the module that is called first for the outermost one
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    elif shared:
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(shared):
            remove_hooks(prepared)  # they would share each layer out again once it has been called
            try:
                yield
            finally:
                add_hooks(prepared)
    else:
        yield


def tie(state: "dict[str, Tensor]", model: "nn.Module") -> None:
    """Let tied weights, each gathered for itself, be one tensor again, which transformers saves once."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name in state and source in state:
            state[name] = state[source]


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Under ZeRO-3, load models whole, as they are before they are trained and where they never are."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
