"""The README tells the truth: its commands run, its tree is the tree, its pins are the pins."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from captioner import Captioner
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


def test_the_two_commands_are_there() -> None:
    assert "pip install -r requirements.txt && python app.py" in COMMANDS
    assert "pip install -r tests/requirements.txt && python -m pytest" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_shell_command_runs_or_its_arguments_parse(
    command: str, tmp_path: Path, example_photos: list[Path]
) -> None:
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        match words:
            case ["pip", "install", "-r", file]:
                assert (ROOT / file).is_file()
            case ["pip", "install", "."] | ["hf", "upload", *_]:
                pass  # tests/test_install.py installs it; the other needs the Hub
            case ["python", "app.py", *rest]:
                assert subprocess.run(
                    [sys.executable, ROOT / "app.py", *rest, "--help"], capture_output=True
                ).stdout.startswith(b"usage:")
            case ["python", "-m", "pytest", *_] | ["tensorboard", *_] | [".ci/run"]:
                pass
            case ["python", "train.py", *rest] | [
                "torchrun",
                "--nproc-per-node",
                _,
                "train.py",
                *rest,
            ]:
                train.build_parser().parse_args(rest)
            case ["python", "-m", "captioner", *rest] if "evaluate" in rest or "--data" in rest:
                captioner_parser().parse_args(rest)
            case ["python", "-m", "captioner", ("export" | "score") as verb, *rest]:
                captioner_parser().parse_args([verb, *rest])
            case ["python", "-m", "captioner", "caption", *rest] | ["captioner", "caption", *rest]:
                (tmp_path / "photos").mkdir()
                for name in ("photo.jpg", "photos/photo.jpg"):
                    (tmp_path / name).write_bytes(example_photos[0].read_bytes())
                done = subprocess.run(
                    [sys.executable, "-m", "captioner", "caption", *rest],
                    cwd=tmp_path,
                    env={"PYTHONPATH": str(ROOT), "PATH": ""},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
            case _:
                pytest.fail(f"the README holds a command that no test knows: {part}")


def test_the_python_examples_run(
    tmp_path: Path,
    example_photos: list[Path],
    served_page: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "photo.jpg").write_bytes(example_photos[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    for example in examples:
        code = example.replace(ADDRESS, served_page.rstrip("/"))
        exec(compile(code, "README.md", "exec"), {})


def test_the_curl_example_answers_with_the_caption(
    tmp_path: Path, example_photos: list[Path], served_page: str, captioner: Captioner
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl: apt-get install curl (Debian, Ubuntu) and run the tests again")
    (tmp_path / "photo.jpg").write_bytes(example_photos[0].read_bytes())
    (script,) = [block for language, block in BLOCKS if language == "sh"]
    done = subprocess.run(
        ["bash", "-c", script.replace(ADDRESS, served_page.rstrip("/"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    event, data = done.stdout.strip().splitlines()
    assert event == "event: complete"
    (caption,) = json.loads(data.removeprefix("data: "))
    assert caption == captioner.caption(example_photos[0]).to_dict()


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = next(block for language, block in BLOCKS if language == "text")
    named = set(re.findall(r"^\s*([\w./-]+\.py)\b", tree, flags=re.MULTILINE))
    there = {path.name for path in (ROOT / "captioner").glob("*.py")} | {"app.py", "train.py"}
    assert named == there


def test_the_space_takes_the_pinned_gradio() -> None:
    version = re.search(r'^sdk_version: "(.+)"$', README, flags=re.MULTILINE)
    pin = re.search(r"^gradio==(.+)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert version
    assert pin
    assert version[1] == pin[1]


def test_pictures_and_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
