"""Whole processes: start-up time, memory, and visitors served."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.benchmarks.conftest import Ratios
from tests.page import Page, captions, running_page, visits

pytestmark = pytest.mark.benchmark

ROOT = Path(__file__).resolve().parent.parent.parent


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_start_up(ratios: Ratios, photos: list[bytes], tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(photos[0])
    ratios.time(
        "process start to first caption / import torch, timm",
        lambda: _run("-m", "captioner", "caption", str(photo)),
        lambda: _run("-c", "import torch, timm"),
        aim="<= 2",
        times=5,
    )
    modules = _run(
        "-c",
        "import sys; from captioner.__main__ import main; "
        f"main(['caption', {str(photo)!r}]); print(*sys.modules, sep='\\n')",
    )
    assert {"gensim", "datasets", "gradio", "matplotlib"} & set(modules.split()) == set()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with running_page(tmp_path / "page") as page:
        yield page


def _anonymous() -> int:
    """Return this process's ``RssAnon``, in kB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1])


def test_visitors(ratios: Ratios, photos: list[bytes], page: Page) -> None:
    (expected,) = captions(page.address, photos[:1])
    visits(page.address, photos[:1], [expected], 3)
    rates: dict[int, float] = {}
    for visitors in (1, 10, 50):
        started = time.monotonic()
        outcome = visits(page.address, photos[:1] * visitors, [expected] * visitors, 20)
        rates[visitors] = len(outcome.seconds) / (time.monotonic() - started)
        ratios.add(
            f"photos a minute with {visitors} visitors / with one",
            rates[visitors] / rates[1],
            "-",
            photos_a_minute=round(60 * rates[visitors]),
            p50_seconds=float(np.percentile(outcome.seconds, 50)),
            p95_seconds=float(np.percentile(outcome.seconds, 95)),
            refused_as_busy=outcome.busy,
            seconds_from_start_to_page=page.ready,
        )


def test_memory_of_the_page(ratios: Ratios, photos: list[bytes], page: Page) -> None:
    expected = captions(page.address, photos[:5])
    memory, count = [], 0
    while count < 2000:
        count += len(visits(page.address, photos[:5], expected, 10).seconds)
        memory.append((count, page.anonymous()))
    first = next(kilobytes for count, kilobytes in memory if count >= 1000)
    ratios.add(
        "memory of the page after 2,000 photos / after 1,000",
        memory[-1][1] / first,
        "flat",
        megabytes=[(count, kilobytes // 1000) for count, kilobytes in memory],
    )


_EXTRACT = """
import json, sys
from pathlib import Path
import datasets, torch
from captioner.data.sources import load_captions
from captioner.model.encoder import load_encoder
from captioner.data.features import cache_features
folder, count = Path(sys.argv[1]), int(sys.argv[2])
encoder = load_encoder("efficientnet_lite2")
photos = load_captions(str(folder / "data"))
cache_features(encoder, photos.select(range(count)), folder / f"cache{count}")
print(Path("/proc/self/status").read_text())
"""

_TRAIN = """
import sys
from pathlib import Path
import numpy as np, torch
from tests.benchmarks.test_speed import captions_for
from captioner import TrainConfig
from captioner.data.dataset import CaptionDataset
from captioner.training.setup import Source, TrainingData
from captioner.training.state import TrainingState
from captioner.training.loop import train_one_epoch
from captioner.model.vocabulary import Vocabulary
folder, count = Path(sys.argv[1]), int(sys.argv[2])
path = folder / f"features{count}.npy"
array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, 49, 1504))
captions = captions_for(count)
vocabulary = Vocabulary.build([text for texts in captions for text in texts], 1)
dataset = CaptionDataset(array, range(count), captions, vocabulary, max_length=20)
config = TrainConfig.from_recipe("best", device="cpu", views=1)
source = Source(
    name="toy", num_photos=count, per_epoch=count, validation=dataset, references=captions
)
data = TrainingData(
    vocabulary=vocabulary, train=dataset, sources=[source], text=None, train_references=captions,
    embedding=None, classifier=None, encoder={"channels": 1504}, fingerprint=[],
    model={"vocabulary_size": len(vocabulary), "encoder_channels": 1504, "num_detectors": 0},
)
for stage in ("captions", "rewards"):
    state = TrainingState(config, data, folder)
    state.begin_stage(stage)
    class EnoughSteps(Exception): pass
    def stop():
        if state.step == 12:
            raise EnoughSteps
    try:
        train_one_epoch(state, stop)
    except EnoughSteps:
        pass
print(Path("/proc/self/status").read_text())
"""


@pytest.mark.parametrize(
    ("name", "code", "few"), [("extraction", _EXTRACT, 150), ("training", _TRAIN, 1000)]
)
def test_memory(
    ratios: Ratios, photos: list[bytes], tmp_path: Path, name: str, code: str, few: int
) -> None:
    rows = [{"image": {"bytes": each, "path": None}, "alt_text": ["a"]} for each in photos]
    kinds = datasets.Features({"image": datasets.Image(), "alt_text": [datasets.Value("string")]})
    table = datasets.Dataset.from_list(rows * 24, features=kinds)
    table.to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    memory = []
    for count in (few, 10 * few):
        lines = _run("-c", code, str(tmp_path), str(count)).splitlines()
        memory.append(int(next(line for line in lines if "RssAnon" in line).split()[1]))
    ratios.add(
        f"memory of {name}, {10 * few:,} photos / {few:,}",
        memory[1] / memory[0],
        "<= 1.05",
        megabytes=[kilobytes // 1000 for kilobytes in memory],
    )


def test_feature_cache(ratios: Ratios, tmp_path: Path) -> None:
    """Write and read the features of 100,000 photos, 14.7 GB, without any encoder."""
    count, shape = 100_000, (49, 1504)
    if shutil.disk_usage(tmp_path).free < 20_000_000_000:
        pytest.skip("needs 20 GB in pytest's temporary folder")
    some = np.random.default_rng(0).random((500, *shape), np.float32).astype(np.float16)
    path = tmp_path / "features.npy"
    started = time.perf_counter()
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, *shape))
    for at in range(0, count, len(some)):
        array[at : at + len(some)] = some
        array.flush()
    written = time.perf_counter() - started
    del array
    before = _anonymous()
    array = np.load(path, mmap_mode="r")
    order = np.random.default_rng(1).permutation(count)[:10_000]
    started = time.perf_counter()
    total = sum(float(np.array(array[row])[0, 0]) for row in order)
    read = time.perf_counter() - started
    assert np.isfinite(total)
    path.unlink()
    ratios.add(
        "100,000 photos' features: anonymous memory while reading / before",
        _anonymous() / before,
        "<= 1.05",
        gigabytes=count * 49 * 1504 * 2 / 1e9,
        photos_written_a_second=round(count / written),
        photos_read_a_second_in_random_order=round(len(order) / read),
    )
