"""The floors of the house: lower ones never import higher ones, and heavy packages live behind their walls."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "autoprune"

LEVELS: dict[str, int] = {
    "errors": 0,
    "memory": 0,
    "core": 1,
    "progress": 2,
    "problems": 2,
    "yamls": 2,
    "plugins": 2,
    "definite": 2,
    "nest": 2,
    "rebuilding": 2,
    "demo": 2,
    "files": 3,
    "base": 3,  # the bases of plug-ins
    "source": 3,
    "sources": 3,
    "spaces": 4,
    "sections": 4,
    "config": 4,
    "data": 4,
    "windows": 4,
    "model": 4,
    "methods": 4,
    "runtimes": 4,
    "evaluators": 4,
    "exporters": 4,
    "packing": 4,
    "sparsity": 5,
    "bank": 5,
    "profile": 5,
    "loading": 5,
    "testing": 5,
    "searching": 6,
    "recover": 6,
    "verify": 6,
    "report": 6,
    "goal": 6,
    "subject": 6,
    "run_folder": 4,
    "engines": 4,
    "run": 7,
    "storage": 7,
    "costing": 7,
    "coverage": 7,
    "workbench": 7,
    "contender": 7,
    "rivals": 7,
    "pursue": 7,
    "aim": 7,
    "recovery": 7,
    "evidence": 7,
    "apply": 7,
    "banking": 7,
    "side_file": 7,
    "resolved": 7,
    "transfer": 7,
    "importers": 4,
    "importing": 7,
    "mapping": 7,
    "merging": 7,
    "replay": 6,
    "exporting": 7,
    "origin": 6,
    "ship": 7,
    "asked": 8,
    "policies": 8,
    "api": 8,
    "display": 8,
    "flags": 8,
    "init": 8,
    "commands": 8,
    "cli": 9,
}
DOORS = {
    "autoprune/__init__.py",
    "autoprune/commands/app.py",
    "autoprune/plugins.py",
    "autoprune/sources/opened.py",
    "autoprune/sources/refusal.py",
}
"""Files that may import by name at run time."""


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> str:
    """The floor's name: the part below `autoprune`; a plug-in's base is a floor of its own."""
    parts = module.split(".")
    if len(parts) < 2:
        return ""
    return "base" if parts[-1] == "base" else parts[1]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, typing_only: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """All modules that a file imports, with where; those for the type checker alone are left out."""
    tree = parsed(path)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_only
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT.parent / whole.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT.parent / whole.replace(".", "/") / "__init__.py").exists()
                yield (whole if is_module or is_package else str(node.module)), node


def own(path: Path) -> Iterator[str]:
    return (name for name, _ in imports(path) if name.split(".")[0] == "autoprune")


@functools.cache
def foreign(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(path)} - {"autoprune"}


def importers(package: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in files() if package in foreign(path)]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_goes_up_or_sideways(path: Path) -> None:
    here = floor_of(module_of(path))
    if here in ("", "__main__"):
        return
    assert here in LEVELS, f"{path.name}: give this file a floor in this test"
    for name in own(path):
        there = floor_of(name)
        if there in ("", here):
            continue
        assert there in LEVELS, f"{name}: give this module a floor in this test"
        blind = LEVELS[here] == LEVELS[there] == 4 and there not in ("config", "sections")
        assert LEVELS[there] <= LEVELS[here], f"{path.relative_to(ROOT)} imports {name}, a floor above"
        assert not blind, f"{path.relative_to(ROOT)} imports {name}; these are blind to each other"


def test_core_is_standard_library_and_pydantic() -> None:
    for path in [*(ROOT / "core").glob("*.py"), ROOT / "errors.py", ROOT / "progress.py"]:
        assert foreign(path) <= {*sys.stdlib_module_names, "pydantic", "pydantic_core"}, path


def test_configuration_is_for_the_top_and_for_loading() -> None:
    users = {module_of(path) for path in files() if "autoprune.config" in set(own(path))}
    commands = {f"autoprune.commands.{name}" for name in ("app", "policies", "searching")}
    assert users <= {
        "autoprune.api",
        "autoprune.asked",
        "autoprune.policies",
        "autoprune.loading",
        "autoprune.init",
        *commands,
    }


def test_sources_run_without_the_rest() -> None:
    for path in (ROOT / "sources").glob("*.py"):
        assert all(name.startswith("autoprune.sources") for name in own(path)), f"{path}: is copied beside rebuild.py"


def test_heavy_packages_live_behind_their_walls() -> None:
    assert all(name.startswith("engines/ray/") for name in importers("ray"))
    assert importers("cloudpickle") == ["engines/freight.py"]
    assert set(importers("rich")) <= {"display.py", "report/text.py"}
    assert all(name.startswith("searching/") or name == "api.py" for name in importers("optuna"))
    assert all(name.startswith("runtimes/") for name in importers("onnxruntime"))


def test_imports_stand_at_the_top() -> None:
    for path in files():
        tree = parsed(path)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = [
            f"{path.relative_to(ROOT)}:{inner.lineno}"
            for function in functions
            for inner in ast.walk(function)
            if isinstance(inner, ast.Import | ast.ImportFrom)
        ]
        assert inside == []


def test_modules_by_name_only_at_named_doors() -> None:
    allowed = {*DOORS, "autoprune/loading.py"}
    found = {
        path.relative_to(ROOT.parent).as_posix()
        for path in files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
    }
    assert found <= allowed
