"""Models whose weights FSDP2 or DeepSpeed ZeRO-3 shares out among the processes, called from outside of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


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
