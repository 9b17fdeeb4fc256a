"""PPO with a critic on TRL's RLOOTrainer, whose generation, reward plumbing and logging it keeps.

RLOOTrainer is the base because it is the one of TRL's living online trainers that generates with transformers,
continuous batching and vLLM, calls reward functions, and has no per-group baseline in the way (GRPO's losses assume
groups throughout). Overridden are: which prompts are drawn (RepeatSampler starts its permutation anew after a resume),
how prompts are tokenised, what a rollout holds, the loss, and what a checkpoint holds.
tests/test_trl_internals.py pins what is relied upon.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, pad

from posttrain.errors import PosttrainError
from posttrain.rlhf import losses
from posttrain.rlhf.critic import POLICY, VALUE, Estimates, PolicyAndValue, ValueNetwork, log_probs
from posttrain.rlhf.rollout import RolloutBuffer, join
from posttrain.rlhf.rollout_plan import Schedule, episode_order, prompts_of_rollout
from posttrain.runs.safe_trainer import SafeTrainer

WEIGHTS = "model.safetensors"
LARGEST = 1e15  # of a reward: sums of squares over a million tokens stay below float32's 3e38
BUFFER = "rollout_{}.safetensors"


@dataclass(kw_only=True)
class PPOConfig(RLOOConfig):
    """TRL's arguments and PPO's own; conf/stage/ppo.yaml holds their values and says what each means."""

    num_mini_batches: int
    gamma: float
    lam: float
    vf_coef: float
    cliprange_value: float | None
    entropy_coef: float
    whiten_advantages: bool
    whiten_rewards: bool
    value_learning_rate: float | None
    critic_warmup_steps: int
    kl_coef: float
    kl_estimator: str
    kl_controller: str
    kl_target: float
    kl_horizon: float
    kl_ceiling: float | None
    reward_scale: float
    reward_clip: float | None
    length_penalty: float
    missing_eos_penalty: float
    pad_to_multiple_of: int | None = None  # TRL's "auto" is resolved where its own checks are, which do not fit

    def __post_init__(self) -> None:
        super(RLOOConfig, self).__post_init__()  # RLOO's own insists on two answers for each prompt
        self.num_generations = 1
        self.beta = 0.0  # RLOO's KL; ours is kl_coef, with a reference that the caller brings
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        self.disable_dropout = True
        self.remove_unused_columns = False


@dataclass
class Rollout:
    """What one rollout was, over all processes."""

    number: int
    numbers: dict[str, float]
    samples: list[dict[str, Any]]


class PPOTrainer(SafeTrainer, RLOOTrainer):
    """Proximal policy optimisation of a policy and a critic.

    `rows` are the prompts: messages and their ids, and columns for the reward functions. `reference` is a frozen copy
    of the policy, or None: the policy with its adapters off. `value` makes the critic out of the policy as it is
    after TRL has wrapped it. `on_rollout` is called on every process after each rollout.
    """

    args: PPOConfig
    model: Any

    def __init__(
        self,
        *,
        rows: Sequence[dict[str, Any]],
        plan: Schedule,
        reference: Any,
        value: Callable[[Any], ValueNetwork],
        args: PPOConfig,
        **options: Any,
    ) -> None:
        super().__init__(args=args, **options)
        self.rows, self.plan = rows, plan
        self.model = PolicyAndValue(self.model, value(self.model), self.temperature, args.entropy_coef > 0)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):  # RLOO has looked at the policy alone
                module.p = 0.0
        self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self.model
        self.model.train()
        self.ref_model = reference
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self._prepare_frozen(reference.eval().requires_grad_(False))
        self.kl_controller = losses.KLController(
            args.kl_coef, args.kl_controller == "adaptive", args.kl_target, args.kl_horizon
        )
        self.on_rollout: Callable[[Rollout], None] = lambda rollout: None
        self.eval_functions: list[Callable[..., Any]] = []
        self.judge_now: Callable[[], dict[str, float]] | None = None
        self.trained_tokens = 0
        self._buffer: RolloutBuffer | None = None
        self._buffer_number = -1
        self._tokens: list[list[float]] = []  # [ppo epoch][mini-batch]: tokens of its answers over all processes

    def _prepare_frozen(self, model: Any) -> Any:
        from trl.models import prepare_deepspeed, prepare_fsdp

        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def trained(self, **options: Any) -> Any:
        """The policy, which is what the stage leaves behind."""
        return self.roles(**options).policy

    def roles(self, **options: Any) -> PolicyAndValue:
        """Policy and critic, without what accelerate has wrapped around them."""
        found: PolicyAndValue = self.accelerator.unwrap_model(self.model, **options)
        return found

    # -- rollouts

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Count forward passes; which episodes each of them learns from is `_prepare_inputs`' matter."""
        passes = self.plan.rollouts_per_epoch * self.plan.micro_steps_per_rollout
        numbers: Any = range(passes)
        return DataLoader(numbers, batch_size=1, collate_fn=lambda number: {"pass": number[0]})

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        plan = self.plan
        number, within = divmod(self._step, plan.micro_steps_per_rollout)
        if self._buffer_number != number:
            self._roll_out(number)
        assert self._buffer is not None
        ppo_epoch, place = divmod(within, plan.accumulation * plan.mini_batches)
        order = episode_order(plan, self.args.seed, number, ppo_epoch, self.accelerator.process_index)
        episodes = order[place * plan.batch_size : (place + 1) * plan.batch_size]
        tokens = self._tokens[ppo_epoch][place // plan.accumulation]
        return {"episodes": self._buffer.take(episodes), "tokens": tokens}

    def _roll_out(self, number: int) -> None:
        """Answer the rollout's prompts, score the answers and estimate their advantages."""
        self.check_weights()  # generation would fail on NaN without saying why
        plan, rank = self.plan, self.accelerator.process_index
        chosen = prompts_of_rollout(plan, self.args.seed, number)[rank * plan.per_process :][: plan.per_process]
        with self.seeded(f"{self.args.seed} {number} {rank}"):
            self._buffer = self._generate_and_score_completions([self.rows[index] for index in chosen])
        self._buffer_number = number
        self._count_tokens(number)

    def _count_tokens(self, number: int) -> None:
        """Each mini-batch's loss is a mean over its tokens, whatever the batch size and number of processes."""
        assert self._buffer is not None
        lengths = self._buffer.completion_mask.sum(-1).tolist()
        size = self.plan.per_process // self.plan.mini_batches
        counts = []
        for ppo_epoch in range(self.plan.ppo_epochs):
            order = episode_order(self.plan, self.args.seed, number, ppo_epoch, self.accelerator.process_index)
            ordered = [lengths[episode] for episode in order]
            counts.append([float(sum(ordered[start : start + size])) for start in range(0, len(ordered), size)])
        self._tokens = self._summed(torch.tensor(counts)).tolist()

    @contextmanager
    def seeded(self, seed: str) -> Iterator[None]:
        """Draw from generators of a rollout's own, so that it is the same one after a resume."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        before = random.getstate()
        with torch.random.fork_rng(devices):
            random.seed(seed)
            torch.manual_seed(random.getrandbits(60))
            yield
        random.setstate(before)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """As they were encoded with the data: TRL would tokenise the rendered text as a whole, special tokens twice."""
        return [list(prompt["ids"]) for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], list[Any]]:
        """TRL's generation from ready ids; completions come back as messages."""
        prompt_ids, completion_ids, texts = super()._generate([{"ids": row["prompt_ids"]} for row in prompts])
        return prompt_ids, completion_ids, [[{"role": "assistant", "content": text}] for text in texts]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():  # as in training, where accelerate does it for the module as a whole
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> RolloutBuffer:
        args, device = self.args, self.accelerator.device
        prompt_ids, completion_ids, completions = self._generate(inputs)
        prompts = [row["prompt"] for row in inputs]
        padding = self._tokenizer.pad_token_id

        def padded(rows: list[Any], value: int, side: str) -> Tensor:
            found: Tensor = pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side)
            return found.to(device)

        buffer = RolloutBuffer(
            prompt_ids=padded(prompt_ids, padding, "left"),
            prompt_mask=padded([[1] * len(row) for row in prompt_ids], 0, "left"),
            completion_ids=padded(completion_ids, padding, "right"),
            completion_mask=padded([[1] * len(row) for row in completion_ids], 0, "right"),
            **dict.fromkeys(("logps", "values", "advantages", "returns"), torch.empty(0)),
        )
        mask = buffer.completion_mask
        now = self.estimates(buffer)
        reference = self.reference_logps(buffer)
        buffer.logps, buffer.values = now.logps * mask, now.values * mask
        k1, k3 = ((losses.kl_estimate(now.logps, reference, kind) * mask) for kind in ("k1", "k3"))

        per_function = self.rewards_of(inputs, prompts, completions, completion_ids)
        scores = (per_function * self.reward_weights.to(device)).nansum(1)
        ended = torch.tensor([row[-1] in self.eos_token_ids for row in completion_ids], device=device)
        shaped = self._shape(scores, mask.sum(-1), ended)
        rewards = losses.token_rewards(shaped, k1 if args.kl_estimator == "k1" else k3, mask, self.kl_controller.coef)
        if args.whiten_rewards:
            over = self._summed(losses.moments(rewards, mask))
            rewards = losses.whiten(rewards, mask, over, shift_mean=False)
        advantages, buffer.returns = losses.generalised_advantages(rewards, buffer.values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = losses.whiten(advantages, mask, self._summed(losses.moments(advantages, mask)))
        buffer.advantages = advantages

        per_episode = torch.stack(
            [scores, shaped, k1.sum(-1), k3.sum(-1), mask.sum(-1).float(), ended.float(), (now.entropy * mask).sum(-1)],
            dim=1,
        )
        numbers = self._report(per_episode, per_function, buffer)
        self._finish_rollout(numbers, prompts, completions, per_function, per_episode)
        return buffer

    def rewards_of(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> Tensor:
        """TRL's reward plumbing: this process's (episodes, functions), NaN where a function does not apply.

        Raises:
            PosttrainError: a reward is infinite or too large to compute with, or no function applies to an answer.
        """
        everything: Tensor = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        weights = self.reward_weights.to(everything.device).abs() / min(self.args.reward_scale, 1)
        worst = int((everything.double() * weights).abs().nan_to_num(0).argmax())
        row, column = divmod(worst, len(self.reward_func_names))
        if LARGEST < abs(float(everything[row, column])) * float(weights[column]) < float("inf"):
            raise PosttrainError(
                f"{self.reward_func_names[column]} gave a reward of {float(everything[row, column]):.3g} at step "
                f"{self.state.global_step}: its square overflows float32. Bring rewards to about 1 where they are made"
            )
        without = torch.isnan(everything).all(1) | torch.isinf(everything).any(1)
        if without.any():
            names = ", ".join(self.reward_func_names)
            raise PosttrainError(
                f"the reward is not a finite number for {int(without.sum())} of {len(everything)} answers at step "
                f"{self.state.global_step} ({names}); nothing was learned from them"
            )
        start = self.accelerator.process_index * len(prompts)
        return everything[start : start + len(prompts)]

    def _shape(self, scores: Tensor, lengths: Tensor, ended: Tensor) -> Tensor:
        """The score of each episode as it is learned from: scaled, clipped, less what length and a missing end cost."""
        shaped = scores / self.args.reward_scale
        if self.args.reward_clip is not None:
            shaped = shaped.clamp(-self.args.reward_clip, self.args.reward_clip)
        return shaped - self.args.length_penalty * lengths - self.args.missing_eos_penalty * (~ended)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        found: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return found

    def _report(self, per_episode: Tensor, per_function: Tensor, buffer: RolloutBuffer) -> dict[str, float]:
        """The rollout's numbers over all processes."""
        mask = buffer.completion_mask
        gathered = self.accelerator.gather(per_episode)
        score, shaped, k1, k3, length, ended, entropy = gathered.unbind(1)
        by_function = self.accelerator.gather(per_function)
        errors = self._summed(losses.moments(buffer.returns - buffer.values, mask))
        returns = self._summed(losses.moments(buffer.returns, mask))
        numbers = {
            "reward": float(score.mean()),
            "reward_std": float(score.std(unbiased=False)),
            "shaped_reward": float(shaped.mean()),
            "kl": float(k1.mean()),
            "kl_error": float(k1.std(unbiased=False)) / len(k1) ** 0.5,
            "kl_k3": float(k3.mean()),
            "kl_coef": self.kl_controller.coef,
            "entropy": float(entropy.sum() / length.sum()),
            "response_length": float(length.mean()),
            "ended_by_eos": float(ended.mean()),
            "explained_variance": losses.explained_variance(errors, returns),
        }
        if len(self.reward_func_names) > 1:
            means = by_function.nanmean(0).tolist()
            numbers |= {f"reward/{name}": mean for name, mean in zip(self.reward_func_names, means, strict=True)}
        self.trained_tokens += int(length.sum())
        self.kl_controller.update(numbers["kl"], len(gathered))
        return numbers

    def _finish_rollout(
        self,
        numbers: dict[str, float],
        prompts: list[Any],
        completions: list[Any],
        per_function: Tensor,
        per_episode: Tensor,
    ) -> None:
        samples = [
            {
                "prompt": prompt,
                "answer": completion[0]["content"],
                "reward": float(row[0]),
                "kl": float(row[2]),
                "tokens": int(row[4]),
                "ended": bool(row[5]),
            }
            | (dict(zip(self.reward_func_names, each.tolist(), strict=True)) if len(each) > 1 else {})
            for prompt, completion, row, each in zip(prompts, completions, per_episode, per_function, strict=True)
        ]
        # for TRL's tables of completions (trainer.log_completions)
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        self._logs["advantages"].extend(per_episode[:, 1].tolist())
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(per_function[:, index].tolist())
        number = self._step // self.plan.micro_steps_per_rollout
        self._metrics["train"].clear()  # what TRL counts of a generation is among our numbers
        self.on_rollout(Rollout(number, numbers, samples))
        self.log(dict(numbers))

    # -- estimates

    def inputs_of(self, buffer: RolloutBuffer) -> dict[str, Any]:
        mask, positions = join(buffer.prompt_mask, buffer.completion_mask)
        ids = torch.cat([buffer.prompt_ids, buffer.completion_ids], dim=1)
        width = buffer.completion_ids.size(1)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "completion": width}

    def estimates(self, buffer: RolloutBuffer) -> Estimates:
        """Policy and critic as they are now, without gradients."""
        return Estimates(*self._in_batches(buffer, lambda inputs: self.model(**inputs)))

    def reference_logps(self, buffer: RolloutBuffer) -> Tensor:
        """log π_ref of each token of the answers."""
        with self.reference() as model:
            return self._in_batches(buffer, lambda inputs: log_probs(model, **inputs, temperature=self.temperature))[0]

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference: the frozen copy, or the policy with all adapters off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        roles = self.roles()
        with roles.role(None):
            yield roles.policy

    def _in_batches(self, buffer: RolloutBuffer, forward: Callable[[dict[str, Any]], Any]) -> list[Tensor]:
        """What `forward` gives for the whole buffer, (E, C) each, computed a batch at a time on its own width."""
        episodes, width = buffer.completion_mask.shape
        found: list[list[Tensor]] = []
        for start in range(0, episodes, self.plan.batch_size):
            part = buffer.take(range(start, min(start + self.plan.batch_size, episodes)))
            with torch.no_grad(), self.accelerator.autocast():
                output = forward(self.inputs_of(part))
            found.append([nn.functional.pad(each.float(), (0, width - each.size(1))) for each in output])
        return [torch.cat(each) for each in zip(*found, strict=True)]

    # -- updates

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """One optimizer; the critic's weights in groups of their own where they have their own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.value_learning_rate
        if rate is not None:
            critic = {id(weight) for name, weight in self.model.named_parameters() if is_critic(name)}
            for group in list(optimizer.param_groups):
                theirs = [weight for weight in group["params"] if id(weight) in critic]
                if theirs:
                    group["params"] = [weight for weight in group["params"] if id(weight) not in critic]
                    optimizer.add_param_group({**group, "params": theirs, "lr": rate})
        return optimizer

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        args, buffer = self.args, inputs["episodes"]
        mask = buffer.completion_mask
        now = model(**self.inputs_of(buffer))
        policy = losses.policy_loss(now.logps, buffer.logps, buffer.advantages, mask, args.epsilon)
        value = losses.value_loss(now.values, buffer.values, buffer.returns, mask, args.cliprange_value)
        # processes are averaged over by DDP, forward passes by the Trainer: undone, to give a mean over tokens
        scale = self.accelerator.num_processes * self.plan.accumulation / inputs["tokens"]
        entropy = (now.entropy * mask).sum() * scale
        loss: Tensor = policy.loss.sum() * scale - args.entropy_coef * entropy
        if self.state.global_step < args.critic_warmup_steps:
            loss = loss * 0.0
        loss = loss + args.vf_coef * value.sum() * scale
        with torch.no_grad():
            sums = torch.stack([policy.loss.sum(), value.sum(), policy.clipped.sum(), policy.approx_kl.sum()])
            means = self._summed(sums.detach()) * self.plan.accumulation / inputs["tokens"]
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
        for name, mean in zip(names, means.tolist(), strict=True):
            self._metrics["train"][name].append(mean)
        return loss

    def measure(self) -> dict[str, float]:
        """The held-out numbers of whoever set `judge_now`."""
        metrics = {f"eval_{name}": value for name, value in self.judge_now().items()} if self.judge_now else {}
        self.log(dict(metrics))
        return metrics

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained, of policy and critic."""
        from safetensors.torch import save_file

        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.roles().trained_weights()
        if state_dict is not None:
            trained = {name: state_dict[name] for name in trained}
        save_file({name: weight.detach().cpu().contiguous() for name, weight in trained.items()}, folder / WEIGHTS)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as a model folder, or its adapter; for a checkpoint everything that is trained."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        options: dict[str, Any] = {}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model)
            options["state_dict"] = {
                name.removeprefix("policy."): weight for name, weight in state.items() if name.startswith("policy.")
            }
        if self.args.should_save:
            policy = self.trained()
            if hasattr(policy, "peft_config"):
                options["selected_adapters"] = [POLICY]
            policy.save_pretrained(output_dir, **options)
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles().load_trained(Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self.roles().load_trained(self.best_checkpoint() / WEIGHTS)

    def _save_rng_state(self, output_dir: str) -> None:
        """With the generators' states, on every process: the rollout."""
        super()._save_rng_state(output_dir)
        if self._buffer is not None:
            self._buffer.save(Path(output_dir) / BUFFER.format(self.accelerator.process_index))

    def running(self) -> dict[str, Any]:
        """And how far the passes over the rollout have come."""
        return super().running() | {
            "rollout": self._buffer_number,
            "rollout_tokens": self._tokens,
            "kl_coef": self.kl_controller.coef,
            "trained_tokens": self.trained_tokens,
            "forward_passes": self._step,
        }

    def resume(self, running: dict[str, Any], checkpoint: Path) -> None:
        file = checkpoint / BUFFER.format(self.accelerator.process_index)
        self._buffer = RolloutBuffer.load(file, self.accelerator.device) if file.is_file() else None
        self._buffer_number, self._tokens = running["rollout"], running["rollout_tokens"]
        self.kl_controller.coef = running["kl_coef"]
        self.trained_tokens, self._step = running["trained_tokens"], running["forward_passes"]
        super().resume(running, checkpoint)


def is_critic(name: str) -> bool:
    """Whether a weight of `PolicyAndValue` is the critic's."""
    return name.startswith("value.") or f".{VALUE}." in name
