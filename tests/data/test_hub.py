"""What is fetched of a data set on the Hub, counted by a stand-in of its HTTP API."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.data.hub import COMMIT, Hub

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
import json, os, sys, urllib.request
from captioner.data.columns import Columns
from captioner.data.sources import load_captions, stream_photos
from captioner.errors import DataError

def sent():
    with urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/sent") as answer:
        return json.load(answer)

results = []
for source, split, limit in json.loads(sys.argv[1]):
    try:
        if limit is None:
            photos = sum(1 for _ in stream_photos(source, split))
        else:
            found = load_captions(source, split, limit=limit)
            sizes = {found.photo(row).size for row in range(len(found))}
            assert len(sizes) == 1, sizes
            photos = len(found)
        results.append([photos, sent()])
    except DataError as error:
        results.append([str(error), sent()])
print("RESULTS", json.dumps(results))
"""


def _noise(number: int) -> bytes:
    """Return a photo of two megabytes, which no compression makes smaller."""
    pixels = np.random.default_rng(number).integers(0, 256, (820, 820, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def _parquet(numbers: range, split: Callable[[int], str] | None = None) -> bytes:
    """Return a file of Parquet with five photos per row group."""
    rows = [
        {
            "image": {"bytes": _noise(number), "path": f"{number}.bmp"},
            "caption": [f"a photo of noise number {number}", "noise of many colors"],
            **({} if split is None else {"split": split(number)}),
        }
        for number in numbers
    ]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=5)
    return file.getvalue()


_CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
  - {split: test, path: data/test-*}
- config_name: tiny
  data_files:
  - {split: train, path: tiny/*}
---
"""


@pytest.fixture(scope="module")
def hub() -> Hub:
    """Two data sets: one with a file per split, one with a column ``split`` in a single file."""
    files = {
        "README.md": _CARD,
        "data/train-00000-of-00002.parquet": _parquet(range(60)),
        "data/train-00001-of-00002.parquet": _parquet(range(60, 70)),
        "data/validation-00000-of-00001.parquet": _parquet(range(70, 75)),
        "data/test-00000-of-00001.parquet": _parquet(range(75, 80)),
        "tiny/a.parquet": _parquet(range(3)),
    }
    names = ["train"] * 50 + ["val"] * 5 + ["test"] * 5
    single = {"data/test-00000-of-00001.parquet": _parquet(range(60), lambda n: names[n])}
    photos = {f"train/{n}.bmp": _noise(n) for n in range(12)}
    lines = (json.dumps({"file_name": f"{n}.bmp", "text": f"a photo {n}"}) for n in range(12))
    photos["train/metadata.jsonl"] = "\n".join(lines).encode()
    return Hub({"some/flickr": files, "some/single": single, "some/photos": photos})


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., list[tuple[Any, dict[str, int]]]]:
    """``load((source, split, limit), …)``: number of photos, or the error, and bytes by file.

    A limit of None streams the photos as ``captioner caption --data`` does. The calls of a test
    share a cache.
    """

    def run(
        *loads: tuple[str, str, int | None], **variables: str
    ) -> list[tuple[Any, dict[str, int]]]:
        environment = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
        environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **variables}
        with hub.serve():
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, json.dumps(loads)],
                env={**environment, "HF_ENDPOINT": hub.endpoint},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        results = done.stdout.partition("RESULTS ")[2]
        return [(photos, sent) for photos, sent in json.loads(results)]

    return run


@pytest.mark.slow
def test_limit_and_split_fetch_only_what_is_needed(
    hub: Hub, load: Callable[..., list[tuple[Any, dict[str, int]]]]
) -> None:
    train, more, validation, test = (name for name in hub.files["some/flickr"] if "data/" in name)
    size = {name: len(data) for name, data in hub.files["some/flickr"].items()}
    assert size[train] > 100_000_000
    beginning, whole_test, again, of_validation, streamed, everything = load(
        ("some/flickr", "train", 4),
        ("some/flickr", "test", 0),
        ("some/flickr", "test", 0),
        ("some/flickr", "dev", 2),
        ("some/flickr", "test", None),
        ("some/flickr", "train", 0),
    )
    assert beginning[0] == 4
    assert beginning[1].keys() == {train}
    assert beginning[1][train] < size[train] / 2
    assert whole_test == (5, {test: size[test]})
    assert again == (5, {})
    assert of_validation[0] == 2
    assert of_validation[1].keys() <= {validation, train}  # the columns are those of the first
    assert of_validation[1].get(train, 0) < size[train] / 2
    assert streamed[0] == 5
    assert streamed[1].keys() <= {test, train}
    assert everything == (70, {train: size[train], more: size[more]})


@pytest.mark.slow
def test_split_column_skips_the_row_groups_of_other_splits(
    hub: Hub, load: Callable[..., list[tuple[Any, dict[str, int]]]]
) -> None:
    ((name, data),) = hub.files["some/single"].items()
    some, streamed = load(("some/single", "val", 3), ("some/single", "val", None))
    assert some[0] == 3
    assert some[1][name] < len(data) / 2
    assert streamed[0] == 5
    assert streamed[1][name] < len(data) / 2


@pytest.mark.slow
def test_addresses_revisions_and_configurations_are_understood(
    hub: Hub, load: Callable[..., list[tuple[Any, dict[str, int]]]]
) -> None:
    address = "https://huggingface.co/datasets/some/flickr"
    hub.revisions.clear()
    tiny, viewed, pinned, tree, file, photos, all_photos, missing, wrong = load(
        ("some/flickr:tiny", "train", 0),
        (f"{address}/viewer/tiny/train?row=2", "train", 0),
        ("some/flickr@v1:tiny", "train", 0),
        (f"{address}/tree/v2", "validation", 1),
        (f"{address}/blob/main/tiny/a.parquet", "train", 1),
        ("some/photos", "train", 2),
        ("some/photos", "train", 0),
        ("some/nothing", "train", 0),
        ("some/flickr:huge", "train", 0),
    )
    assert [each[0] for each in (tiny, viewed, pinned, tree, file)] == [3, 3, 3, 1, 1]
    assert {"v1", "v2"} < hub.revisions <= {"v1", "v2", "main", COMMIT}
    assert file[1].keys() == {"tiny/a.parquet"}
    assert photos[0] == 2
    assert sum(name.endswith(".bmp") for name in photos[1]) <= 3
    assert all_photos[0] == 12
    assert "no repository of this name" in missing[0]
    assert "choose a configuration, as in some/flickr:NAME, from default, tiny" in wrong[0]


@pytest.mark.slow
def test_splits_that_were_loaded_before_are_there_offline(
    load: Callable[..., list[tuple[Any, dict[str, int]]]],
) -> None:
    assert [each[0] for each in load(("some/flickr", "test", 0), ("some/flickr", "val", 0))] == [
        5,
        5,
    ]
    test, some, streamed, train, tiny, other = load(
        ("some/flickr", "test", 0),
        ("some/flickr", "validation", 3),
        ("some/flickr", "test", None),
        ("some/flickr", "train", 0),
        ("some/flickr:tiny", "train", 0),
        ("some/single", "train", 0),
        HF_HUB_OFFLINE="1",
    )
    assert [test, some, streamed] == [(5, {}), (3, {}), (5, {})]
    assert "no split 'train', only: test, validation" in train[0]
    for error, _ in (tiny, other):
        assert "cannot load some/" in error
        assert "internet connection" in error
