"""What must hold before PPO's first step, checked with the run's own model, prompts and generation settings."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from posttrain.console import say
from posttrain.data.prepared import column_of
from posttrain.errors import PosttrainError
from posttrain.rlhf.critic import pad_left
from posttrain.rlhf.ppo import PPOTrainer
from posttrain.rlhf.rollout import RolloutBuffer

ROWS = 8
NEW_TOKENS = 16
# |log-probability| differences at a token, in nats: rounding, and that of half precision
TOLERANCE = {"no": 1e-3, "bf16": 0.15, "fp16": 0.05}
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


def check_start(trainer: PPOTrainer) -> None:
    """At step 0 the ratio is 1, KL is 0, and log-probabilities in training are those of generation.

    Raises:
        PosttrainError: one of them is not; names which of the known causes it is.
    """
    tolerance = TOLERANCE[trainer.rounds_as]
    buffer, generated = _complete_some(trainer)
    mask = buffer.completion_mask
    now = trainer.estimates(buffer)
    first = buffer.take(range(min(trainer.plan.batch_size, ROWS)))  # the very batch that `estimates` began with
    with torch.enable_grad(), trainer.accelerator.autocast():
        training = trainer.model(**trainer.inputs_of(first)).logps.detach()
    estimated = now.logps[: len(training), : training.size(1)]
    ratio = float(((training - estimated) * first.completion_mask).exp().sub(1).abs().max())
    kl = float(((now.logps - trainer.reference_logps(buffer)) * mask).abs().max())
    gap = ((now.logps - generated) * mask).abs().amax(-1)
    worst = float(gap.max())
    if ratio <= tolerance and kl <= tolerance and worst <= tolerance:
        say(
            f"step 0: probability ratio within {ratio:.1e} of 1, KL within {kl:.1e} of 0, log-probabilities within "
            f"{worst:.1e} of generation's"
        )
        return
    raise PosttrainError(
        f"PPO step-0 check failed: max |ratio − 1| = {ratio:.3g}, KL = {kl:.3g} nats, log-probabilities off "
        f"generation's by up to {worst:.3g} nats per token. Cause: {_cause(trainer, buffer, generated, tolerance)}"
    )


def _complete_some(trainer: PPOTrainer) -> tuple[RolloutBuffer, Tensor]:
    """Short completions to a few prompts of different lengths, and log π of their tokens as generation had it."""
    by_length = np.argsort(column_of(trainer.train_dataset, "length"), kind="stable")
    last = len(by_length) - 1
    rows = [trainer.rows[int(by_length[round(index * last / (ROWS - 1))])]["prompt_ids"] for index in range(ROWS)]
    device, padding = trainer.accelerator.device, trainer.processing_class.pad_token_id
    ids = pad_left(rows, padding).to(device)
    prompt_mask = pad_left([[1] * len(row) for row in rows], 0).to(device)
    settings = copy.deepcopy(trainer.generation_config) if not trainer.use_vllm else None
    if settings is None:
        settings = GenerationConfig(do_sample=True, temperature=trainer.temperature, top_k=0, top_p=1.0)
    settings.max_new_tokens = min(NEW_TOKENS, trainer.args.max_completion_length)
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


def _cause(trainer: PPOTrainer, buffer: RolloutBuffer, generated: Tensor, tolerance: float) -> str:
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
        filters = [f"{name}={settings[name]}" for name, neutral in NEUTRAL.items() if settings.get(name) not in neutral]
        if filters:
            return f"generation samples otherwise than by temperature alone ({', '.join(filters)})"
    reference = trainer.reference_logps(buffer)
    agrees = float(((first - generated) * mask).abs().max()) <= tolerance
    if agrees and float(((first - reference) * mask).abs().max()) > tolerance:
        return "the reference is not the model that the policy starts from, or has another precision"
    alone = [trainer.estimates(buffer.take([row])).logps for row in range(len(mask))]
    apart = [
        float(((row[0] - generated[index, : row.size(1)]) * mask[index, : row.size(1)]).abs().max())
        for index, row in enumerate(alone)
    ]
    if max(apart) <= tolerance:
        return (
            "the model counts the padding on the left among its positions (learned positions, as in GPT-2, need "
            "position_ids from the attention mask)"
        )
    return "none of the known ones; precision=fp32 model.attn_implementation=eager narrows it down"


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0 and module.training
