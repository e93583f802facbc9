"""Kills a process, holds it or fills its disk just before it changes a file.

The program itself stays as it is: an audit hook observes what it does to files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault before the change number ``at`` to the files under ``folder``.

    "fill" fills the disk before a file is opened for writing. "kill" and "stop" also count renamed
    files and removed folders as changes.
    """

    kind: Literal["fill", "kill", "stop"]
    folder: Path
    at: int = 1


def fill(folder: Path) -> None:
    """Leave no room on the disk of ``folder``."""
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def inject(fault: Fault, record: Path) -> None:
    """Arrange the fault for this process; ``record`` is to hold the change that it precedes."""
    remaining, last = fault.at, ""
    events = {"open"} if fault.kind == "fill" else {"open", "os.rename", "os.rmdir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining, last
        if remaining == 0 or event not in events:
            return
        path, *details = arguments
        if event == "open" and not details[1] & (os.O_WRONLY | os.O_RDWR):
            return
        if isinstance(path, int) or fault.folder not in Path(os.fsdecode(path)).parents:
            return
        change = f"{event} {Path(os.fsdecode(path)).relative_to(fault.folder)}"
        if change == last:  # Python audits the opening of a file twice
            return
        last = change
        remaining -= 1
        if remaining == 0:
            record.write_text(change)
            if fault.kind == "fill":
                fill(fault.folder)
            else:
                os.kill(os.getpid(), _SIGNALS[fault.kind])

    sys.addaudithook(hook)
