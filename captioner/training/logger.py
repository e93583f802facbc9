"""The record of a training run: run.json, metrics.csv, TensorBoard and curves.png."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import math
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from captioner.config import TrainConfig
from captioner.files import atomic_write, reraise_os_errors

RECORD = "run.json"

_PANELS = {
    "Cross-entropy, nats per token": ("train_loss", "val_loss"),
    "Validation scores x 100": ("CIDEr", "ROUGE-L", "BLEU-4"),
    "Learning rate": ("learning_rate",),
    "Reward: mean CIDEr-D of samples": ("reward",),
    "Word detectors: loss per photo": ("detector_loss", "val_detector_loss"),
}
# The lines of single sources, in the color of their mean.
_SOURCE_STYLES = ("--", ":", "-.")


class MetricsLogger:
    """Writes each row immediately, so that a killed run leaves its metrics.

    Both methods raise ``WriteError`` if the disk is full.
    """

    def __init__(self, folder: Path, rows: list[dict[str, float]]) -> None:
        """Log to ``folder``, continuing after the ``rows`` of an earlier part of the run."""
        self.rows = list(rows)
        self._folder = folder
        self._events = folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"
        with reraise_os_errors(self._events):
            self._events.parent.mkdir(exist_ok=True)
        self._write_event(file_version="brain.Event:2")
        # Discards later epochs, which a killed run has logged but not saved.
        self._write_event(session_log=SessionLog(status=SessionLog.START), step=len(rows) + 1)

    def add(self, row: dict[str, float]) -> None:
        """Log one epoch; ``row["epoch"]`` counts from 1."""
        self.rows.append(row)
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "epoch"
        ]
        self._write_event(summary=Summary(value=values), step=int(row["epoch"]))
        table = io.StringIO(newline="")
        # Stages have different metrics; missing ones stay empty.
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(table, fieldnames=names)
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self._folder / "metrics.csv", table.getvalue().encode())
        image = io.BytesIO()
        curves(self.rows).savefig(image, dpi=120)
        atomic_write(self._folder / "curves.png", image.getvalue())

    def _write_event(self, **event: Any) -> None:
        """Append to TensorBoard's file; errors in its own writer's thread would go unnoticed."""
        record = Event(wall_time=time.time(), **event).SerializeToString()
        with reraise_os_errors(self._events), self._events.open("ab") as file:
            RecordWriter(file).write(record)


def curves(rows: list[dict[str, float]]) -> Figure:
    """Plot losses, scores, learning rate and, if there is one, the reward over the epochs."""
    metrics = dict.fromkeys(name for row in rows for name in row)
    panels = {
        title: names for title, names in _PANELS.items() if any(name in metrics for name in names)
    }
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, name in enumerate(names):
            # The metric's name alone is the mean; with a source's name behind it, that source's.
            sources = [metric for metric in metrics if metric.startswith(f"{name} ")]
            for metric, style in [(name, "-"), *zip(sources, itertools.cycle(_SOURCE_STYLES))]:
                values = [row.get(metric, math.nan) for row in rows]
                label = metric.replace(name, name.replace("_", " "), 1)
                axes.plot(
                    epochs, values, style, color=f"C{number}", marker="o", markersize=3, label=label
                )
        axes.set(title=title, xlabel="Epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    return figure


@functools.cache  # a run keeps the code that it started with
def _git_commit() -> str | None:
    """Return the commit of the code, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_record(
    folder: Path,
    config: TrainConfig,
    rows: Sequence[dict[str, float]],
    processes: int,
    precision: str,
) -> None:
    """Write run.json: settings, versions, commit and each epoch's metrics."""
    packages = ("torch", "torchvision", "timm", "datasets", "gensim", "numpy", "sacrebleu")
    record = {
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "git_commit": _git_commit(),
        "processes": processes,
        "precision": precision,
        "epochs": list(rows),
    }
    atomic_write(folder / RECORD, json.dumps(record, indent=1).encode())
