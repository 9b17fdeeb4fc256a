"""What a user's yaml files may hold: a mapping of a sane size, and no keys by which Hydra writes files or runs code."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from posttrain.errors import ConfigError

MOST_VALUES = 100_000  # of one file, its aliases written out
# hydra.* that may be set, and on the command line the folder of a point, which the launcher names there
ALLOWED = ("hydra.launcher", "hydra.sweeper", "hydra/launcher", "hydra/sweeper")
ON_COMMAND_LINE = ("hydra.run.dir",)
# classes that Hydra may make of `hydra.launcher` and `hydra.sweeper`
PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.")
# what Hydra fills in by itself
FILLED_IN = ("hydra.overrides", "hydra.runtime", "hydra.job.override_dirname", "hydra.searchpath")


def check_files(config_dir: str | None, chosen: Sequence[tuple[str, str]]) -> None:
    """Check the files of --config-dir that (group, option) name, and those that they name in `defaults`.

    Raises:
        ConfigError: names the file, and what is wrong with it.
    """
    waiting, seen = list(chosen) if config_dir else [], set()
    while waiting:
        group, option = waiting.pop()
        file = Path(config_dir or "", group, f"{option}.yaml")
        if file.is_file() and file not in seen:
            seen.add(file)
            waiting += _defaults(_mapping(file), group)


def _mapping(file: Path) -> yaml.MappingNode:
    """The file as a tree of nodes in which an alias is the node that it names: nothing is written out."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        size = _size(node, {}, set()) if node is not None else 0
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{file}: invalid YAML ({text})") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file} holds {'nothing' if node is None else 'no mapping'}; it must hold key: value lines")
    if size > MOST_VALUES:
        raise ConfigError(f"{file} holds more than {MOST_VALUES:,} values once its aliases are written out")
    return node


def _size(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node holds with its aliases written out.

    Raises:
        yaml.YAMLError: an alias names a node that it is part of.
    """
    if id(node) in above:
        raise yaml.YAMLError("an alias refers to itself")
    if id(node) not in sizes:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        sizes[id(node)] = 1 + sum(_size(child, sizes, above | {id(node)}) for child in children)
    return sizes[id(node)]


def _defaults(node: yaml.MappingNode, group: str) -> Iterator[tuple[str, str]]:
    """(group, option) of each entry of a file's defaults list."""
    listed = [value for key, value in node.value if key.value == "defaults"]
    for entry in listed[0].value if listed and isinstance(listed[0], yaml.SequenceNode) else []:
        if isinstance(entry, yaml.ScalarNode):
            yield (group, entry.value) if not entry.value.startswith("/") else _apart(entry.value[1:])
        elif isinstance(entry, yaml.MappingNode):
            for key, value in entry.value:
                name = str(key.value).split()[-1]
                yield name[1:] if name.startswith("/") else f"{group}/{name}", str(value.value)


def _apart(path: str) -> tuple[str, str]:
    group, _, option = path.rpartition("/")
    return group, option


def hydra_problems(
    overrides: Sequence[Override], composed: DictConfig | None, baseline: DictConfig | None
) -> list[str]:
    """Keys of Hydra's own that would write files, set the environment or run code, from the command line or a file.

    `baseline` is composed without the user's files; None where there are none.
    """
    only = f"cannot be set; of hydra.*, only {ALLOWED[0]}.* and {ALLOWED[1]}.* can"
    names = [override.key_or_group for override in overrides]
    found = [
        f"{name} {only}" for name in names if name.startswith("hydra") and not _below(name, ALLOWED + ON_COMMAND_LINE)
    ]
    if composed is None:
        return found
    ours = dict(_values(composed.hydra))
    for path, value in ours.items():
        if path.endswith("._target_") and _below(path, ALLOWED) and not str(value).startswith(PLUGINS):
            found.append(f"{path}={value}: a configuration cannot name code to run")
    if baseline is not None:
        shipped = dict(_values(baseline.hydra))
        given = tuple(name for name in names if name.startswith("hydra"))
        changed = [path for path in [*ours, *shipped] if ours.get(path) != shipped.get(path)]
        found += [f"{path} {only}" for path in changed if not _below(path, ALLOWED + FILLED_IN + given)]
    return list(dict.fromkeys(found))


def _below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith((f"{prefix}.", f"{prefix}/")) for prefix in prefixes)


def _values(node: DictConfig) -> Iterator[tuple[str, object]]:
    plain = OmegaConf.to_container(node, resolve=False)
    waiting: list[tuple[str, object]] = [("hydra", plain)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{path}.{name}", part) for name, part in value.items()]
        elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            waiting += [(f"{path}.{place}", part) for place, part in enumerate(value)]
        else:
            yield path, value
