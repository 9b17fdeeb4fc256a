"""Documented data formats, and how public data sets write them, as conversations, pairs and prompts.

Each row knows where it stood. Whatever its shape, a row that is read has been read in one way only.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from posttrain.config.schema import Columns, DataConfig
from posttrain.data.messages import (
    Message,
    MessageKeys,
    as_messages,
    as_tool_calls,
    as_tools,
    check_text,
    check_turns,
    is_transcript,
    kind,
    listed_messages,
    message_keys,
    parse_transcript,
    parsed,
    role_of,
    without_nulls,
)
from posttrain.data.splits import IS_TIE, NO_INPUTS, Reader, Shape, Tally, TemplateInputs
from posttrain.values import Fields


def _content(*parts: object, inputs: TemplateInputs) -> str:
    named = list(parts[0]) if len(parts) == 1 and isinstance(parts[0], list) else list(parts)
    whole = [*named, inputs] if inputs != NO_INPUTS else named
    return json.dumps(whole, ensure_ascii=False, default=str)  # a Parquet file may hold dates and bytes


class Conversation(NamedTuple):
    """One checked instruction row: its messages, the last by the assistant, and where it stood ("a.jsonl line 3")."""

    messages: list[Message]
    where: str
    inputs: TemplateInputs = NO_INPUTS
    is_text: bool = False  # raw text, as the one message: no template, every token carries loss

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last completion."""
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        """The completion that the data gives."""
        return str(self.messages[-1]["content"])

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return _content(self.messages, inputs=self.inputs)


class Pair(NamedTuple):
    """One checked preference row: after `prompt`, the messages of `chosen` are better than those of `rejected`.

    Of a completion that was rated alone one of the two is empty.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str
    margin: float | None = None  # by how much, where the data says so
    inputs: TemplateInputs = NO_INPUTS
    group: str | None = None  # which kind of pair, where the data says so; no part of `content`
    tie: bool = False  # neither is better

    @property
    def reference(self) -> str:
        """The completion that the data prefers; empty where it has none."""
        return str(self.chosen[-1]["content"]) if self.chosen else ""

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        ties = [IS_TIE] if self.tie else []
        return _content(self.prompt, self.chosen, self.rejected, self.margin, *ties, inputs=self.inputs)


class Prompt(NamedTuple):
    """One checked prompt row, its last message not by the assistant, and the row's other columns."""

    prompt: list[Message]
    where: str
    columns: Fields  # handed to reward functions
    inputs: TemplateInputs = NO_INPUTS

    @property
    def reference(self) -> str:
        """The data gives no completion."""
        return ""

    @property
    def content(self) -> str:
        """What makes two rows the same row."""
        return _content(self.prompt, self.columns, inputs=self.inputs)


def require_columns(row: Fields, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in row:
            found = ", ".join(str(other) for other in row) or "nothing"
            raise ValueError(f"no {column!r} (found: {found}); format {name!r} needs {', '.join(columns)}")


def _is_conversation(value: object, keys: MessageKeys | None) -> bool:
    """Whether a value is more than a completion: messages that begin before one, or a transcript."""
    known = keys or message_keys()
    listed = listed_messages(value, known)
    if isinstance(listed, str):
        return is_transcript(listed)
    return isinstance(listed, list) and bool(listed) and role_of(listed[0], known) not in (None, "assistant")


def _whole(value: object, column: str, keys: MessageKeys | None) -> list[Message]:
    """The messages of a whole conversation."""
    value = parsed(value)
    return parse_transcript(value, column) if isinstance(value, str) else as_messages(value, "assistant", column, keys)


def _asked(value: object, column: str, keys: MessageKeys | None) -> list[Message]:
    """The messages of a prompt; a text is the user's, or a transcript that ends where the assistant is to speak."""
    if isinstance(value, str) and is_transcript(value, prompt=True):
        return parse_transcript(value, column, is_open=True)
    return as_messages(value, "user", column, keys)


def _begun(messages: list[Message], row: Fields, keys: MessageKeys | None) -> list[Message]:
    """With the row's `system` before it and its `history` after that."""
    system, history = row.get("system"), parsed(row.get("history"))
    if system is not None and not isinstance(system, str):
        raise ValueError(f"'system' must be a text, got {kind(system)}")
    opening = messages[:1] if messages[0]["role"] in ("system", "developer") else []
    rest = messages[len(opening) :]
    if system and system.strip():
        if opening and opening[0]["content"] != system:
            raise ValueError(
                "'system' is not the conversation's own system message; data.columns.system=null ignores it"
            )
        opening = [{"role": "system", "content": system}]
    if history is None or history == [] or history == "":
        return [*opening, *rest]
    pairs = isinstance(history, list) and all(isinstance(each, list) and len(each) == 2 for each in history)
    if not isinstance(history, list) or not (pairs or all(isinstance(each, dict) for each in history)):
        raise ValueError(
            f"'history' must be messages or pairs of question and answer, got {kind(history)}; "
            "data.columns.history=null ignores it"
        )
    if not pairs:
        return [*opening, *as_messages(history, "user", "history", keys), *rest]
    said = [text for pair in history for text in pair]
    earlier = [as_messages(text, ("user", "assistant")[at % 2], "history") for at, text in enumerate(said)]
    return [*opening, *(message for part in earlier for message in part), *rest]


def _inputs(row: Fields) -> TemplateInputs:
    options = without_nulls(parsed(row.get("chat_template_kwargs")) or {})
    if not isinstance(options, dict):
        raise ValueError(f"'chat_template_kwargs' must be an object, got {kind(options)}")
    tools = as_tools(row.get("tools"))
    return TemplateInputs(tools, options) if tools or options else NO_INPUTS


def _response(row: Fields, keys: MessageKeys | None) -> list[Message]:
    """A response; where the row has tools, the JSON text of calls is calls."""
    calls = parsed(row["response"]) if row.get("tools") and isinstance(row["response"], str) else None
    if isinstance(calls, list) and calls:
        names = {tool["function"]["name"] for tool in as_tools(row["tools"])}
        if all(_is_call(call, names) for call in calls):
            return [{"role": "assistant", "content": "", "tool_calls": as_tool_calls(calls, "'response'")}]
    return as_messages(row["response"], "assistant", "response", keys)


def _is_call(call: object, names: set[str]) -> bool:
    return isinstance(call, dict) and call.get("name") in names and call.keys() <= {"name", "arguments", "id", "type"}


def _conversation(row: Fields, keys: MessageKeys | None) -> list[Message]:
    """The messages of an instruction row, in whatever order they are."""
    if row.get("messages") is not None:
        messages = _whole(row["messages"], "messages", keys)
    elif row.get("completion") is not None:
        asked = _asked(row["prompt"], "prompt", keys)
        answer = as_messages(row["completion"], "assistant", "completion", keys)
        before = _begun(asked, row, keys)
        return [{**said, "train": False} if said["role"] == "assistant" else said for said in before] + answer
    elif row.get("instruction") is None and _is_conversation(row.get("response"), keys):
        messages = _whole(row["response"], "response", keys)
    else:
        require_columns(row, ("instruction", "response"), "instruction")
        instruction, more = row["instruction"], row.get("input")
        if more is not None and not isinstance(more, str):
            raise ValueError(f"'input' must be a text, got {kind(more)}")
        if more and more.strip():
            if not isinstance(instruction, str):
                raise ValueError("'input' goes with an 'instruction' that is a text, not a list of messages")
            instruction = f"{instruction}\n\n{more}"
        messages = _asked(instruction, "instruction", keys) + _response(row, keys)
    return _begun(messages, row, keys)


def format_instruction(row: Fields, keys: MessageKeys | None = None) -> list[Message]:
    """Turn an instruction row into the messages of its conversation.

    `instruction` and `response` are texts or lists of messages; `input` is appended to the instruction after a
    blank line; `system` becomes the first message and `history` follows it. Every assistant message is a response to
    learn. `messages`, or a `response` without an `instruction`, is a whole conversation: a list of messages or a
    transcript. Of `prompt` and `completion`, the completion alone is learned.

    Raises:
        ValueError: says what is missing or out of order.
    """
    messages = _conversation(row, keys)
    check_turns(messages)
    return messages


def _answer(side: object, name: str, of_transcript: bool, keys: MessageKeys | None) -> list[Message]:
    """A completion; after a transcript, the rest of one."""
    if of_transcript and isinstance(side, str) and side.strip():
        return parse_transcript(f"Assistant: {side.strip()}", name)
    return as_messages(side, "assistant", name, keys)


def _preference(
    row: Fields, keys: MessageKeys | None
) -> tuple[list[Message], list[Message], list[Message], str | None]:
    """Prompt, chosen, rejected, and how the `prompt` column differs from what the two conversations begin with."""
    require_columns(row, ("chosen", "rejected"), "preference")
    sides = [row["chosen"], row["rejected"]]
    given = row.get("prompt")
    asked = _begun(_asked(given, "prompt", keys), row, keys) if given not in (None, "", []) else []
    names = ("chosen", "rejected")
    if whole := all(_is_conversation(side, keys) for side in sides):
        answered = [_begun(_whole(side, name, keys), row, keys) for side, name in zip(sides, names, strict=True)]
    elif not asked:
        require_columns({name: "" for name in row if name != "prompt"}, ("prompt", "chosen", "rejected"), "preference")
    else:
        parts = zip(sides, names, strict=True)
        answered = [
            asked + _answer(side, name, isinstance(given, str) and is_transcript(given), keys) for side, name in parts
        ]
    shared = 0
    while shared < min(map(len, answered)) - 1 and answered[0][shared] == answered[1][shared]:
        shared += 1
    while shared and answered[0][shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    prompt, answers = answered[0][:shared], [messages[shared:] for messages in answered]
    if not prompt:
        raise ValueError("'chosen' and 'rejected' do not begin with the same prompt")
    for answer in answers:
        check_turns([*prompt, *answer])
    differs = whole and bool(asked) and asked != prompt[: len(asked)]
    return prompt, answers[0], answers[1], f"{asked[-1]['content'][:40]!r}" if differs else None


def format_preference(
    row: Fields, keys: MessageKeys | None = None
) -> tuple[list[Message], list[Message], list[Message]]:
    """Turn a preference row into prompt, chosen and rejected messages.

    `chosen` and `rejected` are completions of `prompt` (text, messages or a transcript), or whole conversations. The
    prompt is what both conversations begin with, whatever the `prompt` column says.

    Raises:
        ValueError: says what is missing or out of order.
    """
    return _preference(row, keys)[:3]


def _prompt(row: Fields, keys: MessageKeys | None) -> tuple[list[Message], bool]:
    """The messages that wait for a completion, and whether the row has one, which is left out."""
    asks = row.get("prompt") is not None
    if not asks and {"chosen", "rejected"} <= row.keys():
        return format_preference(row, keys)[0], True
    if not asks and {"messages", "instruction", "response"} & row.keys():
        whole = _conversation(row, keys)
        last = max((at for at, message in enumerate(whole) if message["role"] == "user"), default=-1)
        messages = whole[: last + 1]
    else:
        require_columns(row, ("prompt",), "prompt")
        whole = messages = _begun(_asked(row["prompt"], "prompt", keys), row, keys)
    check_turns([*messages, {"role": "assistant", "content": "?"}])
    return messages, "chosen" in row or len(whole) > len(messages)


def format_prompt(row: Fields, keys: MessageKeys | None = None) -> list[Message]:
    """Turn a row into messages that wait for a completion.

    `prompt` is a text, messages or a transcript; of a preference row it is what both conversations begin with, of a
    conversation all up to the user's last message.

    Raises:
        ValueError: says what is missing or out of order.
    """
    return _prompt(row, keys)[0]


_SHARE_GPT = Shape("ShareGPT", {"messages": "conversations"})
_ALPACA = Shape("Alpaca", {"instruction": "instruction", "response": "output"}, more={"input": "input"})
_COMPLETION = Shape(
    "prompt and completion (the completion alone carries loss)", {"prompt": "prompt", "completion": "completion"}
)
_OPENAI = Shape(
    "OpenAI's preferences",
    {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
    more={"tools": "input.tools"},
)
_ANSWERS = [
    Shape(f"{name} with two answers", {"prompt": name, "chosen": "chosen", "rejected": "rejected"}, unless=("prompt",))
    for name in ("conversations", "messages")
]


def _documented(columns: Columns, *needs: str, more: Sequence[str] = ()) -> Shape:
    named = vars(columns)
    more_of_them = {name: named[name] for name in more}
    return Shape(" and ".join(needs), {name: named[name] for name in needs}, more=more_of_them, documented=True)


def instructions(data: DataConfig) -> Reader[Conversation]:
    """Reads instruction rows."""
    keys = message_keys(data.messages)

    def make(row: Fields, where: str, others: Fields) -> Conversation:
        if row.get("text") is None:
            return Conversation(format_instruction(row, keys), where, _inputs(row))
        check_text(row["text"], "'text'")
        for name in ("system", "history", "tools"):
            if row.get(name):
                raise ValueError(
                    f"{name!r} goes with a conversation, not with raw text; data.columns.{name}=null skips it"
                )
        return Conversation([{"role": "assistant", "content": row["text"]}], where, is_text=True)

    columns = data.columns
    shapes = [
        _documented(columns, "text"),
        _documented(columns, "messages"),
        _documented(columns, "instruction", "response", more=["input"]),
        # a whole conversation, where there is no instruction
        _documented(columns, "response")._replace(unless=(str(vars(columns)["instruction"]),)),
        *(_SHARE_GPT, _ALPACA._replace(more={"input": vars(columns)["input"]}), _COMPLETION),
    ]
    return Reader(data, make, shapes, keys=keys)


MAX_MARGIN = 1e30
# told of the rows that it is true of
_DIFFERS = "in {count:,} rows 'prompt' is not how chosen and rejected begin, which is taken as the prompt ({line})"
_ANSWERED = "the answers after the last prompt of {count:,} rows are left out: the policy gives its own"


_HALVES = "{count:,} ties are kept, each as half a pair either way ({line})"


def preferences_and_ties(data: DataConfig) -> Reader[Pair]:
    """Reads preference rows, those among them of which neither answer is better."""
    return preferences(data, keeps_ties=True)


def preferences(data: DataConfig, keeps_ties: bool = False) -> Reader[Pair]:
    """Reads preference rows."""
    keys, tally = message_keys(data.messages), Tally()
    of_group = {"group": vars(data.columns)["group"]}
    named_group = [name for name, path in of_group.items() if path not in (None, name)]  # another name than its own

    def make(row: Fields, where: str, others: Fields) -> Pair:
        margin = row.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
            raise ValueError(f"'margin' must be a number, got {kind(margin)}")
        if margin is not None and not abs(margin) < MAX_MARGIN:
            raise ValueError(f"'margin' must be a finite number, got {margin}")
        if margin is not None and data.preference.winner is not None:  # which says whose it is
            margin = abs(margin)
        require_columns(row, named_group, "preference")
        group = row.get("group")
        if isinstance(group, (dict, list)):
            raise ValueError(
                f"'group' must be a text or a number, got {kind(group)}; data.columns.group=null leaves it out"
            )
        prompt, chosen, rejected, differs = _preference(row, keys)
        if differs is not None:
            tally.told[_DIFFERS].add(where, differs)
        if tie := IS_TIE in row:
            tally.told[_HALVES].add(where, "")
        by = None if margin is None else float(margin)
        return Pair(prompt, chosen, rejected, where, by, _inputs(row), None if group is None else str(group), tie)

    shapes = [*_ANSWERS, _documented(data.columns, "chosen", "rejected", more=["prompt", "margin"]), _OPENAI]
    shapes = [shape._replace(more={**shape.more, **of_group}) for shape in shapes]
    return Reader(data, make, shapes, keys=keys, tally=tally, keeps_ties=keeps_ties)


def ratings(data: DataConfig) -> Reader[Pair]:
    """Reads completions that were liked or not, and preference rows, which have one of each."""
    keys = message_keys(data.messages)

    def make(row: Fields, where: str, others: Fields) -> Pair:
        if "chosen" in row:
            prompt, chosen, rejected, _ = _preference(row, keys)
            return Pair(prompt, chosen, rejected, where, inputs=_inputs(row))
        require_columns(row, ("prompt", "completion", "label"), "ratings")
        label = row["label"]
        if isinstance(label, str):  # a CSV file's cells are text
            label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
        if label not in (True, False):  # 1 and 0 among them
            raise ValueError(f"'label' must be true or false, got {label!r}")
        prompt = _begun(_asked(row["prompt"], "prompt", keys), row, keys)
        completion = as_messages(row["completion"], "assistant", "completion", keys)
        check_turns([*prompt, *completion])
        return Pair(prompt, *((completion, []) if label else ([], completion)), where, inputs=_inputs(row))

    columns = data.columns
    rated = _documented(columns, "prompt", "completion", "label")
    return Reader(
        data, make, [rated, *_ANSWERS, _documented(columns, "chosen", "rejected", more=["prompt"])], keys=keys
    )


def prompts(data: DataConfig) -> Reader[Prompt]:
    """Reads prompt rows, their other columns for reward functions."""
    keys, tally = message_keys(data.messages), Tally()

    def make(row: Fields, where: str, others: Fields) -> Prompt:
        prompt, has_answer = _prompt(row, keys)
        if has_answer:
            tally.told[_ANSWERED].add(where, "")
        return Prompt(prompt, where, others, _inputs(row))

    shapes = [
        _documented(data.columns, "prompt"),
        *_ANSWERS,
        Shape("chosen and rejected", {"chosen": "chosen", "rejected": "rejected"}),
        Shape("messages", {"messages": "messages"}),
        Shape(
            "instruction and response", {"instruction": "instruction", "response": "response"}, more={"input": "input"}
        ),
        *(_SHARE_GPT, _ALPACA, _OPENAI),
    ]
    return Reader(data, make, shapes, hands_on=True, keys=keys, tally=tally)
