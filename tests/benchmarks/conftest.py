"""Ratios against a reference in the same process, so that a busy machine slows both.

``python -m pytest tests/benchmarks -m benchmark -s`` prints them and writes them to the JSON file
BENCHMARKS; the table in RESULTS.md was made from one.
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

from captioner.images import open_photo
from captioner.web import example_photos

BENCHMARKS = Path("runs/benchmarks.json")


class Ratios:
    """The figures of the benchmarks, by name."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, ratio: float, aim: str, **facts: Any) -> None:
        """Record and print a row."""
        self.rows[name] = {"ratio": ratio, "aim": aim, **facts}
        details = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
        )
        print(f"\n{name}: {ratio:.2f} (aim {aim}); {details}")

    def time(
        self,
        name: str,
        function: Callable[[], object],
        reference: Callable[[], object],
        *,
        aim: str,
        times: int = 15,
        inverse: bool = False,
        **facts: Any,
    ) -> None:
        """Time the two in turns, after a warm-up of each.

        The ratio is the median over the turns of ``function`` / ``reference``, or the reverse with
        ``inverse``; ``ratio_from`` and ``ratio_to`` are its quartiles.
        """
        pairs = []
        for turn in range(times + 1):
            pair = []
            for timed in (function, reference):
                started = time.perf_counter()
                timed()
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
    measured = Ratios()
    yield measured
    BENCHMARKS.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(BENCHMARKS.read_text()) if BENCHMARKS.exists() else {"rows": {}}
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "gradio", "transformers")
    machine = {
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{
            package.name: package.version for package in distributions() if package.name in packages
        },
    }
    # A run of some benchmarks keeps the rows of the others.
    record = {"machine": machine, "rows": earlier["rows"] | measured.rows}
    BENCHMARKS.write_text(json.dumps(record, indent=1))
    print(f"\nwritten: {BENCHMARKS.resolve()}")


def make_photos() -> list[bytes]:
    """Return 64 JPEGs of 500 x 375 pixels, as in Flickr8k: parts of the example photos."""
    photos = []
    random = np.random.default_rng(0)
    examples = [example.path for example in example_photos().values()]
    for number in range(64):
        photo = open_photo(examples[number % len(examples)])
        left, top = (random.uniform(0, 0.3) * side for side in photo.size)
        width, height = (random.uniform(0.6, 0.7) * side for side in photo.size)
        part = photo.crop((int(left), int(top), int(left + width), int(top + height)))
        file = io.BytesIO()
        part.resize((500, 375)).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """The photos of ``make_photos``."""
    return make_photos()
