"""Sample answers to prompts, score them, and keep the best and the worst of each as a preference row.

usage: posttrain pairs policy=<folder or Hub id> [key=value ...]

  policy=...                   a run folder, a model folder or a Hub id
  data.dataset_name=f.jsonl    prompts; without it, those of the recipe. Held-out ones
                               are never answered
  reward_model=...             scores the answers, and so do reward_functions=[...];
                               default: the reward model of the run
  samples=4                    answers to each prompt
  keep=pairs                   preferences.jsonl, the best and the worst of the answers;
                               best: instructions.jsonl, the best alone, to train SFT on
  min_margin=0.5               leave out pairs whose rewards are closer
  min_reward=1                 leave out prompts whose best answer has a lower reward;
                               default: none, so that the best of bad answers is kept
  gold_filter=true             leave out pairs of which one of eval_reward_functions=[...]
                               prefers the worst
  out=<folder>                 default: pairs, in the run of the policy or in
                               <output_dir>/<run_name>

Only an answer with an end is chosen. What is left out is counted. The same command
again goes on where it stopped; out= is never replaced unless move_aside=true or
overwrite=true says so. All other keys are those of stage=ppo, without `stage.`:
temperature=0.7, max_new_tokens=40, recipes=quickstart/ppo.

examples:
  posttrain pairs policy=outputs/demo/sft recipes=quickstart/ppo
  posttrain pairs policy=outputs/demo/sft recipes=quickstart/ppo keep=best out=best
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain import judges
from posttrain.cli.command import parse, read_command
from posttrain.cli.entry import entry_point, quoted
from posttrain.cli.launching import is_to_launch, launch
from posttrain.config.schema import Config
from posttrain.config.stages import EVALUATED_AS, PAIRS, OnlineStage
from posttrain.config.suggest import nearest
from posttrain.console import is_main_process, say, show_table
from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import PromptEncoding
from posttrain.data.formats import Prompt, prompts
from posttrain.devices import on_main_process, setup_device
from posttrain.errors import ConfigError, DataError
from posttrain.evaluate import load_scorer, own_options, run_written_to, sample_answers
from posttrain.metrics.comparison import REWARD
from posttrain.models.load import load_model_and_tokenizer
from posttrain.models.resolve import all_reward_functions, resolve
from posttrain.planning.preview import show_data
from posttrain.rlhf.pairing import (
    FILES,
    GOLD,
    LOW_MARGIN,
    LOW_REWARD,
    NO_END,
    NO_REWARD,
    REASONS,
    Choice,
    PairsConfig,
    choose,
    row_of,
)
from posttrain.rlhf.scoring import RewardScorer, ScoredCompletion, score_name
from posttrain.runs.checkpoint import file_hashes, write_atomically
from posttrain.runs.folder import ANSWERS, IDENTITY, RunFolder, changes, locked, read_json, read_lines, sha256_of
from posttrain.stages.base import data_sources, prepare_rows
from posttrain.stages.online import check_rewards
from posttrain.train import check_start, identity_of, leaving_no_trace, load_tokenizer_of, manifest_of

MEANS = {REWARD: "mean reward of all answers", f"{REWARD}_best": "of the best", f"{REWARD}_worst": "of the worst"}
MORE = "sample more of them (samples=, temperature=)"
SHARD = 32  # prompts whose answers are written to one file


def read_options(given: Mapping[str, str]) -> PairsConfig:
    """How answers are sampled and chosen.

    Raises:
        ConfigError: an option is unknown, of another type, or out of range.
    """
    if unknown := [name for name in given if name not in OPTIONS]:
        raise ConfigError(f"{unknown[0]} is none of {', '.join(OPTIONS)}{nearest(unknown[0], OPTIONS)}")
    if given.get("keep") == "best" and (idle := [name for name in ("min_margin", "gold_filter") if name in given]):
        raise ConfigError(f"{idle[0]} is about two answers, and keep=best keeps one; min_reward= bounds its reward")
    try:
        found = OmegaConf.merge(OmegaConf.structured(PairsConfig), given)
        return PairsConfig(**{str(name): value for name, value in found.items()})
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}={given[str(error.full_key)]}: {str(error.msg).splitlines()[0]}") from error


OPTIONS = tuple(item.name for item in fields(PairsConfig))


def sample_pairs(
    config: Config, folder: RunFolder, chosen: PairsConfig, to_come: Collection[str] = ()
) -> dict[str, float]:
    """Answer the prompts to train on, and write the rows chosen into `folder`; their numbers, none of a dry run.

    A dry run does without what the stages `to_come` will make.

    Raises:
        ConfigError, DataError: before a model is loaded; or there are answers, and no row can be made of them.
    """
    stage = config.stage
    assert isinstance(stage, OnlineStage)
    if chosen.gold_filter and not stage.eval_reward_functions:
        raise ConfigError("gold_filter=true asks the functions of eval_reward_functions=[…], and there are none")
    # 1. what is asked, and whether it has been answered before
    resolved, path = resolve(config, to_come), folder.path
    config = resolved.config
    tokenizer, begun = load_tokenizer_of(resolved)
    with tempfile.TemporaryDirectory() as scratch:
        sources = data_sources(config)
        kept = replace(sources, scratch=Path(scratch)) if config.dry_run else sources
        data = prepare_rows(config, tokenizer, kept, prompts, PromptEncoding, stage.max_new_tokens)
        rows: list[Prompt] = data.train.examples(range(len(data.train.dataset)))
    show_data(config, data)
    say(f"pairs: {chosen.samples} answers to each of {len(rows):,} prompts, into {path}")
    if config.dry_run:
        say("dry run: nothing was sampled or written")
        return {}
    resolved.keep_out_of(path)
    check_rewards(config)
    # what is chosen of the answers may change until it is done; nothing is sampled again for it, nor later
    identity = identity_of(resolved, sources, tokenizer, begun) | {PAIRS: {"samples": chosen.samples}}
    state = on_main_process(lambda: folder.look(identity, config.overwrite, config.move_aside, {PAIRS: asdict(chosen)}))
    if state == "complete":
        manifest = folder.manifest()
        assert manifest is not None
        say(f"already complete: {path}, and nothing has changed (finished {manifest['finished']})")
        return dict(manifest["metrics"])
    # 2. answer, a shard at a time; those that are there stay
    scorer = load_scorer(config, tokenizer)
    if not scorer.functions:
        raise ConfigError("posttrain pairs chooses by the reward: name reward_model= or reward_functions=")
    with leaving_no_trace(folder):
        aside = on_main_process(folder.make_room)
        on_main_process(lambda: folder.begin(identity, None))
        if aside is not None and not changes(read_json(aside / IDENTITY, "move it away"), identity):
            on_main_process(lambda: _take_over(RunFolder(aside), path / ANSWERS))
        _sample(config, data.encoder, rows, scorer, folder, chosen.samples)
        check_start(resolved, identity)
    # 3. choose, and only then call it finished
    made, metrics, lost = on_main_process(lambda: _choose(path / ANSWERS, rows, scorer, chosen))
    means = [(label, f"{metrics[key]:.3g}") for key, label in MEANS.items() if key in metrics]
    low = f"margin below min_margin={chosen.min_margin:g}" if chosen.min_margin else "best and worst have one reward"
    told = [(low if why == LOW_MARGIN else why, f"{count:,}") for why, count in lost.items()]
    show_table("pairs", ("what became of the prompts", ""), [*told, ("rows", f"{len(made):,}"), *means])
    if not made:
        raise DataError(
            f"{path}: no row can be made of the answers ({', '.join(f'{why}: {count}' for why, count in told)}); "
            + ", or ".join(dict.fromkeys(_remedy(why, chosen) for why in lost))
        )
    file = path / FILES[chosen.keep]
    if is_main_process():
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in made)
        write_atomically(file, "".join(f"{line}\n" for line in lines))
        manifest = manifest_of(resolved, sources, data, identity, metrics)
        own = {"stage": PAIRS, PAIRS: asdict(chosen), "files": {file.name: sha256_of(file)}}
        folder.finish(manifest | own | {ANSWERS: file_hashes(path / ANSWERS)})
    say(f"rows: {file}")
    return metrics


def _remedy(why: str, config: PairsConfig) -> str:
    """What to do about prompts that make no row."""
    return {
        NO_REWARD: "look at the reward",
        NO_END: "let answers be longer (max_new_tokens=)",
        LOW_REWARD: f"lower min_reward={config.min_reward}",
        LOW_MARGIN: f"lower min_margin={config.min_margin:g}" if config.min_margin else MORE,
        GOLD: "leave gold_filter=true out",
    }.get(why, MORE)


def _sample(
    config: Config, encoder: ChatEncoder, rows: Sequence[Prompt], scorer: RewardScorer, folder: RunFolder, samples: int
) -> None:
    """Write the answers of each shard of the prompts that is not there yet; called on all processes.

    Answer k to prompt i of n has the seed `seed + k n + i`, so it does not depend on where an earlier start stopped.
    """
    answers = folder.path / ANSWERS
    there = on_main_process(lambda: {each.name for each in answers.glob("*.jsonl")})
    missing = [start for start in range(0, len(rows), SHARD) if _shard(start) not in there]
    if not missing:
        return
    policy, _ = load_model_and_tokenizer(config.model)
    policy = policy.to(setup_device()).eval()
    folder.trains = True
    for number, start in enumerate(missing, start=1):
        part = rows[start : start + SHARD]
        seeds = range(config.seed + start, config.seed + start + samples * len(rows), len(rows))
        found = [sample_answers(policy, None, encoder, part, config, scorer, seed) for seed in seeds]
        if is_main_process():
            answers.mkdir(exist_ok=True)
            lines = (json.dumps([each._asdict() for each in of_row]) for of_row in zip(*found, strict=True))
            write_atomically(answers / _shard(start), "".join(f'{{"answers": {line}}}\n' for line in lines))
        if number * 10 // len(missing) > (number - 1) * 10 // len(missing):
            say(f"answered: {min(start + SHARD, len(rows)):,} of {len(rows):,} prompts")


def _take_over(earlier: RunFolder, answers: Path) -> None:
    """Begin with the answers of a run that was moved aside, of which others may be chosen now; not with edited ones."""
    known = (earlier.manifest() or {}).get(ANSWERS, {})
    whole = [name for name, found in file_hashes(earlier.path / ANSWERS).items() if known.get(name) == found]
    if not whole:
        return
    answers.mkdir()
    for name in whole:
        write_atomically(answers / name, (earlier.path / ANSWERS / name).read_text(encoding="utf-8"))
    say(f"answers: those of {earlier.path}")


def _shard(start: int) -> str:
    return f"{start:08}.jsonl"


def _answers(file: Path, count: int) -> list[list[ScoredCompletion]]:
    """The answers of a shard, which are to `count` prompts.

    Raises:
        DataError: it is not what was written.
    """
    again = "delete it, and the same command samples its answers again"
    try:
        found = [[ScoredCompletion(**each) for each in line["answers"]] for line in read_lines(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is broken ({error}); {again}") from error
    if len(found) != count:
        raise DataError(f"{file} holds answers to {len(found)} of {count} prompts; {again}")
    return found


def _choose(
    folder: Path, rows: Sequence[Prompt], scorer: RewardScorer, config: PairsConfig
) -> tuple[list[dict[str, object]], dict[str, float], dict[str, int]]:
    """The rows that are made, their numbers, and how many prompts make none and why."""
    shards = {folder / _shard(start): len(rows[start : start + SHARD]) for start in range(0, len(rows), SHARD)}
    answered = [answers for file, count in shards.items() for answers in _answers(file, count)]
    gold = [score_name(function) for function in scorer.eval_functions]
    found = [choose(answers, config, gold if config.gold_filter else ()) for answers in answered]
    made = [row_of(row, each, config) for row, each in zip(rows, found, strict=True) if isinstance(each, Choice)]
    why = Counter(each for each in found if isinstance(each, str))
    metrics: dict[str, float] = {"prompts": len(rows), "rows": len(made)}
    chosen = [each for each in found if isinstance(each, Choice)]
    sides = {"": [each for of_row in answered for each in of_row]}
    sides |= {"_best": [each.best for each in chosen], "_worst": [each.worst for each in chosen]}
    for score in (REWARD, *gold):
        for end, answers in sides.items():
            values = [value for each in answers if (value := each.scores.get(score)) is not None]
            metrics |= {f"{score}{end}": fmean(values)} if values else {}
    return made, metrics, {reason: why[reason] for reason in REASONS if why[reason]}


def main() -> None:
    """The entry point of `posttrain pairs`."""
    entry_point("pairs", lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    given, words = own_options(arguments, EVALUATED_AS, ("policy", "out", *OPTIONS))
    parse(words)  # an unknown flag is named first
    if "policy" not in given:
        raise ConfigError("policy=… is required: a run folder, a model folder or a Hub id")
    options = read_options({name: value for name, value in given.items() if name in OPTIONS})
    run = run_written_to([given["policy"]], arguments)
    into = [f"output_dir='{run.parent}'", f"run_name='{run.name}'"] if run is not None else []
    config = read_command([*words, *into, f"model.model_name_or_path='{given['policy']}'"]).config
    if is_to_launch(config):
        launch(config, "posttrain.pairs", arguments)
        return
    if any(spec.startswith(judges.__name__) for spec in all_reward_functions(config)):
        judges.shipped.endpoint()
    if given.get("out") == "":
        raise ConfigError("out= needs the name of a folder")
    path = Path(given["out"]) if "out" in given else Path(config.output_dir) / config.run_name / PAIRS
    if (path.is_symlink() or path.exists()) and not path.is_dir():
        raise ConfigError(f"out={path} is no folder")
    folder = RunFolder(path)
    folder.elsewhere = "out=…"
    with locked(*([path] if is_main_process() and not config.dry_run else [])):
        sample_pairs(config, folder, options)
    if not config.dry_run:
        trains, rows = "dpo" if options.keep == "pairs" else "sft", path / FILES[options.keep]
        to = f"run_name={Path(config.run_name if run is None else run).name}-{path.name}"  # whatever else is there
        typed = (f"stage={trains}", to, f"model.model_name_or_path={given['policy']}", f"data.dataset_name={rows}")
        say(f"train on them: posttrain run {' '.join(quoted(word) for word in typed)}")
    judges.print_costs()


if __name__ == "__main__":
    main()
