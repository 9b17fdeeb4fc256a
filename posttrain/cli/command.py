"""The one reader of command lines: every word is checked, and what Hydra composes of it, before anything runs."""

import argparse
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from posttrain import paths
from posttrain.cli.files import check_files, hydra_problems
from posttrain.config.check import check
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES
from posttrain.config.suggest import nearest, one_of
from posttrain.data.sources import check_source
from posttrain.errors import ConfigError
from posttrain.models.resolve import resolve, with_data, with_models
from posttrain.runs.folder import check_path

OmegaConf.register_new_resolver("posttrain_point", lambda name: name.replace("+", "").replace("/", "_"), replace=True)
FLAGS = [
    *("--help", "--version", "--multirun", "--cfg", "--resolve", "--package", "--info", "--hydra-help"),
    *("--config-dir", "--shell-completion"),
]


@dataclass
class Line:
    """A command line taken apart, nothing checked but its form."""

    words: list[str]  # key=value, as typed
    overrides: list[Override]  # the same, parsed
    multirun: bool
    prints: list[str]  # the flags by which Hydra only prints something
    config_dir: str | None


@dataclass
class Command:
    """A command line that has been checked."""

    arguments: list[str]  # for Hydra
    sweep: bool
    swept: list[str]  # the keys that take several values
    config: Config  # of the first point


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags and words of a command line.

    Raises:
        ConfigError: a flag is unknown or takes another value.
    """
    # Hydra has no public parser; its own, as the parent, keeps every flag that it takes
    parser = _Parser(parents=[get_args_parser()], add_help=False, allow_abbrev=False)
    found, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        raise ConfigError(f"{unknown[0]} is unknown{nearest(unknown[0], FLAGS)}")
    return found


def parse(arguments: Sequence[str]) -> Line:
    """Take apart the command line of an entry point whose words go to Hydra.

    Raises:
        ConfigError: a flag is unknown, a word is not an override, or --config-dir is not a folder.
    """
    flags = _flags(arguments)
    if flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"--config-dir={flags.config_dir}: no such folder")
    prints = ["--hydra-help"] if flags.hydra_help else []
    prints += [part for name in ("cfg", "info", "package") for part in _with_value(name, vars(flags)[name])]
    prints += ["--resolve"] if flags.resolve else []
    if flags.cfg is None and (flags.resolve or flags.package):
        raise ConfigError("--resolve and --package go with --cfg")
    if (flags.cfg is not None) + (flags.info is not None) + flags.hydra_help > 1:
        raise ConfigError("only one of --cfg, --info and --hydra-help can be printed")
    # accelerate=ddp accelerate.num_processes=4: a name, and keys of what it names
    words = [re.sub(r"^(\+*)accelerate=", r"\1accelerate.config_file=", word) for word in flags.overrides]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except (OverrideParseException, HydraException) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{text}; quote a value that holds = , [ ] {{ }} or spaces") from error
    return Line(words, overrides, flags.multirun, prints, flags.config_dir)


def _with_value(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"--{name}", value]


def read_words(arguments: Sequence[str], options: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The plain words of a command line, and its options in the form key=value.

    Raises:
        ConfigError: a flag or an option is unknown.
    """
    flagged = [word for word in arguments if word.startswith("-")]
    if flagged:
        raise ConfigError(f"{flagged[0]} is unknown; --help lists what can be given")
    # the folder of a sweep's point has = in its name
    pairs = dict(word.split("=", 1) for word in arguments if "=" in word and not Path(word).exists())
    for name in pairs:
        if name not in options:
            raise ConfigError(f"{name} is unknown; the options are {', '.join(options)}{nearest(name, options)}")
    return [word for word in arguments if "=" not in word or Path(word).exists()], pairs


def names_in(value: str) -> list[str]:
    """The names of a list such as [a,b]; the commas in the name of a folder that is there part nothing."""
    names: list[str] = []
    parts = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if Path(",".join(parts[:n])).exists()), 1)
        names.append(",".join(parts[:count]))
        parts = parts[count:]
    return names


def named_stages(overrides: Sequence[Override], known: Collection[str] = STAGES) -> list[str]:
    """The stages that `stage=` or `stages=` names, in the order of those that are known; none where neither is.

    Of several the last one counts, as for other keys.

    Raises:
        ConfigError: one of them is unknown.
    """
    named: list[str] = []
    for override in overrides:
        if override.key_or_group in ("stage", "stages"):
            value = override.value()
            names = [str(name) for name in value] if isinstance(value, list) else _values(override)
            if not names:
                raise ConfigError(f"{override.input_line} names no stage; it may name {', '.join(known)}")
            for name in names:
                if name not in known:
                    raise ConfigError(one_of(override.key_or_group, name, list(known)))
            named = names
    return [name for name in known if name in named]


def groups(config_dir: str | None) -> dict[str, list[str]]:
    """Config group -> its options, those of --config-dir among them; a base that others start from is not one."""
    found: dict[str, list[str]] = {}
    own = [paths.RECIPES, *(folder for folder in sorted(paths.CONF.iterdir()) if folder.is_dir())]
    more = [folder for folder in Path(config_dir).iterdir() if folder.is_dir()] if config_dir else []
    for folder in [*own, *more]:
        options = (str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
        found.setdefault(folder.name, []).extend(sorted(option for option in options if option != "base"))
    return found


def forced(override: Override, value: str, known: Collection[str]) -> str:
    """A key is set whether it stands in conf/ or not: `check` says what is unknown, and says it better."""
    name = override.key_or_group
    if name not in known and not name.startswith("hydra") and not override.is_delete():
        return f"++{name}={value}"
    line = str(override.input_line)
    prefix = line[: len(line) - len(line.lstrip("+~"))]
    package = f"@{override.package}" if override.package else ""
    return line if override.is_delete() else f"{prefix}{name}{package}={value}"


def _values(override: Override) -> list[str]:
    if override.is_interval_sweep():  # of a sweeper that chooses the values itself, such as Optuna's
        ends: Any = override.value()
        return [str(ends.start), str(ends.end)]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def search_path(config_dir: str | None) -> list[str]:
    """Where Hydra looks beside conf/: never first, so that a file of the user's cannot stand in for one of conf/."""
    return [f"hydra.searchpath=[file://{paths.ROOT},file://{Path(config_dir).resolve()}]"] if config_dir else []


def compose_config(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """What Hydra composes, its own node `hydra` among it."""
    with initialize_config_dir(config_dir=str(paths.CONF), version_base="1.3", job_name="posttrain"):
        words = [*overrides, *search_path(config_dir)]
        return compose(config_name="config", overrides=words, return_hydra_config=True)


def _option_problem(error: MissingConfigException, known: dict[str, list[str]]) -> str:
    """'stage=dpp is not one of …' from Hydra's report of a group option that does not exist."""
    group, _, option = str(error.missing_cfg_file).partition("/")
    options = known.get(group, [])
    return f"{group}={option} is not one of {', '.join(options) or 'nothing'}{nearest(option, options)}"


def compose_all(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """What Hydra composes of these overrides.

    Raises:
        ConfigError: with every override that it refuses, a line each.
    """
    line, known = parse(overrides), groups(config_dir)
    words = [forced(override, _values(override)[0], known) for override in line.overrides]
    composed, problems = _compose_all(words, config_dir, known)
    if composed is None or problems:
        raise ConfigError(*problems)
    return composed


def _compose_all(
    overrides: list[str], config_dir: str | None, known: dict[str, list[str]]
) -> tuple[DictConfig | None, list[str]]:
    """Compose, leaving out one by one the overrides that Hydra refuses, so that all problems are printed at once."""
    problems: list[str] = []
    remaining = list(overrides)
    while True:
        try:
            return compose_config(remaining, config_dir), problems
        except MissingConfigException as error:
            problems.append(_option_problem(error, known))
            group, _, option = str(error.missing_cfg_file).partition("/")
            bad = [override for override in remaining if override.lstrip("+") == f"{group}={option}"]
            if not bad:
                return None, problems
            remaining = [override for override in remaining if override not in bad]
        except RecursionError:
            return None, [*problems, "the files of --config-dir include each other without end; look at their defaults"]
        except YAMLError as error:
            return None, [*problems, f"invalid YAML: {' '.join(str(error).split())}"]
        except (ConfigCompositionException, HydraException) as error:
            cause = error.__cause__ or error
            first = " ".join(str(cause).split())
            named = (f"'{override}'" in str(error) or f"override {override}" in str(error) for override in remaining)
            bad = [override for override, is_named in zip(remaining, named, strict=True) if is_named]
            problems.append(f"{bad[0]}: {first}" if bad else first)
            if not bad:
                return None, problems
            remaining = [override for override in remaining if override not in bad]


def _check_inputs(config: Config, to_come: Collection[str] | None, needs_data: bool) -> None:
    """Refuse a source, a model or a run folder that cannot be, before anything slow is imported."""
    check_path(config)
    if to_come is None:
        found = with_models(config, STAGES)[0]
        found = with_data(found) if needs_data else found
    else:
        found = resolve(config, to_come, needs_data).config
    if found.data.dataset_name is not None:
        check_source(found.data)


def read_command(arguments: Sequence[str], to_come: Collection[str] | None = (), needs_data: bool = True) -> Command:
    """Check a command line; for a sweep each value of each swept key is checked.

    What the stages `to_come` will make is not looked for; with None no model is. Without `needs_data`, a configuration
    that names none is taken: the caller brings it.

    Raises:
        ConfigError: with every problem found, a line each.
    """
    line = parse(arguments)
    known = groups(line.config_dir)
    check_files(line.config_dir, [(override.key_or_group, _values(override)[0]) for override in line.overrides])
    first = [forced(override, _values(override)[0], known) for override in line.overrides]
    variants = [first]
    for index, override in enumerate(line.overrides):
        for value in _values(override)[1:]:
            variants.append([*first[:index], forced(override, value, known), *first[index + 1 :]])
    swept = [override.key_or_group for override in line.overrides if override.is_sweep_override()]
    if swept and not line.multirun and not line.prints:
        raise ConfigError(f"{swept[0]} has several values: add -m to sweep over them, or quote the value")
    problems: dict[str, None] = {}  # ordered, without repetition
    configs: list[Config] = []
    baseline = compose_config([], None) if line.config_dir else None
    for variant in variants:
        composed, found = _compose_all(variant, line.config_dir, known)
        problems |= dict.fromkeys([*found, *hydra_problems(line.overrides, composed, baseline)])
        if composed is not None:
            try:
                configs.append(check(composed))
                if not line.prints:
                    _check_inputs(configs[-1], to_come, needs_data)
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)
    rewritten = [forced(override, _raw_value(override), known) for override in line.overrides]
    if line.prints:  # of a sweep its first point
        rewritten = first
    elif line.multirun:
        fixed = [override.key_or_group for override in line.overrides if override.key_or_group not in swept]
        rewritten.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    flags = ["-m"] if line.multirun and not line.prints else line.prints
    # Hydra's help is about itself: it does not read our configuration, and refuses its keys
    arguments = line.prints if "--hydra-help" in line.prints else [*flags, *rewritten, *search_path(line.config_dir)]
    return Command(arguments, line.multirun and not line.prints, swept, configs[0])


def configure(*overrides: str) -> Config:
    """The configuration of one run, checked as on the command line: configure("stage=dpo", "stage.beta=0.3").

    Raises:
        ConfigError: with every problem found, a line each.
    """
    return read_command(overrides, needs_data=False).config


def _raw_value(override: Override) -> str:
    return str(override.input_line).partition("=")[2]
