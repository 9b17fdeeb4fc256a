"""Models on torch's meta device, which have shapes and types but no content: what a stage will hold in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.config.schema import Config, ModelConfig
from posttrain.models.load import hub_config, refuse_reward_model
from posttrain.models.lora import lora_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# bits of a quantised weight with its constants: Dettmers et al. 2023, QLoRA, section 3 (double quantisation: 0.127)
BITS = {"nested": 4.127, "4bit": 4.5, "8bit": 8.0}
Batch = dict[str, "Tensor"]  # input_ids and attention_mask, (sequences, tokens) each


@dataclass
class Holdings:
    """Every model that a stage holds, on the meta device, and what one training step computes with them."""

    trained: "PreTrainedModel"  # the module whose parameters the optimizer has
    modules: "list[nn.Module]"
    held: list[tuple[str, int]]  # name and bytes
    loss: Callable[[Batch, int], "Tensor"]  # of a batch whose completions have that many tokens
    hidden_loss: Callable[[Batch], "Tensor"]  # the same step, but for what is over the vocabulary
    keeps_dropout: bool = False  # whether TRL leaves dropout on


def hold_model(config: Config, tokenizer: "PreTrainedTokenizerBase", scores: bool = False) -> Holdings:
    """The model that is trained, alone: a policy with a loss over its own tokens, or a model with one score."""
    settings = config.model
    trained = meta_model(settings, scores, len(tokenizer))
    base = trained
    adapter = lora_config(settings, base, "SEQ_CLS" if scores else "CAUSAL_LM")
    size = weight_bytes(base, settings)
    quantised = settings.load_in_4bit or settings.load_in_8bit
    note = "4 or 8 bits" if quantised else "all weights"
    if not scores:
        fuse_head(base)
    if adapter is not None:
        import torch
        from peft import get_peft_model

        with torch.device("meta"):
            trained = get_peft_model(base, adapter)
        note = "frozen, in 4 or 8 bits" if quantised else "frozen"
    held = [(f"{'reward model' if scores else 'policy'} ({note})", size)]
    if adapter is not None:
        held.append(("adapter", weight_bytes(trained, settings) - size))

    def loss(batch: Batch, completion: int) -> "Tensor":
        found: Tensor
        if scores:
            found = trained(**batch, use_cache=False).logits.sum()
        else:
            found = trained(**batch, labels=batch["input_ids"], fused_lm_head=True).loss
        return found

    def hidden_loss(batch: Batch) -> "Tensor":
        inner = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
        found: Tensor = inner.base_model(**batch, use_cache=False).last_hidden_state.sum()
        return found

    return Holdings(trained, [trained], held, loss, hidden_loss)


def meta_model(settings: ModelConfig, scores: bool, tokens: int) -> "PreTrainedModel":
    """A model with a language modelling head, or with one score, whose vocabulary holds `tokens`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    known = hub_config(settings)
    if scores:
        known.num_labels = 1
        known.get_text_config().pad_token_id = 0
    else:
        refuse_reward_model(settings, known)
    text = known.get_text_config()
    text.vocab_size = max(text.vocab_size, tokens)
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(known, dtype=None if settings.dtype == "auto" else settings.dtype)


def fuse_head(causal: "nn.Module") -> None:
    """Let a causal model give log-probabilities, as TRL's trainers do."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(causal, outputs=("log_probs", "entropy", "is_top1"))


def weight_bytes(module: "nn.Module", settings: ModelConfig) -> int:
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


def give_fake_content(module: "nn.Module", dtype: "torch.dtype | None" = None) -> None:
    """Put every weight from the meta device onto the one in hand, in that type; tied weights stay tied."""
    import torch
    from torch import nn

    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if id(weight) not in done:
                    content = torch.empty(weight.shape, dtype=dtype or weight.dtype)
                    done[id(weight)] = nn.Parameter(content, requires_grad=weight.requires_grad)
                part._parameters[name] = done[id(weight)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
