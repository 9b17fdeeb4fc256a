"""What the installed TRL, transformers and accelerate take, read from their sources: to import them takes seconds."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import ConfigError

# What the arguments of every trainer have, most general first: package, file, class.
_COMMON = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
_ENUMS = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))


@dataclass(frozen=True)
class Argument:
    """One argument of a trainer: its annotation, and the words that it takes if these are named."""

    annotation: str
    choices: tuple[str, ...] = ()


@cache
def _tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {package} is not installed; run: pip install -e .")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


def _texts(nodes: list[ast.expr]) -> tuple[str, ...]:
    return tuple(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@cache
def _enums() -> dict[str, tuple[str, ...]]:
    """The values of transformers' enumerations, by class name."""
    return {
        node.name: _texts([item.value for item in node.body if isinstance(item, ast.Assign)])
        for source in _ENUMS
        for node in _tree(*source).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Enum") for base in node.bases)
    }


def _named_choices(default: ast.expr | None) -> Iterator[str]:
    """The `choices` in a field's metadata, where they stand as a list of words."""
    for node in ast.walk(default) if default is not None else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    yield from _texts(value.elts)


def dpo_losses() -> tuple[str, ...]:
    """The names that TRL's DPOTrainer compares `loss_type` with, in its order."""
    found = [
        text
        for node in ast.walk(_tree("trl", "trainer/dpo_trainer.py"))
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "loss_type" and isinstance(node.ops[0], ast.Eq)
        for text in _texts(node.comparators)
    ]
    return tuple(dict.fromkeys(found))


@cache
def trainer_arguments(file: str, name: str) -> dict[str, Argument]:
    """The arguments of the TRL config `name` in trl/trainer/`file`."""
    found: dict[str, Argument] = {}
    for package, path, class_name in (*_COMMON, ("trl", f"trainer/{file}", name)):
        for node in _tree(package, path).body:
            if not (isinstance(node, ast.ClassDef) and node.name == class_name):
                continue
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    annotation = ast.unparse(item.annotation)
                    words = [word for part in annotation.split(" | ") for word in _enums().get(part, ())]
                    choices = tuple(words) or tuple(_named_choices(item.value))
                    found[item.target.id] = Argument(annotation, choices)
    return found


@cache
def accelerate_keys() -> frozenset[str]:
    """The keys of accelerate's configuration files, those of their sections among them."""
    config, launch = (_tree("accelerate", f"commands/{file}") for file in ("config/config_args.py", "launch.py"))
    fields = {ast.unparse(node.target) for node in ast.walk(config) if isinstance(node, ast.AnnAssign)}
    calls = (node for node in ast.walk(launch) if isinstance(node, ast.Call))
    return frozenset(fields | {text[2:] for call in calls for text in _texts(call.args) if text.startswith("--")})
