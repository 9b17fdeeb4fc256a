"""Answers of a model to held-out prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.encoding import ChatEncoder


class Answer(NamedTuple):
    """A generated answer, without special tokens, and whether the model ended it by itself."""

    text: str
    ended: bool


def panel(rows: Sequence[Conversation], encoder: "ChatEncoder", size: int, room: int) -> list[Conversation]:
    """The first `size` rows whose prompts leave the model room to answer: the same ones before and after."""
    chosen: list[Conversation] = []
    for row in rows:
        if len(chosen) == size:
            break
        if len(encoder.prompt_ids(row.prompt)) <= room:
            chosen.append(row)
    return chosen


def answer(
    model: "PreTrainedModel", encoder: "ChatEncoder", rows: Sequence[Conversation], max_new_tokens: int
) -> list[Answer]:
    """The most likely answer to each prompt, token by token (greedy), all prompts in one left-padded batch."""
    import torch

    if not rows:
        return []
    prompts = [encoder.prompt_ids(row.prompt) for row in rows]
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    training, model.config.use_cache = model.training, True
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[pad],
            temperature=None,
            top_p=None,
            top_k=None,
        )
    model.train(training)
    stops = model.generation_config.eos_token_id
    stop_ids = {stops} if isinstance(stops, int) else set(stops)
    answers = []
    for completion in output[:, width:].tolist():
        end = next((index for index, token in enumerate(completion) if token in stop_ids), None)
        text = encoder.tokenizer.decode(completion[:end], skip_special_tokens=True)
        answers.append(Answer(str(text), end is not None))
    return answers
