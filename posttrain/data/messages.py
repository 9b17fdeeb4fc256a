r"""Messages of a conversation, however a data set spells them, in the words of transformers' chat templates.

A message has `role` and `content`, and where the data says so `reasoning_content`, `tool_calls`, `tool_call_id` and
`name`; `train` is False in an assistant's message that shall carry no loss.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from posttrain.config.schema import ROLES, MessagesConfig
from posttrain.values import JsonObject

Message = JsonObject
REASONING = ("reasoning_content", "thinking", "reasoning")
# who may speak next; "" stands before the first message
_NEXT = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),  # a call may stand in its text
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


KNOWN_ROLES = {
    **{"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "function_call": "assistant"},
    **{role: role for role in ROLES},
}
_MASKS = re.compile("(?:^|_)(?:train|mask|loss|weight)")  # in the name of a key that says whether a turn is trained


class MessageKeys(NamedTuple):
    """What messages are called in the data: keys that hold the role, the text, and whether a turn is trained."""

    role: tuple[str, ...]
    content: tuple[str, ...]
    train: tuple[str, ...]
    roles: dict[str, str]
    ignored: Counter[str]  # keys that nothing reads, counted
    seen: Counter[str]  # keys that say whether a turn is trained, counted


def message_keys(given: MessagesConfig | None = None) -> MessageKeys:
    """What `data.messages` says; without it, and for each key that is null, the names that public data sets use."""
    given = given or MessagesConfig(role=None, content=None, roles={}, train=None)
    return MessageKeys(
        (given.role,) if given.role else ("role", "from"),
        (given.content,) if given.content else ("content", "value"),
        (given.train,) if given.train else ("weight", "train", "loss", "loss_weight"),
        KNOWN_ROLES | given.roles,
        Counter(),
        Counter(),
    )


def kind(value: object) -> str:
    """The name of its type, as an error shows it."""
    return "null" if value is None else type(value).__name__


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: object, name: str) -> None:
    """Refuse what is not a text, is blank, or cannot be encoded."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {kind(text)}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if _SURROGATE.search(text):
        raise ValueError(f"{name} contains an unpaired surrogate (invalid Unicode)")


def without_nulls(value: object) -> object:
    """Without the null keys that Parquet writes for what other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def parsed(value: object) -> object:
    """A list or an object that stands as JSON text in a CSV or Parquet column; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _joined(content: object, where: str) -> object:
    """The text of OpenAI's content parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in (None, "text", "input_text", "output_text")
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where} has a part of type {what!r} in its content; posttrain trains on text alone")
        texts.append(text)
    return "".join(texts)


def as_tool_calls(value: object, where: str) -> list[JsonObject]:
    """Calls as chat templates take them, their arguments an object.

    Raises:
        ValueError: a call has no name, or arguments that are neither an object nor the JSON text of one.
    """
    calls = []
    value = parsed(value)
    for given in value if isinstance(value, list) else [value]:
        call: JsonObject = given if isinstance(given, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where} has a tool call without a function name: {str(given)[:80]}")
        arguments = parsed(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise ValueError(f"{where} calls {function['name']!r} with arguments that are not a JSON object")
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def as_tools(value: object) -> list[JsonObject]:
    """The schemas of a row's tools, in OpenAI's form; a JSON text of a list will do.

    Raises:
        ValueError: it is not a list of objects with a name.
    """
    tools = without_nulls(parsed(value) or [])
    if not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of tools or its JSON text, got {kind(value)}")
    made: list[JsonObject] = []
    for tool in tools:
        schema = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            raise ValueError(f"'tools' holds one without a name: {str(tool)[:80]}")
        made.append({"type": "function", "function": schema})
    return made


def _trained(flag: object, key: str, where: str) -> bool:
    if flag not in (0, 1):  # True and False are 1 and 0
        raise ValueError(f"{where} has {key}={flag!r}; a turn is trained (1, true) or not (0, false), no fraction")
    return bool(flag)


def _message(message: object, where: str, keys: MessageKeys) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, got {kind(message)}")
    given = {str(name): value for name, value in message.items() if value is not None}
    wanted = {"role": keys.role, "content": keys.content, "reasoning": REASONING}
    taken = {what: next((name for name in names if name in given), None) for what, names in wanted.items()}
    if taken["role"] is None:
        found = ", ".join(given) or "nothing"
        raise ValueError(f"{where} has no {keys.role[0]!r} (found: {found}); data.messages.role names the key")
    said = str(given[taken["role"]])
    role = keys.roles.get(said, keys.roles.get(said.lower()))
    if role not in ROLES:
        raise ValueError(
            f"{where} has the role {said!r}; data.messages.roles={{{said}: …}} says which of {', '.join(ROLES)} it is"
        )
    made: Message = {"role": role, "content": ""}
    calls = given.get("tool_calls") or given.get("function_call")
    if said == "function_call" and taken["content"] is not None:  # LLaMA-Factory's: the call is the text
        calls = given.pop(taken["content"])
        taken["content"] = None
    if calls:
        made["tool_calls"] = as_tool_calls(without_nulls(calls), where)
    if taken["content"] is not None:
        made["content"] = _joined(given[taken["content"]], where)
    elif not calls:
        is_null = any(key in message for key in keys.content)
        fault = (
            "null for content and no tool call" if is_null else f"no {keys.content[0]!r} (found: {', '.join(given)})"
        )
        raise ValueError(f"{where} has {fault}; data.messages.content names the key")
    if not isinstance(made["content"], str):
        raise ValueError(f"{where} has {kind(made['content'])} for content, not a text")
    if made["content"] or not (calls or role in ("tool", "system")):
        check_text(made["content"] if role != "tool" else made["content"] or "-", where)
    if taken["reasoning"] is not None and given[taken["reasoning"]] != "":
        check_text(given[taken["reasoning"]], f"{taken['reasoning']} of {where}")
        made["reasoning_content"] = given[taken["reasoning"]]
    flags = {key: _trained(given[key], key, where) for key in keys.train if key in given}
    if len(set(flags.values())) > 1:
        raise ValueError(
            f"{where} has {' and '.join(flags)}, which contradict each other; data.messages.train names one"
        )
    if not all(flags.values()):
        made["train"] = False
    keys.seen.update(flags)
    made |= {name: given[name] for name in ("tool_call_id", "name") if name in given}
    unread = given.keys() - {*made, *taken.values(), *flags, "tool_calls", "function_call"}
    if len(keys.train) > 1 and (masks := sorted(key for key in unread if _MASKS.search(key))):
        raise ValueError(
            f"{where} has {masks[0]!r}, as if it said whether the turn is trained; data.messages.train={masks[0]} "
            "reads it as 1 or 0"
        )
    keys.ignored.update(unread)
    return made


def role_of(message: object, keys: MessageKeys) -> str | None:
    """The role of a message as chat templates call it; None of anything else."""
    said = next((message[key] for key in keys.role if key in message), None) if isinstance(message, dict) else None
    return keys.roles.get(str(said), keys.roles.get(str(said).lower()))


def listed_messages(value: object, keys: MessageKeys) -> object:
    """The list of messages that a value is, alone or as JSON text; any other value as it is."""
    if isinstance(value, dict):
        return [value]
    listed = parsed(value)
    return listed if isinstance(listed, list) and listed and all(role_of(each, keys) for each in listed) else value


def as_messages(value: object, role: str, column: str, keys: MessageKeys | None = None) -> list[Message]:
    """A text as one message of that role; a message or a list of them in the words of chat templates.

    Raises:
        ValueError: says which message is missing something, and the key that names it.
    """
    known = keys or message_keys()
    listed = listed_messages(value, known)
    if isinstance(listed, str):
        check_text(listed, repr(column))
        return [{"role": role, "content": listed}]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{column!r} must be a text or a list of messages, got {kind(value)}")
    messages = [_message(each, f"message {number} of {column!r}", known) for number, each in enumerate(listed, start=1)]
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        if len(messages) == 1:
            raise ValueError(f"{column!r} is an empty system message alone")
        return messages[1:]
    return messages


def check_turns(messages: Sequence[Message]) -> None:
    """After an optional system message user and assistant take turns, tools answer calls, the assistant is last."""
    before = ""
    for message in messages:
        if message["role"] not in _NEXT[before]:
            break
        before = "calls" if message.get("tool_calls") else message["role"]
    else:
        if messages and messages[-1]["role"] == "assistant":
            return
    roles = ", ".join(message["role"] for message in messages)
    raise ValueError(
        f"the roles are {roles}; user and assistant must take turns, a tool answers a call, and assistant be last "
        "(data.bad_rows=drop leaves such rows out)"
    )


_HH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HASHES = re.compile(r"(?:^|\s*)###\s*(Human|Assistant):")


def _turns(text: str) -> list[str]:
    return (_HASHES if text.lstrip().startswith("###") else _HH).split(text.lstrip() if text.strip() else "")


def is_transcript(text: str, prompt: bool = False) -> bool:
    """Whether it begins with a turn of a transcript; a prompt of one turn begins with the blank line before it, too."""
    parts = _turns(text)
    return len(parts) >= 3 and not parts[0].strip() and (not prompt or len(parts) > 3 or text.startswith("\n\n"))


def parse_transcript(text: str, column: str, is_open: bool = False) -> list[Message]:
    r"""The messages of a transcript as in Anthropic's hh-rlhf ("\n\nHuman: …\n\nAssistant: …") or with ### before each.

    Where it `is_open`, its last turn is the assistant's, still empty, and left out: it waits for a completion.

    Raises:
        ValueError: it does not begin with a turn, or a turn is empty.
    """
    parts = _turns(text)
    if not is_transcript(text):
        raise ValueError(f"{column!r} has no 'prompt' beside it and is not a transcript of Human: and Assistant: turns")
    names = {"Human": "user", "Assistant": "assistant"}
    messages: list[Message] = [
        {"role": names[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if is_open and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    for number, message in enumerate(messages, start=1):
        check_text(message["content"], f"turn {number} of {column!r}")
    return messages
