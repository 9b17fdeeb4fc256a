"""`python -m posttrain.pipeline ...`: SFT, reward modelling, then PPO and DPO, each taking what the ones before made.

A command of the pipeline is a command for each of its stages: `sft.num_epochs=1` is `stage.num_epochs=1` for SFT,
`sft.trainer.packing=true` its `trainer.packing=true`, `recipes=quickstart` is `recipes=quickstart/sft` and so on, and
what names no stage goes to all. So a stage that the pipeline runs is the stage that `posttrain.run` runs.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from posttrain import run
from posttrain.compose import read_command
from posttrain.config import nearest
from posttrain.console import is_main_process, number, say, show_table
from posttrain.errors import ConfigError, PosttrainError
from posttrain.launching import refuse_sweep_under_accelerate
from posttrain.lineage import MANIFEST, run_path, with_inputs
from posttrain.report import write_report
from posttrain.schema import Config
from posttrain.stages import STAGES

# data.<name>=<source> for the stages that read this format
FORMATS = {"instructions": ("sft",), "preferences": ("reward", "dpo"), "prompts": ("ppo",)}
SECTIONS = ("data", "trainer", "model")  # keys of a stage's command that are not its stage.*
SWEPT = ("ppo", "dpo")  # stages that nothing is built on
# the number that tells a newcomer what a stage did
HEADLINES = {"sft": "eval_loss", "reward": "accuracy", "ppo": "reward", "dpo": "accuracy"}


@dataclass
class Step:
    """One stage of a pipeline: the command that runs it, and its values of a sweep."""

    stage: str
    arguments: list[str]
    sweeps: bool


def read_pipeline(arguments: Sequence[str]) -> list[Step]:
    """Translate a command line into one for each stage, all of them checked.

    Raises:
        ConfigError: with every problem found, a line each.
    """
    overrides, multirun = _parse(arguments)
    stages = _stages(overrides)
    problems: dict[str, None] = {}
    steps = []
    for stage in stages:
        own, sweeps = _command(overrides, stage, stages)
        if sweeps and stage not in SWEPT:
            problems[
                f"a sweep over {stage} would train everything after it again for each point; sweep it alone: "
                f"python -m posttrain.run -m stage={stage} …"
            ] = None
        given = [*(["-m"] if sweeps else []), *own]
        try:
            with _in_words_of(stage):
                read_command(given, inputs_exist=stage == stages[0])
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
        steps.append(Step(stage, given, sweeps))
    for override in overrides:
        if override.key_or_group in ("stage", "data"):
            problems[
                f"{override.input_line}: the pipeline runs several stages; choose with stages=[{','.join(STAGES)}], "
                f"set data with data.instructions=, data.preferences=, data.prompts="
            ] = None
    if any(override.is_sweep_override() for override in overrides) and not multirun:
        problems["a key has several values: add -m to sweep over them, or quote the value"] = None
    if multirun and not any(step.sweeps for step in steps):
        problems["-m sweeps over nothing; give a key of ppo or dpo several values"] = None
    if problems:
        raise ConfigError(*problems)
    return steps


def _parse(arguments: Sequence[str]) -> tuple[list[Override], bool]:
    """The overrides of a command line, and whether it sweeps."""
    flags = get_args_parser().parse_args(list(arguments))
    try:
        return OverridesParser.create().parse_overrides(flags.overrides), bool(flags.multirun)
    except (OverrideParseException, HydraException) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _command(overrides: Sequence[Override], stage: str, stages: Sequence[str]) -> tuple[list[str], bool]:
    """The command line of one stage, and whether it holds several values of a key."""
    own, sweeps = [f"stage={stage}"], False
    for override in overrides:
        translated = _for_stage(override, stage, stages)
        if translated is not None:
            sweeps |= override.is_sweep_override()
            own.append(translated)
    return own, sweeps


@contextmanager
def _in_words_of(stage: str) -> Iterator[None]:
    """Let errors over stage.<key> name the key as the pipeline's command spells it."""
    try:
        yield
    except ConfigError as error:
        told = [problem.replace("stage.", f"{stage}.") for problem in error.problems]
        raise ConfigError(*told) from error


def _stages(overrides: Sequence[Override]) -> list[str]:
    for override in overrides:
        if override.key_or_group == "stages":
            value = override.value()
            names = [str(name) for name in value] if isinstance(value, list) else [str(value)]
            unknown = [name for name in names if name not in STAGES]
            if unknown or not names:
                raise ConfigError(f"stages={names} must be some of {', '.join(STAGES)}{nearest(str(names[0]), STAGES)}")
            return [name for name in STAGES if name in names]
    return list(STAGES)


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
        return f"data.dataset_name={value}" if stage in FORMATS[rest] else None
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
        config = _first_point(step)
        folder = run_path(config)
        to_come = _unfinished(steps[: place - 1]) if config.dry_run else ()
        metrics: dict[str, float] = {}
        if step.sweeps and not config.dry_run:
            _sweep(step)
        else:
            with _in_words_of(step.stage):
                result = run_stage(config, folder, rerun=True, to_come=to_come)
            metrics = result.metrics if result is not None else {}
        done.append(Finished(step.stage, folder, metrics, time.monotonic() - started))
    return done


def _first_point(step: Step) -> Config:
    """A step's configuration; of a sweep its first point's."""
    config = read_command(step.arguments, inputs_exist=False).config
    assert config is not None
    return config


def _unfinished(steps: Sequence[Step]) -> list[str]:
    """Those of the stages that have left no model behind yet."""
    return [step.stage for step in steps if not (run_path(_first_point(step)) / MANIFEST).is_file()]


def _sweep(step: Step) -> None:
    """Let `posttrain.run -m` do it."""
    given = sys.argv
    sys.argv = [given[0], *step.arguments]
    try:
        run.main()
    except SystemExit as ended:
        if ended.code:
            raise PosttrainError(f"points of the sweep over {step.stage} failed; see above") from ended
    finally:
        sys.argv = given


def show_pipeline(done: Sequence[Finished]) -> None:
    """What each stage has done, in a line."""
    rows = []
    for each in done:
        name = HEADLINES[each.stage]
        label = STAGES[each.stage].shown[name]
        before, after = (each.metrics.get(key) for key in (f"{name}_before", name))
        numbers = " → ".join(number(name, value) for value in (before, after) if value is not None)
        rows.append((each.stage, label if numbers else "sweep", numbers, f"{each.seconds:.0f} s", str(each.folder)))
    show_table("pipeline", ("stage", "", "", "took", "folder"), rows)


def main() -> None:
    """The entry point: exit codes as those of `posttrain.run`."""
    sys.exit(run.guarded(_main))


def evaluate_pipeline(arguments: Sequence[str], done: Sequence[Finished]) -> None:
    """Put SFT, PPO and DPO side by side on PPO's held-out prompts, where there are any."""
    from posttrain.evaluate import evaluate_into

    folders = {each.stage: str(each.folder) for each in done if each.metrics}
    policies = [folders[stage] for stage in ("sft", "ppo", "dpo") if stage in folders]
    if "sft" not in folders or len(policies) < 2:
        return
    overrides, _ = _parse(arguments)
    names = {override.key_or_group for override in overrides}
    if "ppo" not in folders and not names & {"recipes", "data.prompts"}:
        say("no evaluation: name prompts to answer with data.prompts=<source>")
        return
    single = [override for override in overrides if not override.is_sweep_override()]
    ppo, sft = (_command(single, stage, ("sft", stage))[0] for stage in ("ppo", "sft"))
    config = _first_point(Step("ppo", ppo, sweeps=False))
    responses = _first_point(Step("sft", sft, sweeps=False))
    evaluate_into(with_inputs(config, to_come=("reward",))[0], policies, responses.data)


def _main() -> None:
    steps = read_pipeline(sys.argv[1:])
    if any(step.sweeps for step in steps):
        refuse_sweep_under_accelerate("posttrain.pipeline", sys.argv[1:])
    done = run_pipeline(steps)
    if all(not each.metrics for each in done):
        return  # a dry run, or sweeps alone, which have told their own
    evaluate_pipeline(sys.argv[1:], done)
    show_pipeline(done)
    if is_main_process():
        say(f"report: {write_report(done[0].folder.parent)}")


if __name__ == "__main__":
    main()
