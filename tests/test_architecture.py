"""The house's rules that a reader relies on: imports go one way, files stay small, names say something."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

# Packages in the order in which one may import another: only those before it.
PACKAGES = ("", "config", "data", "metrics", "runs", "models", "rlhf", "stages", "planning", "cli", "commands")
# Modules at the top of the tree that packages import; all other modules there are commands, and import packages.
FOUNDATION = {
    "posttrain",
    "posttrain.values",
    "posttrain.errors",
    "posttrain.paths",
    "posttrain.console",
    "posttrain.devices",
}
# Its classes are modules and trainers themselves, so it is imported only when a run begins.
IMPORTED_LATE = {
    *(f"posttrain.rlhf.{name}" for name in ("critic", "online", "policy", "ppo", "grpo", "preflight", "vllm")),
    "posttrain.stages.trainers",
}
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


def package(module: str) -> str:
    """The package of a module; "" for what all of them may import, "commands" for what imports them."""
    parts = module.split(".")
    return (
        parts[1]
        if len(parts) > 2 or (module.count(".") == 1 and parts[1] in PACKAGES)
        else ("" if module in FOUNDATION else "commands")
    )


def test_every_package_has_a_place_and_says_what_it_is_for() -> None:
    assert {package(name) for name in modules()} == set(PACKAGES)
    for name in set(PACKAGES) - {"", "commands"}:
        [sentence] = ast.parse(modules()[f"posttrain.{name}"].read_text()).body
        assert isinstance(sentence, ast.Expr), name


@pytest.mark.parametrize("name", sorted(modules()))
def test_packages_import_only_those_before_them(name: str) -> None:
    for other in imports(modules()[name]) & set(modules()) - {"posttrain"}:
        if name != "posttrain":  # hands out pieces of every package
            assert PACKAGES.index(package(other)) <= PACKAGES.index(package(name)), f"{name} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    found = modules()
    graph = {name: imports(path) & set(found) - {name, "posttrain"} for name, path in found.items()}
    list(graphlib.TopologicalSorter(graph | {"posttrain": set()}).static_order())


@pytest.mark.parametrize("name", sorted(set(modules()) - IMPORTED_LATE))
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


def test_what_is_not_typed_does_not_grow() -> None:
    """`Any`, and `JsonObject` for what a file holds, wherever they annotate something; lower these where you can."""
    counts = {"Any": 0, "JsonObject": 0}
    for path in [*modules().values(), *(ROOT / "hydra_plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            quoted = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            for name in counts:
                counts[name] += isinstance(node, ast.Name) and node.id == name
                counts[name] += len(re.findall(rf"[\[ ,|]{name}\b", quoted)) if "\n" not in quoted else 0
    assert counts["Any"] <= 60, counts
    assert counts["JsonObject"] <= 100, counts
