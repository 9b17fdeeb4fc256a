"""Run SFT, reward model and what comes after them in order, then compare the policies.

usage: posttrain pipeline [recipes=...] [stages=[sft,reward,ppo,dpo]] [key=value ...]

A key that begins with a stage goes to that stage: sft.num_epochs=1, dpo.beta=0.3,
sft.trainer.packing=true. All others go to every stage. data.instructions=,
data.preferences= and data.prompts= name your own rows. The same command again goes
on where it stopped; a finished stage that has to be re-run is moved to
<run_name>/earlier first. With -m, several values of a key of ppo or dpo are a sweep.
Flags are those of posttrain run; every key: posttrain pipeline stages=[dpo] --help

stages=[sft,reward,pairs,dpo] trains DPO on pairs sampled from the SFT model and scored
by the reward model (posttrain pairs; its options begin with pairs., as pairs.samples=4;
prompts and rewards are those of ppo). rounds=3 then samples from the DPO model and
trains it on, held to the model that the first round started from, until one of the
eval_reward_functions of ppo falls.

examples:
  posttrain pipeline recipes=quickstart
  posttrain pipeline run_name=mine stages=[sft] data.instructions=mine.jsonl
  posttrain pipeline recipes=quickstart stages=[sft,reward,pairs,dpo] rounds=3
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override

from posttrain import run
from posttrain.cli.command import Line, named_stages, parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.cli.launching import is_to_launch, launch, refuse_sweep_under_accelerate, refuse_to_launch
from posttrain.config.schema import Config, MessagesConfig, PreferenceConfig
from posttrain.config.stages import (
    DPO,
    EVALUATED_AS,
    FORMATS,
    INSTRUCTIONS,
    PAIRS,
    PIPELINE,
    STAGES,
    STEPS,
    DPOStage,
    OnlineStage,
    followers,
)
from posttrain.console import is_main_process, say, show_table, warn
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics.catalogue import label
from posttrain.metrics.comparison import Difference, before_and_after, paired
from posttrain.models.resolve import data_required, resolve
from posttrain.report import write_report
from posttrain.rlhf.pairing import FILES, PairsConfig
from posttrain.runs.folder import MANIFEST, ROUND, RunFolder, locked, of_round, run_path

if TYPE_CHECKING:
    from posttrain.data.prepared import Encoded

MOST = 99  # rounds
FEWEST = 6  # prompts, of which all have to be lost for the sign test to call it more than chance
LOOKED_AT = 50_000  # instruction rows among which held-out prompts are looked for
SECTIONS = ("data", "trainer", "model")  # keys of a stage's command that are not its stage.*


@dataclass
class Step:
    """One stage of a pipeline: the command that runs it, its values of a sweep, and its configuration."""

    stage: str
    arguments: list[str]
    sweeps: bool
    config: Config  # of a sweep its first point's
    pairs: PairsConfig | None = None  # where pairs are sampled
    round: int = 1

    @property
    def folder(self) -> Path:
        """Where its result goes; a later round's beside the first one's."""
        return run_path(self.config).with_name(of_round(self.stage, self.round))


def read_pipeline(arguments: Sequence[str]) -> list[Step]:
    """Translate a command line into one for each stage, all of them checked.

    Raises:
        ConfigError: with every problem found, a line each.
    """
    line = parse(arguments)
    stages = named_stages(line.overrides, STEPS) or PIPELINE
    problems: dict[str, None] = {}
    steps: list[Step] = []
    for override in line.overrides:
        if override.key_or_group in ("stage", "data"):
            problems[
                f"{override.input_line}: the pipeline runs several stages; choose with stages=[{','.join(STEPS)}], "
                f"set data with {', '.join(f'data.{name}=' for name in FORMATS)}"
            ] = None
    for place, stage in enumerate(stages):
        if stage == PAIRS:
            problems |= dict.fromkeys(_add_pairs(line, steps, stages))
            continue
        own, sweeps = _command(line.overrides, stage, stages)
        if sweeps and followers(stage):
            problems[
                f"a sweep over {stage} would train everything after it again for each point; sweep it alone: "
                f"posttrain run -m stage={stage} …"
            ] = None
        flags = [*(["-m"] if sweeps else []), *line.prints]
        given = [*flags, *own, *(["--config-dir", line.config_dir] if line.config_dir else [])]
        try:
            with _in_words_of(stage):
                sampled = stage == DPO.name and PAIRS in stages[:place]  # its rows are to come
                if sampled and any(each.key_or_group == f"{stage}.data.dataset_name" for each in line.overrides):
                    raise ConfigError("stage.data.dataset_name: its rows are those of pairs; leave one of them out")
                config = read_command(given, stages[:place], needs_data=not sampled).config
                if config.data.ptx and (rows := _own_instructions(line.overrides, stage)):
                    given.append(f"data.ptx={rows}")
                    config = read_command(given, stages[:place]).config
                has_own_rows = bool(steps) and steps[0].config.data.dataset_name is not None
                if has_own_rows and config.data.dataset_name is None and not sampled:
                    raise data_required(config)
                steps.append(Step(stage, given, sweeps, config))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if any(override.is_sweep_override() for override in line.overrides) and not line.multirun and not line.prints:
        problems["a key has several values: add -m to sweep over them, or quote the value"] = None
    if line.multirun and not any(step.sweeps for step in steps):
        last = " or ".join(name for name in STAGES if not followers(name))
        problems[f"-m sweeps over nothing; give a key of {last} several values"] = None
    if line.multirun and PAIRS in stages:
        problems["pairs are of one run; sweep afterwards: posttrain run -m stage=dpo data.dataset_name=…"] = None
    rounds = _rounds(line.overrides)
    if rounds not in map(str, range(1, MOST + 1)):
        problems[f"rounds={rounds} must be a whole number from 1 to {MOST}"] = None
    elif rounds != "1" and not {PAIRS, DPO.name} <= {*stages}:
        problems[f"rounds={rounds} needs stages=[…,{PAIRS},{DPO.name}]"] = None
    if PAIRS not in stages and (idle := [each for each in line.overrides if each.key_or_group.startswith(f"{PAIRS}.")]):
        problems[f"{idle[0].input_line}: no pairs are sampled in stages=[{','.join(stages)}]"] = None
    if problems:
        raise ConfigError(*problems)
    again = [step for step in steps if step.stage in (PAIRS, DPO.name)]
    return [*steps, *(replace(step, round=number) for number in range(2, int(rounds) + 1) for step in again)]


def _rounds(overrides: Sequence[Override]) -> str:
    given = [str(each.input_line).partition("=")[2] for each in overrides if each.key_or_group == "rounds"]
    return ["1", *given][-1]


def _add_pairs(line: Line, steps: list[Step], stages: Sequence[str]) -> list[str]:
    """Add the step that samples pairs, by the prompts, rewards and keys of PPO; returns what is wrong with it."""
    from posttrain.pairs import read_options

    online = EVALUATED_AS.name
    concerned = [each for each in line.overrides if not each.key_or_group.startswith("trainer.")]
    words, _ = _command(concerned, online, [online if stage == PAIRS else stage for stage in stages])
    words = [*line.prints, *words, *(["--config-dir", line.config_dir] if line.config_dir else [])]
    mine = [str(each.input_line).partition("=") for each in line.overrides if each.key_or_group.startswith(f"{PAIRS}.")]
    try:
        pairs = read_options({key.removeprefix(f"{PAIRS}."): value for key, _, value in mine})
        if pairs.keep != "pairs":
            raise ConfigError(f"pairs.keep={pairs.keep} makes no pairs; it is for posttrain pairs alone")
        with _in_words_of(online):
            config = read_command(words, stages[: stages.index(PAIRS)]).config
        steps.append(Step(PAIRS, words, False, config, pairs))
    except ConfigError as error:
        return [problem.replace(f"stage={online}", PAIRS) for problem in error.problems]
    return []


def _command(overrides: Sequence[Override], stage: str, stages: Sequence[str]) -> tuple[list[str], bool]:
    """The command line of one stage, and whether it holds several values of a key."""
    own, sweeps = [f"stage={stage}"], False
    for override in overrides:
        translated = _for_stage(override, stage, stages)
        if translated is not None:
            sweeps |= override.is_sweep_override()
            own.append(translated)
    # an earlier result may be moved aside where the command says what is to come in its place
    named = {override.key_or_group.split(".")[-1] for override in overrides}
    if named & {"recipes", "dataset_name", *FORMATS}:
        own.insert(1, "move_aside=true")
    return own, sweeps


def _own_instructions(overrides: Sequence[Override], stage: str) -> str | None:
    """SFT's rows on the command line, which a recipe's data.ptx gives way to; None where data.ptx is there as well."""
    values = {override.key_or_group: str(override.input_line).partition("=")[2] for override in overrides}
    return None if f"{stage}.data.ptx" in values else values.get(f"data.{INSTRUCTIONS.name}")


@contextmanager
def _in_words_of(stage: str) -> Iterator[None]:
    """Let errors over stage.<key> name the key as the pipeline's command spells it."""
    try:
        yield
    except ConfigError as error:
        data = f"data.{STAGES[stage].data_format.name}"
        texts = [text.replace("stage.", f"{stage}.").replace("data.dataset_name", data) for text in error.problems]
        raise ConfigError(*texts) from error


def _for_stage(override: Override, stage: str, stages: Sequence[str]) -> str | None:
    """What an override of the pipeline is for one stage; None where it does not concern it."""
    key, _, value = str(override.input_line).partition("=")
    name = override.key_or_group
    prefix = key[: len(key) - len(key.lstrip("+~"))]
    if name in ("stages", "stage", "data", "rounds") or name.startswith(f"{PAIRS}."):
        return None
    if name == "recipes":
        return f"recipes={value}/{stage}" if value not in ("null", "") else None
    first, _, rest = name.partition(".")
    if first in STAGES:
        if first != stage:
            return None
        return f"{prefix}{rest if rest.split('.')[0] in SECTIONS else f'stage.{rest}'}={value}"
    if first == "data" and rest in FORMATS:
        return f"data.dataset_name={value}" if rest == STAGES[stage].data_format.name else None
    if name == "model.model_name_or_path" and stage != stages[0]:
        return None  # where the pipeline starts; what comes after starts from what it makes
    return str(override.input_line)


@dataclass
class Finished:
    """A stage that the pipeline has been through."""

    stage: str  # the name of its folder
    folder: Path
    metrics: dict[str, float]
    seconds: float


def run_pipeline(steps: Sequence[Step]) -> list[Finished]:
    """Run the stages in order; one that is complete and unchanged is not run again.

    Raises:
        PosttrainError: a stage failed; those before it stay complete.
    """
    from posttrain.pairs import sample_pairs
    from posttrain.train import run_stage

    done: list[Finished] = []
    for place, step in enumerate(steps, start=1):
        started = time.monotonic()
        say(f"\n[{place} of {len(steps)}] {step.folder.name}", style="bold")
        earlier = steps[: place - 1]
        to_come = _unfinished(earlier) if step.config.dry_run else ()
        metrics: dict[str, float] = {}
        if to_come and PAIRS in (each.stage for each in earlier):
            say(f"dry run: it follows from {', '.join(to_come)}, still to come")
        elif step.pairs is not None:
            metrics = sample_pairs(with_what_came(step, earlier), RunFolder(step.folder), step.pairs, to_come)
        elif step.sweeps and not step.config.dry_run:
            _sweep(step)
        else:
            with _in_words_of(step.stage):
                result = run_stage(with_what_came(step, earlier), step.folder, to_come)
            metrics = result.metrics if result is not None else {}
        done.append(Finished(step.folder.name, step.folder, metrics, time.monotonic() - started))
        if metrics and step.stage == DPO.name and _is_worse(step, steps):
            break
    return done


def with_what_came(step: Step, earlier: Sequence[Step]) -> Config:
    """The configuration of a step, with the pairs of its round and the policy of the round before."""
    config, stage = step.config, step.config.stage
    first = next((each for each in earlier if each.stage == DPO.name), step)
    if step.round > 1:
        before = str(replace(first, round=step.round - 1).folder)
        config = replace(config, model=replace(config.model, model_name_or_path=before, from_scratch=False))
    if step.round > 1 and isinstance(stage, DPOStage) and stage.reference is None:
        config = replace(config, stage=replace(stage, reference=_start(first)))
    sampled = [each for each in earlier if each.pairs is not None and each.round == step.round]
    if step.pairs is not None:
        return replace(config, seed=config.seed + step.round - 1)
    if not sampled or step.stage != DPO.name:
        return config
    columns = type(config.data.columns)
    data = replace(
        config.data,
        dataset_name=str(sampled[0].folder / FILES["pairs"]),
        mixture=[],
        dataset_config=None,
        dataset_train_split="train",
        dataset_test_split=None,
        max_rows=None,
        ignored_columns=[],
        columns=columns(**{each.name: each.name for each in fields(columns)}),
        messages=MessagesConfig(None, None, {}, None),
        preference=PreferenceConfig(None, None, None, None),
    )
    return replace(config, data=data)


def _start(step: Step) -> str:
    """What a finished stage started from; its `base`, where that had to be built."""
    base = step.folder / "base"
    return str(base) if base.is_dir() else resolve(step.config, needs_data=False).config.model.start


def _is_worse(step: Step, steps: Sequence[Step]) -> bool:
    """Whether a gold function has fallen beyond chance, since the round before or since the start; then says so.

    Small losses add up: none of three rounds need differ from the one before for the last to be worse than the start.
    """
    asked = next((each.config for each in steps if each.pairs is not None), step.config)
    rounds, stage = steps[-1].round, asked.stage
    if rounds == 1 or not isinstance(stage, OnlineStage) or not stage.eval_reward_functions:
        return False
    from posttrain.evaluate import compare

    earlier = [_start(replace(step, round=1)), *(str(replace(step, round=n).folder) for n in range(1, step.round))]
    names = dict.fromkeys([earlier[0], earlier[-1], str(step.folder)])
    *others, last = compare(resolve(asked, STAGES).config, list(names))
    pairs = [(each, score) for each in others for score in last.gold]
    changes = [
        Difference(last.policy, each.policy, score, paired(last.scores[score], each.scores[score]))
        for each, score in pairs
    ]
    for each in changes:
        say(f"round {step.round}: {each.score} since {each.first}: {each}")
    fell = [f"{each.score} fell since {each.first}, {each}" for each in changes if each.way < 0]
    if fell:
        say(f"round {step.round} is the last of {rounds}: {'; '.join(fell)}. The policy before it: {earlier[-1]}")
    elif len(last.prompts) < FEWEST:
        warn(f"{len(last.prompts)} held-out prompts cannot tell a fall from chance; rounds do not end by themselves")
    return bool(fell)


def _unfinished(steps: Sequence[Step]) -> list[str]:
    """Those of the stages that have left no model behind yet."""
    return [step.folder.name for step in steps if not (step.folder / MANIFEST).is_file()]


def _sweep(step: Step) -> None:
    """Let `posttrain run -m` do it."""
    try:
        run.run(step.arguments)
    except (SystemExit, PosttrainError) as ended:
        if not isinstance(ended, SystemExit) or ended.code:
            raise PosttrainError(f"points of the sweep over {step.stage} failed; see above") from ended


def show_pipeline(done: Sequence[Finished]) -> None:
    """What each stage has done, in a line."""
    rows = []
    for each in done:
        if (spec := STAGES.get(each.folder.name.partition(ROUND)[0])) is None:
            numbers = f"{each.metrics['rows']:,.0f} of {each.metrics['prompts']:,.0f} prompts" if each.metrics else ""
            rows.append((each.stage, "pairs", numbers, f"{each.seconds:.0f} s", str(each.folder)))
            continue
        name = spec.headline
        *values, change = before_and_after(name, each.metrics)
        numbers = ": ".join(filter(None, (" → ".join(filter(None, values)), change)))
        rows.append(
            (each.stage, label(name) if numbers else "sweep", numbers, f"{each.seconds:.0f} s", str(each.folder))
        )
    show_table("pipeline", ("stage", "", "", "took", "folder"), rows)


def main() -> None:
    """The entry point of `posttrain pipeline`."""
    entry_point("pipeline", lambda: _main(sys.argv[1:]))


def evaluate_pipeline(arguments: Sequence[str], done: Sequence[Finished], best_of: int = 1) -> None:
    """Put the policies side by side on held-out prompts, where there are any."""
    from posttrain.evaluate import asked_prompts, evaluate_into
    from posttrain.train import prepared

    folders = {each.stage: str(each.folder) for each in done if each.metrics}
    kinds = {name: STAGES.get(name.partition(ROUND)[0]) for name in folders}
    policies = [folders[name] for name, spec in kinds.items() if spec is not None and not spec.is_classifier]
    trained_first = next(spec.name for spec in STAGES.values() if spec.data_format is INSTRUCTIONS)
    if trained_first not in folders or len(policies) < 2:
        return
    overrides = parse(arguments).overrides
    names = {override.key_or_group for override in overrides}
    prompts = EVALUATED_AS.data_format.name
    online = next((name for name, spec in kinds.items() if spec is not None and spec.is_online), EVALUATED_AS.name)
    if online not in folders and not names & {"recipes", f"data.{prompts}"}:
        say(f"no evaluation: name prompts to compare on with data.{prompts}=<source>")
        return
    single = [override for override in overrides if not override.is_sweep_override()]
    compared, said = (
        read_command(_command(single, stage, (trained_first, stage))[0], list(STAGES)).config
        for stage in (online, trained_first)
    )
    taught, compared = prepared(resolve(said).config), resolve(compared, STAGES).config
    rows = taught.test.rows if taught.test is not None else ()
    on = asked_prompts(compared).test
    if on is not None and (seen := asked_in_training(taught.train, on)):
        warn(
            f"{seen} of the {len(on.dataset)} held-out prompts are asked in rows that {trained_first} was trained on, "
            "so the comparison is not of new questions; a column `split` (train or test) in both files keeps them apart"
        )
    evaluate_into(compared, policies, rows, best_of)


def asked_in_training(trained: "Encoded", held_out: "Encoded") -> int:
    """How many of the held-out prompts begin instruction rows; of a long file, some of its rows."""
    rows = trained.bounded(LOOKED_AT).dataset.select_columns(["input_ids", "spans"])
    asked = {tuple(row["input_ids"][: row["spans"][0]]) for row in rows if row["spans"]}
    return sum(tuple(ids) in asked for ids in held_out.dataset["prompt_ids"])


def _main(arguments: Sequence[str]) -> None:
    steps = read_pipeline(arguments)
    if (prints := parse(arguments).prints) and "--hydra-help" not in prints:
        for place, step in enumerate(steps, start=1):
            print(f"# [{place} of {len(steps)}] {step.stage}")
            run.run(step.arguments)
    elif prints:
        run.run(prints)
    else:
        _run(steps, arguments)


def _run(steps: Sequence[Step], arguments: Sequence[str]) -> None:
    config = steps[0].config
    if any(step.sweeps for step in steps):
        refuse_sweep_under_accelerate("posttrain.pipeline", arguments)
        refuse_to_launch(config, "of a pipeline with -m, sweep over the last stage alone: posttrain run -m stage=dpo …")
    elif is_to_launch(config):
        launch(config, "posttrain.pipeline", arguments)
        return
    folders = [step.folder for step in steps] if is_main_process() and not steps[0].config.dry_run else []
    with locked(*folders):
        done = run_pipeline(steps)
        if all(not each.metrics for each in done):
            return  # a dry run, or sweeps alone, which have printed their own
        evaluate_pipeline(arguments, done, next((step.pairs.samples for step in steps if step.pairs is not None), 1))
        show_pipeline(done)
        if is_main_process():
            say(f"report: {write_report(done[0].folder.parent)}")


if __name__ == "__main__":
    main()
