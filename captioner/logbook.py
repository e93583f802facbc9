"""A training run's figures, an epoch a row: CSV, TensorBoard and curves.png."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

_PANELS = {
    "Cross-entropy, nats a word": ("train_loss", "val_loss"),
    "Validation scores x 100": ("CIDEr", "ROUGE-L", "BLEU-4"),
    "Learning rate": ("learning_rate",),
}


class Logbook:
    """Writes each row at once, so that a killed run leaves its figures."""

    def __init__(self, folder: Path, rows: list[dict[str, float]]) -> None:
        """Start in ``folder`` after the ``rows`` of an earlier part of the run."""
        self.rows = list(rows)
        self._folder = folder
        self._tensorboard = SummaryWriter(
            str(folder / "tensorboard"), purge_step=len(rows) + 1 if rows else None
        )

    def add(self, row: dict[str, float]) -> None:
        """Keep one epoch; ``row["epoch"]`` counts from 1."""
        self.rows.append(row)
        for name, value in row.items():
            if name != "epoch":
                self._tensorboard.add_scalar(name, value, int(row["epoch"]))
        self._tensorboard.flush()
        with (self._folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        curves(self.rows).savefig(self._folder / "curves.png", dpi=120)

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self._tensorboard.close()


def curves(rows: list[dict[str, float]]) -> Figure:
    """Draw losses, scores and learning rate over the epochs."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, (title, names) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        for name in names:
            label = name.replace("_", " ")
            axes.plot(epochs, [row[name] for row in rows], marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="Epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False)
    return figure
