"""The files of a training run, and their comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def figures(run: Path) -> list[dict[str, str]]:
    """Return metrics.csv without the times."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare the weights, figures and file names of two runs, bit by bit."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert figures(one) == figures(other)
    for name in ("checkpoint/model.safetensors", "state/state.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == [], name
    configs = [json.loads((run / "checkpoint/config.json").read_text()) for run in (one, other)]
    assert configs[0] == configs[1]
