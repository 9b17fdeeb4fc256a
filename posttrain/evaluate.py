"""Compare finished policies on the same prompts.

usage: posttrain evaluate policies=[<folder or Hub id>,...] [key=value ...]

  policies=[...]               run folders, model folders or Hub ids; wins and KL
                               are against the first
  data.dataset_name=f.jsonl    answer all rows of it; without it, the held-out
                               prompts of the recipe
  reward_model=...             scores the answers, and so do reward_functions=[...]
                               and eval_reward_functions=[...]
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
from typing import Any, NamedTuple

from posttrain.cli.command import parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.config.schema import Config, DataConfig, PPOStage
from posttrain.console import is_main_process, say, show_table, warn
from posttrain.data.encode import ChatEncoder, encode_conversations
from posttrain.data.formats import read_instructions, read_prompts
from posttrain.data.sources import Problems
from posttrain.devices import process_state
from posttrain.errors import ConfigError
from posttrain.metrics import comparison
from posttrain.models.generate import completion_kl, completion_logps, generate, panel, scores
from posttrain.models.load import load_causal_lm, load_reward_model, load_tokenizer, max_positions
from posttrain.models.resolve import beside, input_hashes, naming, resolve_path, with_data
from posttrain.rlhf import rewards, roles
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import EARLIER, read_json
from posttrain.stages.base import check_length

PROMPTS = 128  # held-out prompts that are answered
BATCH = 32


@dataclass
class Evaluated:
    """What one policy answered, and what the answers are worth."""

    policy: str
    metrics: dict[str, float]
    prompts: list[str]
    answers: list[str]
    scores: dict[str, list[float | None]]  # score -> of each answer; None where it does not apply
    against_first: dict[str, dict[str, float]]  # score -> comparison.paired


class Judge:
    """Scores answers by the reward model and the reward functions of a configuration, and by its eval functions."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        assert isinstance(config.stage, PPOStage)
        stage = config.stage
        self.functions = [rewards.load_function("reward_functions", spec) for spec in stage.reward_functions]
        self.eval_functions = [
            rewards.load_function("eval_reward_functions", spec) for spec in stage.eval_reward_functions
        ]
        found = roles.find_reward(config, tokenizer)
        if found is not None:
            with naming("reward_model"):
                input_hashes(Path(found.path))
                loaded = load_reward_model(
                    found.settings, found.tokenizer, found.path, config.seed, quantised=False, new_head=False
                )
            loaded = loaded.to(process_state().device).eval()
            pad = found.tokenizer.pad_token_id
            encode = rewards.encoded_anew(
                ChatEncoder(found.tokenizer, allow_special_tokens=True), max_positions(found.settings)
            )
            if found.same_tokenizer:
                encode = rewards.same_ids
            self.functions.insert(0, rewards.model_reward(lambda rows: scores(loaded, rows, pad), encode))
        self.weights = stage.reward_weights or [1.0] * len(self.functions)

    def __call__(self, asked: dict[str, Any]) -> dict[str, list[float | None]]:
        """Score -> of each answer: the reward as it was optimised, its parts, and each eval function apart."""
        parts = {function.__name__: function(**asked) for function in self.functions}
        found = {function.__name__: function(**asked) for function in self.eval_functions}
        if not parts:
            return found
        reward = [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True) if value is not None)
            for row in zip(*parts.values(), strict=True)
        ]
        return {comparison.REWARD: reward, **(parts if len(parts) > 1 else {}), **found}


def compare(
    config: Config, policies: Sequence[str], responses: DataConfig | None = None, all_rows: bool = False
) -> list[Evaluated]:
    """Let every policy answer the held-out prompts of `config`, a PPO stage's, or all of them, and score the answers.

    `responses` names instruction rows whose held-out responses are scored by perplexity.

    Raises:
        ConfigError: a policy cannot be loaded or has changed since its run wrote it, or nothing is held out.
    """
    for path in policies:
        with naming("policies"):
            input_hashes(Path(resolve_path(_config_for(config, path).model)))
    first = _config_for(config, policies[0])
    tokenizer, _ = load_tokenizer(first.model)
    judge = Judge(first, tokenizer)
    splits = read_prompts(replace(config.data, test_size=0.0) if all_rows else config.data)
    asked = [*splits.train, *splits.test] if all_rows else splits.test[:]
    if not asked:
        raise ConfigError("no prompts are held out to evaluate on; set data.test_size or data.dataset_test_split")
    said = read_instructions(responses) if responses is not None else None
    reference: Any = None
    done: list[Evaluated] = []
    for path in policies:
        mine = _config_for(config, path)
        with naming("policies"):
            tokenizer, _ = load_tokenizer(mine.model)
            policy = load_causal_lm(mine.model, tokenizer, resolve_path(mine.model))
        policy = policy.to(process_state().device).eval()
        reference = policy if reference is None else reference
        encoder = ChatEncoder(tokenizer, config.data.allow_special_tokens)
        room = check_length(mine) - config.stage.max_new_tokens
        rows = panel(asked, encoder, len(asked) if all_rows else PROMPTS, room, config.data.bad_rows == "drop")
        if all_rows and len(rows) < len(asked):
            warn(f"{path}: {len(asked) - len(rows)} of {len(asked)} prompts leave no room for an answer")
        answers = _answers(policy, reference, encoder, rows, config, judge)
        texts = [each.text for each in answers]
        scores = {name: [each.scores[name] for each in answers] for name in answers[0].scores}
        metrics: dict[str, float] = {
            "response_length": fmean(each.length for each in answers),
            "ended_by_eos": fmean(each.ended for each in answers),
            **{f"distinct_{size}": comparison.distinct(texts, size) for size in (1, 2)},
        }
        prompts = [row.prompt[-1]["content"] for row in rows]
        same = bool(done) and prompts == done[0].prompts
        against = {name: comparison.paired(values, done[0].scores[name]) for name, values in scores.items() if same}
        if all(each.kl is not None for each in answers):
            metrics["kl"] = fmean(each.kl for each in answers if each.kl is not None)
        if said is not None and said.test:
            encoded = encode_conversations(
                encoder, said.test, said.counts["test"], check_length(mine), "drop", Problems()
            )
            metrics["perplexity"] = perplexity(policy, encoded.dataset, tokenizer.pad_token_id)
        done.append(Evaluated(path, metrics, prompts, texts, scores, against))
        say(f"evaluated: {path}, {len(rows)} prompts")
        del policy
    return done


def _config_for(config: Config, path: str) -> Config:
    return replace(config, model=beside(config.model, path))


class _Answer(NamedTuple):
    """One answer to one held-out prompt; None where nothing scores it or the reference reads other tokens."""

    place: int  # of the prompt
    text: str
    length: int
    ended: bool
    scores: dict[str, float | None]
    kl: float | None


def _answers(
    policy: Any, reference: Any, encoder: ChatEncoder, rows: Sequence[Any], config: Config, judge: Judge
) -> list[_Answer]:
    """Sampled answers with their scores: batches are distributed round-robin, each with a seed of its own."""
    import torch
    from accelerate.utils import gather_object

    assert isinstance(config.stage, PPOStage)
    state, found = process_state(), []
    tokenizer = encoder.tokenizer
    for start in range(BATCH * state.process_index, len(rows), BATCH * state.num_processes):
        part = rows[start : start + BATCH]
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            torch.manual_seed(config.seed + start)
            made = generate(policy, encoder, part, config.stage.max_new_tokens, temperature=config.stage.temperature)
        texts = [str(text) for text in tokenizer.batch_decode(made.completions, skip_special_tokens=True)]
        names = sorted({name for row in part for name in row.columns})
        asked = {
            **{name: [row.columns.get(name) for row in part] for name in names},
            "prompts": [row.prompt for row in part],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": made.completions,
            "prompt_ids": made.prompts,
        }
        nothing = [None] * len(part)
        kl: Sequence[float | None] = nothing
        if reference.config.vocab_size == policy.config.vocab_size:
            opened = partial(nullcontext, reference)
            kl = completion_kl(policy, opened, made.prompts, made.completions, tokenizer.pad_token_id).tolist()
        scores = judge(asked)
        columns = (
            range(start, start + len(part)),
            texts,
            map(len, made.completions),
            made.ended,
            [{name: values[index] for name, values in scores.items()} for index in range(len(part))],
            kl,
        )
        found += [tuple(each) for each in zip(*columns, strict=True)]
    return sorted((_Answer(*each) for each in gather_object(found)), key=lambda each: each.place)


def perplexity(policy: Any, dataset: Any, pad: int) -> float:
    """exp of the mean negative log-likelihood of the tokens of each row's last response, over all processes' rows."""
    from accelerate.utils import gather_object

    state = process_state()
    prompts, responses = [], []
    for row in dataset.select(range(state.process_index, len(dataset), state.num_processes)):
        start = len(row["labels"])
        while start and row["labels"][start - 1] != -100:
            start -= 1
        prompts.append(row["input_ids"][:start])
        responses.append(row["input_ids"][start:])
    total = completion_logps(policy, prompts, responses, pad).double().sum().item() if prompts else 0.0
    parts = gather_object([(total, sum(map(len, responses)))])
    return math.exp(-sum(part for part, _ in parts) / sum(count for _, count in parts))


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


def read_evaluation(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The policies, the file for the numbers, and the command line of a PPO stage that says the rest.

    Raises:
        ConfigError: no policies are named.
    """
    own = {item.name for item in fields(PPOStage)}
    policies: list[str] = []
    out: str | None = None
    rest = ["stage=ppo", "stage.gate=warn"]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "policies":
            policies = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        elif key == "out":
            out = value
        else:
            rest.append(f"stage.{argument}" if key in own else argument)
    parse(rest)  # an unknown flag is named first
    if not policies:
        raise ConfigError("policies=[…] is required: run folders, model folders or Hub ids; the first is the reference")
    return policies, out, rest


def main() -> None:
    """The entry point of `posttrain evaluate`."""
    entry_point("evaluate", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    policies, out, rest = read_evaluation(arguments)
    start = f"model.model_name_or_path='{policies[0]}'"
    config = with_data(read_command([*rest, start], to_come=None).config)
    all_rows = any(argument.startswith("data.dataset_name=") for argument in arguments)
    file = Path(out) if out is not None else _free_file(config)
    if file.exists() and not config.overwrite:
        raise ConfigError(f"out={file} is there already; choose another file, or pass overwrite=true")
    show_evaluation(compare(config, policies, None, all_rows), file)


def _answers_in(file: Path) -> list[Any]:
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


def evaluate_into(config: Config, policies: Sequence[str], responses: DataConfig | None) -> None:
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
