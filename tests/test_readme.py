"""The README is true: its commands and examples run, its tree and versions are the real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import app
import train
from captioner.__main__ import main
from captioner.arguments import build_parser as captioner_parser

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:7860"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
PARTS = [
    words
    for command in COMMANDS
    for part in command.split("&&")
    if (words := shlex.split(part, comments=True))
]
LAYOUT_COMMANDS = [
    shlex.split(command)
    for command in re.findall(r"^\|.*\| `(python train\.py .*)` \|$", README, flags=re.MULTILINE)
]
CAPTION_COMMANDS = [
    words[words.index("captioner") + 1 :]
    for words in PARTS
    if "captioner" in words and words[0] in ("python", "captioner") and "--data" not in words
    if words[words.index("captioner") + 1] in ("caption", "score")
]


def _check_installation(arguments: list[str]) -> None:
    """Check the files and the extras that ``pip install`` names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "-r":
            assert (ROOT / value).is_file()
        if match := re.fullmatch(r"\.\[(.+)\]", option):
            assert set(match[1].split(",")) <= extras.keys()


def _check_command(words: list[str], page_help: str) -> None:
    """Check that the command exists and takes these arguments."""
    match words:
        case ["pip", "install", *rest] | ["uv", "pip", "install", *rest]:
            _check_installation(rest)
        case ["python", "app.py", *rest]:
            for option in rest:
                assert not option.startswith("--") or f" {option} " in page_help
        case ["python", "train.py", *rest]:
            train.build_parser().parse_args(rest)
        case ["torchrun", "--nproc-per-node", _, "train.py", *rest]:
            train.build_parser().parse_args(rest)
        case ["python", "-m", "captioner", *rest] | ["captioner", *rest]:
            captioner_parser().parse_args(rest)
        case ["python", "-m", "pytest", *rest]:
            assert all((ROOT / path).exists() for path in rest if path.startswith("tests"))
        case ["hf" | "tensorboard" | "docker" | "pre-commit", *_]:
            pass  # needs the Hub, an engine or a browser
        case [script] if (ROOT / script).is_file():
            pass
        case _:
            pytest.fail(f"no test knows this command of the README: {shlex.join(words)}")


@pytest.fixture
def photo_folder(
    tmp_path: Path, example_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working folder, with the photos that the README's commands name."""
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/photo.jpg"):
        shutil.copy(example_photos[0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_has_the_commands_to_try_and_to_test() -> None:
    assert "pip install -r requirements.txt && python app.py" in COMMANDS
    assert "pip install -r tests/requirements.txt && python -m pytest" in COMMANDS


def test_command_arguments_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--help"])
    page_help = capsys.readouterr().out
    assert len(LAYOUT_COMMANDS) > 10
    for words in (*PARTS, *LAYOUT_COMMANDS):
        _check_command(words, page_help)


def test_caption_commands_run(photo_folder: Path) -> None:
    assert len(CAPTION_COMMANDS) > 5
    for arguments in CAPTION_COMMANDS:
        assert main(arguments) == 0, arguments
    assert len(list(photo_folder.iterdir())) > 3  # a table and two folders of maps


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["-m", "captioner", *CAPTION_COMMANDS[0]], [str(ROOT / "app.py"), "--help"]]
)
def test_command_runs_in_a_process_without_environment(
    photo_folder: Path, command: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=photo_folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python_examples_run(photo_folder: Path, served_page: str) -> None:
    assert photo_folder == Path.cwd()
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    names: dict[str, Any] = {}  # later examples use those of earlier ones
    for example in examples:
        code = example.replace(ADDRESS, served_page.rstrip("/"))
        exec(compile(code, "README.md", "exec"), names)


def test_tree_names_every_module() -> None:
    tree = next(block for language, block in BLOCKS if language == "text")
    named, folders = set[str](), list[tuple[int, str]]()
    for line in tree.splitlines():
        if not (match := re.match(r"( *)([\w./-]+)(?:  |$)", line)):
            continue
        indent, name = len(match[1]), match[2]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        elif name.endswith(".py"):
            named.add(path)
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "captioner").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "captioner"
    }
    assert named == modules | {"app.py", "train.py"}


def test_space_has_the_pinned_gradio() -> None:
    version = re.search(r'^sdk_version: "(.+)"$', README, flags=re.MULTILINE)
    pin = re.search(r"^gradio==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert version
    assert pin
    assert version[1] == pin[1]


def test_pictures_and_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_figures_of_tables_are_in_results() -> None:
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if line.startswith("|")]
    figures = set(re.findall(r"\d+\.\d+", "".join(rows)))
    assert figures
    assert figures <= set(re.findall(r"\d+\.\d+", results))
