"""Conversations as the model sees them: rendered by its chat template, in segments that carry loss or do not.

A prompt is what the model generates from: the template's own text, tokenised by itself. Where a template has
{% generation %} marks, its own or TRL's for it, they say what of a conversation carries loss; elsewhere a completion
reaches from the end of the generation prompt to the token that ends its turn.
"""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.messages import Message, parsed
from posttrain.data.splits import NO_INPUTS, TemplateInputs
from posttrain.data.template import training_template
from posttrain.errors import ConfigError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token without loss: torch.nn.CrossEntropyLoss(ignore_index=-100)
_LAST = "; data.train_on=last trains the last completion alone"
_THINK = re.compile(r"</?think>")
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")  # of a thought, where a generation prompt ends with one


class Segment(NamedTuple):
    """A piece of a rendered conversation, and whether it is something to learn."""

    text: str
    is_response: bool


class ChatEncoder:
    """Renders and tokenises conversations with one tokenizer and its chat template.

    Raises:
        ConfigError: the template cannot be used for training, and why.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", allow_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the tokenizer"
        self.training = training_template(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {*(token for token in tokenizer.all_special_tokens if token.strip()), *added}
        # the longest match first: <|im_end|> before <|im
        names = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
        self._longest = max(map(len, tokens), default=0)
        self._special, self._special_at_end = re.compile(names), re.compile(rf"(?:\s*(?:{names}))+\s*\Z")
        self._refuses_special = not allow_special_tokens
        self._call_forms: dict[str | None, tuple[str | None, bool]] = {}
        self.unlike_generation = 0  # completions that do not begin with the thought that a generation prompt begins
        self._proven: set[tuple[object, ...]] = set()  # shapes of conversations; see `_span`
        self.end_of_turn, self.tail = self._probe()
        plain, line, both = self._ids(["a", "\n", "\na"])
        # what is put before a later text, where the tokenizer begins every text with a space of its own
        self._anchors = [""] if both == line + plain else ["\n", ":", "a"]

    # --- what the template writes

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        return self._render(messages, inputs, add_generation_prompt=add_generation_prompt)[0]

    def _render(
        self,
        messages: Sequence[Message],
        inputs: TemplateInputs,
        template: str | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text by a template, else by the tokenizer's own, and where {% generation %} marks begin and end."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = self._in_its_words(messages, inputs, template)
        try:
            [text], marks = render_jinja_template(
                conversations=[given],
                tools=inputs.tools or None,
                chat_template=template or self.tokenizer.get_chat_template(tools=inputs.tools or None),
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=template is not None,
                **{**self.tokenizer.special_tokens_map, **inputs.options},
            )
        except Exception as error:  # whatever a template raises: jinja2's errors and its own raise_exception
            raise ValueError(f"the chat template raised {type(error).__name__}: {error}") from error
        return str(text), marks[0] if marks else []

    def _in_its_words(self, messages: Sequence[Message], inputs: TemplateInputs, template: str | None) -> list[Message]:
        """The messages with what this template reads where: tool calls, and the developer as the system."""
        own = template or str(self.tokenizer.get_chat_template(tools=inputs.tools or None))
        made = []
        for message in messages:
            message = {name: value for name, value in message.items() if name != "train"}
            if message["role"] == "developer" and "developer" not in own:
                message["role"] = "system"
            if calls := message.get("tool_calls"):
                if template not in self._call_forms:
                    self._call_forms[template] = self._find_call_form(inputs, template)
                empty, as_text = self._call_forms[template]
                message["content"] = message["content"] or empty
                message["tool_calls"] = [_call(each, as_text) for each in calls]
            made.append(message)
        return made

    def _find_call_form(self, inputs: TemplateInputs, template: str | None) -> tuple[str | None, bool]:
        """How the template wants calls: their empty content "" or None, and arguments as an object or as JSON text."""
        function = {"name": "name_of_tool", "arguments": {"key_of_tool": "value_of_tool"}}
        call = {"id": "call12345", "type": "function", "function": function}  # Mistral's wants an id of nine characters
        for form in itertools.product(("", None), (False, True)):
            self._call_forms[template] = form
            asked: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            result: Message = {"role": "tool", "name": "name_of_tool", "tool_call_id": call["id"]}
            result["content"] = "result_of_tool"
            with contextlib.suppress(ValueError):  # then the next form
                text = self._render([{"role": "user", "content": "Q"}, asked, result], inputs, template)[0]
                if all(word in text for word in ("name_of_tool", "key_of_tool", "value_of_tool", "result_of_tool")):
                    return form
        del self._call_forms[template]
        raise ValueError(
            f"it has tool calls, which the chat template of {self.name} does not write; name one that does with "
            "model.chat_template_path"
        )

    def _probe(self) -> tuple[str, str]:
        """The token that ends a completion, and what the template writes after it."""
        question: list[Message] = [{"role": "user", "content": "Q"}]
        answered: list[Message] = [*question, {"role": "assistant", "content": "ANSWER"}]
        try:
            asked, own = self.render(question, add_generation_prompt=True), self.render(answered)
            trained, _ = self._render(answered, NO_INPUTS, self.training)
        except ValueError as error:
            raise ConfigError(f"{self.name}, a plain question and answer: {error}") from error
        if "Q" not in own or "ANSWER" not in own:
            raise ConfigError(f"{self.name}: the chat template does not write messages whose content is a text")
        self._opens = _OPENING.search(asked) is not None
        unasked = self.render(question)
        self._asks = asked.removeprefix(unasked) if asked.startswith(unasked) else ""
        if not own.startswith((asked, _OPENING.sub("", asked))):
            raise ConfigError(
                f"{self.name}: the chat template does not begin a completion where its generation prompt ends"
            )
        rest = own[own.rindex("ANSWER") + len("ANSWER") :]
        if (found := self._special.search(rest)) is not None:
            return found.group(), rest[found.end() :]
        # TRL's template may end it where the model's own leaves that to what follows
        marked = self._special.search(trained, trained.rindex("ANSWER"))
        if marked is None and self.tokenizer.eos_token is None:
            raise ConfigError(f"{self.name}: the tokenizer has no EOS token, so a model could never learn to stop")
        return marked.group() if marked else str(self.tokenizer.eos_token), rest[len(rest.rstrip()) :]

    # --- what of it carries loss

    def segments(
        self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS, train_on: str = "all"
    ) -> list[Segment]:
        """A conversation in pieces; each completion that is trained ends with the token that ends its turn.

        What the template writes after the last one is left out: nobody generates it.

        Raises:
            ValueError: a message spells a control token, the template drops or changes one, or what of the text
                belongs to which completion cannot be told.
        """
        completions = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [index for index in completions if messages[index].get("train", True)]
        if train_on == "last":
            trained = trained[-1:]
        if not trained:
            raise ValueError("no completion of it is trained (data.messages.train names the key that says so)")
        last = trained[-1]
        if len(completions) > 1 and trained == completions[-1:]:
            return self.answer(messages[:last], messages[last:], inputs)
        self._check_words(messages, inputs)
        if self.training is None:
            text = self.render(messages, inputs=inputs)
            spans = [self._span(text, messages, index, index, inputs) for index in trained]
        else:
            text, marks = self._render(messages, inputs, self.training)
            spans = [self._with_end(text, *span) for span in _merged(marks) if text[slice(*span)].strip()]
            for index in set(completions) - set(trained):
                begin = _shared(text, self._render(messages[:index], inputs, self.training)[0])
                later = next((other for other in completions if other > index), None)
                end = len(text)
                if later is not None:
                    end = _shared(text, self._render(messages[:later], inputs, self.training)[0])
                spans = [span for span in spans if not begin <= span[0] < end]
            if self._opens and spans:
                opening = _OPENING.search(self.render(messages[:last], add_generation_prompt=True, inputs=inputs))
                self.unlike_generation += opening is not None and opening.group() not in text[slice(*spans[-1])]
        self._check_kept(text, spans, messages, trained)
        return self._pieces(text, spans)

    def answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], inputs: TemplateInputs = NO_INPUTS
    ) -> list[Segment]:
        """What the model generates from, and the messages of its completion up to the token that ends the last.

        Raises:
            ValueError: as `segments`.
        """
        messages = [*prompt, *answer]
        self._check_words(messages, inputs)
        text = self.render(messages, inputs=inputs)
        span = self._span(text, messages, len(prompt), len(messages) - 1, inputs)
        self._check_kept(text, [span], messages, range(len(prompt), len(messages)))
        return self._pieces(text, [span])

    def prompt(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> list[Segment]:
        """What the model generates its completion from."""
        self._check_words(messages, inputs)
        text = self.render(messages, add_generation_prompt=True, inputs=inputs)
        self._check_kept(text, [], messages, ())
        return [Segment(text, False)]

    def raw_text(self, text: str) -> list[Segment]:
        """A text without a template, as the model would write it from its first token to the last."""
        self._check_words([{"role": "raw", "content": text}], NO_INPUTS)
        begins = self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]
        first = [Segment(str(self.tokenizer.bos_token), False)] if begins else []
        return [*first, Segment(text + str(self.tokenizer.eos_token), True)]

    def _check_words(self, messages: Sequence[Message], inputs: TemplateInputs) -> None:
        """No message spells a control token, and the tools are written."""
        if self._refuses_special:
            for message in messages:
                words = message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)
                if found := self._special.search(words):
                    raise ValueError(
                        f"a {message['role']} message contains the special token {found.group()!r}; "
                        "data.allow_special_tokens=true lets it through as a control token"
                    )
            if any(inputs) and (found := self._special.search(json.dumps(inputs, ensure_ascii=False))):
                raise ValueError(f"its tools or chat_template_kwargs contain the special token {found.group()!r}")
        if inputs.tools and not self._writes_tools:
            without = any("tool_calls" in message for message in messages)
            raise ValueError(
                f"it has 'tools', which the chat template of {self.name} does not write; take a model whose template "
                "does, or name a template with model.chat_template_path"
                + ("" if without else ", or leave them out with data.columns.tools=null")
            )

    @functools.cached_property
    def _writes_tools(self) -> bool:
        schema: JsonObject = {
            "name": "name_of_tool",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        }
        tool: JsonObject = {"type": "function", "function": schema}
        return "name_of_tool" in self.render([{"role": "user", "content": "Q"}], inputs=TemplateInputs([tool], {}))

    def _start(self, text: str, prompt: Sequence[Message], inputs: TemplateInputs) -> int:
        """Where the completion of a prompt begins in the text of a conversation."""
        asked = self.render(prompt, add_generation_prompt=True, inputs=inputs)
        if text.startswith(asked):
            return len(asked)
        if text.startswith(without := _OPENING.sub("", asked)):
            self.unlike_generation += 1
            return len(without)
        raise ValueError(
            f"the chat template of {self.name} is not prefix-preserving: later messages change how earlier ones are "
            f"rendered{_LAST}"
        )

    def _ends(self, text: str, start: int) -> tuple[int, int]:
        """Where the words of the last completion end, and where the token ends that ends its turn, if there is one."""
        if text.endswith(self.end_of_turn + self.tail):
            return (end := len(text) - len(self.tail)) - len(self.end_of_turn), end
        if (found := self._special_at_end.search(text, start)) is not None:  # another one, as after a tool call
            *_, token = self._special.finditer(text, found.start())
            return token.start(), token.end()
        return (end := len(text.rstrip())), end

    def _span(
        self, text: str, messages: Sequence[Message], first: int, last: int, inputs: TemplateInputs
    ) -> tuple[int, int]:
        """Without marks: from where the first of these messages is generated to the token that ends the last of them.

        It is found by rendering what comes before each; in further plain conversations of the same roles, which the
        template writes in the same way, by the generation prompts in their text.
        """
        shape = (*(str(message["role"]) for message in messages), first, last)
        quick = self._span_in_text(text, messages, first, last, inputs)
        if quick is not None and shape in self._proven:
            return quick
        span = self._rendered_span(text, messages, first, last, inputs)
        if span == quick:
            self._proven.add(shape)
        return span

    def _span_in_text(
        self, text: str, messages: Sequence[Message], first: int, last: int, inputs: TemplateInputs
    ) -> tuple[int, int] | None:
        """The same by the generation prompts alone; None where it cannot be told so."""
        if any(inputs) or not (self._asks and self._refuses_special):
            return None
        if any(set(message) - {"role", "content", "train"} for message in messages):
            return None
        completions = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [at + len(self._asks) for at in _finds(self._asks, text, 0)]
        if first not in completions or len(starts) != len(completions):  # somebody's words hold one
            return None
        start = starts[completions.index(first)]
        if last == len(messages) - 1:
            return start, self._ends(text, start)[1]
        token = self._special.search(text, start)  # no words hold one
        return (start, token.end()) if token is not None else None

    def _rendered_span(
        self, text: str, messages: Sequence[Message], first: int, last: int, inputs: TemplateInputs
    ) -> tuple[int, int]:
        start = self._start(text, messages[:first], inputs)
        if last == len(messages) - 1:
            return start, self._ends(text, start)[1]
        alone = self.render(messages[: last + 1], inputs=inputs)
        words, end = self._ends(alone, start)
        if text[:words] != alone[:words]:
            raise ValueError(
                f"the chat template of {self.name} renders a completion otherwise once messages follow it{_LAST}"
            )
        # the token that ends it here, which is not the one that begins a message of the user
        after = len(text) - len(text[words:].lstrip())
        token = self._special.match(text, after)
        is_new = token is not None and token.group() != alone[words:end]
        if token is None or (is_new and token.group() in self._before_user(messages, inputs)):
            raise ValueError(
                f"the chat template of {self.name} does not mark the end of a completion that others follow{_LAST}"
            )
        return start, token.end()

    def _before_user(self, messages: Sequence[Message], inputs: TemplateInputs) -> str:
        """The text up to the user's first words."""
        first = next(index for index, message in enumerate(messages) if message["role"] == "user")
        text = self.render(messages[: first + 1], inputs=inputs)
        return text[: text.rfind(messages[first]["content"].strip())]

    def _check_kept(
        self, text: str, spans: Sequence[tuple[int, int]], messages: Sequence[Message], trained: Sequence[int]
    ) -> None:
        """What is to be learned stands in the spans, what others say stands outside of them, in their order."""

        def inside(start: int, end: int) -> bool:
            return any(begin < end and start < stop for begin, stop in spans)

        position = 0
        for number, message in enumerate(messages):
            learned = number in trained
            if message["role"] == "assistant" and not learned:
                continue
            ends, calls = [position], position
            for name, words in _words(message, split=learned):
                if message["role"] == "tool" and (parsed(words) != words or json.dumps(words)[1:-1] in text):
                    continue  # templates write a tool's JSON in ways of their own
                # some templates write the system message before the last question
                starts = (calls if name == "tool call" else position,) if learned else (position, 0)
                found = (at for start in starts for at in _finds(words, text, start))
                at = next((at for at in found if inside(at, at + len(words)) == learned), None)
                if at is None:
                    what = f"the {name} of message {number + 1}, by the {message['role']} ({words[:30]!r})"
                    raise ValueError(
                        f"the chat template of {self.name} drops or changes {what}; leave it out of the data, or name "
                        f"another template with model.chat_template_path{_LAST if len(trained) > 1 else ''}"
                    )
                ends.append(at + len(words))
                calls = ends[-1] if name == "tool call" else calls  # each call stands behind the one before
            position = max(ends)

    def _with_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A mark with the token that ends the turn, where it stands right behind it."""
        if not self._ends_with_token(text[start:end]):
            token = self._special.match(text, len(text) - len(text[end:].lstrip()))
            end = token.end() if token is not None and token.group() == self.end_of_turn else end
        return start, end

    def _ends_with_token(self, text: str) -> bool:
        return self._special_at_end.search(text, max(len(text.rstrip()) - self._longest, 0)) is not None

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
        pieces, position = [], 0
        for start, end in spans:
            pieces += [Segment(text[position:start], False)] if start > position else []
            pieces.append(Segment(text[start:end], True))
            position = end
        if not self._ends_with_token(pieces[-1].text):  # the template itself ends it with no token
            pieces[-1] = Segment(pieces[-1].text + self.end_of_turn, True)
        return pieces

    # --- token ids

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    def _ids_behind(self, anchors: Sequence[str], texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of each text behind the first of the anchors whose own ids stand apart from it."""
        found: dict[str, list[int]] = {}
        left = [*dict.fromkeys(texts)]  # a prompt before two completions is tokenised once
        for anchor in anchors:
            before = self._ids([anchor])[0] if anchor else []
            ids = dict(zip(left, self._ids([anchor + text for text in left]), strict=True))
            found |= {text: both[len(before) :] for text, both in ids.items() if both[: len(before)] == before}
            left = [text for text in left if text not in found]
        if left:
            raise ValueError("the tokenizer merges the beginning of the response with any text before it")
        return found

    def encode(self, batch: Sequence[Sequence[Segment]]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each row; a label is the token itself in a response, IGNORED elsewhere."""
        first = self._ids_behind([""], (segments[0].text for segments in batch))
        later = self._ids_behind(self._anchors, (segment.text for segments in batch for segment in segments[1:]))
        rows = []
        for segments in batch:
            row_ids: list[int] = []
            labels: list[int] = []
            for number, segment in enumerate(segments):
                piece = later[segment.text] if number else first[segment.text]
                if number and not row_ids:  # nothing came of the text before it
                    [piece] = self._ids([segment.text])
                row_ids += piece
                labels += piece if segment.is_response else [IGNORED] * len(piece)
            rows.append((row_ids, labels))
        return rows

    def prompt_ids(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> list[int]:
        """The ids from which the model generates its completion."""
        return self.encode([self.prompt(messages, inputs)])[0][0]

    @property
    def end_id(self) -> int:
        """Of the token that ends a turn."""
        return int(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))

    def end_of_text(self) -> tuple[str, str]:
        """What to take from the end of a rendered conversation, and then to put there, to have what is trained."""
        text = self.render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}])
        return self.tail, "" if text.endswith(self.end_of_turn + self.tail) else self.end_of_turn

    def conversation_ids(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> list[int]:
        """The ids of a conversation that a reward model reads: up to the token that ends its last completion."""
        return self.encode([self.answer(messages[:-1], messages[-1:], inputs)])[0][0]


def _call(call: JsonObject, as_text: bool) -> JsonObject:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False) if as_text else function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


def _finds(words: str, text: str, start: int) -> Iterator[int]:
    """Where they stand in it, from `start` on."""
    while (start := text.find(words, start)) >= 0:
        yield start
        start += 1


def _shared(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if text.startswith(other):
        return len(other)
    return next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _merged(marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marks that meet, as one."""
    spans: list[tuple[int, int]] = []
    for start, end in marks:
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _words(message: Message, split: bool) -> Iterator[tuple[str, str]]:
    """What of a message must stand in the rendered text; templates set a completion's thoughts apart from the rest."""
    if message.get("reasoning_content"):
        yield "reasoning", message["reasoning_content"].strip()
    for part in _THINK.split(message["content"]) if split else [message["content"]]:
        if part.strip():
            yield "content", part.strip()
    for call in message.get("tool_calls", ()):
        yield "tool call", call["function"]["name"]
        for value in call["function"]["arguments"].values():
            if isinstance(value, str) and value.strip() and json.dumps(value, ensure_ascii=False) == f'"{value}"':
                yield "argument of a call", value.strip()
