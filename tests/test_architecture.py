"""Imports go one way: wings on a common ground, as the README draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import captioner

PACKAGE = Path(captioner.__file__).resolve().parent
ROOT = PACKAGE.parent

GROUND = {"config", "distributed", "environment", "errors", "files", "images", "options"}
# What each wing may use beside the ground and itself.
WINGS: dict[str, set[str]] = {
    "model": set(),
    "data": {"model"},
    "training": {"data", "model"},
    "inference": {"model"},
    "web": {"inference"},
}
# The command line brings both sides together, and the package exports public names.
ENTRANCES: dict[str, set[str]] = {
    "__init__": {"inference", "model"},
    "arguments": {"__init__"},
    "__main__": {"arguments", "data", "inference", "model", "training"},
}
SCRIPTS: dict[str, set[str]] = {"app.py": {"inference", "web"}, "train.py": {"training"}}
ALLOWED = {name: set[str]() for name in GROUND} | WINGS | ENTRANCES
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Return the wing, or the module of the ground, that a file of the package belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import of this package, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative, counted from the file's own folder
                folder = path.parents[node.level - 1].relative_to(ROOT)
                module = ".".join([*folder.parts, *filter(None, [module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "captioner":
                yield node.lineno, module


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and wing of each import; a public name stands for the wing it comes from."""
    for line, module in imported_modules(path):
        part = module.partition(".")[0]
        if part and part not in ALLOWED:
            value = getattr(captioner, part)
            part = value.__module__.split(".")[1] if hasattr(value, "__module__") else ""
        yield line, part or "__init__"


def forbidden_imports(path: Path, allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {part}"
        for line, part in imported_parts(path)
        if part not in allowed
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_wings_import_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"which wing does {part} belong to?"

    assert forbidden_imports(path, ALLOWED[part] | GROUND | {part}) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_one_way(name: str) -> None:
    assert forbidden_imports(ROOT / name, SCRIPTS[name] | GROUND) == []


def test_modules_have_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at import, not for types
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captioner."):
                module = str(node.module).removeprefix("captioner.")
                for alias in node.names:
                    inner = PACKAGE.joinpath(*module.split("."), f"{alias.name}.py")
                    graph[name].add(f"{module}.{alias.name}" if inner.exists() else module)

    # Raises CycleError on a cycle.
    assert set(TopologicalSorter(graph).static_order()) == set(graph)


def test_imports_are_found_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "captioner" / "web" / "sheet.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import captioner.data.sources as d, json\n"
        "from captioner import Captioner, __version__\n"
        "from captioner.model import checkpoint as c\n"
        "from ..model.decoder import CaptionModel\n"
        "def f():\n"
        "    from captioner.training.loop import fit\n"
        "    from .. import files\n",
        encoding="utf-8",
    )

    assert sorted(imported_parts(path)) == [
        (1, "data"),
        (2, "__init__"),
        (2, "inference"),
        (3, "model"),
        (4, "model"),
        (6, "training"),
        (7, "files"),
    ]


def test_captioning_loads_no_library_of_other_wings() -> None:
    code = (
        "import sys, captioner.inference.captioner\n"
        "print(*({'gensim', 'datasets', 'matplotlib', 'gradio', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch"]
