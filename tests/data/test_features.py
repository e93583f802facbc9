"""The feature cache: its contents, its key, and resumption after a kill."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captioner.data import features as features_module
from captioner.data.features import cache_features
from captioner.data.sources import CaptionedPhotos, load_captions
from captioner.errors import DataError, WriteError
from captioner.model.encoder import Encoder

ROOT = Path(__file__).resolve().parents[2]
MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]
MakeEncoder = Callable[..., Encoder]


class Counter:
    """Counts the photos that an encoder processes."""

    def __init__(self, encoder: Encoder) -> None:
        self.photos = 0
        encoder.backbone.register_forward_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.photos += len(inputs[0])


def _expected(encoder: Encoder, photos: CaptionedPhotos, row: int) -> np.ndarray:
    """Return a photo's features straight from the encoder."""
    pixels = torch.from_numpy(encoder.transform(photos.photo(row)))
    return encoder(pixels[None])[0].half().numpy()


@pytest.fixture
def photos(parquet_folder: Path) -> CaptionedPhotos:
    return load_captions(str(parquet_folder), "train")


def test_features_equal_encoder_output(
    tmp_path: Path, photos: CaptionedPhotos, lite2: Encoder
) -> None:
    some = photos.select(range(5))
    features = cache_features(lite2, some, tmp_path)
    assert features.array.shape == (5, 49, 1504)
    assert features.array.dtype == np.float16
    assert features.readable == [0, 1, 2, 3, 4]
    for row in range(5):
        difference = np.abs(features.array[row] - _expected(lite2, some, row))
        assert difference.max() <= 0.01  # a batch is summed in another order than one photo
    assert np.abs(features.array[0] - features.array[1]).max() > 0.1


def test_cells_are_ordered_by_row_from_top_left(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, tiny_encoder: MakeEncoder
) -> None:
    # A red circle on the left of the middle row, seen by an encoder that counts missing green.
    folder = write_parquet(tmp_path / "data", {"train": [hub_row(0)]})
    encoder = tiny_encoder()
    weight = torch.zeros(8, 3, 32, 32)
    weight[:, 1] = -1.0
    encoder.backbone.weight = nn.Parameter(weight, requires_grad=False)
    features = cache_features(encoder, load_captions(str(folder)), tmp_path / "cache")
    heat = features.array[0, :, 0].reshape(7, 7)
    row, column = np.unravel_index(int(heat.argmax()), (7, 7))
    assert (int(row), int(column)) in {(3, 1), (2, 1), (3, 0), (4, 1)}


def test_array_is_memory_mapped_and_read_only(
    tmp_path: Path, photos: CaptionedPhotos, tiny_encoder: MakeEncoder
) -> None:
    features = cache_features(tiny_encoder(), photos, tmp_path)
    assert isinstance(features.array, np.memmap)
    assert not features.array.flags.writeable
    assert features.array.shape == (24, 49, 8)
    assert features.folder.parent == tmp_path


def test_second_call_extracts_nothing(
    tmp_path: Path, photos: CaptionedPhotos, tiny_encoder: MakeEncoder
) -> None:
    encoder = tiny_encoder()
    counter = Counter(encoder)
    first = cache_features(encoder, photos, tmp_path)
    assert counter.photos == 24
    second = cache_features(encoder, photos, tmp_path)
    assert counter.photos == 24
    assert second.folder == first.folder
    assert np.array_equal(second.array, first.array)
    # The same weights, loaded again.
    again = tiny_encoder()
    counter = Counter(again)
    assert np.array_equal(cache_features(again, photos, tmp_path).array, first.array)
    assert counter.photos == 0


def test_concurrent_calls_extract_once(
    tmp_path: Path, photos: CaptionedPhotos, tiny_encoder: MakeEncoder
) -> None:
    encoder = tiny_encoder()
    counter = Counter(encoder)
    threads = [
        threading.Thread(target=cache_features, args=(encoder, photos, tmp_path)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.photos == 24


def test_cache_key_covers_photos_encoder_view_and_preprocessing(
    tmp_path: Path,
    photos: CaptionedPhotos,
    hub_row: MakeRow,
    write_parquet: Write,
    tiny_encoder: MakeEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [hub_row(number) for number in range(24)]
    rows[3]["image"] = hub_row(40)["image"]
    one_other = load_captions(str(write_parquet(tmp_path / "data", {"train": rows})))
    order = [*range(22), 23, 22]
    runs: dict[str, tuple[Encoder, CaptionedPhotos, int]] = {
        "as it is": (tiny_encoder(), photos, 0),
        "one photo other": (tiny_encoder(), one_other, 0),
        "two photos swapped": (tiny_encoder(), photos.select(order), 0),
        "fewer photos": (tiny_encoder(), photos.select(range(23)), 0),
        "weights": (tiny_encoder(seed=1), photos, 0),
        "mean": (tiny_encoder(mean=0.4), photos, 0),
        "interpolation": (tiny_encoder(interpolation="bicubic"), photos, 0),
        "mirrored": (tiny_encoder(), photos, 1),
        "in part": (tiny_encoder(), photos, 2),
    }
    found = {
        name: cache_features(encoder, some, tmp_path / "cache", view=view)
        for name, (encoder, some, view) in runs.items()
    }
    folders = {features.folder for features in found.values()}
    assert len(folders) == len(runs)
    monkeypatch.setattr(features_module, "_PREPROCESSING_VERSION", 0)
    assert cache_features(tiny_encoder(), photos, tmp_path / "cache").folder not in folders
    for name, (encoder, some, view) in runs.items():
        if not view:
            difference = found[name].array[3] - _expected(encoder, some, 3)
            assert np.abs(difference).max() <= 0.01, name


def test_cache_key_ignores_captions(
    tmp_path: Path,
    photos: CaptionedPhotos,
    hub_row: MakeRow,
    write_parquet: Write,
    tiny_encoder: MakeEncoder,
) -> None:
    rows = [hub_row(number) | {"alt_text": ["something else"]} for number in range(24)]
    recaptioned = load_captions(str(write_parquet(tmp_path / "data", {"train": rows})))
    cache_features(tiny_encoder(), photos, tmp_path / "cache")
    encoder = tiny_encoder()
    counter = Counter(encoder)
    cache_features(encoder, recaptioned, tmp_path / "cache")
    assert counter.photos == 0


def test_mirrored_view_equals_features_of_mirrored_photo(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, tiny_encoder: MakeEncoder
) -> None:
    # Photo n + 8 is photo n mirrored: a shape on the right in place of the left.
    folder = write_parquet(
        tmp_path / "data", {"train": [hub_row(n) for n in range(8)], "test": [hub_row(8)]}
    )
    encoder = tiny_encoder()
    left = load_captions(str(folder), "train")
    plain = cache_features(encoder, left, tmp_path / "cache")
    mirrored = cache_features(encoder, left, tmp_path / "cache", view=1)
    for row in range(8):
        pixels = torch.from_numpy(encoder.transform(left.photo(row)))
        expected = encoder(pixels.flip(-1)[None])[0].half().numpy()
        assert np.abs(mirrored.array[row] - expected).max() <= 0.01
    assert np.abs(mirrored.array - plain.array).max() > 0.1
    # The shape moves from the left to the right.
    heat = np.abs(plain.array[0] - plain.array[0, 0]).sum(-1).reshape(7, 7)
    turned = np.abs(mirrored.array[0] - mirrored.array[0, 0]).sum(-1).reshape(7, 7)
    assert heat[:, :3].sum() > 3 * heat[:, 4:].sum()
    assert turned[:, 4:].sum() > 3 * turned[:, :3].sum()


def test_unreadable_photos_are_skipped_and_counted(
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    tiny_encoder: MakeEncoder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [hub_row(number) for number in range(7)]
    rows[0]["image"]["bytes"] = b"no photo"
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:60]
    photos = load_captions(str(write_parquet(tmp_path / "data", {"train": rows})))
    encoder = tiny_encoder()
    for _ in range(2):  # when it extracts, and when all is there
        features = cache_features(encoder, photos, tmp_path / "cache")
        assert features.readable == [1, 2, 3, 5, 6]
        assert len(features.array) == 7
        assert "skipped 2 unreadable photos" in caplog.text
        caplog.clear()
    for row in features.readable:
        assert np.abs(features.array[row] - _expected(encoder, photos, row)).max() <= 0.01


def test_no_readable_photo_raises_data_error(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, tiny_encoder: MakeEncoder
) -> None:
    rows = [hub_row(n) | {"image": {"bytes": b"none", "path": "x"}} for n in range(3)]
    photos = load_captions(str(write_parquet(tmp_path / "data", {"train": rows})))
    for _ in range(2):
        with pytest.raises(DataError, match="none of the 3 photos"):
            cache_features(tiny_encoder(), photos, tmp_path / "cache")


def test_full_disk_raises_before_extraction(
    tmp_path: Path,
    photos: CaptionedPhotos,
    tiny_encoder: MakeEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_encoder()
    counter = Counter(encoder)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        with pytest.raises(WriteError, match=r"24 photos need .* GB .*free.*--cache"):
            cache_features(encoder, photos, tmp_path)
        assert counter.photos == 0
        assert not list(tmp_path.rglob("*.npy"))
    # With space it resumes; a complete cache needs none.
    features = cache_features(encoder, photos, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert np.array_equal(cache_features(encoder, photos, tmp_path).array, features.array)
    assert counter.photos == 24


_KILLED = """
import os, signal, sys
import torch
from torch import nn
from pathlib import Path
from captioner.data.sources import load_captions
from captioner.model.encoder import Encoder
from captioner.model.encoder import Transform
from captioner.data.features import cache_features

class Deadly(nn.Conv2d):
    photos = 0
    def forward(self, images):
        Deadly.photos += len(images)
        if Deadly.photos > 800:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

torch.manual_seed(0)
transform = Transform(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
encoder = Encoder("tiny", Deadly(3, 8, 32, stride=32), transform)
cache_features(encoder, load_captions(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_extraction_resumes_to_the_same_bytes(
    tmp_path: Path,
    draw: Callable[..., bytes],
    write_parquet: Write,
    tiny_encoder: MakeEncoder,
) -> None:
    rows = []
    for number in range(1100):
        row = {"image": {"bytes": draw(number, (16, 12)), "path": ""}, "alt_text": ["a shape"]}
        rows.append(row)
    rows[5]["image"] = rows[700]["image"] = {"bytes": b"broken", "path": ""}
    folder = write_parquet(tmp_path / "data", {"train": rows})
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), str(tmp_path / "killed")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    encoder = tiny_encoder()
    counter = Counter(encoder)
    photos = load_captions(str(folder))
    resumed = cache_features(encoder, photos, tmp_path / "killed")
    assert len(list((tmp_path / "killed").iterdir())) == 1
    assert 0 < counter.photos < 800  # not from the start
    whole = cache_features(encoder, photos, tmp_path / "whole")
    assert resumed.readable == whole.readable
    assert set(range(1100)) - set(whole.readable) == {5, 700}
    left, right = (features.folder / "features.npy" for features in (resumed, whole))
    assert left.read_bytes() == right.read_bytes()
