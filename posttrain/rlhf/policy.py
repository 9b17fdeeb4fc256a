"""A policy that learns from its rollouts by clipped probability ratios, perhaps with a critic; and its checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME

from posttrain.rlhf import losses
from posttrain.rlhf.critic import POLICY, Estimates, PolicyAndValue, ValueNetwork
from posttrain.rlhf.online import OnlineConfig, OnlineTrainer
from posttrain.rlhf.ptx import InstructionRows
from posttrain.rlhf.rollout import RolloutBuffer, spread
from posttrain.runs.sharding import tie
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
MakeCritic = Callable[["PreTrainedModel"], ValueNetwork | None]


class PolicyTrainer(OnlineTrainer):
    """Updates of a policy by the clipped probability ratios of its completions' tokens.

    `value` makes the critic, if there is one, out of the policy as it is after TRL has wrapped it; `ptx` are
    instruction rows that the policy learns beside; all else as in `OnlineTrainer`.
    """

    detached = False  # whether the critic's gradient is kept out of the policy's own states

    def __init__(
        self, *, value: MakeCritic, args: OnlineConfig, ptx: InstructionRows | None = None, **options: Any
    ) -> None:
        super().__init__(args=args, **options)
        self.ptx = ptx
        self.model = PolicyAndValue(self.model, value(self.model), self.temperature, args.stage.entropy_coef > 0)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):  # RLOO has looked at the policy alone
                module.p = 0.0
        if not self.shards:  # an engine takes its shares from the CPU
            self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self.model
        self.model.train()

    @contextmanager
    def unwrapped_model(self, **options: object) -> "Iterator[PreTrainedModel]":
        """The policy, which is what the stage leaves behind."""
        with self.policy_and_value(**options) as both:
            yield both.policy

    @contextmanager
    def policy_and_value(self, **options: object) -> Iterator[PolicyAndValue]:
        """Policy and critic, to be called; as `unwrapped_model` for both."""
        with super().unwrapped_model(**options) as both:
            yield both

    # -- rollouts

    def estimates(self, buffer: RolloutBuffer) -> Estimates:
        """Policy and critic as they are now, without gradients."""
        return Estimates(*self.in_batches(buffer, lambda inputs: self.model(**inputs)[:3]))

    def estimate(self, buffer: RolloutBuffer) -> Tensor:
        now = self.estimates(buffer)
        buffer.logps, buffer.values = now.logps * buffer.completion_mask, now.values * buffer.completion_mask
        return now.entropy

    # -- updates

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        """Skips what is left of a rollout whose KL(π_old‖π) an update has found above stage.target_kl.

        Weights without gradients are left alone by PyTorch's optimizers, and so are their moments.
        """
        target, number = self.args.stage.target_kl, self._step // self.plan.micro_steps_per_rollout
        skipped, metrics = number == self.ended_rollout, self._metrics["train"]
        if skipped:
            self._step += 1
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(*args, **kwargs)
        if target is not None:
            metrics["skipped_updates"].append(float(skipped))
            passes, is_last = self.plan.accumulation, self._step % self.plan.accumulation == 0
            # the update's mean, the same on all processes
            if not skipped and is_last and fmean(metrics["approx_kl"][-passes:]) > target:
                self.ended_rollout = number
        return loss

    def objective(self, policy: losses.PolicyLoss, now: Estimates, buffer: RolloutBuffer, tokens: float) -> Tensor:
        """What the policy minimises, such that the sum over a mini-batch divided by its `tokens` is the loss."""
        return policy.loss

    def with_critic(self, loss: Tensor, now: Estimates, buffer: RolloutBuffer, each: dict[str, Tensor]) -> Tensor:
        """The policy's loss and the critic's, both summed over tokens; what is to be reported goes into `each`."""
        return loss

    def _compute_loss(self, model: nn.Module, inputs: JsonObject) -> Tensor:
        stage, buffer, tokens = self.args.stage, inputs["episodes"], inputs["tokens"]
        mask = buffer.completion_mask
        processes, accumulation = self.accelerator.num_processes, self.plan.accumulation
        ptx = None
        if self.ptx is not None and inputs["part"] == 0:
            share = self._step % accumulation * processes + self.accelerator.process_index
            ptx = self.ptx.batch(self.state.global_step, share, accumulation * processes, mask.device)
        instructions = None if ptx is None else ptx.inputs
        said = model(**self.inputs_of(buffer), detached=self.detached, instructions=instructions)
        now = Estimates(*(spread(each, mask) for each in said[:3]))
        clips = (stage.clip_ratio, stage.clip_ratio_high, stage.dual_clip)
        policy = losses.policy_loss(now.logps, buffer.logps, buffer.advantages, mask, *clips)
        each = {"policy_loss": self.objective(policy, now, buffer, tokens)}
        each |= {"clip_fraction": policy.clipped, "approx_kl": policy.approx_kl}
        loss: Tensor = each["policy_loss"].sum() - stage.entropy_coef * (now.entropy * mask).sum()
        if ptx is not None:  # a mean over tokens of its own
            each["ptx_loss"] = -said.instructions * (tokens / ptx.tokens)
            loss = loss + stage.ptx_coef * each["ptx_loss"].sum()
        # processes are averaged over by DDP, forward passes by the Trainer: undone, to give a mean over tokens
        loss = self.with_critic(loss, now, buffer, each) * (processes * accumulation / tokens)
        with torch.no_grad():
            sums = torch.stack([values.sum() for values in each.values()])
            means = self.summed(sums.detach()) * accumulation / tokens
        for name, mean in zip(each, means.tolist(), strict=True):
            noted = self._metrics["train"][name]
            if inputs["part"] == 0:
                noted.append(0.0)
            noted[-1] += mean
        return loss

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """What is trained, of policy and critic."""
        from safetensors.torch import save_file

        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.accelerator.unwrap_model(self.model).trained_weights()
        if state_dict is not None:
            trained = {name: state_dict[name] for name in trained}
        save_file({name: weight.detach().cpu().contiguous() for name, weight in trained.items()}, folder / WEIGHTS)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as a model folder, or its adapter; for a checkpoint everything that is trained."""
        if _internal_call:
            if self.is_fsdp_enabled:
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(output_dir, _internal_call=True)
            return
        options: JsonObject = {}
        policy = self.accelerator.unwrap_model(self.model).policy
        if self.shards:
            state = self.accelerator.get_state_dict(self.model_wrapped) or {}  # ZeRO-3 gives it to process 0 alone
            options["state_dict"] = {
                name.removeprefix("policy."): weight for name, weight in state.items() if name.startswith("policy.")
            }
            tie(options["state_dict"], policy)
        if self.args.should_save:
            if hasattr(policy, "peft_config"):
                options["selected_adapters"] = [POLICY]
            policy.save_pretrained(output_dir, **options)
            self.processing_class.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would write all weights besides, those of the base under adapters too
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(self.model).load_trained(Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._evaluated = (-1, {})  # those were other weights
            self._load_from_checkpoint(str(self.best_checkpoint()))
