"""Help for every command: the docstrings of the entry points, the options in conf/, and the comments above each key."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain import paths
from posttrain.cli import command
from posttrain.config.stages import STAGES, STEPS

COMMANDS = ("run", "pipeline", "pairs", "evaluate", "chat", "report", "export", "data", "recipes", "version")
MODULES = {"data": "prepare"}  # of posttrain/, where it is not called as the command is
EXIT_CODES = (
    "exit codes:\n  0 done; 2 configuration or data invalid; 1 failed while running;\n"
    "  130, 143 stopped by Ctrl-C or SIGTERM after writing a checkpoint"
)
SECTIONS = ("stage", "data", "model", "trainer")


def docstring(name: str) -> str:
    """What `posttrain <name>` does: the docstring of its module, or of its function in __main__.py; nothing is run."""
    module = paths.PACKAGE / f"{MODULES.get(name, name)}.py"
    if module.is_file():
        return ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    tree = ast.parse((paths.PACKAGE / "__main__.py").read_text(encoding="utf-8"))
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.get_docstring(function) or ""


def overview() -> str:
    """What `posttrain --help` prints."""
    rows = [f"  {name:<10}{docstring(name).splitlines()[0].rstrip('.')}" for name in COMMANDS]
    return "\n".join([docstring("__main__"), "", "commands:", *rows, "", EXIT_CODES])


def help_text(name: str, arguments: Sequence[str]) -> str:
    """What `posttrain <name> --help` prints; of run and pipeline also options, and of a named stage every key."""
    parts = [docstring(name)]
    if name in ("run", "pipeline"):
        line = command.parse(arguments)
        named = command.named_stages(line.overrides, STEPS if name == "pipeline" else STAGES)
        stages = [stage for stage in named if stage in STAGES]
        parts += [_choices(line.config_dir)] if not stages else [_keys(name, line, stage) for stage in stages]
    return "\n\n".join([*parts, EXIT_CODES])


def recipe_lines(config_dir: str | None) -> list[tuple[str, str]]:
    """Each recipe and its comment: what it is and needs; shipped ones first, then those of --config-dir."""
    folders = [paths.RECIPES, *([Path(config_dir) / "recipes"] if config_dir else [])]
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    return [(str(file.relative_to(folder).with_suffix("")), _description(file)) for folder, file in files]


def _description(file: Path) -> str:
    """The comment at the top of a yaml file, without Hydra's header and the command that runs it."""
    kept: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        kept.append(line.removeprefix("#").strip())
    return " ".join(line for line in kept if not line.startswith(("@package", "python -m", "posttrain ")))


def _choices(config_dir: str | None) -> str:
    """The groups with their options, and the recipes."""
    known = command.groups(config_dir)
    lines = ["groups and their options:"]
    lines += [f"  {name}={'|'.join(known[name])}" for name in SECTIONS if name in known]
    for name, text in recipe_lines(config_dir):
        lines += [f"  recipes={name}", *_wrapped(text, " " * 6)]
    return "\n".join(lines)


def _keys(name: str, line: command.Line, stage: str) -> str:
    """Every key of a stage with its value, and the comment above it in conf/."""
    words = [word for word in line.words if not word.startswith(("stage=", "stages="))] if name == "run" else []
    composed = command.compose_all([f"stage={stage}", *words], line.config_dir)
    choices = composed.hydra.runtime.choices
    lines = [f"keys of {stage} and their values:"]
    for section in SECTIONS:
        files = list(_chain(section, str(choices[section]), line.config_dir))
        notes = {key: text for file in files for key, text in _comments(file).items() if text}
        prefix = stage if (name, section) == ("pipeline", "stage") else section
        text = next(filter(None, map(_description, reversed(files))), "")
        lines += ["", *_wrapped(f"{section}={choices[section]}: {text}", "")]
        lines += _rows(prefix, composed[section], notes)
    top = DictConfig({str(key): composed[key] for key in composed if key not in ("hydra", *SECTIONS, "recipes")})
    return "\n".join([*lines, "", "the run:", *_rows("", top, _comments(paths.CONF / "config.yaml"))])


def _chain(group: str, option: str, config_dir: str | None) -> Iterator[Path]:
    """The files that make up an option, what it starts from first."""
    folders = [paths.CONF, *([Path(config_dir)] if config_dir else [])]
    file = next(path for folder in folders if (path := folder / group / f"{option}.yaml").is_file())
    content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    for start in content.get("defaults", []):
        if isinstance(start, str) and start != "_self_":
            yield from _chain(group, start, config_dir)
    yield file


def _comments(file: Path) -> dict[str, list[str]]:
    """Dotted key -> the comment lines right above it."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    path: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip().removeprefix("#").strip())
        elif not line.strip():
            above = []
        elif key := re.match(r"( *)([\w.-]+):", line):
            path[len(key[1]) // 2 :] = [key[2]]
            found[".".join(path)] = above if key[2] != "name" else []
            above = []
    return found


def _rows(prefix: str, node: DictConfig, notes: dict[str, list[str]]) -> Iterator[str]:
    """A line for each key with its value, its comment below it; a comment that begins with -- is a heading."""
    groups: set[str] = set()
    for key, value in _leaves(node):
        group = key.rpartition(".")[0]
        if group and group not in groups and notes.get(group):
            groups.add(group)
            yield from _wrapped(f"-- {prefix}.{group}: {' '.join(notes[group])}", "  ")
        note = notes.get(key, [])
        for heading in note:
            yield from _wrapped(heading, "  ") if heading.startswith("--") else ()
        yield f"  {prefix}{'.' if prefix else ''}{key}={value}"
        yield from _wrapped(" ".join(part for part in note if not part.startswith("--")), " " * 6)


def _wrapped(text: str, indent: str) -> list[str]:
    width = shutil.get_terminal_size().columns
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _leaves(node: DictConfig, path: str = "") -> Iterator[tuple[str, str]]:
    for key in map(str, node):
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and len(inner):
            yield from _leaves(inner, f"{path}{key}.")
        elif path + key != "name":
            yield path + key, _shown(inner)


def _shown(node: Any) -> str:
    """A value as it can be typed; an interpolation as it stands in conf/."""
    value = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if value == {}:
        return "{}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
