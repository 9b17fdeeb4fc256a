"""PPO with a critic, which TRL dropped in 1.13, and GRPO, on an online trainer that stands on one of TRL's."""
