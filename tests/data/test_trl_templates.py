"""Every chat template that the installed TRL bundles, with the conversations that people have.

The table of what is trained, equal to TRL's mask, or refused and why:
`pytest tests/data/test_trl_templates.py -s -n 0`.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
import trl
from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from posttrain.data.chat import IGNORED, ChatEncoder, Segment
from posttrain.data.splits import TemplateInputs

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# what stands for the special tokens of the tokenizers that these templates belong to
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"]*>|<[^<>\s'\"|｜]*[|｜]>|<(?:start|end)_of_\w+>|<end_of_utterance>|\[gMASK\]|<sop>"
)
TOOL = {"name": "tide_table", "description": "Tabulates", "parameters": {"type": "object", "properties": {}}}
INPUTS = TemplateInputs([{"type": "function", "function": TOOL}], {})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"id": "call12345", "type": "function", "function": {"name": "tide_table", "arguments": {"port": "Quaymouth"}}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Asked1"), says("Said1")],
    "several": [user("Asked1"), says("Said1"), user("Asked2"), says("Said2"), user("Asked3"), says("Said3")],
    "system": [{"role": "system", "content": "Told"}, user("Asked1"), says("Said1")],
    "tools": [
        *(user("Asked1"), says("", tool_calls=[CALL])),
        *({"role": "tool", "tool_call_id": "call12345", "name": "tide_table", "content": "Found"}, says("Said1")),
    ],
    "thinks last": [user("Asked1"), says("Said1"), user("Asked2"), says("Said2", reasoning_content="Mused2")],
    "thinks earlier": [user("Asked1"), says("Said1", reasoning_content="Mused1"), user("Asked2"), says("Said2")],
}
WORDS = re.compile(r"Asked\d|Said\d|Mused\d|Told|tide_table|Quaymouth|Found|Tabulates")


def tokenizer_for(name: str) -> Any:
    tokenizer = made.gpt2_like()
    template = (TEMPLATES / f"{name}.jinja").read_text()
    training = TEMPLATES / f"{name}_training.jinja"
    found = SPECIAL.findall(template + (training.read_text() if training.is_file() else ""))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(found))})
    if "deepseek" in name:
        tokenizer.eos_token = "<｜end▁of▁sentence｜>"
    tokenizer.chat_template = template
    return tokenizer


def training_template(tokenizer: Any) -> str | None:
    """TRL's for it, or its own with marks; None where TRL knows none."""
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def as_written(encoder: ChatEncoder, messages: list[dict[str, Any]], template: str | None) -> list[dict[str, Any]]:
    """The messages with tool calls as the template takes them: a choice that is ours, not TRL's."""
    return encoder._in_its_words(messages, INPUTS, template)


def renders(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, template: str | None) -> bool:
    """Whether the template writes all that there is, however calls are written down."""
    wanted = set(WORDS.findall(str(messages))) | ({"Tabulates"} if tools else set())
    for empty in ("", None):
        for text in (False, True):
            arguments = '{"port": "Quaymouth"}' if text else {"port": "Quaymouth"}
            calls = [{**CALL, "function": {"name": "tide_table", "arguments": arguments}}]
            given = [m | ({"tool_calls": calls, "content": empty} if "tool_calls" in m else {}) for m in messages]
            try:
                written = tokenizer.apply_chat_template(given, tools=tools, chat_template=template, tokenize=False)
            except (TemplateError, TypeError):
                continue
            if wanted <= set(WORDS.findall(written)):
                return True
    return False


def pieces(encoder: ChatEncoder, messages: list[dict[str, Any]], inputs: TemplateInputs) -> list[Segment] | str:
    try:
        return encoder.segments(messages, inputs)
    except ValueError as error:
        return str(error)


def outcome(name: str, talk: str) -> str:
    """What becomes of a conversation; every guarantee is asserted on the way."""
    tokenizer, messages = tokenizer_for(name), TALKS[talk]
    inputs = INPUTS if talk == "tools" else TemplateInputs([], {})
    try:
        encoder = ChatEncoder(tokenizer)
    except ValueError as error:
        assert not renders(tokenizer, TALKS["one turn"], None, None)
        return f"refused: {error}"
    training = training_template(tokenizer)
    can = renders(tokenizer, messages, inputs.tools or None, training)
    if not can:
        with pytest.raises(ValueError, match="chat template") as refused:
            encoder.segments(messages, inputs)
        return f"refused: {refused.value}"
    segments = encoder.segments(messages, inputs)
    [(ids, labels)] = encoder.encode([segments])
    # 1. no token of anybody else carries loss, every completion does, with the token that ends it
    learned = "".join(segment.text for segment in segments if segment.is_response)
    others = "".join(segment.text for segment in segments if not segment.is_response)
    own = [message for message in messages if message["role"] == "assistant"]
    assert set(WORDS.findall(learned)) == set(WORDS.findall(str(own)))
    assert not {"Said", "Mused"} & set(re.findall("Said|Mused", others))
    assert not {"Asked", "Told", "Found"} & set(re.findall("Asked|Told|Found", learned))
    assert all(encoder._special_at_end.search(segment.text) for segment in segments if segment.is_response)
    assert [label for label in labels if label != IGNORED]
    # 2. the ids of the prompt are those of generation
    prompt = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    asked = tokenizer.apply_chat_template(
        messages[:prompt], tools=inputs.tools or None, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert encoder.prompt_ids(messages[:prompt], inputs) == asked
    *before, answer = messages
    split = encoder.unlike_generation
    [given_prompt, given_answer] = encoder.answer(before, [answer], inputs)
    whole = encoder.render(messages, inputs=inputs)
    assert whole.startswith((given_prompt.text + given_answer.text).removesuffix(encoder.end_of_turn))
    if encoder.unlike_generation == split:
        assert given_prompt.text == encoder.render(before, True, inputs)
    # 3. a conversation of the same roles before it, after which the whole alone is rendered, changes nothing
    other = [message | {"content": message["content"] and message["content"] + "er"} for message in messages]
    for marks in {training, None}:
        fresh, used = ChatEncoder(tokenizer), ChatEncoder(tokenizer)
        fresh.training = used.training = marks
        pieces(used, other, inputs)
        assert pieces(used, messages, inputs) == pieces(fresh, messages, inputs)
        used.answer(other[:-1], other[-1:], inputs)
        assert used.answer(before, [answer], inputs) == [given_prompt, given_answer]
    # 4. ids and mask are TRL's
    if training is None:
        return "trained"
    given = as_written(encoder, messages, training)
    theirs = tokenizer.apply_chat_template(
        given, tools=inputs.tools or None, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = [int(label != IGNORED) for label in labels]
    assert theirs["input_ids"][: len(ids)] == ids
    assert theirs["assistant_masks"][: len(ids)] == ours
    assert not any(theirs["assistant_masks"][len(ids) :])
    return "trained, TRL's mask"


@pytest.mark.parametrize("name", NAMES)
def test_each_template_is_trained_as_trl_masks_it_or_refused_because_it_cannot_render(name: str) -> None:
    found = {talk: outcome(name, talk) for talk in TALKS}
    shown = " | ".join(f"{talk}: {what[:110]}" for talk, what in found.items())
    print(f"\n{name} | {shown}")
    if renders(tokenizer_for(name), TALKS["one turn"], None, None):
        assert found["one turn"].startswith("trained")
        assert found["several"].startswith("trained")
