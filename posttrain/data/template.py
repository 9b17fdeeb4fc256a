"""The chat template that a model is trained with, and what is kept with it: its date and its arguments."""

import copy
import datetime
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For models that come without a template: plain text, no token that the model does not know yet.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ '### System:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' + message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{%- if messages and messages[-1]['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}{{ '### Response:\\n' }}
{%- endif %}"""

# strftime directives of a format that the template makes up from parts
_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdHIjmMpSyYc"))
_BEGIN, _END = "{#- posttrain keeps -#}", "{#- end -#}{{- '' }}"
_KEPT = re.compile(rf"\A{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Ours, beginning with BOS where the tokenizer itself puts one."""
    first = tokenizer("a").input_ids[:1]
    begins_with_bos = bool(first) and first[0] == tokenizer.bos_token_id
    return ("{{- bos_token }}\n" if begins_with_bos else "") + PLAIN_TEMPLATE


def kept_apart(template: str) -> tuple[str, str]:
    """What posttrain has put before a template, and the template itself."""
    found = _KEPT.match(template)
    return (found.group(), template[found.end() :]) if found else ("", template)


def default_of(template: str | dict[str, str]) -> str:
    """Of a tokenizer with several templates, the one for plain conversations."""
    return template if isinstance(template, str) else template["default"]


def keep_in_template(
    tokenizer: "PreTrainedTokenizerBase", day: datetime.datetime, options: Mapping[str, object]
) -> str:
    """Put the date and the arguments of a run before the tokenizer's template, so that they stay with the model.

    A template that writes today's date would train other weights tomorrow. What is kept already stays, unless
    `options` sets it again. Returns a note, empty where nothing is kept.

    Raises:
        ConfigError: the template reads no argument of that name.
    """
    earlier, template = kept_apart(default_of(tokenizer.chat_template))
    for name in options:
        if name in ("messages", "tools", "documents", "add_generation_prompt") or not re.search(
            rf"\b{re.escape(name)}\b", template
        ):
            raise ConfigError(f"data.chat_template_kwargs.{name} is not read by the model's chat template")
    parts = [f"{{%- set {name} = {name} if {name} is defined else {value!r} -%}}" for name, value in options.items()]
    notes = [f"{name}={value}" for name, value in options.items()]
    if earlier:  # behind the new ones, which it so cannot set again
        parts.append(earlier.removesuffix(_END).removeprefix(_BEGIN))
    elif "strftime_now" in template:
        written = {text: day.strftime(text) for _, text in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
        chain = "".join(f" | replace({name!r}, {day.strftime(name)!r})" for name in _DIRECTIVES)
        value = f"{written!r}[format] | default(format{chain})"
        parts.append(f"{{%- macro strftime_now(format) %}}{{{{ {value} }}}}{{% endmacro -%}}")
        notes.append(f"its date is {day:%Y-%m-%d}, kept with the model")
    if notes:
        kept = _BEGIN + "".join(parts) + _END
        given = tokenizer.chat_template
        tokenizer.chat_template = kept + template if isinstance(given, str) else {**given, "default": kept + template}
    return f"chat template: {', '.join(notes)}" if notes else ""


def training_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template whose {% generation %} marks say what carries loss: the tokenizer's own, or the one of TRL for it.

    None where there is neither.
    """
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    kept, template = kept_apart(default_of(tokenizer.chat_template))
    if has_generation_markers(template):
        return kept + template
    plain = copy.copy(tokenizer)
    plain.chat_template = template
    try:
        return kept + str(get_training_chat_template(plain))
    except (ValueError, TypeError, TemplateError):  # TRL does not know it, or it cannot render what TRL tries it on
        return None
