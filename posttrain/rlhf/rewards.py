"""Rewards behind TRL's signature f(prompts, completions, completion_ids, **columns): models and Python functions."""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from posttrain.config.suggest import nearest
from posttrain.console import say, warn
from posttrain.data.chat import ChatEncoder
from posttrain.data.messages import Message
from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.resolve import import_from_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., Any]
Score = Callable[[list[list[int]]], list[float]]
# (prompt, completion, ids of the prompt, ids of the completion) -> the ids that a reward model reads
Encode = Callable[[list[Message], str, list[int], list[int]], list[int]]


def load_function(key: str, spec: str) -> RewardFunction:
    """The function that `spec` names, as package.module.f or path/to/file.py:f; its file is printed before it is run.

    Raises:
        ConfigError: there is no such file, module or function; `key` is the option that named it.
    """
    file, separator, name = spec.rpartition(":") if ":" in spec else spec.rpartition(".")
    if not separator or not file or not name.isidentifier():
        raise ConfigError(f"{key}={spec} must be package.module.function or path/to/file.py:function")
    if file.endswith(".py"):
        path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigError(f"{key}={spec}: no file {path}")
        found = importlib.util.spec_from_file_location(f"reward_functions_in_{path.stem}", path)
    else:
        import_from_here()
        try:
            found = importlib.util.find_spec(file)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{key}={spec}: {error}") from error
        if found is None:
            raise ConfigError(f"{key}={spec}: no module named {file} (looked in {', '.join(sys.path[:3])}, ...)")
    assert found is not None
    say(f"{key}: {name} from {found.origin}")
    module = _run(found, key, spec)
    function = vars(module).get(name)
    if not callable(function):
        functions = [other for other, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"{key}={spec}: no function {name} in {found.origin}{nearest(name, functions)}")
    return checked(name, function)


def _run(found: ModuleSpec, key: str, spec: str) -> ModuleType:
    earlier = sys.modules.get(found.name)
    if earlier is not None and earlier.__file__ == found.origin:
        return earlier
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    try:
        assert found.loader is not None
        found.loader.exec_module(module)
    except BaseException as error:  # SystemExit among them: it would end the run as if all were well
        del sys.modules[found.name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{key}={spec} cannot be imported: {_place(error)}") from error
    return module


def _place(error: BaseException) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"


def checked(name: str, function: RewardFunction) -> RewardFunction:
    """The function, its failures and non-finite values raised under its name; None: does not apply.

    A coroutine function stays one, so that TRL awaits several at a time.
    """

    def check(values: Sequence[float | None], completions: Sequence[list[Message]]) -> list[float | None]:
        if len(values) != len(completions):
            raise PosttrainError(
                f"reward function {name} gave {len(values)} rewards for {len(completions)} completions"
            )
        for value, completion in zip(values, completions, strict=True):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise PosttrainError(
                    f"reward function {name} gave {value!r}, which is not a finite number, for the completion "
                    f"{completion[0]['content'][:100]!r}"
                )
        return [None if value is None else float(value) for value in values]

    def failed(error: BaseException) -> PosttrainError:
        more = "; it is called with prompts=, completions= and more (**columns), and returns a list of numbers"
        return PosttrainError(
            f"reward function {name} failed: {_place(error)}{more if isinstance(error, TypeError) else ''}"
        )

    def call(completions: Sequence[list[Message]], **columns: object) -> list[float | None]:
        try:
            found = list(function(completions=completions, **columns))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise failed(error) from error
        return check(found, completions)

    async def call_and_wait(completions: Sequence[list[Message]], **columns: object) -> list[float | None]:
        try:
            found = list(await function(completions=completions, **columns))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise failed(error) from error
        return check(found, completions)

    wrapped = call_and_wait if inspect.iscoroutinefunction(function) else call
    wrapped.__name__ = name
    return wrapped


def model_reward(score: Score, encode: Encode) -> RewardFunction:
    """A reward model as a function: `encode` makes the ids that it reads, `score` reads them."""

    def reward_model(
        prompts: list[list[Message]],
        completions: list[list[Message]],
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
        **columns: object,
    ) -> list[float]:
        parts = zip(prompts, completions, prompt_ids, completion_ids, strict=True)
        return score([encode(prompt, answer[0]["content"], ids, more) for prompt, answer, ids, more in parts])

    return reward_model


def same_ids(prompt: list[Message], answer: str, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
    """For a reward model with the policy's own tokenizer and template: exactly what was generated."""
    return [*prompt_ids, *completion_ids]


def encoded_again(encoder: ChatEncoder, limit: int) -> Encode:
    """For a reward model with a tokenizer of its own: the text through its own template, its end if it is too long."""
    warned = False

    def encode(prompt: list[Message], answer: str, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
        nonlocal warned
        messages = [*prompt, {"role": "assistant", "content": answer}]
        ids = encoder.conversation_ids(messages)
        if len(ids) > limit:
            if not warned:
                warned = True
                warn(f"the reward model has {limit} positions: of a longer conversation ({len(ids)}) it reads the end")
            start = ids[: ids[0] == encoder.tokenizer.cls_token_id]  # an encoder's score is read there
            ids = [*start, *ids[len(start) - limit :]]
        return ids

    return encode


def same_tokenizer(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether two tokenizers and their templates turn every conversation into the same ids."""
    return bool(
        one.chat_template == other.chat_template
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        and one.eos_token_id == other.eos_token_id
    )
