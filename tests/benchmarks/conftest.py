"""Ratios against a reference in the same process, so that a busy machine slows both.

``python -m pytest tests/benchmarks -m benchmark`` prints them and writes BENCHMARKS, a JSON file;
RESULTS.md has the table that was written from one.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner import Captioner
from captioner import web as viewer
from captioner.images import open_photo

BENCHMARKS = Path("runs/benchmarks.json")


class Ratios:
    """The figures of a run of the benchmarks, by name."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, ratio: float, aim: str, **facts: Any) -> None:
        """Keep and print a row."""
        self.rows[name] = {"ratio": ratio, "aim": aim, **facts}
        rest = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
        )
        print(f"\n{name}: {ratio:.2f} (aim {aim}); {rest}")

    def time(
        self,
        name: str,
        do: Callable[[], object],
        reference: Callable[[], object],
        *,
        aim: str,
        times: int = 15,
        inverse: bool = False,
        **facts: Any,
    ) -> None:
        """Time the two in turns, after a warm-up of each.

        The ratio is the median over the turns of ``do`` / ``reference``, or with ``inverse`` the
        other way round; ``ratio_from`` and ``ratio_to`` are its quartiles.
        """
        pairs = []
        for turn in range(times + 1):
            pair = []
            for each in (do, reference):
                started = time.perf_counter()
                each()
                pair.append(time.perf_counter() - started)
            if turn:
                pairs.append(pair)
        ratios = [b / a if inverse else a / b for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        self.add(
            name,
            middle,
            aim,
            ratio_from=low,
            ratio_to=high,
            milliseconds=1000 * statistics.median(a for a, _ in pairs),
            reference_milliseconds=1000 * statistics.median(b for _, b in pairs),
            **facts,
        )


@pytest.fixture(scope="session")
def ratios() -> Iterator[Ratios]:
    found = Ratios()
    yield found
    BENCHMARKS.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(BENCHMARKS.read_text()) if BENCHMARKS.exists() else {"rows": {}}
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "gradio", "transformers")
    machine = {
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{each.name: each.version for each in distributions() if each.name in packages},
    }
    # Of a run of some benchmarks the others stay.
    record = {"machine": machine, "rows": kept["rows"] | found.rows}
    BENCHMARKS.write_text(json.dumps(record, indent=1))
    print(f"\nwritten: {BENCHMARKS.resolve()}")


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    return Captioner.load()


def make_photos() -> list[bytes]:
    """Return 64 JPEGs of 500 x 375 pixels, as in Flickr8k: the examples, in parts."""
    made = []
    random = np.random.default_rng(0)
    for number in range(64):
        examples = [each.path for each in viewer.example_photos().values()]
        photo = open_photo(examples[number % len(examples)])
        left, top = (random.uniform(0, 0.3) * side for side in photo.size)
        width, height = (random.uniform(0.6, 0.7) * side for side in photo.size)
        part = photo.crop((int(left), int(top), int(left + width), int(top + height)))
        file = io.BytesIO()
        part.resize((500, 375)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """The photos of ``make_photos``."""
    return make_photos()
