"""Reads the command line as Hydra would, and checks what it composes before anything runs."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from posttrain import lineage, model, paths, sources
from posttrain.config import check, nearest
from posttrain.errors import ConfigError
from posttrain.schema import Config, PPOStage

OmegaConf.register_new_resolver("posttrain_point", lambda name: name.replace("+", "").replace("/", "_"), replace=True)


@dataclass
class Command:
    """A command line that has been checked."""

    arguments: list[str]  # for Hydra
    sweep: bool
    swept: list[str]  # the keys that take several values
    config: Config | None  # of the first point; None where Hydra only prints something


def _groups(config_dir: str | None) -> dict[str, list[str]]:
    """Config group -> its options, those of --config-dir among them; what others start from is no option."""
    groups: dict[str, list[str]] = {}
    own = [paths.RECIPES, *(folder for folder in paths.CONF.iterdir() if folder.is_dir())]
    more = [folder for folder in Path(config_dir).iterdir() if folder.is_dir()] if config_dir else []
    for folder in [*own, *more]:
        options = (str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
        groups.setdefault(folder.name, []).extend(sorted(option for option in options if option != "base"))
    return groups


def _forced(override: Override, value: str, groups: Collection[str]) -> str:
    """A key is set whether it stands in conf/ or not: `check` says what is unknown, and says it better."""
    name = override.key_or_group
    if name not in groups and not name.startswith("hydra") and not override.is_delete():
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


def _compose(overrides: list[str], config_dir: str | None) -> DictConfig:
    search = [f"hydra.searchpath=[file://{paths.ROOT},file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(config_dir=str(paths.CONF), version_base="1.3", job_name="posttrain"):
        return compose(config_name="config", overrides=[*overrides, *search])


def _option_problem(error: MissingConfigException, groups: dict[str, list[str]]) -> str:
    """'stage=dpp is not one of …' from Hydra's report of a group option that does not exist."""
    group, _, option = str(error.missing_cfg_file).partition("/")
    options = groups.get(group, [])
    return f"{group}={option} is not one of {', '.join(options) or 'nothing'}{nearest(option, options)}"


def _compose_all(
    overrides: list[str], config_dir: str | None, groups: dict[str, list[str]]
) -> tuple[DictConfig | None, list[str]]:
    """Compose, leaving out one by one the overrides that Hydra refuses, so that all are told at once."""
    problems: list[str] = []
    remaining = list(overrides)
    while True:
        try:
            return _compose(remaining, config_dir), problems
        except MissingConfigException as error:
            problems.append(_option_problem(error, groups))
            group, _, option = str(error.missing_cfg_file).partition("/")
            bad = [override for override in remaining if override.lstrip("+") == f"{group}={option}"]
            if not bad:
                return None, problems
            remaining = [override for override in remaining if override not in bad]
        except YAMLError as error:
            return None, [*problems, f"a configuration is no yaml: {' '.join(str(error).split())}"]
        except (ConfigCompositionException, HydraException) as error:
            cause = error.__cause__ or error
            first = " ".join(str(cause).split())
            named = (f"'{override}'" in str(error) or f"override {override}" in str(error) for override in remaining)
            bad = [override for override, is_named in zip(remaining, named, strict=True) if is_named]
            problems.append(f"{bad[0]}: {first}" if bad else first)
            if not bad:
                return None, problems
            remaining = [override for override in remaining if override not in bad]


def _check_models(config: Config) -> None:
    config, _ = lineage.with_inputs(config)
    model.source(config.model)
    if isinstance(config.stage, PPOStage) and config.stage.reward_model is not None:
        with model.named("stage.reward_model"):
            model.source(model.beside(config.model, config.stage.reward_model))


def _check_folder(config: Config) -> None:
    folder = lineage.run_path(config)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output_dir={config.output_dir}: {path} is a file, so {folder} cannot be a folder")


def read_command(arguments: list[str], inputs_exist: bool = True) -> Command:
    """Check a command line; for a sweep each value of each swept key is checked.

    Without `inputs_exist` the models that the run will start from may still be to come.

    Raises:
        ConfigError: with every problem found, a line each.
    """
    flags = get_args_parser().parse_args(arguments)
    if flags.help or flags.hydra_help or flags.cfg or flags.info is not None or flags.shell_completion:
        return Command(arguments, sweep=False, swept=[], config=None)
    try:
        overrides = OverridesParser.create().parse_overrides(flags.overrides)
    except (OverrideParseException, HydraException) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{told}; quote a value that holds = , [ ] {{ }} or spaces") from error
    groups = _groups(flags.config_dir)
    first = [_forced(override, _values(override)[0], groups) for override in overrides]
    variants = [first]
    for index, override in enumerate(overrides):
        for value in _values(override)[1:]:
            variants.append([*first[:index], _forced(override, value, groups), *first[index + 1 :]])
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    if swept and not flags.multirun:
        raise ConfigError(f"{swept[0]} has several values: add -m to sweep over them, or quote the value")
    problems: dict[str, None] = {}  # ordered, without repetition
    configs: list[Config] = []
    for variant in variants:
        composed, found = _compose_all(variant, flags.config_dir, groups)
        problems |= dict.fromkeys(found)
        if composed is not None:
            try:
                configs.append(check(composed))
                if inputs_exist:
                    _check_models(configs[-1])
                sources.check_source(configs[-1].data)
                _check_folder(configs[-1])
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)
    kept = [argument for argument in arguments if argument not in flags.overrides]
    rewritten = [_forced(override, _raw_value(override), groups) for override in overrides]
    if flags.multirun:
        fixed = [override.key_or_group for override in overrides if override.key_or_group not in swept]
        rewritten.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    return Command([*kept, *rewritten], flags.multirun, swept, configs[0])


def configure(*overrides: str) -> Config:
    """The configuration of one run, checked as on the command line: configure("stage=dpo", "stage.beta=0.3").

    Raises:
        ConfigError: with every problem found, a line each.
    """
    config = read_command(list(overrides)).config
    if config is None:
        raise ConfigError(f"{' '.join(overrides)} asks for something else than a run")
    return config


def _raw_value(override: Override) -> str:
    return str(override.input_line).partition("=")[2]
