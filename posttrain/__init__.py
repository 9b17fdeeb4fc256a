"""posttrain: supervised fine-tuning, reward modelling, PPO and DPO as one typed Hydra layer over Hugging Face TRL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.cli.command import configure
    from posttrain.data.formats import format_instruction, format_preference
    from posttrain.models.load import load_model_and_tokenizer
    from posttrain.stages.dpo import compute_dpo_loss
    from posttrain.train import run_stage

__version__ = "0.1.0"
__all__ = [
    "compute_dpo_loss",
    "configure",
    "format_instruction",
    "format_preference",
    "load_model_and_tokenizer",
    "run_stage",
]


def __getattr__(name: str) -> Any:
    """The pieces by their usual names, imported when first asked for: importing posttrain stays instant."""
    if name in ("format_instruction", "format_preference"):
        from posttrain.data import formats as data

        return data.format_instruction if name == "format_instruction" else data.format_preference
    if name == "load_model_and_tokenizer":
        from posttrain.models.load import load_model_and_tokenizer

        return load_model_and_tokenizer
    if name == "configure":
        from posttrain.cli.command import configure

        return configure
    if name == "run_stage":
        from posttrain.train import run_stage

        return run_stage
    if name == "compute_dpo_loss":
        from posttrain.stages.dpo import compute_dpo_loss

        return compute_dpo_loss
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
