"""Policy gradients against the other answers to the same prompt, without a critic: GRPO, DAPO, Dr. GRPO and RLOO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.config.stages import GRPOStage
from posttrain.rlhf import losses
from posttrain.rlhf.critic import Estimates
from posttrain.rlhf.online import Episodes, OnlineConfig
from posttrain.rlhf.policy import PolicyTrainer
from posttrain.rlhf.rollout import RolloutBuffer


@dataclass(kw_only=True)
class GRPOConfig(OnlineConfig):
    """TRL's arguments and GRPO's own."""

    stage: GRPOStage


class GRPOTrainer(PolicyTrainer):
    """Group-relative policy optimisation; on one batch its losses are those of TRL's GRPOTrainer and RLOOTrainer."""

    args: GRPOConfig

    def credit(self, buffer: RolloutBuffer, episodes: Episodes) -> dict[str, float]:
        """Each completion's reward against those of the same prompt, the same at all of its tokens."""
        stage, rewards = self.args.stage, episodes.shaped
        if not stage.kl_in_loss:
            rewards = rewards - self.kl_controller.coef * episodes.k1.sum(-1)
        spread = losses.group_spread(rewards, stage.num_generations)
        same = self.accelerator.gather((spread <= 1e-8).float()).mean()
        if stage.scale_rewards == "batch":
            spread = self.accelerator.gather(rewards).std().expand_as(rewards)
        advantages = losses.group_advantages(
            rewards,
            stage.num_generations,
            leave_one_out=stage.loss_type == "rloo",
            spread=None if stage.scale_rewards == "none" else spread,
        )
        buffer.advantages = advantages[:, None] * episodes.weights
        return {"frac_reward_zero_std": float(same)}

    def objective(self, policy: losses.PolicyLoss, now: Estimates, buffer: RolloutBuffer, tokens: float) -> Tensor:
        """Tokens count alike (dapo), completions do (grpo, rloo), or a token counts 1 / max_new_tokens (dr_grpo).

        DeepSeekMath: Shao et al. 2024, equation 3, https://arxiv.org/abs/2402.03300; DAPO: Yu et al. 2025, equation 8,
        https://arxiv.org/abs/2503.14476; Dr. GRPO: Liu et al. 2025, equation 4, https://arxiv.org/abs/2503.20783; RLOO:
        Ahmadian et al. 2024, section 3, https://arxiv.org/abs/2402.14740
        """
        stage, mask, plan = self.args.stage, buffer.completion_mask, self.plan
        completions = plan.accumulation * plan.batch_size * self.accelerator.num_processes  # of a mini-batch
        each, share = policy.loss, torch.tensor(tokens / completions, device=mask.device)
        if stage.loss_type == "rloo":  # a completion is one action
            clips = (stage.clip_ratio, stage.clip_ratio_high, stage.dual_clip)
            whole, old = ((logps * mask).sum(-1, keepdim=True) for logps in (now.logps, buffer.logps))
            each = losses.policy_loss(whole, old, buffer.advantages[:, :1], torch.ones_like(whole), *clips).loss
        elif stage.kl_in_loss:
            # weighted by the probability ratio, without which its gradient would be that of KL(π_ref‖π)
            ratio = ((now.logps - buffer.logps) * mask).exp()
            k3 = losses.kl_estimate(now.logps, buffer.ref_logps, "k3")
            each = each + self.kl_controller.coef * ratio * k3 * mask
        if stage.loss_type == "dapo":
            share = torch.ones_like(share)
        elif stage.loss_type == "grpo":
            share = share / mask.sum(-1, keepdim=True)
        elif stage.loss_type == "dr_grpo":
            share = share / stage.max_new_tokens
        return each * share
