"""Write files and folders atomically, and report full or read-only disks."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from captioner.errors import WriteError


def user_path(text: str) -> Path:
    """Expand "~", which a shell leaves alone in ``--out=~/run``."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 -- Path raises for an unknown user


@contextlib.contextmanager
def reraise_os_errors(name: str | Path) -> Iterator[None]:
    """Raise ``OSError`` as ``WriteError``; the system's error often names no file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and start again" if full else "choose another place"
        raise WriteError(f"cannot write {name}: {reason}; {advice}") from error


@contextlib.contextmanager
def locked_dir(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for this process; ``WriteError`` if that fails."""
    lock = filelock.FileLock(folder / ".lock")
    with reraise_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise WriteError(
                f"another process is writing to {folder}: wait until it ends, or choose another"
            ) from error
    try:
        yield
    finally:
        lock.release()


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file in one step; ``WriteError`` if that fails."""
    part = path.with_name(f".{path.name[:50]}.part")  # a name has 255 bytes at most
    with reraise_os_errors(path):
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(folder: Path, name: str | Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` if the block succeeds.

    Args:
        folder: may exist; it is kept if the block or the writing fails.
        name: for error messages, by default the folder's path.

    Raises:
        WriteError: the folder cannot be written.
    """
    folder = folder.resolve()
    part, old = _beside(folder)
    with reraise_os_errors(name or folder):
        recover_dir(folder)
        part.mkdir(parents=True)
        try:
            yield part
            if folder.exists():
                folder.replace(old)  # a folder cannot be replaced in one step
            part.replace(folder)
        finally:
            recover_dir(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


def recover_dir(folder: Path) -> None:
    """Remove the leftovers of an interrupted write; restore the old folder if none exists."""
    part, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.replace(folder)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
