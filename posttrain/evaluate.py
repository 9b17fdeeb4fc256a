"""`python -m posttrain.evaluate policies=[outputs/demo/sft,outputs/demo/dpo] ...`: the same numbers for every policy.

Every policy answers the same held-out prompts, sampled with the same seed. Where the prompts come from and what scores
the answers is said in the words of stage=ppo, `stage.` left out: `reward_model=`, `reward_functions=[...]`,
`eval_reward_functions=[...]`, `temperature=`, `max_new_tokens=`, `data.dataset_name=`, `recipes=quickstart/ppo`.
The first policy is the reference: win rates and KL are against it.
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from posttrain import comparison, model, run
from posttrain.arguments import process_state
from posttrain.compose import read_command
from posttrain.console import is_main_process, say, show_table
from posttrain.data import read_instructions, read_prompts
from posttrain.encoding import ChatEncoder, encode_conversations
from posttrain.errors import ConfigError
from posttrain.evaluation import completion_kl, completion_logps, generate, panel, scores
from posttrain.lineage import input_hashes
from posttrain.rlhf import rewards, roles
from posttrain.schema import Config, DataConfig, PPOStage
from posttrain.sources import Problems
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
    rewards: list[float]


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
            with model.named("reward_model"):
                input_hashes(Path(found.path))
                loaded = model.load_reward_model(
                    found.settings, found.tokenizer, found.path, config.seed, quantised=False, new_head=False
                )
            loaded = loaded.to(process_state().device).eval()
            pad = found.tokenizer.pad_token_id
            encode = rewards.encoded_anew(
                ChatEncoder(found.tokenizer, allow_special_tokens=True), model.positions(found.settings)
            )
            if found.same_tokenizer:
                encode = rewards.same_ids
            self.functions.insert(0, rewards.model_reward(lambda rows: scores(loaded, rows, pad), encode))
        self.weights = stage.reward_weights or [1.0] * len(self.functions)

    def __call__(self, functions: Sequence[Any], weights: Sequence[float], asked: dict[str, Any]) -> list[float]:
        """The weighted sum of what the functions give each answer; one that does not apply counts nothing."""
        found = [function(**asked) for function in functions]
        return [
            sum(weight * value for weight, value in zip(weights, row, strict=True) if value is not None)
            for row in zip(*found, strict=True)
        ]


def compare(config: Config, policies: Sequence[str], responses: DataConfig | None = None) -> list[Evaluated]:
    """Let every policy answer the held-out prompts of `config`, a PPO stage's, and score the answers.

    `responses` names instruction rows whose held-out responses are scored by perplexity.

    Raises:
        ConfigError: a policy cannot be loaded or has changed since its run wrote it, or nothing is held out.
    """
    for path in policies:
        with model.named("policies"):
            input_hashes(Path(model.source(_config_for(config, path).model)))
    first = _config_for(config, policies[0])
    tokenizer, _ = model.load_tokenizer(first.model)
    judge = Judge(first, tokenizer)
    splits = read_prompts(config.data)
    if not splits.test:
        raise ConfigError("no prompts are held out to evaluate on; set data.test_size or data.dataset_test_split")
    said = read_instructions(responses) if responses is not None else None
    reference: Any = None
    done: list[Evaluated] = []
    for path in policies:
        mine = _config_for(config, path)
        with model.named("policies"):
            tokenizer, _ = model.load_tokenizer(mine.model)
            policy = model.load_causal_lm(mine.model, tokenizer, model.source(mine.model))
        policy = policy.to(process_state().device).eval()
        reference = policy if reference is None else reference
        encoder = ChatEncoder(tokenizer, config.data.allow_special_tokens)
        room = check_length(mine) - config.stage.max_new_tokens
        rows = panel(splits.test, encoder, PROMPTS, room, config.data.bad_rows == "drop")
        answers = _answers(policy, reference, encoder, rows, config, judge)
        texts, reward = [each.text for each in answers], [each.reward for each in answers if each.reward is not None]
        golds = [each.gold for each in answers if each.gold is not None]
        metrics: dict[str, float] = {
            "response_length": fmean(each.length for each in answers),
            "ended_by_eos": fmean(each.ended for each in answers),
            **{f"distinct_{size}": comparison.distinct(texts, size) for size in (1, 2)},
        }
        if reward:
            metrics["reward"] = fmean(reward)
        if golds:
            metrics["gold"] = fmean(golds)
        if done and reward and len(reward) == len(done[0].rewards):
            metrics |= comparison.win_rate(reward, done[0].rewards)
        if all(each.kl is not None for each in answers):
            metrics["kl"] = fmean(each.kl for each in answers if each.kl is not None)
        if said is not None and said.test:
            encoded = encode_conversations(
                encoder, said.test, said.counts["test"], check_length(mine), "drop", Problems()
            )
            metrics["perplexity"] = perplexity(policy, encoded.dataset, tokenizer.pad_token_id)
        asked_for = [row.prompt[-1]["content"] for row in rows]
        done.append(Evaluated(path, metrics, asked_for, texts, reward))
        say(f"evaluated: {path}, {len(rows)} held-out prompts")
        del policy
    return done


def _config_for(config: Config, path: str) -> Config:
    return replace(config, model=model.beside(config.model, path))


class _Answer(NamedTuple):
    """One answer to one held-out prompt; None where nothing scores it or the reference reads other tokens."""

    place: int  # of the prompt
    text: str
    length: int
    ended: bool
    reward: float | None
    gold: float | None
    kl: float | None


def _answers(
    policy: Any, reference: Any, encoder: ChatEncoder, rows: Sequence[Any], config: Config, judge: Judge
) -> list[_Answer]:
    """Sampled answers with their scores: each process answers every so-manieth batch, each batch has its own seed."""
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
        ones = [1.0] * len(judge.eval_functions)
        columns = (
            range(start, start + len(part)),
            texts,
            map(len, made.completions),
            made.ended,
            judge(judge.functions, judge.weights, asked) if judge.functions else nothing,
            judge(judge.eval_functions, ones, asked) if judge.eval_functions else nothing,
            kl,
        )
        found += [tuple(each) for each in zip(*columns, strict=True)]
    return sorted(_Answer(*each) for each in gather_object(found))


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
    """Print the policies side by side and keep everything in `file`."""
    table = [(label, *cells) for label, cells in comparison.rows([each.metrics for each in found])]
    show_table("evaluation", ("", *(each.policy for each in found)), table)
    if is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        content = [{item.name: vars(each)[item.name] for item in fields(each)} for each in found]
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        say(f"evaluation: {file}")


def read_evaluation(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The policies, and the command line of a PPO stage that says the rest.

    Raises:
        ConfigError: no policies are named.
    """
    own = {item.name for item in fields(PPOStage)}
    policies: list[str] = []
    rest = ["stage=ppo", "stage.gate=warn"]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "policies":
            policies = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        else:
            rest.append(f"stage.{argument}" if key in own else argument)
    if not policies:
        raise ConfigError("policies=[…] is required: run folders, model folders or Hub ids; the first is the reference")
    return policies, rest


def main() -> None:
    """The entry point: exit codes as those of `posttrain.run`."""
    sys.exit(run.guarded(_main))


def _main() -> None:
    policies, rest = read_evaluation(sys.argv[1:])
    command = read_command([*rest, f"model.model_name_or_path={policies[0]}"], inputs_exist=False)
    assert command.config is not None
    evaluate_into(command.config, policies, None)


def evaluate_into(config: Config, policies: Sequence[str], responses: DataConfig | None) -> list[Evaluated]:
    """Compare the policies and leave the numbers in the run's folder."""
    found = compare(config, policies, responses)
    show_evaluation(found, Path(config.output_dir) / config.run_name / comparison.FILE)
    return found


if __name__ == "__main__":
    main()
