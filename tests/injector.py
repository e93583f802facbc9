"""Runs a command line in a process of its own that dies, or whose disk runs full, midway.

Nothing of the command is replaced: an audit hook sees what it does to files, and strikes before
a change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

import train
from captioner import __main__ as captioner
from captioner.training.logger import curves

# Once, for all processes that are forked from this one.
for _name in (
    "captioner.inference.bulk",
    "captioner.training.word2vec",
    "captioner.inference.render",
    "sacrebleu",
    "timm",
):
    importlib.import_module(_name)
curves([{"epoch": 1, "val_loss": 1.0, "CIDEr": 1.0}]).savefig(io.BytesIO())

_PROGRAMS = {"train.py": train.main, "captioner": captioner.main}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens before the ``at``-th file under ``folder`` is written.

    "fill" fills the disk; "kill" kills the process and "stop" holds it, also before anything is
    renamed and before a folder is removed.
    """

    kind: Literal["fill", "kill", "stop"]
    folder: Path
    at: int = 1


def fill(folder: Path) -> None:
    """Leave no room on the disk of ``folder``."""
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _expect(fault: Fault, struck: Path) -> None:
    """Strike when it is time, and write into ``struck`` before which change."""
    left, last = fault.at, ""
    events = {"open"} if fault.kind == "fill" else {"open", "os.rename", "os.rmdir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left, last
        if left == 0 or event not in events:
            return
        path, *rest = arguments
        if event == "open" and not rest[1] & (os.O_WRONLY | os.O_RDWR):
            return
        if isinstance(path, int) or fault.folder not in Path(os.fsdecode(path)).parents:
            return
        change = f"{event} {Path(os.fsdecode(path)).relative_to(fault.folder)}"
        if change == last:  # Python tells of opening a file twice
            return
        last = change
        left -= 1
        if left == 0:
            struck.write_text(change)
            if fault.kind == "fill":
                fill(fault.folder)
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.kind])

    sys.addaudithook(hook)


def run(
    program: str, arguments: list[str], log: Path, fault: Fault | None, settings: dict[str, Any]
) -> None:
    """Run one command, its output in ``log``/out and ``log``/err, and exit as it exits.

    Args:
        settings: names of modules' constants, and their values here.
    """
    # Else each semaphore of a process that was killed is reported as leaked.
    multiprocessing.set_start_method("fork", force=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), number)
    for name, value in settings.items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    if fault is not None:
        _expect(fault, log / "struck")
    sys.exit(_PROGRAMS[program](arguments))
