"""The public names, and what importing them costs."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import captioner
from captioner import errors
from captioner.__main__ import _COMMANDS, main

ROOT = Path(captioner.__file__).resolve().parent.parent


def test_public_names_exist_and_are_documented() -> None:
    for name in captioner.__all__:
        public = getattr(captioner, name)
        assert public.__name__ == name
        assert public.__module__.startswith("captioner.")
        assert public.__doc__


def test_public_names_are_sorted_and_unique() -> None:
    assert list(captioner.__all__) == sorted(set(captioner.__all__))
    assert {"Captioner", "Caption", "DecodingOptions", "CaptionerError"} <= set(captioner.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(captioner, "Captionist")
    with pytest.raises(AttributeError, match="'captioner' has no attribute 'Captionist'"):
        captioner.Captionist  # noqa: B018


def test_errors_are_public_captioner_errors() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}

    assert kinds == {name for name in captioner.__all__ if name.endswith("Error")}
    for name in kinds:
        assert issubclass(getattr(captioner, name), captioner.CaptionerError)


def test_kinds_of_errors_do_not_catch_each_other() -> None:
    kinds = [getattr(captioner, name) for name in captioner.__all__ if name.endswith("Error")]
    children = [kind for kind in kinds if kind is not captioner.CaptionerError]

    for one, other in itertools.permutations(children, 2):
        assert not issubclass(one, other)


def test_config_error_is_a_value_error() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert not issubclass(errors.ImageError, ValueError)


def loaded_by(statement: str, *modules: str) -> set[str]:
    """Return which of ``modules`` a fresh Python has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*({set(modules)!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


HEAVY = ("torch", "torchvision", "timm", "PIL", "datasets", "gensim", "gradio", "matplotlib")


@pytest.mark.parametrize(
    "statement",
    [
        "import captioner",
        "from captioner import CaptionerError, DecodingOptions, Vocabulary",
    ],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement, "captioner", *HEAVY) == {"captioner"}


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from captioner import *", names)

    assert set(captioner.__all__) <= set(names)


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_missing(*_: object) -> int:
        raise ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu.metrics")

    monkeypatch.setitem(_COMMANDS, "evaluate", import_missing)

    assert main(["evaluate"]) == 1

    assert "sacrebleu is not installed" in (message := capsys.readouterr().err)
    assert ".[train]" in message


def test_extras_hold_every_pinned_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [*project["dependencies"], *extras["page"], *extras["train"]]
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)

    assert {re.split(r"[<>=]", name)[0] for name in installed} == set(pins)
    for package, extra in errors._EXTRAS.items():
        distribution = {"skimage": "scikit-image"}.get(package, package)
        assert any(name.startswith(distribution) for name in extras[extra])
