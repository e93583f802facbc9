"""Files and folders are replaced whole or not at all, whatever happens to the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from captioner.errors import WriteError
from captioner.files import (
    atomic_dir,
    atomic_write,
    locked_dir,
    recover_dir,
    reraise_os_errors,
    user_path,
)
from tests.fault_injection import Fault, inject


def _replace_folder(folder: Path) -> None:
    with atomic_dir(folder) as partial:
        (partial / "one").write_text("new")
        (partial / "two").write_text("new")


def _kill_at_each_change(
    change: Callable[[], None], folder: Path, check: Callable[[], None]
) -> int:
    """Run ``change`` in processes that are killed before its first, second, … step.

    Check the files after each kill. Return the number of kills.
    """
    for at in range(1, 30):
        if (pid := os.fork()) == 0:
            inject(Fault("kill", folder, at), folder.parent / "change")
            change()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        check()
        if status == 0:
            return at - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
    pytest.fail("it changes files without end")


def test_killed_atomic_write_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.write_text("old")

    def check() -> None:
        assert file.read_text() in ("old", "new" * 100_000)

    change = lambda: atomic_write(file, b"new" * 100_000)  # noqa: E731
    assert _kill_at_each_change(change, file.parent, check) >= 2
    assert file.read_text().startswith("new")
    assert list(file.parent.iterdir()) == [file]


def test_killed_atomic_dir_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = home / "folder"
    folder.mkdir(parents=True)
    (folder / "one").write_text("old")

    def check() -> None:
        recover_dir(folder)
        contents = {path.name: path.read_text() for path in folder.iterdir()}
        assert contents in ({"one": "old"}, {"one": "new", "two": "new"})
        assert list(home.iterdir()) == [folder]

    assert _kill_at_each_change(lambda: _replace_folder(folder), home, check) >= 4
    assert (folder / "two").exists()


def test_atomic_dir_keeps_the_old_folder_until_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    _replace_folder(folder)
    with atomic_dir(folder):
        assert (folder / "one").read_text() == "new"
    assert list(folder.iterdir()) == []


def test_atomic_dir_keeps_the_old_folder_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    _replace_folder(folder)
    with pytest.raises(UnicodeEncodeError), atomic_dir(folder) as partial:
        (partial / "one").write_text("\ud800", encoding="utf-8")
    assert (folder / "one").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_locked_dir_refuses_a_second_writer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked_dir(folder):
        assert folder.is_dir()
        with pytest.raises(WriteError, match="another process is writing"), locked_dir(folder):
            pass
    with locked_dir(folder):
        pass


def test_write_error_names_the_file_the_reason_and_the_way_out(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match="cannot write x: No space left on device; make room"),
        reraise_os_errors("x"),
    ):
        Path("/dev/full").write_text("anything")
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "inside"
    message = "inside: Not a directory; choose another place"
    with pytest.raises(WriteError, match=message):
        atomic_write(inside, b"")
    with pytest.raises(WriteError, match=message):
        _replace_folder(inside)


def test_user_path_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/run") == Path("/home/somebody/run")
    assert user_path("~nobody-of-this-name/run") == Path("~nobody-of-this-name/run")
