"""Compare finished policies on the same prompts.

usage: posttrain evaluate policies=[<folder or Hub id>,...] [key=value ...]

  policies=[...]               run folders, model folders or Hub ids; wins and KL
                               are against the first
  data.dataset_name=f.jsonl    complete all rows of it; without it, the held-out
                               prompts of the recipe
  reward_model=...             scores the completions, and so do reward_functions=[...]
                               and eval_reward_functions=[...]
  best_of=8                    as one more column, the best of 8 completions of the
                               first policy by the reward: what training has to beat
  out=<file>                   where the numbers go; default: a new file
                               <output_dir>/<run_name>/evaluation-<data>.json

All other keys are those of stage=ppo, without `stage.`: temperature=0.7,
max_new_tokens=40, recipes=quickstart/ppo.

examples:
  posttrain evaluate policies=[outputs/demo/sft,outputs/demo/dpo] recipes=quickstart/ppo
  posttrain evaluate policies=[outputs/demo/dpo] data.dataset_name=mine.jsonl
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, cast

from posttrain.cli.command import parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.cli.launching import refuse_to_launch
from posttrain.config.schema import Config
from posttrain.config.stages import EVALUATED_AS, OnlineStage
from posttrain.console import is_main_process, say, show_table, warn
from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import ConversationEncoding, EncodedRow, PromptEncoding, encode_rows
from posttrain.data.formats import Conversation, Prompt, prompts
from posttrain.devices import on_all_processes, setup_device
from posttrain.errors import ConfigError
from posttrain.metrics import comparison
from posttrain.models.generate import completion_logps, panel
from posttrain.models.load import load_model_and_tokenizer, load_tokenizer
from posttrain.models.resolve import beside, input_hashes, naming, resolve_path, with_data
from posttrain.rlhf import rewards, roles, scoring
from posttrain.rlhf.scoring import RewardModel, RewardScorer
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import EARLIER, read_json
from posttrain.stages.base import PANEL_SIZE, check_length, data_sources, prepare_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Evaluated:
    """What one policy completed, and what the completions are worth."""

    policy: str
    metrics: dict[str, float]
    prompts: list[str]
    answers: list[str]
    scores: dict[str, list[float | None]]  # score -> of each completion; None where it does not apply
    against_first: dict[str, dict[str, float]]  # score -> comparison.paired
    gold: list[str]  # the scores that are reward functions kept apart
    tokens: list[int]  # of each completion
    kl: list[float | None]  # of each completion, from the first policy; None where that reads other tokens
    ended: list[bool]  # by EOS


def load_scorer(config: Config, tokenizer: "PreTrainedTokenizerBase") -> RewardScorer:
    """The reward model and the reward functions of a configuration, loaded once for all policies."""
    stage = _stage(config)
    functions = [rewards.load_function("reward_functions", spec) for spec in stage.reward_functions]
    apart = [rewards.load_function("eval_reward_functions", spec) for spec in stage.eval_reward_functions]
    source = roles.find_reward(config, tokenizer)
    if source is not None:
        with naming("reward_model"):
            input_hashes(Path(source.path))
            model = RewardModel.load(source, config.seed, setup_device())
        functions.insert(0, rewards.model_reward(model, scoring.encoding_for(source)))
    return RewardScorer(functions, stage.reward_weights or [1.0] * len(functions), apart)


def _stage(config: Config) -> OnlineStage:
    assert isinstance(config.stage, OnlineStage)
    return config.stage


def compare(
    config: Config,
    policies: Sequence[str],
    responses: Sequence[Conversation] = (),
    all_rows: bool = False,
    best_of: int = 1,
) -> list[Evaluated]:
    """Let every policy complete the held-out prompts of `config`, or all of them, and score the completions.

    The last completions of `responses` are scored by perplexity. With `best_of` above 1, the first policy stands there
    once more, with the best of so many completions.

    Raises:
        ConfigError: a policy cannot be loaded or has changed since its run wrote it, nothing is held out, or there
            is no reward for best_of to choose by.
    """
    # 1. refuse what cannot be compared
    for path in policies:
        with naming("policies"):
            input_hashes(Path(resolve_path(_config_for(config, path).model)))
    first = _config_for(config, policies[0])
    scorer = load_scorer(first, load_tokenizer(first.model)[0])
    if best_of > 1 and not scorer.functions:
        raise ConfigError(f"best_of={best_of} chooses by the reward: name reward_model= or reward_functions=")
    asked = _prompts(first, all_rows)
    reference: PreTrainedModel | None = None
    done: list[Evaluated] = []
    entrants = [(path, 1) for path in policies]
    entrants[1:1] = [(policies[0], best_of)] if best_of > 1 else []
    for path, count in entrants:
        # 2. load the policy, and choose the prompts that fit it
        mine = _config_for(config, path)
        with naming("policies"):
            policy, tokenizer = load_model_and_tokenizer(mine.model)
        policy = policy.to(setup_device()).eval()
        reference = policy if reference is None else reference
        encoder = ChatEncoder(tokenizer, config.data.allow_special_tokens)
        room = check_length(mine) - _stage(config).max_new_tokens
        rows = panel(asked, encoder, len(asked) if all_rows else PANEL_SIZE, room, config.data.bad_rows == "drop")
        if all_rows and len(rows) < len(asked):
            warn(f"{path}: {len(asked) - len(rows)} of {len(asked)} prompts leave no room for a completion")
        # 3. sample, score, and compare with the first policy
        opened = reference if count == 1 else None  # KL of completions that are chosen is bounded alone
        seeds = range(config.seed, config.seed + count * len(rows), len(rows))
        samples = [_answers(policy, opened, encoder, rows, config, scorer, seed) for seed in seeds]
        answers = [max(each, key=_reward) for each in zip(*samples, strict=True)]
        questions = [row.prompt[-1]["content"] for row in rows]
        scores = {score: [each.scores[score] for each in answers] for score in answers[0].scores}
        same = bool(done) and questions == done[0].prompts
        against = {name: comparison.paired(values, done[0].scores[name]) for name, values in scores.items() if same}
        name, metrics = path, _metrics(answers)
        # Nakano et al. 2021, https://arxiv.org/abs/2112.09332; an upper bound: Beirami et al. 2024,
        # https://arxiv.org/abs/2401.01879
        if count > 1:
            name, metrics["kl_bound"] = f"best of {count} of {path}", math.log(count) - (count - 1) / count
        if responses:
            found = encode_rows(encoder, responses, ConversationEncoding(check_length(mine), "drop"))
            fitting = [row for row in found if isinstance(row, EncodedRow)]
            metrics["perplexity"] = perplexity(policy, fitting, tokenizer.pad_token_id)
        done.append(
            Evaluated(
                policy=name,
                metrics=metrics,
                prompts=questions,
                answers=[each.text for each in answers],
                scores=scores,
                against_first=against,
                gold=[scoring.score_name(function) for function in scorer.eval_functions],
                tokens=[each.length for each in answers],
                kl=[each.kl for each in answers],
                ended=[each.ended for each in answers],
            )
        )
        say(f"evaluated: {name}, {len(rows)} prompts")
        del policy
    return done


def _prompts(config: Config, all_rows: bool) -> list[Prompt]:
    """The held-out prompts of a configuration, or all of them, which are not too long for its model."""
    config = replace(config, data=replace(config.data, test_size=0.0)) if all_rows else config
    tokenizer, _ = load_tokenizer(config.model)
    new_tokens = _stage(config).max_new_tokens
    data = prepare_rows(config, tokenizer, data_sources(config), prompts, PromptEncoding, new_tokens)
    held_out = data.prepared.test if all_rows else data.test
    parts = [*([data.train] if all_rows else []), *([held_out] if held_out is not None else [])]
    if not parts:
        raise ConfigError("no prompts are held out to evaluate on; set data.test_size or data.dataset_test_split")
    long = sum(counts.prompt_too_long for counts in data.prepared.counts.values()) if all_rows else 0
    if long:
        warn(f"{config.model.start}: {long} prompts leave no room for a completion")
    return [row for part in parts for row in part.rows]


def _metrics(answers: Sequence[scoring.ScoredCompletion]) -> dict[str, float]:
    texts = [each.text for each in answers]
    found = {
        "response_length": fmean(each.length for each in answers),
        "ended_by_eos": fmean(each.ended for each in answers),
        **{f"distinct_{size}": comparison.distinct(texts, size) for size in (1, 2)},
    }
    kl = [each.kl for each in answers if each.kl is not None]
    return found | ({"kl": fmean(kl)} if len(kl) == len(answers) else {})


def _config_for(config: Config, path: str) -> Config:
    return replace(config, model=beside(config.model, path))


def _answers(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    encoder: ChatEncoder,
    rows: Sequence[Prompt],
    config: Config,
    scorer: RewardScorer,
    seed: int,
) -> list[scoring.ScoredCompletion]:
    """Sampled completions with their scores; the processes share them. KL is from a reference that reads the same."""
    stage = _stage(config)
    reads_same = reference is not None and reference.config.vocab_size == policy.config.vocab_size
    opened = partial(nullcontext, reference) if reads_same else None

    def share(mine: list[tuple[int, Prompt]]) -> list[scoring.ScoredCompletion]:
        seeds, asked = zip(*mine, strict=True)
        return scoring.score_answers(
            policy, opened, encoder, asked, scorer, stage.max_new_tokens, stage.temperature, seeds
        )

    return on_all_processes(list(enumerate(rows, seed)), share)


def _reward(answer: scoring.ScoredCompletion) -> float:
    value = answer.scores.get(comparison.REWARD)
    return -math.inf if value is None else value


def perplexity(policy: "PreTrainedModel", rows: Sequence[EncodedRow], pad: int) -> float:
    """exp of the mean negative log-likelihood of the tokens of each row's last response, over all rows."""
    pairs = []
    for columns in (row.columns for row in rows):
        ids, spans = cast("list[int]", columns["input_ids"]), cast("list[int]", columns["spans"])
        pairs.append((ids[: spans[-2]], ids[spans[-2] :]))

    def share(mine: list[tuple[list[int], list[int]]]) -> list[float]:
        asked, responses = zip(*mine, strict=True)
        found: list[float] = completion_logps(policy, asked, responses, pad).tolist()
        return found

    return math.exp(-math.fsum(on_all_processes(pairs, share)) / sum(len(response) for _, response in pairs))


def show_evaluation(found: Sequence[Evaluated], file: Path) -> None:
    """Print the policies side by side and what has changed beyond chance, and keep everything in `file`."""
    content = [{item.name: vars(each)[item.name] for item in fields(each)} for each in found]
    table = [(label, *cells) for label, cells in comparison.rows(content)]
    show_table("evaluation", ("", *(each.policy for each in found)), table)
    for title, lines in comparison.in_words(content):
        say("\n  ".join([f"{title}:", *lines]))
    if is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False))
        say(f"evaluation: {file}")


def read_evaluation(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str], int]:
    """The policies, the file for the numbers, the command line of an online stage that says the rest, and best_of.

    Raises:
        ConfigError: no policies are named, or best_of is no number above 1.
    """
    own = {item.name for item in fields(EVALUATED_AS.schema)}
    policies: list[str] = []
    out: str | None = None
    best_of = 1
    rest = [f"stage={EVALUATED_AS.name}", "stage.gate=warn"]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "policies":
            policies = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        elif key == "out":
            out = value
        elif key == "best_of":
            if not value.isdecimal() or int(value) < 2:
                raise ConfigError(f"best_of={value} must be a number of completions, 2 or more")
            best_of = int(value)
        else:
            rest.append(f"stage.{argument}" if key in own else argument)
    parse(rest)  # an unknown flag is named first
    if not policies:
        raise ConfigError("policies=[…] is required: run folders, model folders or Hub ids; the first is the reference")
    return policies, out, rest, best_of


def main() -> None:
    """The entry point of `posttrain evaluate`."""
    entry_point("evaluate", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    policies, out, rest, best_of = read_evaluation(arguments)
    start = f"model.model_name_or_path='{policies[0]}'"
    config = with_data(read_command([*rest, start], to_come=None).config)
    refuse_to_launch(config, "posttrain evaluate is one process")
    all_rows = any(argument.startswith("data.dataset_name=") for argument in arguments)
    file = Path(out) if out is not None else _free_file(config)
    if file.exists() and not config.overwrite:
        raise ConfigError(f"out={file} is there already; choose another file, or pass overwrite=true")
    show_evaluation(compare(config, policies, all_rows=all_rows, best_of=best_of), file)


def _answers_in(file: Path) -> list[tuple[object, object]]:
    content = read_json(file, "delete it to evaluate again")
    return [(each.get("answers"), each.get("scores")) for each in content]


def _free_file(config: Config) -> Path:
    """A file in the run's folder that is not there yet, named after the data."""
    names = config.data.dataset_name
    stem = Path(names if isinstance(names, str) else names[0]).stem
    folder, number = Path(config.output_dir) / config.run_name, 1
    while (file := folder / f"evaluation-{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return file


def evaluate_into(config: Config, policies: Sequence[str], responses: Sequence[Conversation]) -> None:
    """Compare the policies of a pipeline; an earlier evaluation with other numbers is moved to earlier/."""
    found = compare(config, policies, responses)
    file = Path(config.output_dir) / config.run_name / comparison.FILE
    if is_main_process() and file.is_file() and _answers_in(file) != [(each.answers, each.scores) for each in found]:
        when = datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%S")
        kept = file.parent / EARLIER / f"{file.stem}-{when}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            file.rename(kept)
    show_evaluation(found, file)


if __name__ == "__main__":
    main()
