"""Direct preference optimisation: TRL's DPOTrainer, its reference proven to be the model that it should be."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from posttrain.config.schema import Config, ModelConfig
from posttrain.config.stages import DPOStage, KTOStage, other_models
from posttrain.console import say, warn
from posttrain.data.encode import PairEncoding
from posttrain.data.formats import preferences
from posttrain.data.splits import Example
from posttrain.devices import on_all_processes
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics.catalogue import of_sets
from posttrain.metrics.report_card import wilson
from posttrain.models.generate import COMPLETED, complete, completion_kl, completion_logps, generate, share_ended
from posttrain.models.load import load_causal_lm, load_tokenizer, load_whole
from posttrain.models.lora import lora_config
from posttrain.models.meta import Batch, Holdings, fuse_head, hold_model, meta_model, weight_bytes
from posttrain.models.resolve import beside, naming
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.stages.base import (
    DataSources,
    EvalResult,
    Stage,
    StageContext,
    StageData,
    load_policy,
    plan_steps,
    prepare_rows,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from posttrain.stages.trainers import DPOTrainer, ReferenceTrainer

T = TypeVar("T", bound="ReferenceTrainer")
KL_COMPLETIONS = 64  # held-out prompts completed to estimate KL before and after training; a quarter during it
# what is shown before and after: its key in an evaluation
EVALUATED = {
    "eval_loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "reward_margin": "eval_rewards/margins",
    **{name: f"eval_{name}" for name in ("chosen_logp_change", "rejected_logp_change", "kl", "response_length")},
}
STEP_0_ROWS = 8
# |log π - log π_ref| at step 0, in nats per completion: fp32 rounding, and that of half precision
STEP_0_TOLERANCE = {"no": 1e-3, "bf16": 0.5, "fp16": 0.1}


def compute_dpo_loss(
    policy_chosen_logps: "torch.Tensor",
    policy_rejected_logps: "torch.Tensor",
    reference_chosen_logps: "torch.Tensor",
    reference_rejected_logps: "torch.Tensor",
    beta: float,
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """The DPO loss of each pair and the implicit rewards of its completions.

    All arguments are log π(y|x), summed over the tokens of the completion, of shape (pairs). Returned are, of the same
    shape, -log σ(r_chosen - r_rejected) and the rewards r = β (log π(y|x) - log π_ref(y|x)): equations 7 and 5 of
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.
    """
    import torch

    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -torch.nn.functional.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """Read and encode the preference rows, each completion one message."""
    encoding = partial(PairEncoding, learns_tokens=True, min_margin=config.data.min_margin)
    return prepare_rows(config, tokenizer, sources, preferences, encoding)


def named_reference(config: Config) -> ModelConfig | None:
    """The settings of the model that stage.reference names; None where the reference is what the stage starts from."""
    name = other_models(config.stage).get("reference")
    return None if name is None else beside(config.model, name)


def check_reference(settings: ModelConfig, config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The model that stage.reference names has the policy's tokens.

    Raises:
        ConfigError: it has others.
    """
    with naming("stage.reference"):
        vocabulary = load_tokenizer(settings)[0].get_vocab()
    if vocabulary != (ours := tokenizer.get_vocab()):
        raise ConfigError(
            f"stage.reference={settings.start} has another tokenizer than {config.model.start}: {len(vocabulary):,} "
            f"and {len(ours):,} tokens, {len(vocabulary.items() - ours.items()):,} of them others; name a model with "
            "the same one, such as that which the policy was trained from"
        )


def load_reference(settings: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The model that stage.reference names, read from where it is."""
    with naming("stage.reference"):
        return load_whole(settings, tokenizer)


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """The policy, and the reference that scores the same batch: the policy without its adapter, or a frozen copy."""
    import torch

    held, named = hold_model(config, tokenizer), named_reference(config)
    if named is not None:
        check_reference(named, config, tokenizer)
    if config.trainer.get("precompute_ref_log_probs") and named is None:
        return held
    frozen = held.trained
    if not config.model.use_peft or named is not None:
        settings = named or config.model
        with naming("stage.reference" if named else "model.model_name_or_path"):
            frozen = meta_model(settings, False, len(tokenizer))
        fuse_head(frozen)
        held.modules.append(frozen)
        held.held.append(("reference (frozen copy)", weight_bytes(frozen, settings)))

    def loss(batch: Batch, completion: int) -> "torch.Tensor":
        output = held.trained(**batch, labels=batch["input_ids"], fused_lm_head=True)
        with torch.no_grad():
            fixed = frozen(**batch, labels=batch["input_ids"], fused_lm_head=True)
        difference: torch.Tensor = (output.log_probs - fixed.log_probs).sum()
        return difference

    return replace(held, loss=loss)


def build(context: StageContext, model: "PreTrainedModel") -> "DPOTrainer":
    """The trainer, its reference read from where the policy was, or from stage.reference."""
    from trl import DPOConfig

    from posttrain.stages.trainers import DPOTrainer

    return build_as(DPOTrainer, DPOConfig, context, model)


def build_as(
    trainer: type[T], arguments: Callable[..., "TrainingArguments"], context: StageContext, model: "PreTrainedModel"
) -> T:
    """A trainer of a policy and its reference, as one of this class."""
    config, data, tokenizer = context.config, context.data, context.tokenizer
    given = trainer_arguments(config, context.folder.path, data.test is not None)
    lora, path, named = config.model.use_peft, str(model.config._name_or_path), named_reference(config)
    frozen, origin = None, f"{path}, {'the adapter switched off' if lora else 'its log-probabilities taken once'}"
    if named is not None:
        check_reference(named, config, tokenizer)
        frozen, origin = load_reference(named, tokenizer), f"{named.start} (stage.reference), a frozen copy"
    elif not lora and not given.get("precompute_ref_log_probs"):
        frozen, origin = load_causal_lm(config.model, tokenizer, path), f"{path}, a frozen copy"
    say(f"policy = {path}{' with a new adapter' if lora else ', all weights'}")
    say(f"reference = {origin} ({'one model' if frozen is None else 'two models'} in memory)")
    return trainer(
        model=model,
        ref_model=frozen,
        args=trl_config(arguments, given),
        train_dataset=data.train.dataset,
        eval_dataset=data.test.dataset if data.test else None,
        named={name: rows.dataset for name, rows in data.named.items()},
        processing_class=tokenizer,
        peft_config=lora_config(config.model, model),
        more_metrics=DPOEvalMetrics(context),
    )


def reference(
    context: StageContext, trainer: "ReferenceTrainer"
) -> Callable[[], AbstractContextManager["PreTrainedModel"]]:
    """Opens the reference: the adapter switched off, the frozen copy, or else the starting weights read again."""
    if context.config.model.use_peft and trainer.ref_model is None:

        @contextmanager
        def adapter_off() -> Iterator["PreTrainedModel"]:
            with trainer.unwrapped_model() as policy, policy.disable_adapter():
                yield policy

        return adapter_off
    frozen = trainer.ref_model
    if frozen is not None:
        frozen = trainer.accelerator.unwrap_model(frozen)
    else:
        frozen = load_causal_lm(context.config.model, context.tokenizer, context.base).to(trainer.args.device).eval()
    return lambda: nullcontext(frozen)


def preflight(context: StageContext, trainer: "ReferenceTrainer") -> None:
    """At step 0 the reference says what the start says, or the model of stage.reference read again; so does the loss.

    Raises:
        PosttrainError: they do not; names what is usually behind it.
    """
    import torch

    from posttrain.stages.trainers import without_router_loss

    count = min(STEP_0_ROWS, len(trainer.train_dataset))
    rows = [trainer.train_dataset[place * len(trainer.train_dataset) // count] for place in range(count)]
    sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    prompts, said = zip(*((prompt, ids) for prompt, ids in sides if ids is not None), strict=True)
    pad, named = context.tokenizer.pad_token_id, named_reference(context.config)
    tolerance = STEP_0_TOLERANCE[trainer.rounds_as]
    trainer.model.eval()
    with trainer.unwrapped_model() as policy:
        ours = completion_logps(policy, prompts, said, pad)
    with reference(context, trainer)() as model:
        theirs = completion_logps(model, prompts, said, pad)
    right = ours
    if named is not None:
        fresh = load_reference(named, context.tokenizer).to(trainer.args.device).eval()
        right = completion_logps(fresh, prompts, said, pad)
        del fresh
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()  # as in the first step: dropout that is still on shows here
    with torch.no_grad(), trainer.compute_loss_context_manager(), without_router_loss(trainer):
        loss = float(trainer.compute_loss(trainer.model, batch))
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    difference = float((right - theirs).abs().max())
    first_loss = trainer.first_loss(rows, ours - right)
    wanted = "" if first_loss is None else f"{first_loss:.6f}" + (" = ln 2" if first_loss == math.log(2) else "")
    if difference <= tolerance and (first_loss is None or abs(loss - first_loss) <= tolerance):
        first = f", first loss {loss:.6f} (in theory {wanted})" if wanted else ""
        both = "policy and reference agree" if named is None else f"the reference agrees with {named.start}"
        say(f"step 0: {both} within {difference:.1e} nats{first}")
        return
    wanted_one = "the model that this stage starts from" if named is None else f"stage.reference={named.start}"
    raise PosttrainError(
        f"the reference is not {wanted_one}: at step 0 their log-probabilities differ by up "
        f"to {difference:.3g} nats{f' and the loss is {loss:.6f}, not {wanted}' if wanted else ''}. Usual causes: the "
        f"weights in {context.base if named is None else named.start} changed while they were read, dropout is on, or "
        "policy and reference differ in precision"
    )


class DPOEvalMetrics:
    """What only sampled completions and the start of a run can tell, computed at every evaluation."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.warned = False

    def __call__(self, trainer: "ReferenceTrainer", metrics: dict[str, float]) -> dict[str, float]:
        chosen, rejected = (metrics.get(f"eval_logps/{kind}", math.nan) for kind in ("chosen", "rejected"))
        trainer.start = trainer.start or (chosen, rejected)
        fall, others = chosen - trainer.start[0], rejected - trainer.start[1]
        more = {"eval_chosen_logp_change": fall, "eval_rejected_logp_change": others}
        at_an_end = trainer.state.global_step in (0, trainer.state.max_steps)
        more |= sample_kl(self.context, trainer, KL_COMPLETIONS if at_an_end else KL_COMPLETIONS // 4)
        trainer.log(dict(more))
        if fall < -1 and not self.warned:
            self.warned = True
            stage = self.context.config.stage
            assert isinstance(stage, DPOStage)
            cause, remedy = (
                "DPO only widens the gap between the two",
                "add the chosen ones' own likelihood: +trainer.loss_type=[sigmoid,sft] +trainer.loss_weights=[1.0,0.2]",
            )
            if isinstance(stage, KTOStage):
                cause = "KTO asks that liked ones gain on its KL term, which may fall as well"
                remedy = f"let them count for more: stage.desirable_weight={stage.desirable_weight * 2:g}"
            warn(
                f"chosen completions have become less likely ({fall:+.1f} nats since the start, rejected ones "
                f"{others:+.1f}): {cause}. If completions get worse, {remedy}, "
                f"or hold on to the reference: stage.beta={stage.beta * 3:g}"
            )
        return more


def sample_kl(context: StageContext, trainer: "ReferenceTrainer", count: int) -> dict[str, float]:
    """KL(π‖π_ref) in nats per completion, estimated on completions that the policy samples to held-out prompts.

    The mean over completions y ~ π of the sum over positions of KL(π(·|x, y<t)‖π_ref(·|x, y<t)), each exact: unbiased,
    of less variance than log π(y|x) - log π_ref(y|x), never negative, and 0 while the two agree.
    """
    if not context.panel:
        return {}
    encoder, frozen = context.data.encoder, reference(context, trainer)

    def share(mine: list[tuple[int, Example]]) -> list[tuple[float, int]]:
        seeds, rows = zip(*mine, strict=True)
        with trainer.unwrapped_model() as policy:
            made = generate(policy, encoder, rows, context.new_tokens, 1.0, seeds)
            kl = completion_kl(policy, frozen, made.prompts, made.completions, encoder.tokenizer.pad_token_id)
        return list(zip(kl.tolist(), map(len, made.completions), strict=True))

    training = trainer.model.training
    trainer.model.eval()
    found = on_all_processes(list(enumerate(context.panel[:count], context.config.seed)), share)
    trainer.model.train(training)
    kl, lengths = zip(*found, strict=True)
    return {"eval_kl": fmean(kl), "eval_response_length": fmean(lengths)}


def evaluate_model(context: StageContext, trainer: "ReferenceTrainer") -> EvalResult:
    """Held-out accuracy and margin over rows, KL from the reference, and the prompt panel."""
    with trainer.unwrapped_model() as policy:
        completions = complete(policy, context.data.encoder, context.panel[:COMPLETED], context.new_tokens)
    metrics = {"ended_by_eos": share_ended(completions)}
    if context.data.test is None:
        return EvalResult(metrics, completions)
    found = trainer.evaluate()
    metrics |= {name: found[key] for name, key in EVALUATED.items() if key in found}
    if trainer.state.global_step == 0 and not other_models(context.config.stage):
        # while policy and reference agree all pairs are ties
        metrics |= dict.fromkeys(("accuracy", *of_sets(["rewards/accuracies"], context.data.named)), math.nan)
    elif "accuracy" in metrics:
        rows = len(context.data.test.dataset)
        metrics["accuracy_low"], metrics["accuracy_high"] = wilson(metrics["accuracy"] * rows, rows)
    return EvalResult(metrics, completions)


STAGE = Stage(
    prepare=prepare,
    plan=plan_steps,
    hold=hold,
    load=load_policy,
    build=build,
    preflight=preflight,
    evaluate_model=evaluate_model,
)
