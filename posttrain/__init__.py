"""posttrain: supervised fine-tuning, reward modelling, PPO and DPO as one typed Hydra layer over Hugging Face TRL."""

__version__ = "0.1.0.dev0"
