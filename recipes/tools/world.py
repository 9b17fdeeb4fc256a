"""A shop with one tool: questions about prices, the call that answers each, and the reward functions that know it.

`python recipes/tools/world.py` writes conversations.jsonl, preferences.jsonl and prompts.jsonl beside this file, byte
for byte the same each time. Each item is asked about in eight phrasings, two of which are held out.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

ITEMS = (
    *("bread", "milk", "fish", "salt", "paper", "glass", "stone", "coal", "gold", "chocolate"),
    *("music", "grass", "snow", "a lemon", "a carrot", "a plum", "a lamp", "a tree", "a ship", "a house"),
)
PRICES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PHRASINGS = (
    "What is the price of {}?",
    "Tell me the price of {}.",
    "Name the price of {}.",
    "I forgot the price of {}. What is it?",
    "Can you say what {} costs?",
    "The price of {}, please.",
    "What does one say that {} costs?",
    "Give me the price of {}.",
)
TOOL = {
    "name": "price",
    "description": "the price of a thing",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": TOOL}]
Row = dict[str, Any]


class Question(NamedTuple):
    """A question about an item, and what the tool says when it is called: a price that nobody can guess."""

    text: str
    item: str
    price: str
    split: str

    @property
    def answer(self) -> str:
        return f"The price of {self.item} is {self.price}."


def questions() -> list[Question]:
    """Each item in each phrasing, twice with other prices, in a fixed order; two phrasings of an item are held out."""
    generator = random.Random(0)
    found = []
    for item in ITEMS:
        held_out = generator.sample(range(len(PHRASINGS)), 2)
        for index, phrasing in enumerate(PHRASINGS):
            split = "test" if index in held_out else "train"
            for price in generator.sample(PRICES, 2):
                found.append(Question(phrasing.format(item), item, price, split))
    generator.shuffle(found)
    return found


ITEM_OF = {question.text: question.item for question in questions()}


def call(item: str) -> Row:
    """The assistant's message that calls the tool."""
    function = {"name": "price", "arguments": {"item": item}}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


def asked(question: Question) -> list[Row]:
    return [{"role": "user", "content": question.text}]


def looked_up(question: Question) -> list[Row]:
    """The question, the right call, and what the tool said."""
    return [*asked(question), call(question.item), {"role": "tool", "content": question.price}]


def made_up(question: Question, generator: random.Random) -> Row:
    """An answer that did not wait for the tool."""
    price = generator.choice([other for other in PRICES if other != question.price])
    return {"role": "assistant", "content": question._replace(price=price).answer}


def once() -> list[Question]:
    """Each question with one of its prices."""
    return list({question.text: question for question in questions()}.values())


def conversations() -> list[Row]:
    """`messages`, `tools`, `split`: question, call, result, answer; a third of the training rows makes it up."""
    generator = random.Random(2)
    right = [
        ([*looked_up(question), {"role": "assistant", "content": question.answer}], question.split)
        for question in questions()
    ]
    wrong = [([*asked(each), made_up(each, generator)], each.split) for each in once() if each.split == "train"]
    rows = [{"messages": messages, "tools": TOOLS, "split": split} for messages, split in right + wrong]
    generator.shuffle(rows)
    return rows


def preferences() -> list[Row]:
    """Preference rows with `group`, `tools`, `split`: what is due over another item or price."""
    generator = random.Random(1)
    rows = []
    for index, question in enumerate(once()):
        item = generator.choice([other for other in ITEMS if other != question.item])
        wrong, right = made_up(question, generator), {"role": "assistant", "content": question.answer}
        instead = ("made up", wrong) if index % 2 else ("another item", call(item))
        for (group, rejected), prompt, chosen in (
            (instead, asked(question), call(question.item)),
            (("another price", wrong), looked_up(question), right),
        ):
            row = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "group": group}
            rows.append(row | {"tools": TOOLS, "split": question.split})
    generator.shuffle(rows)
    return rows


def prompts() -> list[Row]:
    """`prompt`, `tools`, `price`, `split`: each question once, and those held out also up to what the tool said."""
    rows = []
    for question in questions():
        row = {"tools": TOOLS, "price": question.price, "split": question.split}
        if question.text not in {each["prompt"][0]["content"] for each in rows}:
            rows.append({"prompt": asked(question)} | row)
        if question.split == "test":
            rows.append({"prompt": looked_up(question)} | row)
    return rows


def due(prompt: list[Row], price: str) -> str:
    """What the model has to say: the call, or the answer once the tool has given a price."""
    item = ITEM_OF[prompt[0]["content"]]
    return f"The price of {item} is {price}." if len(prompt) > 1 else f"price({json.dumps({'item': item})})"


def right(prompts: list[Any], completions: list[Any], price: list[str], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 for the right call, or for the answer with the price that the tool gave."""
    rows = zip(prompts, completions, price, strict=True)
    return [float(completion[0]["content"].strip() == due(prompt, cost)) for prompt, completion, cost in rows]


def right_call(prompts: list[Any], **columns: Any) -> list[float | None]:
    """The same of calls alone; None where the tool has answered."""
    scores = zip(prompts, right(prompts, **columns), strict=True)
    return [score if len(prompt) == 1 else None for prompt, score in scores]


def right_answer(prompts: list[Any], **columns: Any) -> list[float | None]:
    """The same of answers alone; None before the call."""
    scores = zip(prompts, right(prompts, **columns), strict=True)
    return [score if len(prompt) > 1 else None for prompt, score in scores]


def write(folder: Path) -> None:
    made = {"conversations": conversations(), "preferences": preferences(), "prompts": prompts()}
    for name, rows in made.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
