"""PPO with a critic for language models, which TRL dropped in 1.13, on TRL's living online trainer.

losses.py    the arithmetic, pure tensor functions
schedule.py  which prompts a rollout takes, how many steps follow
rollout.py   the rollout buffer
value.py     the critic, policy and critic as one module, several adapters on one base
trainer.py   PPOConfig and PPOTrainer
roles.py     where the reward model lives, what the critic begins as
rewards.py   reward models and reward functions behind one signature
start.py     what must hold before the first step
alarms.py    what a rollout's numbers say in plain words
"""
