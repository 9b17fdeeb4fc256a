"""Sums of three numbers, thought through in two steps: the rows, and the reward functions that know the sums.

`python recipes/reasoning/world.py` writes conversations.jsonl and prompts.jsonl beside this file, byte for byte the
same each time. A held-out sum is one that was not trained. The prompts to train on are sums of which no conversation
tells the answer.
"""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

PHRASINGS = ("What is {}?", "Add up {}.", "Tell me {}.")
SHOWN, TEST = 400, 100  # sums that SFT is shown, and that are held out; the others are for rewards
Row = dict[str, Any]


def sums() -> list[tuple[int, int, int]]:
    """All of three numbers from 1 to 9, in a random order."""
    found = list(itertools.product(range(1, 10), repeat=3))
    random.Random(0).shuffle(found)
    return found


def thought(*numbers: int) -> str:
    """One sum after the other: 3 + 4 = 7. 7 + 5 = 12."""
    totals = list(itertools.accumulate(numbers))
    return " ".join(f"{a} + {b} = {c}." for a, b, c in zip(totals, numbers[1:], totals[1:], strict=False))


def turn(question: str, *numbers: int) -> list[Row]:
    """A question, and its answer with the thought before it."""
    answer = {"role": "assistant", "reasoning_content": thought(*numbers), "content": str(sum(numbers))}
    return [{"role": "user", "content": question}, answer]


def conversations() -> list[Row]:
    """`messages`, `split`; every fourth goes on with a second question, about the first one's result.

    The answers of a third of those to train on do not follow from their thoughts, as in careless data.
    """
    generator = random.Random(1)
    rows = []
    for place, numbers in enumerate(sums()[: SHOWN + TEST]):
        question = generator.choice(PHRASINGS).format(" + ".join(map(str, numbers)))
        messages = turn(question, *numbers)
        if place % 4 == 0:
            more = generator.randint(1, 9)
            messages += turn(f"And {more} more?", sum(numbers), more)
        if place < SHOWN and place % 3 == 2:
            messages[-1]["content"] = str(int(messages[-1]["content"]) + generator.choice((-2, -1, 1, 2)))
        rows.append({"messages": messages, "split": "train" if place < SHOWN else "test"})
    return rows


def prompts() -> list[Row]:
    """`prompt`, `total`, `split`: sums that no conversation shows, in each phrasing, and held-out questions."""
    rows = []
    for numbers, phrasing in itertools.product(sums()[SHOWN + TEST :], PHRASINGS):
        question, _ = turn(phrasing.format(" + ".join(map(str, numbers))), *numbers)
        rows.append({"prompt": [question], "total": sum(numbers), "split": "train"})
    for row in conversations()[SHOWN:]:
        *prompt, answer = row["messages"]
        rows.append({"prompt": prompt, "total": int(answer["content"]), "split": row["split"]})
    return rows


def right(completions: list[Any], total: list[int], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 where what follows the thought is the right number, and nothing else."""
    answers = [completion[0]["content"].rpartition("</think>")[2].strip() for completion in completions]
    return [float(answer == str(number)) for answer, number in zip(answers, total, strict=True)]


def sound(completions: list[Any], **columns: Any) -> list[float]:
    """In TRL's form of a reward: 1 where there is a thought, and each sum in it is true."""
    scores = []
    for completion in completions:
        found = re.match(r"\s*<think>(.*)</think>", completion[0]["content"], re.DOTALL)
        steps = found.group(1).strip() if found else ""
        each = [re.fullmatch(r"\s*(\d+) \+ (\d+) = (\d+)", part) for part in steps.rstrip(".").split(".")]
        scores.append(float(all(step and int(step[1]) + int(step[2]) == int(step[3]) for step in each)))
    return scores


def write(folder: Path) -> None:
    for name, rows in {"conversations": conversations(), "prompts": prompts()}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
