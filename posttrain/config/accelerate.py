"""accelerate's part of a configuration: `accelerate=<name or file>`, and keys of that file such as num_processes."""

import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from posttrain import paths
from posttrain.config.suggest import nearest, one_of
from posttrain.config.trl_fields import accelerate_keys
from posttrain.devices import visible_gpus
from posttrain.errors import ConfigError
from posttrain.values import JsonObject

# sizes of accelerate's parallelism_config that are 1 with every stage
_COUNTED = "rows are counted, shared out and judged as if each process had its own"
_NOT_TRAINED_WITH = {"cp": _COUNTED, "sp": _COUNTED, "tp": "accelerate wants a model that was loaded in parts"}
# MULTI_CPU is not among them: accelerate starts one process for it, whatever number is asked for
_KINDS = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU")
_PRECISIONS = ("no", "bf16", "fp16")


def accelerate_config(given: Mapping[str, object]) -> JsonObject:
    """The file that `accelerate.config_file` names with the other keys put in; empty where none is named.

    A shipped one has as many processes as there are GPUs to be seen, and another at most as many.

    Raises:
        ConfigError: there is no such file, or a key that accelerate or posttrain does not take.
    """
    name, keys = given["config_file"], {key: value for key, value in given.items() if key != "config_file"}
    shipped = {file.stem: file for file in sorted(paths.ACCELERATE_CONFIGS.glob("*.yaml"))}
    if name is None and keys:
        raise ConfigError(f"accelerate.{next(iter(keys))} needs accelerate=<{'|'.join(shipped)}|file>")
    found = _merged(str(name), shipped, keys) if name is not None else {}
    if found:
        _check_values(str(name), found)
    for kind, why in _NOT_TRAINED_WITH.items():
        key = f"parallelism_config_{kind}_size"  # in the file, or as accelerate launch hands it on
        if int((found.get("parallelism_config") or {}).get(key, os.environ.get(key.upper(), 1))) > 1:
            raise ConfigError(f"accelerate.parallelism_config.{key} must be 1 for every stage: {why}")
    is_here = not found.get("use_cpu") and found.get("num_machines", 1) == 1
    counts = is_here and "num_processes" not in keys and found.get("distributed_type", "NO") != "NO"
    if counts and (gpus := len(visible_gpus())):
        found["num_processes"] = gpus if name in shipped else min(gpus, found.get("num_processes", gpus))
    return found


def _merged(name: str, shipped: Mapping[str, Path], keys: Mapping[str, object]) -> JsonObject:
    file, known = shipped.get(name, Path(name)), accelerate_keys()
    if not file.is_file():
        raise ConfigError(
            f"accelerate={name} is neither a file nor one of {', '.join(shipped)}{nearest(name, shipped)}"
        )
    try:
        content = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(file), dict(keys)), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"accelerate={name}: {' '.join(str(error).split())}") from error
    found = {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    sections = [(key, value) for key, value in found.items() if isinstance(value, dict)]
    for path in [*found, *(f"{key}.{part}" for key, value in sections for part in value)]:
        if (part := path.rpartition(".")[2]) not in known:
            raise ConfigError(f"accelerate.{path} is unknown to accelerate{nearest(part, known)}")
    return found


def _check_values(name: str, found: Mapping[str, object]) -> None:
    """Refuse what accelerate would fail over, or take for something else."""
    kind, processes = found.get("distributed_type"), found.get("num_processes", 1)
    if kind not in _KINDS:
        raise ConfigError(f"accelerate={name}: {one_of('distributed_type', kind, _KINDS)}")
    if (precision := found.get("mixed_precision", "no")) not in _PRECISIONS:
        raise ConfigError(f"accelerate={name}: {one_of('mixed_precision', precision, _PRECISIONS)}")
    for key in ("num_processes", "num_machines"):
        value = found.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"accelerate={name}: {key}={value} must be a number from 1 on")
    if kind == "NO" and processes != 1:
        raise ConfigError(f"accelerate={name}: distributed_type=NO is one process, and num_processes={processes}")
    for key in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        if not isinstance(found.get(key) or {}, dict):
            raise ConfigError(f"accelerate={name}: {key}={found[key]} must hold keys of its own")
    if not isinstance(found.get("use_cpu", False), bool):
        raise ConfigError(f"accelerate={name}: use_cpu={found['use_cpu']} must be true or false")
