"""Files and folders that are replaced whole or not at all, and what to say where a disk is full."""

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
    """Return the path with "~" replaced, as a shell does not for ``--out=~/run``."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 -- Path raises for an unknown user


@contextlib.contextmanager
def reraise_os_errors(what: str | Path) -> Iterator[None]:
    """Raise ``WriteError`` where the disk refuses; the system's own error names no file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room and start again" if full else "choose another place"
        raise WriteError(f"cannot write {what}: {reason}; {way_out}") from error


@contextlib.contextmanager
def locked_dir(folder: Path) -> Iterator[None]:
    """Make a folder and write into it alone; ``WriteError`` where it cannot be had."""
    lock = filelock.FileLock(folder / ".lock")
    with reraise_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise WriteError(
                f"another process is writing into {folder}: wait for its end, or choose another"
            ) from error
    try:
        yield
    finally:
        lock.release()


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file in one step; ``WriteError`` where that fails."""
    part = path.with_name(f".{path.name[:50]}.part")  # a name has 255 bytes at most
    with reraise_os_errors(path):
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(folder: Path, what: str | Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` when the block ends well.

    Raises:
        WriteError: it cannot be written; the one that was there stays.
    """
    folder = folder.resolve()
    part, old = _beside(folder)
    with reraise_os_errors(what or folder):
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
    """Clear away what a broken-off write left, and bring the old folder back if none stands."""
    part, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.replace(folder)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
