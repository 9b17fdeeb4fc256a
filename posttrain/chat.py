"""Talk to a model in the terminal, or to two at once.

usage: posttrain chat <folder or Hub id> [<another>] [key=value ...]

  temperature=0.7      0: the most likely completion
  max_new_tokens=256
  system="..."         the system message

The model's own template and generation settings are used. In the conversation:
/reset or /new begins another one, /system <text> too, with that system message (or
none), /help lists these, /quit or Ctrl-D ends. Ctrl-C ends a completion.

examples:
  posttrain chat outputs/demo/dpo
  posttrain chat outputs/demo/sft outputs/demo/dpo temperature=0
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.command import configure, read_words
from posttrain.cli.entry import entry_point
from posttrain.console import say, tame
from posttrain.data.messages import Message
from posttrain.devices import setup_device
from posttrain.errors import ConfigError
from posttrain.models.load import load_model_and_tokenizer, max_positions
from posttrain.models.resolve import beside, input_hashes, naming, resolve_path
from posttrain.values import JsonObject

HELP = (
    "/reset or /new: another conversation; /system <text>: another one with this system message (none without a text); "
    "Ctrl-C: end this completion; /quit or Ctrl-D: end"
)
NUMBERS = {"temperature": 0.7, "max_new_tokens": 256.0}


def read_chat(arguments: Sequence[str]) -> tuple[list[str], dict[str, float], str]:
    """Models, numbers and the system message of a command line.

    Raises:
        ConfigError: no model is named, or more than two, or an option is unknown.
    """
    models, options = read_words(arguments, [*NUMBERS, "system"])
    numbers = dict(NUMBERS)
    for name in NUMBERS.keys() & options.keys():
        try:
            numbers[name] = float(options[name])
        except ValueError as error:
            raise ConfigError(f"{name}={options[name]} must be a number") from error
    if not 0 <= numbers["temperature"] < math.inf or not 1 <= numbers["max_new_tokens"] < math.inf:
        raise ConfigError("temperature= must be at least 0, and max_new_tokens= at least 1")
    if len(models) not in (1, 2):
        raise ConfigError("name one model, or two: posttrain chat outputs/demo/sft outputs/demo/dpo")
    return models, numbers, options.get("system", "")


class Talker:
    """One model and the conversation with it so far."""

    def __init__(self, path: str, system: str) -> None:
        settings = beside(configure().model, path)
        with naming("model"):
            input_hashes(Path(resolve_path(settings)))  # refuses a result that has changed since
            self.model, self.tokenizer = load_model_and_tokenizer(settings)
            self.positions = max_positions(settings)
        self.model = self.model.to(setup_device()).eval()
        self.path, self.system = path, system
        self.messages: list[Message] = []
        self.forget()

    def forget(self) -> None:
        """Begin another conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, numbers: dict[str, float]) -> str:
        """Ask, write the completion to standard output as it is made, and keep both in the conversation.

        Ctrl-C ends it early; what was written by then is kept.
        """
        import torch
        from transformers import TextStreamer

        written: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                written.append(text)
                super().on_finalized_text(tame(text), stream_end)

        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        room = (self.positions or sys.maxsize) - inputs["input_ids"].size(1)
        if room < 1:
            say(f"the conversation is longer than the model's {self.positions} positions; /reset begins another one")
            self.messages.pop()
            return ""
        sampled: JsonObject = {"do_sample": False}
        if numbers["temperature"] > 0:
            sampled = {"do_sample": True, "temperature": numbers["temperature"]}
        try:
            with torch.no_grad():
                self.model.generate(
                    **inputs,
                    **sampled,
                    max_new_tokens=min(int(numbers["max_new_tokens"]), room),
                    streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                )
        except KeyboardInterrupt:
            say("\n(ended by Ctrl-C)")
        said = "".join(written)
        self.messages.append({"role": "assistant", "content": said})
        return said


def main() -> None:
    """The entry point of `posttrain chat`."""
    entry_point("chat", _main)


def _main() -> None:
    paths, numbers, system = read_chat(sys.argv[1:])
    talkers = [Talker(path, system) for path in paths]
    say(HELP)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        word, _, rest = text.partition(" ")
        if word == "/quit":
            return
        if word in ("/new", "/reset", "/system"):
            for talker in talkers:
                talker.system = rest.strip() if word == "/system" else talker.system
                talker.forget()
        elif word.startswith("/") and word[1:].isalpha():  # a path is a question
            say(HELP if word == "/help" else f"{word} is unknown. {HELP}")
        elif text:
            for talker in talkers:
                if len(talkers) > 1:
                    say(talker.path, style="bold")
                talker.answer(text, numbers)


if __name__ == "__main__":
    main()
