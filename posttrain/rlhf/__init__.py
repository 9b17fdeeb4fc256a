"""PPO with a critic for language models, which TRL dropped in 1.13, on TRL's maintained online trainer."""
