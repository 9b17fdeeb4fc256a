"""accelerate's part of a configuration: `accelerate=<name or file>`, and keys of that file such as num_processes."""

import os
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from posttrain import paths
from posttrain.config.suggest import nearest
from posttrain.config.trl_fields import accelerate_keys
from posttrain.devices import visible_gpus
from posttrain.errors import ConfigError
from posttrain.values import JsonObject

# sizes of accelerate's parallelism_config that are 1 with every stage
_COUNTED = "rows are counted, shared out and judged as if each process had its own"
_NOT_TRAINED_WITH = {"cp": _COUNTED, "sp": _COUNTED, "tp": "accelerate wants a model that was loaded in parts"}


def accelerate_config(given: JsonObject) -> JsonObject:
    """The file that `accelerate.config_file` names with the other keys put in; empty where none is named.

    A shipped one has as many processes as there are GPUs to be seen, and another at most as many.

    Raises:
        ConfigError: there is no such file, or a key that accelerate or posttrain does not take.
    """
    keys = dict(given)
    name = keys.pop("config_file", None)
    shipped = {file.stem: file for file in paths.ACCELERATE_CONFIGS.glob("*.yaml")}
    if name is None:
        check_parallelism(dict(os.environ))
        if keys:
            raise ConfigError(f"accelerate.{next(iter(keys))} needs accelerate=<{'|'.join(sorted(shipped))}|file>")
        return {}
    file = shipped.get(str(name), Path(str(name)))
    if not file.is_file():
        known = sorted(shipped)
        raise ConfigError(
            f"accelerate={name} is neither a file nor one of {', '.join(known)}{nearest(str(name), known)}"
        )
    try:
        content = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(file), keys))
    except (YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"accelerate={name}: {' '.join(str(error).split())}") from error
    assert isinstance(content, dict)
    found: JsonObject = {str(key): value for key, value in content.items()}
    for section in (found, *(value for value in found.values() if isinstance(value, dict))):
        if unknown := [str(key) for key in section if key not in accelerate_keys()]:
            close = nearest(unknown[0], accelerate_keys())
            raise ConfigError(f"accelerate.{unknown[0]} is unknown to accelerate{close}")
    check_parallelism({key: str(value) for key, value in (found.get("parallelism_config") or {}).items()})
    gpus = 0 if found.get("use_cpu") or found.get("num_machines", 1) > 1 else len(visible_gpus())
    if gpus and "num_processes" not in keys and found.get("distributed_type") != "NO":
        found["num_processes"] = gpus if name in shipped else min(gpus, found.get("num_processes", gpus))
    return found


def check_parallelism(sizes: dict[str, str]) -> None:
    """Refuse what no stage trains with, in a file's keys or in the environment that they become.

    Raises:
        ConfigError: names the key.
    """
    for name, why in _NOT_TRAINED_WITH.items():
        key = f"parallelism_config_{name}_size"
        if int(sizes.get(key, sizes.get(key.upper(), "1"))) > 1:
            path = f"accelerate.parallelism_config.{key}"
            raise ConfigError(f"{path} must be 1 for every stage: {why}; use accelerate=fsdp2")
