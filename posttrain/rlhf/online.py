"""Sampling completions, scoring them and learning from them: what every online algorithm shares, on RLOOTrainer.

RLOOTrainer is the base because, of TRL's maintained online trainers, it is the one that generates with transformers,
continuous batching and vLLM, calls reward functions, and has no per-group baseline in the way (GRPO's losses assume
groups throughout). Overridden are: which prompts are drawn (after a resume, RepeatSampler would begin its permutation
again), how prompts are tokenised, what a rollout holds, and what a checkpoint holds.
tests/rlhf/test_trl_internals.py pins what is relied upon.
"""

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, pad

from posttrain.config.stages import OnlineStage
from posttrain.console import say
from posttrain.data.messages import Message
from posttrain.errors import PosttrainError
from posttrain.models.generate import by_length, half_weights
from posttrain.models.lora import active_adapter, adapter_layers
from posttrain.rlhf import losses, vllm
from posttrain.rlhf.critic import log_probs
from posttrain.rlhf.diagnostics import VLLM_TOKEN
from posttrain.rlhf.rollout import Inputs, RolloutBuffer, Trace, laid_out, spread
from posttrain.rlhf.rollout_plan import RolloutPlan, episode_order, packing_pays, prompts_of_rollout, split, wider
from posttrain.runs.checkpoint import processes_of
from posttrain.runs.safe_trainer import SafeTrainer
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LARGEST = 1e15  # of a reward: sums of squares over a million tokens stay below float32's 3e38
KEPT = 4  # completions of a rollout that rollouts.jsonl keeps
BUFFER = "rollout_{}.safetensors"
PromptRow = JsonObject  # "prompt" (messages), "prompt_ids", and the columns for reward functions


@dataclass(kw_only=True)
class OnlineConfig(RLOOConfig):
    """TRL's arguments, and the stage's own as `stage`; conf/stage/<name>.yaml holds their values and meaning."""

    stage: OnlineStage
    pad_to_multiple_of: int | None = None  # TRL's "auto" is resolved where its own checks are, which do not fit

    def __post_init__(self) -> None:
        super(RLOOConfig, self).__post_init__()  # RLOO's own insists on two completions for each prompt
        self.num_generations = 1
        self.beta = 0.0  # RLOO's KL; ours is stage.kl_coef, with a reference that the caller brings
        self.disable_dropout = True
        self.remove_unused_columns = False

    def to_dict(self) -> JsonObject:
        """As JSON can hold it: trackers log all arguments."""
        found: JsonObject = super().to_dict()
        return found | {"stage": asdict(self.stage)}


@dataclass
class Rollout:
    """What one rollout was, over all processes, and samples of this one."""

    number: int
    numbers: dict[str, float]
    samples: list[JsonObject]


@dataclass
class Episodes:
    """The rewards of a rollout's completions on this process; E completions of at most C tokens."""

    scores: Tensor  # (E), as the rewards give them
    shaped: Tensor  # (E), as they are learned from
    k1: Tensor  # (E, C), two estimates of KL from the reference at each token
    k3: Tensor  # (E, C)
    entropy: Tensor  # (E, C)
    weights: Tensor  # (E, C), of each token's advantage: 1 but where another policy than π_old has sampled it


class OnlineTrainer(SafeTrainer, RLOOTrainer):
    """Rollouts of a policy, scored and learned from in several passes; an algorithm brings `estimate` and the loss.

    `rows` are the prompts: messages and their ids, and columns for the reward functions. `reference` is a frozen copy
    of the policy, or None: the policy with its adapters off. `on_rollout` is called on every process after each
    rollout, `held_out` at every evaluation; both are handed the trainer.
    """

    args: OnlineConfig
    model: Any

    def __init__(
        self,
        *,
        rows: Sequence[PromptRow],
        plan: RolloutPlan,
        reference: "PreTrainedModel | None",
        on_rollout: "Callable[[OnlineTrainer, Rollout], None]",
        held_out: "Callable[[OnlineTrainer], dict[str, float]]",
        args: OnlineConfig,
        **options: Any,
    ) -> None:
        self.server = vllm.server_of(args, options["model"].name_or_path)
        if self.server is not None:
            say(f"vLLM: waiting up to {args.vllm_server_timeout:g} s for {self.server}")
        with vllm.reaching(self.server):
            super().__init__(args=args, **options)
        self.sampler = vllm.Sampler(self.vllm_generation, self.eos_token_ids) if self.use_vllm else None
        self.rows, self.plan = rows, plan
        self.on_rollout, self.held_out = on_rollout, held_out
        self.ref_model = reference
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self._prepare_frozen(reference.eval().requires_grad_(False))
        stage = args.stage
        self.kl_controller = losses.KLController(
            stage.kl_coef, stage.kl_controller == "adaptive", stage.kl_target, stage.kl_horizon
        )
        self.reward_loop = self.async_loop if self._has_async_funcs else None  # that async reward functions run in
        self.trained_tokens = 0
        self._buffer: RolloutBuffer | None = None
        self._buffer_number = self.ended_rollout = -1  # the rollout that is learned from, and one that is no longer
        self._tokens: list[list[float]] = []  # [pass][mini-batch]: tokens of its completions over all processes
        self._forwards: list[list[list[int]]] = []  # [micro-step of a rollout][forward]: the episodes
        self.keeps_apart = False  # whether packed episodes are known not to see each other: see rlhf/preflight.py

    def _prepare_frozen(self, model: "PreTrainedModel") -> "PreTrainedModel":
        from trl.models import prepare_deepspeed, prepare_fsdp

        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # -- what an algorithm brings

    @abstractmethod
    def estimate(self, buffer: RolloutBuffer) -> Tensor:
        """Fill in `buffer.logps` and what else is taken before the rewards; returns the entropy of π, (E, C)."""

    @abstractmethod
    def credit(self, buffer: RolloutBuffer, episodes: Episodes) -> dict[str, float]:
        """Fill in `buffer.advantages` from the rewards; returns the algorithm's own numbers of the rollout."""

    # -- rollouts

    def get_train_dataloader(self) -> DataLoader[int]:
        """Count forward passes; which episodes each of them learns from is decided in `_prepare_inputs`."""
        passes = self.plan.rollouts_per_epoch * self.plan.micro_steps_per_rollout
        numbers: Any = range(passes)
        return DataLoader(numbers, batch_size=1, collate_fn=lambda number: {"pass": number[0]})

    def _prepare_inputs(self, generation_batch: object) -> JsonObject:
        plan = self.plan
        number, within = divmod(self._step, plan.micro_steps_per_rollout)
        if self._buffer_number != number:
            self._roll_out(number)
        assert self._buffer is not None
        passes, place = divmod(within, plan.accumulation * plan.mini_batches)
        episodes = [self._buffer.take(part) for part in self._forwards[within]]
        return {"episodes": episodes, "tokens": self._tokens[passes][place // plan.accumulation]}

    def compute_loss(self, model: nn.Module, inputs: JsonObject, *args: object, **kwargs: object) -> Tensor:
        """The loss of the last forward; those before it (stage.micro_batch_tokens) have had their backward pass."""
        *earlier, last = (inputs | {"episodes": part, "part": each} for each, part in enumerate(inputs["episodes"]))
        done = torch.zeros((), device=self.accelerator.device)
        for part in earlier:
            with self.accelerator.no_sync(model):
                loss: Tensor = super().compute_loss(model, part, *args, **kwargs)
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            done = done + loss.detach()
        loss = super().compute_loss(model, last, *args, **kwargs)
        return loss + done

    def _roll_out(self, number: int) -> None:
        """Complete the rollout's prompts, score the completions and estimate their advantages."""
        self.check_weights()  # generation would fail on NaN without saying why
        plan, rank = self.plan, self.accelerator.process_index
        chosen = prompts_of_rollout(plan, self.args.seed, number)[rank * plan.per_process :][: plan.per_process]
        with self.seeded(f"{self.args.seed} {number} {rank}"):
            self._buffer = self._generate_and_score_completions([self.rows[index] for index in chosen])
        self._buffer_number = number
        self._divide(number)

    def _divide(self, number: int) -> None:
        """Divide the rollout's episodes into mini-batches, and these, sorted by length, into forwards.

        Each mini-batch's loss is a mean over its tokens, whatever the batch size and number of processes; all processes
        make equally many forwards.
        """
        assert self._buffer is not None
        plan, lengths = self.plan, self._buffer.lengths
        said, size = self._buffer.completion_mask.sum(-1).tolist(), plan.accumulation * plan.batch_size
        counts, batches = [], []
        for each in range(plan.passes):
            order = episode_order(plan, self.args.seed, number, each, self.accelerator.process_index)
            parts = [order[start : start + size] for start in range(0, len(order), size)]
            counts.append([float(sum(said[episode] for episode in part)) for part in parts])
            batches += [batch for part in parts for batch in by_length(lengths, plan.batch_size, part)]
        self._tokens = self.summed(torch.tensor(counts)).tolist()
        room = self.args.stage.micro_batch_tokens or plan.batch_size * max(lengths)
        mine = torch.tensor([[len(split(batch, lengths, room, self.packs)) for batch in batches]])
        most = self.accelerator.gather(mine.to(self.accelerator.device)).amax(0).tolist()
        self._forwards = [
            split(batch, lengths, room, self.packs, least) for batch, least in zip(batches, most, strict=True)
        ]

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

    def _tokenize_prompts(self, prompts: list[PromptRow]) -> tuple[list[list[int]], None, JsonObject]:
        """As they were encoded with the data: TRL would tokenise the rendered text as a whole, special tokens twice."""
        return [list(prompt["ids"]) for prompt in prompts], None, {}

    def _generate(self, prompts: list[PromptRow]) -> tuple[list[list[int]], list[list[int]], list[list[Message]]]:
        """TRL's generation from ready ids; completions come back as messages."""
        prompt_ids, completion_ids, texts = super()._generate([{"ids": row["prompt_ids"]} for row in prompts])
        return prompt_ids, completion_ids, [[{"role": "assistant", "content": text}] for text in texts]

    def _generate_single_turn(self, *args: object, **kwargs: object) -> list[list[int]]:
        # as in training, where accelerate does it for the module as a whole
        half = half_weights(self.accelerator.unwrap_model(self.model).policy, self.args, self.shards)
        batched = self.use_transformers_continuous_batching
        with half if batched else nullcontext(), self.accelerator.autocast(), vllm.reaching(self.server):
            found: list[list[int]] = super()._generate_single_turn(*args, **kwargs)
        return found

    def _generate_and_score_completions(self, inputs: list[PromptRow]) -> RolloutBuffer:
        # 1. sample a completion of each prompt
        prompt_ids, completion_ids, completions = self._generate(inputs)
        buffer = self._buffer_of(prompt_ids, completion_ids)
        mask = buffer.completion_mask
        # 2. what the policy and the reference make of each token
        entropy = self.estimate(buffer)
        reference = self.reference_logps(buffer) * mask if self.args.stage.needs_kl else buffer.logps
        if self.args.stage.kl_in_loss:
            buffer.ref_logps = reference
        k1, k3 = (losses.kl_estimate(buffer.logps, reference, kind) * mask for kind in ("k1", "k3"))
        # 3. what the completions are worth
        prompts = [row["prompt"] for row in inputs]
        per_function = self.rewards_of(inputs, prompts, completions, completion_ids)
        scores = (per_function * self.reward_weights.to(mask.device)).nansum(1)
        ended = torch.tensor([row[-1] in self.eos_token_ids for row in completion_ids], device=mask.device)
        shaped = self._shape(scores, mask.sum(-1), ended)
        # 4. which tokens are to become more likely
        weights, sampled = self._compare_sampler(buffer)
        own = self.credit(buffer, Episodes(scores, shaped, k1, k3, entropy, weights)) | sampled
        # 5. report
        per_episode = torch.stack(
            [scores, shaped, k1.sum(-1), k3.sum(-1), mask.sum(-1).float(), ended.float(), (entropy * mask).sum(-1)],
            dim=1,
        )
        numbers = self._report(per_episode, per_function) | own
        traces = buffer.traces(self._tokenizer, k1 if self.args.stage.needs_kl else None, KEPT)
        self._finish_rollout(numbers, prompts, completions, per_function, per_episode, traces)
        return buffer

    def _buffer_of(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> RolloutBuffer:
        padding = self._tokenizer.pad_token_id

        def padded(rows: list[list[int]], value: int, side: str) -> Tensor:
            found: Tensor = pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side)
            return found.to(self.accelerator.device)

        return RolloutBuffer(
            prompt_ids=padded(prompt_ids, padding, "left"),
            prompt_mask=padded([[1] * len(row) for row in prompt_ids], 0, "left"),
            completion_ids=padded(completion_ids, padding, "right"),
            completion_mask=padded([[1] * len(row) for row in completion_ids], 0, "right"),
            **dict.fromkeys(("logps", "values", "advantages", "returns"), torch.empty(0)),
        )

    def _compare_sampler(self, buffer: RolloutBuffer) -> tuple[Tensor, dict[str, float]]:
        """What each token weighs, (E, C), and how far vLLM's log-probabilities are from the trainer's, in nats."""
        mask, cap = buffer.completion_mask, self.args.stage.vllm_importance_sampling_cap
        if self.sampler is None:
            return mask, {}
        apart = (buffer.logps - self.sampler.logps).abs() * mask
        sums = torch.stack([apart.sum(), (apart > VLLM_TOKEN).sum(), mask.sum()])
        total, beyond, tokens = self.summed(sums).tolist()
        numbers = {
            "vllm_difference": total / tokens,
            "vllm_difference_max": float(self.accelerator.gather(apart.max()).max()),
            "vllm_tokens_beyond": beyond / tokens,
        }
        weights = mask if cap is None else losses.importance_weights(buffer.logps, self.sampler.logps, mask, cap)
        return weights, numbers

    def rewards_of(
        self,
        inputs: list[PromptRow],
        prompts: list[list[Message]],
        completions: list[list[Message]],
        completion_ids: list[list[int]],
    ) -> Tensor:
        """TRL's reward plumbing: this process's (episodes, functions), NaN where a function does not apply.

        Raises:
            PosttrainError: a reward is infinite or too large to compute with, or no function applies to a completion.
        """
        everything: Tensor = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        weights = self.reward_weights.to(everything.device).abs() / min(self.args.stage.reward_scale, 1)
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
                f"the reward is not a finite number for {int(without.sum())} of {len(everything)} completions at step "
                f"{self.state.global_step} ({names}); nothing was learned from them"
            )
        start = self.accelerator.process_index * len(prompts)
        return everything[start : start + len(prompts)]

    def _shape(self, scores: Tensor, lengths: Tensor, ended: Tensor) -> Tensor:
        """The score of each episode as it is learned from: scaled, clipped, less what length and a missing end cost."""
        stage = self.args.stage
        shaped = scores / stage.reward_scale
        if stage.reward_clip is not None:
            shaped = shaped.clamp(-stage.reward_clip, stage.reward_clip)
        return shaped - stage.length_penalty * lengths - stage.missing_eos_penalty * (~ended)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        found: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return found

    def _report(self, per_episode: Tensor, per_function: Tensor) -> dict[str, float]:
        """The rollout's numbers over all processes."""
        gathered = self.accelerator.gather(per_episode)
        score, shaped, k1, k3, length, ended, entropy = gathered.unbind(1)
        by_function = self.accelerator.gather(per_function)
        numbers = {
            "reward": float(score.mean()),
            "reward_std": float(score.std(unbiased=False)),
            "shaped_reward": float(shaped.mean()),
            "entropy": float(entropy.sum() / length.sum()),
            "response_length": float(length.mean()),
            "ended_by_eos": float(ended.mean()),
        }
        if len(self.reward_func_names) > 1:
            means = by_function.nanmean(0).tolist()
            numbers |= {f"reward/{name}": mean for name, mean in zip(self.reward_func_names, means, strict=True)}
        if self.args.stage.needs_kl:
            paid = self.kl_controller.coef
            self.kl_controller.update(float(k1.mean()), len(gathered))
            numbers |= {
                "kl": float(k1.mean()),
                "kl_error": float(k1.std(unbiased=False)) / len(k1) ** 0.5,
                "kl_k3": float(k3.mean()),
                # what this rollout is learned with: a term of the loss comes after the update
                "kl_coef": self.kl_controller.coef if self.args.stage.kl_in_loss else paid,
            }
        self.trained_tokens += int(length.sum())
        return numbers

    def _finish_rollout(
        self,
        numbers: dict[str, float],
        prompts: list[list[Message]],
        completions: list[list[Message]],
        per_function: Tensor,
        per_episode: Tensor,
        traces: list[Trace],
    ) -> None:
        samples = [
            {
                "prompt": prompt,
                "answer": completion[0]["content"],
                "reward": float(row[0]),
                "kl": float(row[2]) if self.args.stage.needs_kl else None,
                "tokens": int(row[4]),
                "ended": bool(row[5]),
                "trace": trace,
            }
            | (dict(zip(self.reward_func_names, each.tolist(), strict=True)) if len(each) > 1 else {})
            for trace, prompt, completion, row, each in zip(
                traces, prompts[:KEPT], completions[:KEPT], per_episode[:KEPT], per_function[:KEPT], strict=True
            )
        ]
        # for TRL's tables of completions (trainer.log_completions)
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        self._logs["advantages"].extend(per_episode[:, 1].tolist())
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(per_function[:, index].tolist())
        number = self._step // self.plan.micro_steps_per_rollout
        self._metrics["train"].clear()  # what TRL counts of a generation is among our numbers
        self.on_rollout(self, Rollout(number, numbers, samples))
        self.log(dict(numbers))

    # -- the reference

    @contextmanager
    def reference(self) -> Iterator["PreTrainedModel"]:
        """The reference: the frozen copy, or the policy with all adapters off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        with self.unwrapped_model() as policy, active_adapter(adapter_layers(policy), None):
            yield policy

    def reference_logps(self, buffer: RolloutBuffer) -> Tensor:
        """log π_ref of each token of the completions, (E, C)."""
        with self.reference() as model:
            return self.in_batches(buffer, lambda inputs: log_probs(model, **inputs, temperature=self.temperature))[0]

    def inputs_of(self, buffer: RolloutBuffer) -> Inputs:
        """What a forward pass over the episodes takes: see `laid_out`; packed where that is less work."""
        return laid_out(buffer, self.packs(buffer.lengths))

    def packs(self, lengths: Sequence[int]) -> bool:
        """Whether a forward over episodes of these lengths packs them into one row."""
        config = self.model.config
        quadratic = "flash" not in str(config._attn_implementation)
        return self.keeps_apart and packing_pays(lengths, config.get_text_config().hidden_size, quadratic)

    @property
    def wider(self) -> int:
        """Episodes in a forward without gradients."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return wider(self.args.stage, vocabulary, self.accelerator.device.type == "cpu")

    def in_batches(self, buffer: RolloutBuffer, forward: Callable[[Inputs], Sequence[Tensor]]) -> list[Tensor]:
        """What `forward` gives for the whole buffer, (E, C) each, computed for episodes of like lengths at a time."""
        mask, found = buffer.completion_mask, []
        batches = by_length(buffer.lengths, self.wider)
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast():
                output = forward(self.inputs_of(buffer.take(batch)))
            found.append([spread(each.float(), mask[batch]) for each in output])
        place = torch.tensor([episode for batch in batches for episode in batch]).argsort().to(mask.device)
        return [torch.cat(each)[place] for each in zip(*found, strict=True)]

    def measure(self) -> dict[str, float]:
        """Numbers of completions sampled to held-out prompts."""
        metrics = {f"eval_{name}": value for name, value in self.held_out(self).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """With the generators' states, on every process: the rollout."""
        super()._save_rng_state(output_dir)
        if self._buffer is not None:
            self._buffer.save(Path(output_dir) / BUFFER.format(self.accelerator.process_index))

    def running(self) -> JsonObject:
        """And how far the passes over the rollout have come."""
        return super().running() | {
            "rollout": self._buffer_number,
            "ended_rollout": self.ended_rollout,
            "keeps_apart": self.keeps_apart,
            "kl_coef": self.kl_controller.coef,
            "trained_tokens": self.trained_tokens,
            "forward_passes": self._step,
        }

    def resume(self, running: JsonObject, checkpoint: Path) -> None:
        file = checkpoint / BUFFER.format(self.accelerator.process_index)
        self._buffer = RolloutBuffer.load(file, self.accelerator.device) if file.is_file() else None
        self._buffer_number, self.keeps_apart = running["rollout"], running.get("keeps_apart", False)
        self.kl_controller.coef = running["kl_coef"]
        self.trained_tokens, self._step = running["trained_tokens"], running["forward_passes"]
        self.ended_rollout = running.get("ended_rollout", -1)
        if self._buffer_number >= 0 and (wrote := processes_of(checkpoint)) != self.accelerator.num_processes:
            files = [checkpoint / BUFFER.format(process) for process in range(wrote)]
            whole = RolloutBuffer.joined([RolloutBuffer.load(file, self.accelerator.device) for file in files])
            start = self.accelerator.process_index * self.plan.per_process
            self._step = self.state.global_step * self.plan.accumulation
            self._buffer = whole.take(range(start, start + self.plan.per_process))
        if self._buffer is not None:
            self._divide(self._buffer_number)
        super().resume(running, checkpoint)
