"""Run SFT, reward model, PPO and DPO in order, then compare them.

usage: posttrain pipeline [recipes=...] [stages=[sft,reward,ppo,dpo]] [key=value ...]

A key that begins with a stage goes to that stage: sft.num_epochs=1, dpo.beta=0.3,
sft.trainer.packing=true. All others go to every stage. data.instructions=,
data.preferences= and data.prompts= name your own rows. The same command again goes
on where it stopped; a finished stage that has to be re-run is moved to
<run_name>/earlier first. With -m, several values of a key of ppo or dpo are a sweep.
Flags are those of posttrain run; every key: posttrain pipeline stages=[dpo] --help

examples:
  posttrain pipeline recipes=quickstart
  posttrain pipeline run_name=mine stages=[sft] data.instructions=mine.jsonl
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override

from posttrain import run
from posttrain.cli.command import named_stages, parse, read_command
from posttrain.cli.entry import entry_point
from posttrain.cli.launching import is_to_launch, launch, refuse_sweep_under_accelerate, refuse_to_launch
from posttrain.config.schema import Config
from posttrain.config.stages import EVALUATED_AS, FORMATS, INSTRUCTIONS, PIPELINE, STAGES, followers
from posttrain.console import is_main_process, say, show_table
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics.catalogue import label
from posttrain.metrics.comparison import before_and_after
from posttrain.models.resolve import data_required, resolve
from posttrain.report import write_report
from posttrain.runs.folder import MANIFEST, locked, run_path

SECTIONS = ("data", "trainer", "model")  # keys of a stage's command that are not its stage.*


@dataclass
class Step:
    """One stage of a pipeline: the command that runs it, its values of a sweep, and its configuration."""

    stage: str
    arguments: list[str]
    sweeps: bool
    config: Config  # of a sweep its first point's


def read_pipeline(arguments: Sequence[str]) -> list[Step]:
    """Translate a command line into one for each stage, all of them checked.

    Raises:
        ConfigError: with every problem found, a line each.
    """
    line = parse(arguments)
    stages = named_stages(line.overrides) or PIPELINE
    problems: dict[str, None] = {}
    steps: list[Step] = []
    for override in line.overrides:
        if override.key_or_group in ("stage", "data"):
            problems[
                f"{override.input_line}: the pipeline runs several stages; choose with stages=[{','.join(STAGES)}], "
                f"set data with {', '.join(f'data.{name}=' for name in FORMATS)}"
            ] = None
    for place, stage in enumerate(stages):
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
                config = read_command(given, stages[:place]).config
                if config.data.ptx and (rows := _own_instructions(line.overrides, stage)):
                    given.append(f"data.ptx={rows}")
                    config = read_command(given, stages[:place]).config
                has_own_rows = bool(steps) and steps[0].config.data.dataset_name is not None
                if has_own_rows and config.data.dataset_name is None:
                    raise data_required(config)
                steps.append(Step(stage, given, sweeps, config))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if any(override.is_sweep_override() for override in line.overrides) and not line.multirun and not line.prints:
        problems["a key has several values: add -m to sweep over them, or quote the value"] = None
    if line.multirun and not any(step.sweeps for step in steps):
        last = " or ".join(name for name in STAGES if not followers(name))
        problems[f"-m sweeps over nothing; give a key of {last} several values"] = None
    if problems:
        raise ConfigError(*problems)
    return steps


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
    if name in ("stages", "stage", "data"):
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

    stage: str
    folder: Path
    metrics: dict[str, float]
    seconds: float


def run_pipeline(steps: Sequence[Step]) -> list[Finished]:
    """Run the stages in order; one that is complete and unchanged is not run again.

    Raises:
        PosttrainError: a stage failed; those before it stay complete.
    """
    from posttrain.train import run_stage

    done = []
    for place, step in enumerate(steps, start=1):
        started = time.monotonic()
        say(f"\n[{place} of {len(steps)}] {step.stage}", style="bold")
        folder = run_path(step.config)
        to_come = _unfinished(steps[: place - 1]) if step.config.dry_run else ()
        metrics: dict[str, float] = {}
        if step.sweeps and not step.config.dry_run:
            _sweep(step)
        else:
            with _in_words_of(step.stage):
                result = run_stage(step.config, folder, to_come)
            metrics = result.metrics if result is not None else {}
        done.append(Finished(step.stage, folder, metrics, time.monotonic() - started))
    return done


def _unfinished(steps: Sequence[Step]) -> list[str]:
    """Those of the stages that have left no model behind yet."""
    return [step.stage for step in steps if not (run_path(step.config) / MANIFEST).is_file()]


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
        name = STAGES[each.stage].headline
        *values, change = before_and_after(name, each.metrics)
        numbers = ": ".join(filter(None, (" → ".join(filter(None, values)), change)))
        rows.append(
            (each.stage, label(name) if numbers else "sweep", numbers, f"{each.seconds:.0f} s", str(each.folder))
        )
    show_table("pipeline", ("stage", "", "", "took", "folder"), rows)


def main() -> None:
    """The entry point of `posttrain pipeline`."""
    entry_point("pipeline", lambda: _main(sys.argv[1:]))


def evaluate_pipeline(arguments: Sequence[str], done: Sequence[Finished]) -> None:
    """Put the policies side by side on held-out prompts, where there are any."""
    from posttrain.evaluate import evaluate_into
    from posttrain.train import prepared

    folders = {each.stage: str(each.folder) for each in done if each.metrics}
    policies = [folders[name] for name, spec in STAGES.items() if name in folders and not spec.is_classifier]
    trained_first = next(spec.name for spec in STAGES.values() if spec.data_format is INSTRUCTIONS)
    if trained_first not in folders or len(policies) < 2:
        return
    overrides = parse(arguments).overrides
    names = {override.key_or_group for override in overrides}
    prompts = EVALUATED_AS.data_format.name
    online = next((name for name in folders if STAGES[name].is_online), EVALUATED_AS.name)
    if online not in folders and not names & {"recipes", f"data.{prompts}"}:
        say(f"no evaluation: name prompts to compare on with data.{prompts}=<source>")
        return
    single = [override for override in overrides if not override.is_sweep_override()]
    asked, said = (
        read_command(_command(single, stage, (trained_first, stage))[0], list(STAGES)).config
        for stage in (online, trained_first)
    )
    held_out = prepared(resolve(said).config).test
    evaluate_into(resolve(asked, STAGES).config, policies, held_out.rows if held_out is not None else ())


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
    folders = [run_path(step.config) for step in steps] if is_main_process() and not steps[0].config.dry_run else []
    with locked(*folders):
        done = run_pipeline(steps)
        if all(not each.metrics for each in done):
            return  # a dry run, or sweeps alone, which have printed their own
        evaluate_pipeline(arguments, done)
        show_pipeline(done)
        if is_main_process():
            say(f"report: {write_report(done[0].folder.parent)}")


if __name__ == "__main__":
    main()
