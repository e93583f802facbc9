"""Imports go one way: an arrow that design/architecture.md does not draw fails here.

``ARROWS`` is that drawing. A room may use what it points to, and what that stands on in turn;
``errors`` and ``config`` are open to all. A new room needs its arrows drawn here first.
"""

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

OPEN_TO_ALL = {"errors", "config"}

# The training side: one room in the drawing, several files.
_TRAINING = {"data", "features", "checkpoint", "embeddings", "decoding", "metrics"}

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "caches": set(),
    "isolation": set(),
    "files": set(),
    "config": {"errors"},
    "vocab": set(),
    "images": set(),
    "caption": set(),
    "model": set(),
    "packed": {"model"},
    "processes": set(),
    "decoding": set(),
    "encoders": {"images", "caches", "isolation"},
    "data": {"vocab", "images", "caches"},
    "features": {"encoders", "data", "processes", "files"},
    "checkpoint": {"model", "vocab", "files", "caches", "isolation"},
    "metrics": {"vocab"},
    "embeddings": {"vocab"},
    "overlay": {"caption"},
    "viewer": {"caption", "images", "overlay", "predictor"},
    "serving": {"files"},
    "predictor": {"checkpoint", "encoders", "decoding", "caption", "packed"},
    "bulk": {"predictor", "files"},
    "export": {"checkpoint", "files"},
    "logbook": {"files"},
    "preparation": _TRAINING,
    "evaluation": _TRAINING,
    "self_critical": {"model", "metrics", "vocab"},
    "run": {"preparation", "self_critical"},
    "training": _TRAINING | {"preparation", "evaluation", "logbook", "run"},
    # The names that are public, each loaded when it is used.
    "__init__": {"caches", "caption", "encoders", "predictor", "vocab"},
    # Captions and evaluates, so it is the one place that sees both sides.
    "__main__": {"__init__", "predictor", "overlay", "evaluation", "bulk", "export", "files"},
}

# Scripts hold layout and arguments only: for them the drawing is meant word by word.
SCRIPTS: dict[str, set[str]] = {
    "app.py": {"predictor", "viewer", "overlay", "serving"},
    "train.py": {"training", "files"},
}

SERVING_SIDE = {"predictor", "overlay", "viewer", "serving"}
TRAINING_SIDE = {
    "training",
    "preparation",
    "evaluation",
    "logbook",
    "run",
    "self_critical",
    "data",
    "features",
    "embeddings",
    "metrics",
}


def room_of(path: Path) -> str:
    """Return the name of the room that a file of the package belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and room of each import of this package, those inside functions included."""
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
            package, _, rest = name.partition(".")
            if package != "captioner":
                continue
            room = rest.partition(".")[0]
            if room and room not in ARROWS and not (PACKAGE / f"{room}.py").exists():
                # A public name stands for the room that it comes from.
                kind = getattr(captioner, room)
                room = "" if isinstance(kind, str) else kind.__module__.split(".")[1]
            yield node.lineno, room or "__init__"


def below(room: str) -> set[str]:
    """Return all that can be reached from ``room`` along the drawn arrows."""
    reached: set[str] = set()
    waiting = [*ARROWS[room], *OPEN_TO_ALL]
    while waiting:
        other = waiting.pop()
        if other not in reached:
            reached.add(other)
            waiting += ARROWS[other]
    return reached


def undrawn(path: Path, allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {room}"
        for line, room in imported_rooms(path)
        if room not in allowed
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_what_the_drawing_lets_it(path: Path) -> None:
    room = room_of(path)
    assert room in ARROWS, f"draw the arrows of {room} in ARROWS and in architecture.md"

    assert undrawn(path, below(room) | {room}) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_what_the_drawing_lets_it(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not written yet")

    assert undrawn(path, SCRIPTS[name] | OPEN_TO_ALL) == []


def test_the_drawing_goes_one_way() -> None:
    # Raises CycleError where an arrow comes back.
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(ARROWS)


def test_the_drawing_keeps_training_and_serving_apart() -> None:
    for room in SERVING_SIDE:
        assert below(room) & TRAINING_SIDE == set()
    for room in TRAINING_SIDE:
        assert below(room) & SERVING_SIDE == set()


def test_imports_are_seen_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser is worth nothing if it overlooks one."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "captioner" / "viewer" / "sheet.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import captioner.data as d, json\n"
        "from captioner import checkpoint as c, Captioner\n"
        "from ..model import CaptionModel\n"
        "def f():\n"
        "    from captioner.training import fit\n"
        "    from .. import features\n",
        encoding="utf-8",
    )

    assert sorted(imported_rooms(path)) == [
        (1, "data"),
        (2, "checkpoint"),
        (2, "predictor"),
        (3, "model"),
        (5, "training"),
        (6, "features"),
    ]


def test_the_path_from_photo_to_caption_loads_no_library_of_other_paths() -> None:
    code = (
        "import sys, captioner.predictor\n"
        "print(*({'gensim', 'datasets', 'matplotlib', 'gradio', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch"]
