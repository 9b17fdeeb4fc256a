"""posttrain: SFT, reward modelling, PPO, GRPO, DPO and KTO as one typed Hydra layer over Hugging Face TRL."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.cli.command import configure
    from posttrain.data.formats import format_instruction, format_preference
    from posttrain.devices import setup_device
    from posttrain.models.load import load_model_and_tokenizer
    from posttrain.rlhf.critic import ValueNetwork
    from posttrain.rlhf.ppo import PPOTrainer
    from posttrain.rlhf.rollout import RolloutBuffer
    from posttrain.rlhf.scoring import RewardModel
    from posttrain.stages.dpo import compute_dpo_loss
    from posttrain.stages.trainers import DPOTrainer, RewardModelTrainer, SFTTrainer
    from posttrain.train import run_stage

__version__ = "0.2.0"
__all__ = [
    "DPOTrainer",
    "PPOTrainer",
    "RewardModel",
    "RewardModelTrainer",
    "RolloutBuffer",
    "SFTTrainer",
    "ValueNetwork",
    "compute_dpo_loss",
    "configure",
    "format_instruction",
    "format_preference",
    "load_model_and_tokenizer",
    "run_stage",
    "setup_device",
]

_MODULES = {
    "DPOTrainer": "stages.trainers",
    "PPOTrainer": "rlhf.ppo",
    "RewardModel": "rlhf.scoring",
    "RewardModelTrainer": "stages.trainers",
    "RolloutBuffer": "rlhf.rollout",
    "SFTTrainer": "stages.trainers",
    "ValueNetwork": "rlhf.critic",
    "compute_dpo_loss": "stages.dpo",
    "configure": "cli.command",
    "format_instruction": "data.formats",
    "format_preference": "data.formats",
    "load_model_and_tokenizer": "models.load",
    "run_stage": "train",
    "setup_device": "devices",
}


def __getattr__(name: str) -> object:
    """The pieces by their usual names, imported when first asked for: importing posttrain stays instant (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return vars(importlib.import_module(f"posttrain.{_MODULES[name]}"))[name]
