"""Of several answers to a prompt, which become a preference row or an instruction row, and why others do not."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.config.stages import InstructionColumns
from posttrain.config.suggest import one_of
from posttrain.data.formats import Prompt
from posttrain.data.splits import decides
from posttrain.errors import ConfigError
from posttrain.metrics.comparison import REWARD
from posttrain.rlhf.scoring import ScoredCompletion
from posttrain.values import Fields

FILES = {"pairs": "preferences.jsonl", "best": "instructions.jsonl"}  # what is kept of each prompt -> its file
NO_REWARD, NO_END, LOW_REWARD, SAME, LOW_MARGIN, GOLD = REASONS = (
    "no answer has a reward",
    "no answer has an end",
    "reward of the best too low",
    "all answers are the same",
    "margin too low",
    "worse by a gold function",
)


@dataclass(frozen=True)
class PairsConfig:
    """How answers are sampled and chosen, as it is typed."""

    samples: int = 4
    keep: str = "pairs"
    min_margin: float = 0.5  # by Bradley-Terry the worse of such a pair is still preferred in 38 % of cases
    min_reward: float | None = None
    gold_filter: bool = False

    def __post_init__(self) -> None:
        if self.samples < (least := 2 if self.keep == "pairs" else 1):
            raise ConfigError(f"samples={self.samples} must be at least {least}: a pair is made of two answers")
        if self.keep not in FILES:
            raise ConfigError(one_of("keep", self.keep, list(FILES)))
        if not 0 <= self.min_margin < math.inf:
            raise ConfigError(f"min_margin={self.min_margin:g} must be a number, at least 0")
        if self.min_reward is not None and not math.isfinite(self.min_reward):
            raise ConfigError(f"min_reward={self.min_reward:g} must be a number")


@dataclass(frozen=True)
class Choice:
    """The answers to a prompt that were chosen."""

    best: ScoredCompletion
    worst: ScoredCompletion
    margin: float  # of their rewards


def reward_of(answer: ScoredCompletion) -> float:
    """The reward of an answer; -inf where there is none."""
    value = answer.scores.get(REWARD)
    return -math.inf if value is None else value


def choose(answers: Sequence[ScoredCompletion], config: PairsConfig, gold: Sequence[str] = ()) -> Choice | str:
    """The best answer that has an end and the worst of all, or which of REASONS there are none for.

    Blank answers are no candidates. Of a pair none of the scores in `gold` may prefer the worst.
    """
    scored = [each for each in answers if each.scores.get(REWARD) is not None and each.text.strip()]
    ended = [each for each in scored if each.ended]
    if not ended:
        return NO_END if scored else NO_REWARD
    best, worst = max(ended, key=reward_of), min(scored, key=reward_of)
    if config.min_reward is not None and reward_of(best) < config.min_reward:
        return LOW_REWARD
    found = Choice(best, worst, reward_of(best) - reward_of(worst))
    if config.keep == "best":
        return found
    if len({each.text for each in scored}) == 1:
        return SAME
    if best.text == worst.text or found.margin <= 0 or found.margin < config.min_margin:
        return LOW_MARGIN
    for chosen, rejected in ((best.scores.get(name), worst.scores.get(name)) for name in gold):
        if chosen is not None and rejected is not None and chosen < rejected:
            return GOLD
    return found


def row_of(prompt: Prompt, choice: Choice, config: PairsConfig) -> Fields:
    """A preference row, or the best answer as an instruction row, in the documented formats.

    The prompt's own columns come along, but for those by which the row would be read in another way.
    """
    best, worst = ([{"role": "assistant", "content": each.text}] for each in (choice.best, choice.worst))
    answers: Fields = {"chosen": best, "rejected": worst, "margin": choice.margin}
    made: Fields = {"prompt": prompt.prompt, **(answers if config.keep == "pairs" else {"completion": best})}
    if prompt.inputs.tools:
        made["tools"] = prompt.inputs.tools
    if prompt.inputs.options:
        made["chat_template_kwargs"] = prompt.inputs.options
    taken = {*made, *answers, "completion", *(each.name for each in dataclasses.fields(InstructionColumns))}
    return {name: value for name, value in prompt.columns.items() if name not in taken and not decides(name)} | made
