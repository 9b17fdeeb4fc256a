"""Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) with a critic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.config.stages import PPOStage
from posttrain.rlhf import losses
from posttrain.rlhf.critic import VALUE, Estimates, is_of
from posttrain.rlhf.online import Episodes, OnlineConfig
from posttrain.rlhf.policy import PolicyTrainer
from posttrain.rlhf.rollout import RolloutBuffer


@dataclass(kw_only=True)
class PPOConfig(OnlineConfig):
    """TRL's arguments and PPO's own."""

    stage: PPOStage


class PPOTrainer(PolicyTrainer):
    """Proximal policy optimisation of a policy and a critic."""

    args: PPOConfig

    def credit(self, buffer: RolloutBuffer, episodes: Episodes) -> dict[str, float]:
        """Generalised advantages of the shaped reward at the last token and the KL penalty at each."""
        stage, mask = self.args.stage, buffer.completion_mask
        kl = episodes.k1 if stage.kl_estimator == "k1" else episodes.k3
        rewards = losses.token_rewards(episodes.shaped, kl, mask, self.kl_controller.coef)
        if stage.whiten_rewards:
            rewards = losses.whiten(rewards, mask, self.summed(losses.moments(rewards, mask)), shift_mean=False)
        advantages, buffer.returns = losses.generalised_advantages(
            rewards, buffer.values, mask, stage.gamma, stage.lam, stage.value_lam
        )
        if stage.whiten_advantages:
            advantages = losses.whiten(advantages, mask, self.summed(losses.moments(advantages, mask)))
        buffer.advantages = advantages * episodes.weights
        errors = self.summed(losses.moments(buffer.returns - buffer.values, mask))
        returns = self.summed(losses.moments(buffer.returns, mask))
        return {"explained_variance": losses.explained_variance(errors, returns)}

    # -- updates

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """One optimizer; the critic's weights in groups of their own where they have their own learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.stage.value_learning_rate
        if rate is not None:
            critic = {id(weight) for name, weight in self.model.named_parameters() if is_critic(name)}
            for group in list(optimizer.param_groups):
                theirs = [weight for weight in group["params"] if id(weight) in critic]
                if theirs:
                    group["params"] = [weight for weight in group["params"] if id(weight) not in critic]
                    optimizer.add_param_group({**group, "params": theirs, "lr": rate})
        return optimizer

    @property
    def warming(self) -> bool:
        """Whether the critic still learns alone."""
        return bool(self.state.global_step < self.args.stage.critic_warmup_steps)

    @property
    def detached(self) -> bool:  # type: ignore[override]
        return self.args.stage.critic == "head" and (self.warming or self.args.stage.critic_stop_gradient)

    def with_critic(self, loss: Tensor, now: Estimates, buffer: RolloutBuffer, each: dict[str, Tensor]) -> Tensor:
        stage = self.args.stage
        value = losses.value_loss(
            now.values, buffer.values, buffer.returns, buffer.completion_mask, stage.cliprange_value
        )
        each["value_loss"] = value
        return (loss * 0.0 if self.warming else loss) + stage.vf_coef * value.sum()


def is_critic(name: str) -> bool:
    """Whether a weight of `PolicyAndValue` is the critic's."""
    return name.startswith("value.") or is_of(name, VALUE)
