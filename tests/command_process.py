"""Command lines for a forkserver, which imports this module once for all of its processes."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import train
from captioner import __main__ as captioner
from captioner.training.logger import curves
from tests.fault_injection import Fault, inject

for _name in (
    "captioner.inference.bulk",
    "captioner.inference.render",
    "captioner.training.word2vec",
    "sacrebleu",
    "timm",
):
    importlib.import_module(_name)
curves([{"epoch": 1, "val_loss": 1.0, "CIDEr": 1.0}]).savefig(io.BytesIO())  # finds the fonts

_PROGRAMS = {"train.py": train.main, "captioner": captioner.main}


def run(
    program: str, arguments: list[str], log: Path, fault: Fault | None, settings: dict[str, Any]
) -> None:
    """Run one command, its output in ``log``/out and ``log``/err, and exit with its code.

    Args:
        settings: values for constants of modules, by full name.
    """
    # Otherwise each semaphore of a killed process would be reported as leaked.
    multiprocessing.set_start_method("fork", force=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), number)
    for name, value in settings.items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    if fault is not None:
        inject(fault, log / "change")
    sys.exit(_PROGRAMS[program](arguments))
