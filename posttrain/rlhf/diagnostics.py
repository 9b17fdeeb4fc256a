"""Warnings about a rollout's numbers, each with a suggested override, and each printed once."""

from collections.abc import Iterator, Mapping

from posttrain.config.schema import Config
from posttrain.config.stages import OnlineStage, PPOStage
from posttrain.errors import PosttrainError
from posttrain.metrics.catalogue import GOLD
from posttrain.metrics.comparison import REWARD, before_and_after

KL_HIGH = 10.0  # nats per completion
ENTROPY_LEFT = 0.2  # of the first rollout's
LENGTH_FACTOR = 2.0
SPREAD_LEFT = 0.05  # of the first rollout's reward spread
LARGE = 100.0  # of a mean reward, as it is learned from
STILL_ROLLOUTS = 5  # how long a policy may take to move, at least
STILL_UPDATES = 4  # of the policy
STILL_KL = 0.01  # nats per completion
VLLM_MEAN = 0.1  # nats between vLLM's log-probabilities and the trainer's, on average over tokens
VLLM_TOKEN = 0.2  # and at one token: as far as stage.clip_ratio lets an update go
VLLM_BEYOND = 0.05  # the share of tokens that may be further apart
ALIKE = 0.8  # the share of prompts whose completions may all have got the same reward
CRITIC_ROLLOUTS = 5  # how long the critic may take to be better than a constant


class Alarms:
    """Watches the rollouts of one run."""

    def __init__(self, stage: OnlineStage, planned: int) -> None:
        self.stage, self.planned = stage, planned  # rollouts
        self.first: Mapping[str, float] | None = None
        self.rollouts = 0
        self.worse_than_constant = 0
        self.printed: set[str] = set()

    def __call__(self, numbers: Mapping[str, float]) -> list[str]:
        """The new alarms of a rollout.

        Raises:
            PosttrainError: KL is above stage.kl_ceiling.
        """
        self.first = self.first or dict(numbers)
        self.rollouts += 1
        below = numbers.get("explained_variance", 0) < 0
        self.worse_than_constant = self.worse_than_constant + 1 if below else 0
        stage, kl = self.stage, numbers.get("kl", 0.0)
        if stage.kl_ceiling is not None and kl > stage.kl_ceiling:
            raise PosttrainError(
                f"KL from the reference is {kl:.2f} nats per completion, above stage.kl_ceiling={stage.kl_ceiling:g}; "
                f"the last checkpoint is kept. Hold on to the reference: {_hold(stage)}, or lower "
                f"stage.learning_rate={stage.learning_rate / 3:.0e}"
            )
        new = [(name, text) for name, text in self._check(numbers, self.first) if name not in self.printed]
        self.printed |= {name for name, _ in new}
        return [text for _, text in new]

    def _check(self, now: Mapping[str, float], first: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        stage = self.stage
        kl, kl_error = now.get("kl", 0.0), now.get("kl_error", 0.0)  # 0 where it is not measured
        if kl < -3 * kl_error - 1e-3:
            yield (
                "negative KL",
                f"KL from the reference is {kl:.3f} nats per completion, below 0 by more than chance: "
                "completions are sampled from another distribution than the one they are scored under. Look at "
                "model.dtype and precision (precision=fp32 tells), and leave generation to TRL's plain path: "
                "stage.use_vllm=false",
            )
        if not (now.get("vllm_difference", 0) <= VLLM_MEAN and now.get("vllm_tokens_beyond", 0) <= VLLM_BEYOND):
            corrects = "stage.vllm_importance_sampling_cap=2 corrects for it, "
            remedy = corrects if stage.vllm_importance_sampling_cap is None else ""
            yield (
                "vLLM",
                f"vLLM's log-probabilities are {now['vllm_difference']:.3f} nats per token off the trainer's (at most "
                f"{now['vllm_difference_max']:.2f}; {now['vllm_tokens_beyond']:.1%} of tokens beyond {VLLM_TOKEN}): "
                f"updates learn from another policy's completions. {remedy}the same dtype on both sides makes it less",
            )
        if self._is_still(now, first):
            yield (
                "still",
                f"after {self.rollouts} rollouts the policy has not moved: KL from the reference "
                f"{now['kl_k3']:.4f} nats per completion, reward {first['reward']:.4f} then, {now['reward']:.4f} now. "
                f"Nothing is being learned; try stage.learning_rate={stage.learning_rate * 10:.0e}",
            )
        if kl > KL_HIGH and stage.kl_ceiling is None:
            yield (
                "high KL",
                f"KL from the reference is {kl:.1f} nats per completion: the policy is far from what the reward "
                f"model has seen. {_hold(stage)} holds it closer, stage.kl_controller=adaptive "
                f"keeps it near stage.kl_target, stage.kl_ceiling={KL_HIGH:g} stops the run",
            )
        if first["entropy"] > 0.05 and now["entropy"] < ENTROPY_LEFT * first["entropy"]:
            yield (
                "entropy",
                f"entropy collapse: from {first['entropy']:.3f} to {now['entropy']:.3f} nats per token: the policy "
                "has collapsed onto few tokens. stage.entropy_coef=0.01 or a smaller stage.learning_rate="
                f"{stage.learning_rate / 3:.0e} keeps it up",
            )
        longer = now["response_length"] / max(first["response_length"], 1)
        if longer > LENGTH_FACTOR or longer < 1 / LENGTH_FACTOR:
            grown = longer > 1
            remedy = (
                f"stage.length_penalty={now['reward_std'] / max(now['response_length'], 1) / 2:.2g} makes length cost"
                if grown
                else f"{_hold(stage)} holds on to the reference"
            )
            yield (
                "longer" if grown else "shorter",
                f"completions have become {'longer' if grown else 'shorter'}: {first['response_length']:.0f} to "
                f"{now['response_length']:.0f} tokens. If that is not wanted, the reward pays for it: {remedy}",
            )
        if isinstance(stage, PPOStage) and self.worse_than_constant >= CRITIC_ROLLOUTS:
            rate = stage.value_learning_rate or stage.learning_rate
            yield (
                "critic",
                f"for {CRITIC_ROLLOUTS} rollouts the critic has been worse than a constant (explained variance "
                f"{now['explained_variance']:.2f}). stage.value_learning_rate={rate * 10:g} lets it learn faster, "
                "stage.critic_warmup_steps=20 trains it alone first, stage.cliprange_value=null removes its clip",
            )
        if now["ended_by_eos"] == 0:
            yield (
                "endless",
                f"no completion of a rollout ended by itself: rewards judge completions that stage.max_new_tokens="
                f"{stage.max_new_tokens} has cut. Twice as many leave room; a policy that never learned its EOS needs "
                "SFT first, or stage.missing_eos_penalty=1",
            )
        if abs(now["shaped_reward"]) > LARGE:
            yield (
                "large",
                f"rewards are large ({now['shaped_reward']:.3g} on average): the critic's loss dominates the total. "
                f"stage.reward_scale={abs(now['shaped_reward']) * stage.reward_scale:.2g} brings them to about 1",
            )
        if now["reward_std"] < 1e-6:
            yield (
                "constant",
                f"all completions of a rollout got the same reward ({now['reward']:.4g}): there is nothing to learn. "
                "Look at rollouts.jsonl and at the reward functions",
            )
        elif now.get("frac_reward_zero_std", 0) > ALIKE:
            yield (
                "groups alike",
                f"for {now['frac_reward_zero_std']:.0%} of the prompts of a rollout all {stage.group} completions got "
                "the same reward, and nothing was learned from them: they are too easy or too hard for the policy, or "
                f"completions vary too little. stage.num_generations={stage.group * 2} finds more differences; "
                "prompts that are always or never solved can be left out",
            )
        elif now["reward_std"] < SPREAD_LEFT * first["reward_std"]:
            yield (
                "saturated",
                f"rewards are saturated (spread {first['reward_std']:.3g} at first, {now['reward_std']:.3g} "
                "now): what is left to gain may be noise of the reward. Fewer passes (stage.num_epochs=…) save time",
            )

    def _is_still(self, now: Mapping[str, float], first: Mapping[str, float]) -> bool:
        """Half of the run and the critic's warm-up are over, or the last rollout is here, and nothing has changed.

        Said where KL is measured. k3 is the estimate of it that varies least; what is left of k1 and of the reward must
        be chance (two standard errors).
        """
        stage = self.stage
        warmup = stage.critic_warmup_steps if isinstance(stage, PPOStage) else 0
        updates = (self.rollouts - 1) * stage.num_mini_batches * stage.ppo_epochs - warmup
        late = self.rollouts in (self.planned, max(STILL_ROLLOUTS, self.planned // 2))
        chance = 2 * ((first["reward_std"] ** 2 + now["reward_std"] ** 2) / stage.rollout_batch_size) ** 0.5
        return (
            late
            and updates >= STILL_UPDATES
            and "kl" in now
            and now["kl_k3"] < STILL_KL
            and abs(now["kl"]) <= 2 * now["kl_error"] + STILL_KL
            and abs(now["reward"] - first["reward"]) <= chance
        )


def over_optimisation(config: Config, name: str, before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """What is printed where the held-out reward has risen while the metric `name` fell.

    Gao et al. 2023, https://arxiv.org/abs/2210.10760
    """
    assert isinstance(config.stage, OnlineStage)
    numbers = {**now, **{f"{key}_before": value for key, value in before.items()}}
    told = []
    for key in (REWARD, name):
        *values, changed = before_and_after(key, numbers)
        told.append(f"{key.removeprefix(GOLD)} {changed}: {' → '.join(values)}")
    return (
        f"over-optimisation on the same held-out prompts: {'; '.join(told)}. {_hold(config.stage)} holds on to the "
        "reference, stage.ptx_coef=1 data.ptx=<instructions> to what it was taught before, and the best checkpoint is "
        f"kept by trainer.load_best_model_at_end=true trainer.metric_for_best_model=eval_{name} "
        f"trainer.save_steps={config.trainer.get('eval_steps')}"
    )


def _hold(stage: OnlineStage) -> str:
    return f"stage.kl_coef={stage.kl_coef * 2 or 0.1:g}"
