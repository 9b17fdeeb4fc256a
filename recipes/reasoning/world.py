"""Sums of five numbers, half of them thought through step by step: the rows, and the reward functions.

`python recipes/reasoning/world.py` writes conversations.jsonl and prompts.jsonl beside this file, byte for byte the
same each time. A held-out sum is one that was not trained.
"""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

PHRASINGS = ("What is {}?", "Add up {}.", "Tell me {}.")
TRAIN, TEST = 500, 100
Row = dict[str, Any]


def sums() -> list[tuple[tuple[int, ...], str]]:
    """Five numbers from 1 to 5, and the part that they belong to; no two rows ask for the same."""
    found = list(itertools.product(range(1, 6), repeat=5))
    random.Random(0).shuffle(found)
    return [(each, "train" if place < TRAIN else "test") for place, each in enumerate(found[: TRAIN + TEST])]


def thought(*numbers: int) -> str:
    """One sum after the other: 3 + 4 = 7. 7 + 5 = 12."""
    totals = list(itertools.accumulate(numbers))
    return " ".join(f"{a} + {b} = {c}." for a, b, c in zip(totals, numbers[1:], totals[1:], strict=False))


def turn(question: str, numbers: tuple[int, ...], thinks: bool) -> list[Row]:
    """A question, and its answer with the thought before it or without."""
    answer = {"role": "assistant", "content": str(sum(numbers))}
    return [
        {"role": "user", "content": question},
        answer | ({"reasoning_content": thought(*numbers)} if thinks else {}),
    ]


def conversations() -> list[Row]:
    """`messages`, `split`; every fourth goes on with a second question, about the first one's result."""
    generator = random.Random(1)
    rows = []
    for place, (numbers, split) in enumerate(sums()):
        question, thinks = generator.choice(PHRASINGS), generator.random() < 0.5
        messages = turn(question.format(" + ".join(map(str, numbers))), numbers, thinks)
        if place % 4 == 0:
            more = generator.randint(1, 5)
            messages += turn(f"And {more} more?", (sum(numbers), more), thinks)
        rows.append({"messages": messages, "split": split})
    return rows


def prompts() -> list[Row]:
    """`prompt`, `total`, `split`: the questions up to the last one, and what is right."""
    rows = []
    for row in conversations():
        *prompt, answer = row["messages"]
        rows.append({"prompt": prompt, "total": int(answer["content"]), "split": row["split"]})
    return rows


def right(completions: list[Any], total: list[int], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 where what follows the thought is the right number, and nothing else."""
    answers = [completion[0]["content"].rpartition("</think>")[2].strip() for completion in completions]
    return [float(answer == str(number)) for answer, number in zip(answers, total, strict=True)]


def thinks(completions: list[Any], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 where there is a thought before the answer, true or not."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(re.match(r"\s*<think>\s*\S.*</think>", text, re.DOTALL) is not None) for text in texts]


def write(folder: Path) -> None:
    for name, rows in {"conversations": conversations(), "prompts": prompts()}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
