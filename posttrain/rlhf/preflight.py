"""What must hold before an online stage's first step, checked with the run's model, prompts and generation settings."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.console import say
from posttrain.data.prepared import column_of
from posttrain.errors import PosttrainError
from posttrain.models.generate import by_length
from posttrain.rlhf import losses
from posttrain.rlhf.critic import VALUE, pad_left
from posttrain.rlhf.diagnostics import VLLM_MEAN
from posttrain.rlhf.policy import PolicyTrainer
from posttrain.rlhf.rollout import RolloutBuffer, laid_out

ROWS = 8
NEW_TOKENS = 16
# |log-probability| differences at a token, in nats: rounding, and that of half precision
TOLERANCE = {"no": 1e-3, "bf16": 0.15, "fp16": 0.05}
UNLIKELY = 1.0  # nats per token by which completions may be less likely than those of their policy are
NEUTRAL = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


def check_start(trainer: PolicyTrainer) -> None:
    """At step 0 the ratio is 1, KL is 0, and log-probabilities in training are those of generation.

    Raises:
        PosttrainError: one of them is not; names which of the known causes it is.
    """
    tolerance = TOLERANCE[trainer.rounds_as]
    buffer, generated = _complete_some(trainer)
    mask = buffer.completion_mask
    now = trainer.estimates(buffer)
    first = buffer.take(by_length(buffer.lengths, trainer.plan.batch_size)[0])  # as a pass without gradients has it
    with torch.enable_grad(), trainer.accelerator.autocast():
        training = trainer.model(**trainer.inputs_of(first)).logps.detach()
    estimated = trainer.estimates(first).logps[first.completion_mask.bool()]
    ratio = float((training - estimated).exp().sub(1).abs().max())
    kl = float(((now.logps - trainer.reference_logps(buffer)) * mask).abs().max())
    worst = float(((now.logps - generated) * mask).abs().max())
    said, agrees = f"log-probabilities within {worst:.1e} of generation's", worst <= tolerance
    if trainer.use_vllm:  # its kernels round otherwise, at a few tokens by much
        mean = float(losses.masked_mean((now.logps - generated).abs(), mask))
        unlikely = float(losses.masked_mean(-now.logps - now.entropy, mask))
        agrees = mean <= VLLM_MEAN and unlikely <= UNLIKELY
        said = f"vLLM's log-probabilities within {mean:.1e} of the trainer's on average, {worst:.1e} at most"
        if unlikely > UNLIKELY:
            said += f", its tokens {unlikely:.1f} nats less likely than the policy's own"
    if ratio <= tolerance and kl <= tolerance and agrees:
        say(f"step 0: probability ratio within {ratio:.1e} of 1, KL within {kl:.1e} of 0, {said}")
        _try_packing(trainer, buffer, now.logps, tolerance)
        return
    raise PosttrainError(
        f"{trainer.args.stage.name}: step-0 check failed: max |ratio − 1| = {ratio:.3g}, KL = {kl:.3g} nats, {said}. "
        f"Cause: {_cause(trainer, buffer, generated, tolerance, agrees)}"
    )


def _try_packing(trainer: PolicyTrainer, buffer: RolloutBuffer, logps: Tensor, tolerance: float) -> None:
    """Let the trainer pack episodes into one row, if in this model they then do not see each other."""
    real = torch.cat([buffer.prompt_mask, buffer.completion_mask], dim=1).bool()
    padded, packed = laid_out(buffer), laid_out(buffer, packed=True)
    with torch.no_grad(), trainer.accelerator.autocast():
        worst = float((trainer.model(**packed).logps - logps[buffer.completion_mask.bool()]).abs().max())
        with trainer.policy_and_value() as both:
            if (
                both.value is not None and both.value.trunk is not None
            ):  # which may be of another kind, and whose head is still 0
                plain, together = (
                    both.hidden(VALUE, each["input_ids"], each["attention_mask"], each["position_ids"])
                    for each in (padded, packed)
                )
                worst = max(worst, float((together[0] - plain[real]).abs().max() / plain.abs().max()))
    trainer.keeps_apart = float(trainer.accelerator.gather(torch.tensor(worst, device=logps.device)).max()) <= tolerance
    so = "packed where that takes less work" if trainer.keeps_apart else "padded, like lengths together"
    say(f"step 0: packed episodes within {worst:.1e} of padded ones: in updates they are {so}")


def _complete_some(trainer: PolicyTrainer) -> tuple[RolloutBuffer, Tensor]:
    """Short completions to a few prompts of different lengths, and log π of their tokens as generation had it."""
    order = np.argsort(column_of(trainer.train_dataset, "length"), kind="stable")
    last = len(order) - 1
    rows = [trainer.rows[int(order[round(index * last / (ROWS - 1))])]["prompt_ids"] for index in range(ROWS)]
    device, padding = trainer.accelerator.device, trainer.processing_class.pad_token_id
    ids = pad_left(rows, padding).to(device)
    prompt_mask = pad_left([[1] * len(row) for row in rows], 0).to(device)
    new_tokens = min(NEW_TOKENS, trainer.args.max_completion_length)
    if trainer.sampler is not None:
        connection = trainer.vllm_generation
        connection.max_completion_length = new_tokens
        with trainer.seeded("start"):
            found = trainer._generate_single_turn(rows, None, {})
        connection.max_completion_length = trainer.args.max_completion_length
        return trainer._buffer_of(rows, found), trainer.sampler.logps
    settings = copy.deepcopy(trainer.generation_config)
    settings.max_new_tokens = new_tokens
    settings.return_dict_in_generate = settings.output_scores = True
    with trainer.unwrapped_model() as policy, trainer.seeded("start"), torch.no_grad(), trainer.accelerator.autocast():
        found = policy.generate(
            input_ids=ids,
            attention_mask=prompt_mask,
            generation_config=settings,
        )
    trainer.model.train()
    completion = found.sequences[:, ids.size(1) :]
    logps = torch.stack([score.float().log_softmax(-1) for score in found.scores], dim=1)
    ends = torch.isin(completion, torch.tensor(trainer.eos_token_ids, device=device))
    mask = (ends.cumsum(-1) - ends.long() == 0).long()
    empty = torch.empty(0, device=device)
    buffer = RolloutBuffer(ids, prompt_mask, completion, mask, empty, empty, empty, empty)
    return buffer, logps.gather(-1, completion[..., None]).squeeze(-1)


def _cause(trainer: PolicyTrainer, buffer: RolloutBuffer, generated: Tensor, tolerance: float, agrees: bool) -> str:
    """Which of the known causes it is, tried one by one."""
    mask = buffer.completion_mask
    first, second = (trainer.estimates(buffer).logps for _ in range(2))
    if float(((first - second) * mask).abs().max()) > tolerance:
        on = sorted({name for name, module in trainer.model.named_modules() if _drops(module)})
        return f"dropout is on ({', '.join(on[:3]) or 'or another randomness'}): two forwards of one batch differ"
    if not trainer.use_vllm:
        with trainer.unwrapped_model() as policy:
            settings = {**policy.generation_config.to_dict()}
        settings |= {name: value for name, value in trainer.generation_config.to_dict().items() if value is not None}
        filters = [
            f"{name}={str(settings[name])[:60]}"
            for name, neutral in NEUTRAL.items()
            if settings.get(name) not in neutral
        ]
        if filters:
            return f"generation samples otherwise than by temperature alone ({', '.join(filters)})"
    reference = trainer.reference_logps(buffer)
    if agrees and float(((first - reference) * mask).abs().max()) > tolerance:
        return "the reference is not the model that the policy starts from, or has another precision"
    alone = [trainer.estimates(buffer.take([row])).logps for row in range(len(mask))]
    apart = [
        float(((row[0] - generated[index, : row.size(1)]) * mask[index, : row.size(1)]).abs().max())
        for index, row in enumerate(alone)
    ]
    if max(apart) <= tolerance < float(((first - generated) * mask).abs().max()):
        return (
            "the model counts the padding on the left among its positions (learned positions, as in GPT-2, need "
            "position_ids from the attention mask)"
        )
    if trainer.use_vllm and not agrees:
        return (
            "vLLM samples from another distribution: it holds other weights (were they sent?), or reports raw "
            "log-probabilities. Its server has to be started as `trl vllm-serve` starts it, for the model of this run"
        )
    return "none of the known ones; precision=fp32 model.attn_implementation=eager narrows it down"


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0 and module.training
