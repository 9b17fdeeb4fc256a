"""Compare finished policies on the same prompts.

usage: posttrain evaluate policies=[<folder or Hub id>,...] [key=value ...]

  policies=[...]               run folders, model folders or Hub ids; wins and KL
                               are against the first
  tasks=[arc_easy,gsm8k]       benchmarks of lm-evaluation-harness (pip install
                               "lm-eval>=0.4.13"); alone, nothing else is evaluated
  tasks_folder=<folder>        with tasks of your own; limit=100: rows of each task;
                               num_fewshot=5; batch_size=4
  data.dataset_name=f.jsonl    complete all rows of it; without it, the held-out
                               prompts of the recipe
  reward_model=...             scores the completions, and so do reward_functions=[...]
                               and eval_reward_functions=[...]; a language model does
                               as posttrain.judges:pairwise or posttrain.judges:score
  best_of=8                    as one more column, the best of 8 completions of the
                               first policy by the reward: what training has to beat
  out=<file>                   where the numbers go; default: a new file
                               evaluation-<data>.json in the run of the first
                               policy, or in <output_dir>/<run_name>

To evaluate a reward model instead, name pairs that it has not been trained on:
reward_model=<folder or Hub id> data.preferences=pairs.jsonl. Its report card is
printed, by sections where data.columns.group names a column of them, and goes to a
new file report_card-<data>.json. Pairs are scored whole, or to max_length= tokens.

All other keys are those of stage=ppo, without `stage.`: temperature=0.7,
max_new_tokens=40, recipes=quickstart/ppo.

examples:
  posttrain evaluate policies=[outputs/demo/sft,outputs/demo/dpo] recipes=quickstart/ppo
  posttrain evaluate policies=[outputs/demo/dpo] data.dataset_name=mine.jsonl
  posttrain evaluate policies=[outputs/demo/sft,outputs/demo/dpo] tasks=[arc_easy]
  posttrain evaluate reward_model=outputs/demo/reward data.preferences=pairs.jsonl
"""

import json
import math
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, cast

from posttrain import judges
from posttrain.cli.command import names_in, parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.cli.launching import refuse_to_launch
from posttrain.config.schema import Config
from posttrain.config.stages import EVALUATED_AS, STAGES, OnlineStage, RewardStage, StageSpec
from posttrain.config.suggest import nearest
from posttrain.console import is_main_process, say, show_table, warn
from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import ConversationEncoding, EncodedRow, PromptEncoding, encode_rows
from posttrain.data.formats import Conversation, Prompt, prompts
from posttrain.devices import on_all_processes, setup_device
from posttrain.errors import ConfigError
from posttrain.metrics import comparison
from posttrain.metrics.report_card import card_table, report_card
from posttrain.models.benchmarks import find_tasks, run_benchmarks
from posttrain.models.generate import completion_logps, panel
from posttrain.models.load import load_model_and_tokenizer, load_tokenizer, max_positions
from posttrain.models.resolve import all_reward_functions, beside, input_hashes, naming, resolve_path, with_data
from posttrain.rlhf import rewards, roles, scoring
from posttrain.rlhf.pairing import reward_of
from posttrain.rlhf.scoring import RewardModel, RewardScorer
from posttrain.runs.checkpoint import write_atomically
from posttrain.runs.folder import EARLIER, MANIFEST, read_json
from posttrain.stages.base import PANEL_SIZE, StageData, check_length, data_sources, prepare_rows
from posttrain.stages.reward import score_pairs

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Evaluated:
    """What one policy completed, and what the completions are worth; of one that ran benchmarks alone, these."""

    policy: str
    metrics: dict[str, float] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    # score -> of each completion; None where it does not apply
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    against_first: dict[str, dict[str, float]] = field(default_factory=dict)  # score -> comparison.paired
    gold: list[str] = field(default_factory=list)  # the scores that are reward functions kept apart
    tokens: list[int] = field(default_factory=list)  # of each completion
    # of each completion, from the first policy; None where that reads other tokens
    kl: list[float | None] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # by EOS
    benchmarks: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value; metric_stderr


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
        # 3. sample, score, and compare with the first policy; a judge that compares sees its completions
        questions = [row.prompt[-1]["content"] for row in rows]
        same = bool(done) and questions == done[0].prompts
        if same or not done:
            others: Sequence[str | None] = done[0].answers if same else [None] * len(rows)
            columns = [{**row.columns, "first_completion": other} for row, other in zip(rows, others, strict=True)]
            rows = [row._replace(columns=each) for row, each in zip(rows, columns, strict=True)]
        opened = reference if count == 1 else None  # KL of completions that are chosen is bounded alone
        seeds = range(config.seed, config.seed + count * len(rows), len(rows))
        samples = [sample_answers(policy, opened, encoder, rows, config, scorer, seed) for seed in seeds]
        if count > 1 and all(reward_of(each) == -math.inf for part in samples for each in part):
            raise ConfigError(f"best_of={best_of} chooses by the reward, which applies to none of the completions")
        answers = [max(each, key=reward_of) for each in zip(*samples, strict=True)]
        scores = {score: [each.scores[score] for each in answers] for score in answers[0].scores}
        against = {name: comparison.paired(values, done[0].scores[name]) for name, values in scores.items() if same}
        against = {name: by for name, by in against.items() if by["prompts"]}
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


def asked_prompts(config: Config) -> StageData:
    """The prompts of a configuration, as its model reads them."""
    tokenizer, _ = load_tokenizer(config.model)
    return prepare_rows(config, tokenizer, data_sources(config), prompts, PromptEncoding, _stage(config).max_new_tokens)


def _prompts(config: Config, all_rows: bool) -> list[Prompt]:
    """The held-out prompts of a configuration, or all of them, which are not too long for its model."""
    data = asked_prompts(replace(config, data=replace(config.data, test_size=0.0)) if all_rows else config)
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


def sample_answers(
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


def add_benchmarks(config: Config, found: Sequence[Evaluated], asked: "Asked", manager: "TaskManager") -> None:
    """Run benchmarks on each policy, through its chat template where it brings one."""
    from transformers import AutoTokenizer

    for each in found:
        settings = _config_for(config, each.policy).model
        with naming("policies"):
            path = resolve_path(settings)
            input_hashes(Path(path))
            model, tokenizer = load_model_and_tokenizer(settings)
        as_saved = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        use_template = bool(as_saved.chat_template)  # a model without one was given posttrain's plain one just now
        model = model.to(setup_device()).eval()
        settled = (use_template, config.stage.batch_size, asked.limit, asked.num_fewshot)
        each.benchmarks = run_benchmarks(model, tokenizer, asked.tasks, manager, *settled)
        say(f"benchmarks: {each.policy}, {'with its' if use_template else 'without a'} chat template")
        del model


def show_evaluation(found: Sequence[Evaluated], file: Path) -> None:
    """Print the policies side by side and what has changed beyond chance, and keep everything in `file`."""
    content = [{item.name: vars(each)[item.name] for item in fields(each)} for each in found]
    table = [(label, *cells) for label, cells in comparison.rows(content)]
    show_table("evaluation", ("", *(each.policy for each in found)), table)
    for title, lines in comparison.in_words(content):
        say("\n  ".join([f"{title}:", *lines]))
    _write(file, content)


def _write(file: Path, content: object) -> None:
    if is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False))
        say(f"evaluation: {file}")


# the options that are no keys of a configuration, and the least that a number may be
OPTIONS: dict[str, int | None] = {
    **dict.fromkeys(("policies", "out", "tasks", "tasks_folder")),
    **{"best_of": 2, "limit": 1, "num_fewshot": 0},
}


CONFIG = {"recipes", *(item.name for item in fields(Config))}  # keys and groups of every command


class Asked(NamedTuple):
    """What a command line asks for: `words` is the configuration that completes prompts, or has pairs scored."""

    policies: list[str]  # none: a reward model is evaluated
    out: str | None
    words: list[str]
    best_of: int = 1
    tasks: Sequence[str] = ()
    tasks_folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    @property
    def completes(self) -> bool:
        """Whether prompts are completed; not where benchmarks alone are asked for."""
        about = ("data.", "recipes=", "stage.reward_", "stage.eval_reward_")
        return not self.tasks or self.best_of > 1 or any(word.startswith(about) for word in self.words)


def own_options(
    arguments: Sequence[str], spec: StageSpec, options: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The options of a command, and the words of the configuration; keys of the stage are typed without `stage.`.

    Raises:
        ConfigError: one is neither.
    """
    keys = {item.name for item in fields(spec.schema)}
    given, words = dict[str, str](), [f"stage={spec.name}", *(["stage.gate=warn"] if spec.is_online else [])]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in options:
            given[key] = value
        elif key.isidentifier() and key not in {*keys, *CONFIG}:
            raise ConfigError(f"{key} is unknown{nearest(key, [*options, *keys])}")
        else:
            words.append(f"stage.{argument}" if key in keys else argument)
    return given, words


def read_evaluation(arguments: Sequence[str]) -> Asked:
    """A command line taken apart.

    Raises:
        ConfigError: no policies are named, a number is none, or what is about policies stands beside pairs.
    """
    pairs = [word.split("=", 1)[1] for word in arguments if word.startswith("data.preferences=")]
    spec = STAGES["reward"] if pairs else EVALUATED_AS
    given, words = own_options(arguments, spec, [*OPTIONS, *(("reward_model", "data.preferences") if pairs else ())])
    words[1:1] = [f"data.dataset_name={pairs[-1]}"] if pairs else []
    parse(words)  # an unknown flag is named first
    for key in given.keys() & OPTIONS.keys():
        if (least := OPTIONS[key]) is not None and not (given[key].isdecimal() and int(given[key]) >= least):
            raise ConfigError(f"{key}={given[key]} must be a whole number, {least} or more")
    if pairs:
        if "reward_model" not in given or given.keys() - {"reward_model", "data.preferences", "out"}:
            raise ConfigError(
                "data.preferences=… evaluates a reward model: it goes with reward_model=<folder or Hub id>, and "
                "policies= and their options are a command of their own"
            )
        words.append(f"model.model_name_or_path='{given['reward_model']}'")
    policies, tasks = names_in(given.get("policies", "")), names_in(given.get("tasks", ""))
    if not policies and not pairs:
        raise ConfigError("policies=[…] is required: run folders, model folders or Hub ids; the first is the reference")
    numbers = {key: int(given[key]) for key, least in OPTIONS.items() if least is not None and key in given}
    return Asked(policies, given.get("out"), words, tasks=tasks, tasks_folder=given.get("tasks_folder"), **numbers)


def main() -> None:
    """The entry point of `posttrain evaluate`."""
    entry_point("evaluate", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    asked = read_evaluation(arguments)
    start = [f"model.model_name_or_path='{asked.policies[0]}'"] if asked.policies else []
    config = read_command([*asked.words, *start], to_come=None, needs_data=asked.completes).config
    refuse_to_launch(config, "posttrain evaluate is one process")
    names = with_data(config).data.dataset_name if asked.completes else asked.tasks[0]
    stem = Path(names if isinstance(names, str) else names[0]).stem
    kind = "evaluation" if asked.policies else "report_card"
    folder = run_written_to(asked.policies[:1], arguments) or Path(config.output_dir) / config.run_name
    file = Path(asked.out) if asked.out is not None else _free_file(folder, kind, stem)
    if len(set(asked.policies)) < len(asked.policies):
        raise ConfigError("policies= names one of them twice")
    if file.is_dir():
        raise ConfigError(f"out={file} is a folder")
    if file.exists() and not config.overwrite:
        raise ConfigError(f"out={file} is there already; choose another file, or pass overwrite=true")
    if not asked.policies:
        _evaluate_reward_model(config, asked, file)
        return
    manager = find_tasks(asked.tasks, asked.tasks_folder) if asked.tasks else None
    if any(spec.startswith(judges.__name__) for spec in all_reward_functions(config)):
        judges.shipped.endpoint()
    found = [Evaluated(path) for path in asked.policies]
    if asked.completes:
        all_rows = any(argument.startswith("data.dataset_name=") for argument in arguments)
        found = compare(with_data(config), asked.policies, all_rows=all_rows, best_of=asked.best_of)
    if manager is not None:
        add_benchmarks(config, [each for each in found if each.policy in asked.policies], asked, manager)
    show_evaluation(found, file)
    judges.print_costs()


def _evaluate_reward_model(config: Config, asked: Asked, file: Path) -> None:
    stage, positions = config.stage, max_positions(config.model)
    assert isinstance(stage, RewardStage)
    if positions is not None and not any(word.startswith("stage.max_length=") for word in asked.words):
        stage = replace(stage, max_length=positions)
    card = report_card(score_pairs(replace(config, stage=stage), data_sources(config)), stage.best_accuracy)
    show_table("report card", ("", ""), card_table(card), headed=False)
    _write(file, card)


def _answers_in(file: Path) -> list[tuple[object, object]]:
    content = read_json(file, "delete it to evaluate again")
    return [(each.get("answers"), each.get("scores")) for each in content]


def run_of(stage: Path) -> Path:
    """The folder of the run that a finished stage, or a point of a sweep over it, belongs to."""
    stage = stage if stage.name else stage.resolve()
    return (stage.parent if "=" in stage.name else stage).parent


def run_written_to(policies: Sequence[str], arguments: Sequence[str]) -> Path | None:
    """The run of the policy that a command is about; None where the policy is no run's, or the command names a run."""
    named = any(argument.startswith(("run_name=", "output_dir=")) for argument in arguments)
    return next((run_of(Path(each)) for each in policies if (Path(each) / MANIFEST).is_file() and not named), None)


def _free_file(folder: Path, kind: str, about: str) -> Path:
    """A file in a run's folder that is not there yet."""
    number = 1
    while (file := folder / f"{kind}-{about}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return file


def evaluate_into(config: Config, policies: Sequence[str], responses: Sequence[Conversation], best_of: int) -> None:
    """Compare the policies of a pipeline; an earlier evaluation with other numbers is moved to earlier/."""
    found = compare(config, policies, responses, best_of=best_of)
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
