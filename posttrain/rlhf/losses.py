"""The arithmetic of PPO and GRPO as pure tensor functions: rewards per token, advantages, clipped losses, KL.

Shapes are (episodes, tokens) unless said otherwise; `mask` is 1 on the tokens of a completion, its EOS among them, and
0 on the padding after it. Log-probabilities and KL are in nats.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(values: "Tensor", mask: "Tensor") -> "Tensor":
    """The mean over the tokens of all completions, as a scalar; 0 where there is none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def moments(values: "Tensor", mask: "Tensor") -> "Tensor":
    """Sum, sum of squares and count over the tokens of all completions: (3), to be added up over processes."""
    import torch

    kept = values * mask
    found: Tensor = torch.stack([kept.sum(), (kept * kept).sum(), mask.sum().to(values.dtype)])
    return found


def whiten(values: "Tensor", mask: "Tensor", over: "Tensor", shift_mean: bool = True) -> "Tensor":
    """Scale to variance 1 and, with `shift_mean`, to mean 0, by the `moments` given; 0 on padding.

    The variance is the unbiased one (Bessel), as in TRL.
    """
    total, squares, count = over
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean * mean).clamp(min=0) / (count - 1).clamp(min=1)
    scaled = (values - mean) * (variance + 1e-8).rsqrt()
    whitened: Tensor = (scaled if shift_mean else scaled + mean) * mask
    return whitened


def kl_estimate(logps: "Tensor", ref_logps: "Tensor", estimator: str) -> "Tensor":
    """KL(π‖π_ref) at each sampled token: k1 = log π - log π_ref, or k3 = 1/r - 1 + log r with r = π / π_ref.

    Both are unbiased for tokens sampled from π; k3 is never negative and varies less. Schulman 2020,
    http://joschu.net/blog/kl-approx.html
    """
    log_ratio = logps - ref_logps
    if estimator == "k1":
        return log_ratio
    return (-log_ratio).expm1() + log_ratio


def token_rewards(scores: "Tensor", kl: "Tensor", mask: "Tensor", kl_coef: float) -> "Tensor":
    """-kl_coef · KL at every token, and the score of the completion on its last one.

    `scores` is (episodes). Ziegler et al. 2019, equation 2, https://arxiv.org/abs/1909.08593
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(-1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: "Tensor", values: "Tensor", mask: "Tensor", gamma: float, lam: float, value_lam: float | None = None
) -> tuple["Tensor", "Tensor"]:
    """Advantages A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t, and returns A_t + V_t; 0 on padding.

    The value after a completion's last token is 0: it ends the episode. The A_t of the returns are by `value_lam`,
    unless it is None. Schulman et al. 2016, equation 16, https://arxiv.org/abs/1506.02438; VC-PPO: Yuan et al. 2025,
    section 3.2, https://arxiv.org/abs/2503.01491
    """
    import torch

    rewards, values = rewards * mask, values * mask
    following = torch.zeros_like(values[:, 0])
    after = torch.zeros_like(following)
    advantages = torch.zeros_like(values)
    for token in range(values.size(1) - 1, -1, -1):
        delta = rewards[:, token] + gamma * following - values[:, token]
        after = delta + gamma * lam * after
        advantages[:, token] = after
        following = values[:, token]
    advantages = advantages * mask
    if value_lam is not None:
        return advantages, generalised_advantages(rewards, values, mask, gamma, value_lam)[1]
    return advantages, (advantages + values) * mask


def importance_weights(logps: "Tensor", sampled_logps: "Tensor", mask: "Tensor", cap: float) -> "Tensor":
    """min(π / μ, cap) at each token that the policy μ has sampled in π's place; 0 on padding.

    Truncated importance sampling (Ionides 2008), between trainer and vLLM: Yao et al. 2025,
    https://fengyao.notion.site/off-policy-rl
    """
    return (logps - sampled_logps).exp().clamp(max=cap) * mask


class PolicyLoss(NamedTuple):
    """The clipped loss, and what it did, each a value per token."""

    loss: "Tensor"
    clipped: "Tensor"  # 1 where a clip decided
    approx_kl: "Tensor"  # KL(π_old‖π), by k3


def policy_loss(
    logps: "Tensor",
    old_logps: "Tensor",
    advantages: "Tensor",
    mask: "Tensor",
    clip_ratio: float,
    clip_ratio_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """max(-A ρ, -A clip(ρ, 1 - clip_ratio, 1 + clip_ratio_high)) at each token, ρ = π / π_old; 0 on padding.

    Where A < 0, no more than -A dual_clip. None: clip_ratio, and no such bound. Schulman et al. 2017, equation 7,
    https://arxiv.org/abs/1707.06347; DAPO: Yu et al. 2025, equation 8, https://arxiv.org/abs/2503.14476; dual clip: Ye
    et al. 2020, equation 5, https://arxiv.org/abs/1912.09729
    """
    import torch

    log_ratio = (logps - old_logps) * mask
    ratio = log_ratio.exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_ratio, 1 + (clip_ratio if clip_ratio_high is None else clip_ratio_high))
    loss, is_clipped = torch.maximum(free, held), held > free
    if dual_clip is not None:
        most = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > most)
        loss, is_clipped = torch.where(beyond, most, loss), is_clipped | beyond
    with torch.no_grad():
        clipped = is_clipped.to(ratio.dtype) * mask
        approx_kl = (ratio - 1 - log_ratio) * mask
    return PolicyLoss(loss * mask, clipped, approx_kl)


def value_loss(
    values: "Tensor", old_values: "Tensor", returns: "Tensor", mask: "Tensor", cliprange_value: float | None
) -> "Tensor":
    """½ max((V - R)², (clip(V, V_old ± cliprange_value) - R)²) at each token; 0 on padding; None: no clip.

    Schulman et al. 2017, section 5, with the clip of OpenAI's baselines (Huang et al. 2022, detail 9,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/).
    """
    import torch

    loss = (values - returns) ** 2
    if cliprange_value is not None:
        held = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
        loss = torch.maximum(loss, (held - returns) ** 2)
    return 0.5 * loss * mask


def explained_variance(errors: "Tensor", returns: "Tensor") -> float:
    """1 - Var(R - V) / Var(R) from the `moments` of R - V and of R: 1 for a perfect critic, 0 for a constant one.

    0, too, where returns do not vary.
    """
    missed, spread = (float(squares / count - (total / count) ** 2) for total, squares, count in (errors, returns))
    return 1 - missed / spread if spread > 1e-12 else 0.0


def group_spread(rewards: "Tensor", group: int) -> "Tensor":
    """The standard deviation (unbiased) of the rewards (E) of each prompt's `group` completions, one after another."""
    rows = rewards.view(-1, group)
    return (rows - rows[:, :1]).std(1).repeat_interleave(group)


def group_advantages(rewards: "Tensor", group: int, leave_one_out: bool, spread: "Tensor | None") -> "Tensor":
    """Each reward (E) less the mean of its group, or with `leave_one_out` less that of the others, over its `spread`.

    GRPO: Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300; RLOO: Ahmadian et al. 2024, section 3.2,
    https://arxiv.org/abs/2402.14740. None: no division (Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783);
    1e-4 is TRL's.
    """
    rows = rewards.view(-1, group)
    rows = rows - rows[:, :1]  # so that rounding leaves nothing of rewards that are all the same
    advantages = (rows - rows.mean(1, keepdim=True)).flatten()
    if leave_one_out:
        advantages = advantages * (group / (group - 1))
    return advantages if spread is None else advantages / (spread + 1e-4)


class KLController:
    """The weight of the KL penalty: fixed, or moved in proportion to how far KL is from its target.

    After each rollout of n episodes, coef ← coef · (1 + clip(KL / target - 1, ±0.2) · n / horizon). KL is in nats per
    completion. Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593
    """

    def __init__(self, kl_coef: float, adaptive: bool, target: float, horizon: float) -> None:
        self.coef = kl_coef
        self.adaptive, self.target, self.horizon = adaptive, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
