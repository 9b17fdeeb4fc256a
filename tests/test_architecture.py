"""The house's rules that a reader relies on: imports go one way, files stay small, names say something."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module imports only from floors below its own.
FLOORS = {
    "posttrain": 99,  # hands out pieces of every floor
    "posttrain.paths": 0,
    "posttrain.errors": 0,
    "posttrain.schema": 0,
    "posttrain.trl_sources": 1,
    "posttrain.reserved": 0,
    "posttrain.config": 2,
    "posttrain.console": 1,
    "posttrain.launching": 3,
    "posttrain.checkpoint": 1,
    "posttrain.safe_trainer": 2,
    "posttrain.progress": 2,
    "posttrain.report_card": 1,
    "posttrain.sources": 2.5,
    "posttrain.data": 3,
    "posttrain.arguments": 2,
    "posttrain.lineage": 3,
    "posttrain.inputs": 4,
    "posttrain.trackers": 3,
    "posttrain.encoding": 4,
    "posttrain.model": 5,
    "posttrain.evaluation": 5,
    "posttrain.curves": 4,
    "posttrain.comparison": 2,
    "posttrain.rlhf": 0,
    "posttrain.rlhf.losses": 0,
    "posttrain.rlhf.schedule": 1,
    "posttrain.rlhf.alarms": 1,
    "posttrain.rlhf.rollout": 0,
    "posttrain.rlhf.value": 1,
    "posttrain.rlhf.rewards": 5,
    "posttrain.rlhf.roles": 6,
    "posttrain.rlhf.trainer": 6,
    "posttrain.rlhf.start": 7,
    "posttrain.stages.base": 6,
    "posttrain.stages.sft": 7,
    "posttrain.stages.reward": 7,
    "posttrain.stages.dpo": 8,
    "posttrain.stages.ppo": 9,
    "posttrain.stages": 10,
    "posttrain.saving": 11,
    "posttrain.preview": 11,
    "posttrain.memory": 12,
    "posttrain.cli": 0,
    "posttrain.cli.files": 2,
    "posttrain.cli.command": 6,
    "posttrain.cli.help": 7,
    "posttrain.cli.completion": 8,
    "posttrain.cli.entry": 9,
    "posttrain.next_steps": 10,
    "posttrain.sweep": 12,
    "posttrain.__main__": 99,
    "posttrain.train": 13,
    "posttrain.run": 14,
    "posttrain.evaluate": 15,
    "posttrain.chat": 15,
    "posttrain.export": 15,
    "posttrain.report": 15,
    "posttrain.pipeline": 16,
}
# Its classes are modules and trainers themselves, so it is imported only when a run begins.
IMPORTED_LATE = {"posttrain.rlhf.value", "posttrain.rlhf.trainer", "posttrain.rlhf.start"}
HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "bitsandbytes"}


def modules() -> dict[str, Path]:
    files = {path: path.relative_to(ROOT).with_suffix("") for path in (ROOT / "posttrain").rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for path, name in files.items()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; not those for type checking only."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_imports_go_down(name: str) -> None:
    for other in imports(modules()[name]) & set(FLOORS):
        if other != name and other != "posttrain":
            assert FLOORS[other] < FLOORS[name], (
                f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
            )


@pytest.mark.parametrize("name", sorted(set(FLOORS) - IMPORTED_LATE))
def test_nothing_heavy_is_imported_at_the_top(name: str) -> None:
    tree = ast.parse(modules()[name].read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") or "" for node in top}
    assert not {found.split(".")[0] for found in names} & HEAVY


def test_files_are_small_and_named() -> None:
    for path in modules().values():
        assert len(path.read_text().splitlines()) <= 500, path
        assert path.stem not in ("utils", "util", "misc", "helpers", "common"), path


def test_no_module_needs_what_windows_lacks() -> None:
    for name, path in modules().items():
        assert not {found.split(".")[0] for found in imports(path)} & {"fcntl", "grp", "pwd", "resource", "termios"}, (
            name
        )


def test_no_config_can_run_code() -> None:
    for path in modules().values():
        assert "instantiate" not in path.read_text(), path
