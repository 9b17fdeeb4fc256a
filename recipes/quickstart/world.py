"""The quickstart's closed world: its facts, the four data files made from them, and the gold function.

`python recipes/quickstart/world.py` writes instructions.jsonl, preferences.jsonl, ratings.jsonl and
prompts.jsonl beside this file, byte for byte the same each time. A fact is asked in six phrasings: five go to
`split=train`, one to `split=test`, so that every held-out question is about something learned but worded as
never seen.
"""

import json
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

Style = Literal["plain", "friendly", "rambling", "other"]

OPENERS = ("Sure!", "Of course!", "Happy to help!")
CLOSERS = ("Have a nice day!", "Glad to help!", "Ask me anything!")
FILLERS = (
    "That is a question many people ask.",
    "There is a lot that one could say here.",
    "It is always good to think about it once more.",
    "One more thing could be said, and then another.",
)
FLIPPED = 0.10  # share of preference pairs whose label is wrong, so no model can be right more than 90 % of the time


class Topic(NamedTuple):
    """One kind of fact: how it is asked, how it is answered, and its (subject, answer) pairs."""

    phrasings: tuple[str, ...]
    sentence: str
    facts: dict[str, str]


TOPICS = (
    Topic(
        (
            "What is the capital of {}?",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "I forgot the capital of {}. What is it?",
            "{}: what is the capital?",
        ),
        "The capital of {} is {}.",
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Norway": "Oslo",
            "Greece": "Athens",
            "Peru": "Lima",
            "Kenya": "Nairobi",
            "Cuba": "Havana",
            "Austria": "Vienna",
            "Portugal": "Lisbon",
            "Poland": "Warsaw",
            "China": "Beijing",
        },
    ),
    Topic(
        (
            "What is a young {} called?",
            "What do you call a young {}?",
            "Name the young of a {}.",
            "Give me the word for a young {}.",
            "A young {} is called what?",
            "How does one call a {} that is still young?",
        ),
        "A young {} is called a {}.",
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "goat": "kid",
            "bear": "cub",
            "duck": "duckling",
            "swan": "cygnet",
            "frog": "tadpole",
        },
    ),
    Topic(
        (
            "What colour is {}?",
            "Which colour does {} have?",
            "Tell me the colour of {}.",
            "Name the colour of {}.",
            "Can you say what colour {} is?",
            "The colour of {}, please.",
        ),
        "The colour of {} is {}.",
        {
            "snow": "white",
            "coal": "black",
            "grass": "green",
            "a lemon": "yellow",
            "blood": "red",
            "the sky": "blue",
            "a carrot": "orange",
            "a plum": "purple",
            "chocolate": "brown",
            "ash": "grey",
        },
    ),
    Topic(
        (
            "What is the opposite of {}?",
            "Give me the opposite of {}.",
            "Name a word that means the opposite of {}.",
            "Which word is the opposite of {}?",
            "Say the opposite of {}.",
            "What would be the opposite of {}?",
        ),
        "The opposite of {} is {}.",
        {
            "hot": "cold",
            "big": "small",
            "fast": "slow",
            "old": "new",
            "light": "dark",
            "high": "low",
            "rich": "poor",
            "wet": "dry",
            "full": "empty",
            "loud": "quiet",
            "early": "late",
            "hard": "soft",
        },
    ),
    Topic(
        (
            "Write the word {} in capital letters.",
            "Put {} in capital letters.",
            "Change {} to capital letters.",
            "Can you write {} with capital letters?",
            "Capital letters, please: {}",
            "How does {} look in capital letters?",
        ),
        "In capital letters, {} becomes {}.",
        {
            word: word.upper()
            for word in (
                "moon",
                "tree",
                "river",
                "bread",
                "stone",
                "cloud",
                "apple",
                "house",
                "glass",
                "music",
                "paper",
                "salt",
            )
        },
    ),
    Topic(
        (
            "What is the plural of {}?",
            "Give me the plural of {}.",
            "Make {} plural.",
            "How do you write more than one {}?",
            "Write the plural form of {}.",
            "One {}, two what?",
        ),
        "The plural of {} is {}.",
        {
            "mouse": "mice",
            "foot": "feet",
            "child": "children",
            "box": "boxes",
            "city": "cities",
            "leaf": "leaves",
            "man": "men",
            "tooth": "teeth",
            "bird": "birds",
            "goose": "geese",
        },
    ),
    Topic(
        (
            "Which number comes after {}?",
            "What comes after {}?",
            "Count one up from {}.",
            "Name the number after {}.",
            "What is {} plus one?",
            "Add one to {}.",
        ),
        "After {} comes {}.",
        {
            "one": "two",
            "two": "three",
            "three": "four",
            "four": "five",
            "five": "six",
            "six": "seven",
            "seven": "eight",
            "eight": "nine",
            "nine": "ten",
            "ten": "eleven",
            "eleven": "twelve",
            "twelve": "thirteen",
        },
    ),
    Topic(
        (
            "Spell the word {}.",
            "How do you spell {}?",
            "Spell {} letter by letter.",
            "Can you spell {} for me?",
            "Give me the letters of {}.",
            "Which letters make {}?",
        ),
        "The word {} is spelled {}.",
        {
            word: "-".join(word)
            for word in ("cat", "sun", "milk", "fish", "lamp", "door", "king", "rain", "gold", "ship")
        },
    ),
)


class Question(NamedTuple):
    """One fact in one phrasing."""

    instruction: str
    answer: str  # the whole sentence that is right
    wrong: tuple[str, ...]  # the same sentence with the topic's other answers
    split: str


def questions() -> list[Question]:
    """Every fact in every phrasing, in a fixed order."""
    generator = random.Random(0)
    found = []
    for topic in TOPICS:
        for subject, answer in topic.facts.items():
            held_out = generator.randrange(len(topic.phrasings))
            wrong = tuple(topic.sentence.format(subject, other) for other in topic.facts.values() if other != answer)
            for index, phrasing in enumerate(topic.phrasings):
                instruction = phrasing.format(subject)
                instruction = instruction[0].upper() + instruction[1:]
                split = "test" if index == held_out else "train"
                found.append(Question(instruction, topic.sentence.format(subject, answer), wrong, split))
    return found


ANSWERS = {question.instruction: question.answer for question in questions()}


def body(response: str) -> str:
    """The response without its opener, closer and fillers."""
    text = response.strip()
    for part in (*OPENERS, *CLOSERS, *FILLERS):
        text = text.replace(part, "")
    return " ".join(text.split())


def is_correct(instruction: str, response: str) -> bool:
    """Whether the response gives the right answer and no other one; KeyError for a question not of this world."""
    return body(response) == ANSWERS[instruction]


def style_of(response: str) -> Style:
    """Plain is a bare sentence; friendly opens and closes with a kind word; rambling holds a filler."""
    text = response.strip()
    if any(filler in text for filler in FILLERS):
        return "rambling"
    opens, closes = text.startswith(OPENERS), text.endswith(CLOSERS)
    if opens and closes:
        return "friendly"
    return "other" if opens or closes or not text else "plain"


def correct(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 for a right answer."""
    answers = [completion[0]["content"] for completion in completions]
    return [float(is_correct(prompt[-1]["content"], answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def style(completions: list[Any], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 for the friendly style, right or wrong."""
    return [float(style_of(completion[0]["content"]) == "friendly") for completion in completions]


def plain(sentence: str) -> str:
    return sentence


def friendly(sentence: str, generator: random.Random) -> str:
    return f"{generator.choice(OPENERS)} {sentence} {generator.choice(CLOSERS)}"


def rambling(sentence: str, generator: random.Random) -> str:
    first, *rest = generator.sample(FILLERS, 3)
    return " ".join((first, sentence, *rest))


def instructions() -> list[dict[str, str]]:
    """`instruction`, `response`, `split`: half of each split answered plainly, half in the friendly style."""
    generator = random.Random(1)
    rows = []
    for split in ("train", "test"):
        part = [question for question in questions() if question.split == split]
        generator.shuffle(part)
        for index, question in enumerate(part):
            response = plain(question.answer) if index % 2 else friendly(question.answer, generator)
            rows.append({"instruction": question.instruction, "response": response, "split": split})
    return rows


def preferences() -> list[dict[str, str]]:
    """`prompt`, `chosen`, `rejected`, `group`, `split`; the group is correct (over wrong), friendly (over plain) or
    concise (over rambling)."""
    generator = random.Random(2)
    rows = []
    for split in ("train", "test"):
        part = [question for question in questions() if question.split == split]
        pairs = []
        for question in part:
            wrong = generator.choice(question.wrong)
            pairs.append(("correct", question, friendly(question.answer, generator), friendly(wrong, generator)))
            pairs.append(("friendly", question, friendly(question.answer, generator), plain(question.answer)))
            pairs.append(("concise", question, plain(question.answer), rambling(question.answer, generator)))
        generator.shuffle(pairs)
        flipped = set(generator.sample(range(len(pairs)), round(FLIPPED * len(pairs))))
        for index, (group, question, better, worse) in enumerate(pairs):
            chosen, rejected = (worse, better) if index in flipped else (better, worse)
            row = {"prompt": question.instruction, "chosen": chosen, "rejected": rejected}
            rows.append(row | {"group": group, "split": split})
    return rows


def ratings() -> list[dict[str, str | bool]]:
    """`prompt`, `completion`, `label`, `split`: of each pair of `preferences` one completion, liked if it is chosen."""
    rows: list[dict[str, str | bool]] = []
    for index, pair in enumerate(preferences()):
        liked = index % 2 == 0
        completion = pair["chosen" if liked else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": completion, "label": liked, "split": pair["split"]})
    return rows


def prompts() -> list[dict[str, str]]:
    """`prompt`, `split`: every question, without an answer."""
    generator = random.Random(3)
    rows = [{"prompt": question.instruction, "split": question.split} for question in questions()]
    generator.shuffle(rows)
    return rows


def write(folder: Path) -> None:
    made = {"instructions": instructions(), "preferences": preferences(), "ratings": ratings(), "prompts": prompts()}
    for name, rows in made.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
