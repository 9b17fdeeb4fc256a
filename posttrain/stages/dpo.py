"""Direct preference optimisation: TRL's DPOTrainer, its reference proven to be the model that it starts from."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config
from posttrain.console import say, warn
from posttrain.errors import PosttrainError
from posttrain.models.generate import ANSWERED, answer, completion_kl, completion_logps, generate, share_ended
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import Judgement, Prepared, Stage, Work, load_policy
from posttrain.stages.reward import prepare_pairs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KL_ANSWERS = 64  # held-out prompts answered to estimate KL after training; a quarter of them during it
STEP_0_ROWS = 8
# |log π - log π_ref| at step 0, in nats per answer: fp32 rounding, and that of half precision
STEP_0_TOLERANCE = {"no": 1e-3, "bf16": 0.5, "fp16": 0.1}


def compute_dpo_loss(
    policy_chosen_logps: "torch.Tensor",
    policy_rejected_logps: "torch.Tensor",
    reference_chosen_logps: "torch.Tensor",
    reference_rejected_logps: "torch.Tensor",
    beta: float,
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """The DPO loss of each pair and the implicit rewards of its answers.

    All arguments are log π(y|x), summed over the tokens of the answer, of shape (pairs). Returned are, of the same
    shape, -log σ(r_chosen - r_rejected) and the rewards r = β (log π(y|x) - log π_ref(y|x)): equations 7 and 5 of
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.
    """
    import torch

    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -torch.nn.functional.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def build(
    config: Config, prepared: Prepared, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> Any:
    """The trainer: TRL's, with our checkpoints, our rows, and the reference read from where the policy was."""
    import torch
    from torch.utils.data import DataLoader
    from trl import DPOConfig, DPOTrainer
    from trl.models import prepare_deepspeed

    from posttrain.runs.safe_trainer import SafeTrainer

    class Trainer(SafeTrainer, DPOTrainer):
        live: Any = None  # (metrics of TRL) -> ours, set when the run's panel is known
        start: Any = None  # held-out log-probabilities of chosen and rejected answers at the start

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # encoded already

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            """On every process, in memory: TRL's file is where the first process alone finds it (TRL 1.16)."""
            loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
            whole = self.ref_model or self.model
            if self.ref_model is None and self.is_deepspeed_enabled:
                whole = prepare_deepspeed(self.model, self.accelerator)
            found = [
                self.accelerator.gather_for_metrics(self.compute_ref_log_probs(whole, batch))
                for batch in self.accelerator.prepare_data_loader(loader)
            ]
            for side, logps in zip(("chosen", "rejected"), zip(*found, strict=True), strict=True):
                dataset = dataset.add_column(f"ref_{side}_logps", torch.cat(logps).float().tolist())
            return dataset

        def held_out_weight(self, name: str, inputs: dict[str, Any]) -> float:
            # what TRL takes over the tokens of answers; all else over pairs
            chosen, rejected = (float(half.sum()) for half in inputs["completion_mask"][:, 1:].chunk(2))
            tokens = {"logits/chosen": chosen, "mean_token_accuracy": chosen, "logits/rejected": rejected}
            return (tokens | {"entropy": chosen + rejected}).get(name, super().held_out_weight(name, inputs))

        def measure(self) -> dict[str, float]:
            metrics: dict[str, float] = super().measure()
            if self.live is not None:
                metrics |= self.live(metrics)
            return metrics

        def running(self) -> dict[str, Any]:
            return super().running() | {"start": self.start}

        def resume(self, running: dict[str, Any], checkpoint: Path) -> None:
            self.start = running["start"]
            super().resume(running, checkpoint)

    arguments = trainer_arguments(config, folder, prepared.test is not None)
    own_reference = not config.model.use_peft and not arguments.get("precompute_ref_log_probs")
    path = str(model.config._name_or_path)
    if config.model.use_peft:
        say(f"policy = {path} with a new adapter\nreference = {path}, the adapter switched off (one model in memory)")
    elif own_reference:
        say(f"policy = {path}, all weights\nreference = {path}, a frozen copy (two models in memory)")
    else:
        say(f"policy = {path}, all weights\nreference = {path}, its log-probabilities taken once (one model in memory)")
    return Trainer(
        model=model,
        ref_model=load_causal_lm(config.model, tokenizer, path) if own_reference else None,
        args=trl_config(DPOConfig, arguments),
        train_dataset=prepared.train.dataset,
        eval_dataset=prepared.test.dataset if prepared.test else None,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, model),
    )


def reference(work: Work) -> Callable[[], AbstractContextManager["PreTrainedModel"]]:
    """Opens the reference: the adapter switched off, the frozen copy, or else the starting weights read anew."""
    from accelerate.utils import is_peft_model

    trainer = work.trainer
    policy = trainer.trained()
    if is_peft_model(policy):

        @contextmanager
        def adapter_off() -> Iterator["PreTrainedModel"]:
            with policy.disable_adapter():
                yield policy

        return adapter_off
    frozen = trainer.ref_model
    if frozen is not None:
        frozen = trainer.accelerator.unwrap_model(frozen)
    else:
        frozen = load_causal_lm(work.config.model, work.prepared.encoder.tokenizer, work.base).to(policy.device).eval()
    return lambda: nullcontext(frozen)


def preflight(work: Work) -> None:
    """At step 0 policy and reference agree and the loss is ln 2.

    Raises:
        PosttrainError: they do not; names what is usually behind it.
    """
    import torch

    trainer = work.trainer
    policy = trainer.trained()
    rows = [trainer.train_dataset[index] for index in range(min(STEP_0_ROWS, len(trainer.train_dataset)))]
    prompts, chosen = ([row[name] for row in rows] for name in ("prompt_ids", "chosen_ids"))
    pad = work.prepared.encoder.tokenizer.pad_token_id
    tolerance = STEP_0_TOLERANCE[trainer.rounds_as]
    policy.eval()
    ours = completion_logps(policy, prompts, chosen, pad)
    with reference(work)() as model:
        theirs = completion_logps(model, prompts, chosen, pad)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(trainer.model, batch))
    trainer._metrics["eval"].clear()
    difference = float((ours - theirs).abs().max())
    plain = trainer.loss_types == ["sigmoid"] and not trainer.use_weighting and trainer.aux_loss_enabled is False
    if difference <= tolerance and (not plain or abs(loss - math.log(2)) <= tolerance):
        said = f", first loss {loss:.6f} (ln 2 = {math.log(2):.6f})" if plain else ""
        say(f"step 0: policy and reference agree within {difference:.1e} nats{said}")
        return
    raise PosttrainError(
        "the reference is not the model that this stage starts from: at step 0 their log-probabilities differ by up "
        f"to {difference:.3g} nats and the loss is {loss:.6f}, not ln 2 = {math.log(2):.6f}. Usual causes: the weights "
        f"in {work.base} changed while they were read, dropout is on, or policy and reference differ in precision"
    )


class _Live:
    """What only a look at generated answers and at the start can tell, computed at every evaluation."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.told = False

    def __call__(self, metrics: dict[str, float]) -> dict[str, float]:
        chosen, rejected = metrics["eval_logps/chosen"], metrics["eval_logps/rejected"]
        trainer = self.work.trainer
        trainer.start = trainer.start or (chosen, rejected)
        fall, others = chosen - trainer.start[0], rejected - trainer.start[1]
        found = {"eval_chosen_logp_change": fall, "eval_rejected_logp_change": others}
        found |= sample_kl(self.work, KL_ANSWERS // 4)
        trainer.log(dict(found))
        if fall < -1 and not self.told:
            self.told = True
            warn(
                f"chosen answers have become less likely ({fall:+.1f} nats since the start, rejected ones "
                f"{others:+.1f}): DPO only widens the gap between the two. If answers get worse, add the chosen "
                "answers' own likelihood: +trainer.loss_type=[sigmoid,sft] +trainer.loss_weights=[1.0,0.2], "
                f"or hold on to the reference: stage.beta={self.work.config.stage.beta * 3:g}"
            )
        return found


def sample_kl(work: Work, count: int) -> dict[str, float]:
    """KL(π‖π_ref) in nats per answer, estimated on answers that the policy samples to held-out prompts.

    The mean over answers y ~ π of the sum over positions of KL(π(·|x, y<t)‖π_ref(·|x, y<t)), each exact: unbiased,
    of less variance than log π(y|x) - log π_ref(y|x), never negative, and 0 while the two agree. The generators of
    the run are left as they were.
    """
    import torch

    rows = work.panel[:count]
    if not rows:
        return {}
    trainer, encoder = work.trainer, work.prepared.encoder
    policy = trainer.trained()
    training = policy.training
    policy.eval()
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(work.config.seed)
        made = generate(policy, encoder, rows, work.new_tokens, temperature=1.0)
    kl = completion_kl(policy, reference(work), made.prompts, made.completions, encoder.tokenizer.pad_token_id)
    policy.train(training)
    return {
        "eval_kl": float(kl.mean()),
        "eval_response_length": fmean(len(completion) for completion in made.completions),
    }


def judge(work: Work) -> Judgement:
    """Held-out accuracy and margin over rows, KL from the reference, and the prompt panel."""
    trainer, prepared = work.trainer, work.prepared
    policy = trainer.trained()
    answers = answer(policy, prepared.encoder, work.panel[:ANSWERED], work.new_tokens)
    metrics: dict[str, float] = {"ended_by_eos": share_ended(answers)}
    if prepared.test is None:
        return Judgement(metrics, answers)
    if trainer.live is None:
        trainer.live = _Live(work)
    metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    held, pad = prepared.test.dataset, prepared.encoder.tokenizer.pad_token_id
    policy.eval()
    logps = {
        side: completion_logps(policy, held["prompt_ids"], held[side], pad) for side in ("chosen_ids", "rejected_ids")
    }
    if trainer.state.global_step == 0:
        trainer.start_logps = logps  # the reference's, too: they have been found to agree
    _, chosen, rejected = compute_dpo_loss(
        logps["chosen_ids"],
        logps["rejected_ids"],
        trainer.start_logps["chosen_ids"],
        trainer.start_logps["rejected_ids"],
        work.config.stage.beta,
    )
    margins = chosen - rejected
    metrics |= {
        # of the policy at the start all pairs are ties
        "accuracy": float((margins > 0).float().mean()) if margins.any() else math.nan,
        "ties": int((margins == 0).sum()),
        "reward_margin": float(margins.mean()),
        "chosen_logp_change": float((logps["chosen_ids"] - trainer.start_logps["chosen_ids"]).mean()),
        "rejected_logp_change": float((logps["rejected_ids"] - trainer.start_logps["rejected_ids"]).mean()),
    }
    sampled = sample_kl(work, KL_ANSWERS)
    return Judgement(metrics | {name.removeprefix("eval_"): value for name, value in sampled.items()}, answers)


STAGE = Stage(
    prepare=prepare_pairs,
    load=load_policy,
    build=build,
    preflight=preflight,
    judge=judge,
    objective="accuracy",
    shown={
        "eval_loss": "held-out loss",
        "accuracy": "held-out accuracy",
        "reward_margin": "reward margin",
        "chosen_logp_change": "chosen answers: log-probability since the start",
        "rejected_logp_change": "rejected answers: log-probability since the start",
        "kl": "KL from the reference (nats per answer)",
        "response_length": "response length (tokens)",
        "ended_by_eos": "answers ended by the model itself",
    },
    swept={
        "accuracy": "held-out accuracy",
        "reward_margin": "reward margin",
        "kl": "KL from reference",
        "eval_loss": "held-out loss",
    },
)
