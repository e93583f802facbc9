"""Photos to grids, once a data set, kept on disk and memory-mapped.

The backbone is frozen, so every photo passes it once. Knows nothing of captions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from captioner.config import FEATURES_FOLDER
from captioner.data import CaptionedPhotos, PhotoDataset
from captioner.encoders import GRID, Encoder
from captioner.errors import DataError, EncoderError

log = logging.getLogger(__name__)

_STATE = "state.json"
_SAVE_EVERY = 512
_SPARE_BYTES = 200_000_000


@dataclasses.dataclass(frozen=True)
class Features:
    """A data set's cached features.

    Attributes:
        array: float16 (N, P, C), memory-mapped and read-only.
        readable: the rows whose photo could be opened, in order.
        folder: where they lie.
    """

    array: np.ndarray
    readable: list[int]
    folder: Path


def _write_state(path: Path, state: dict[str, object]) -> None:
    """Replace a small JSON file in one step."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(state))
    partial.replace(path)


def _home(encoder: Encoder, photos: CaptionedPhotos, folder: Path, view: int) -> Path:
    """Return the folder of a cache."""
    key = {"photos": photos.fingerprint, "encoder": encoder.spec(), "view": view}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = encoder.name.replace(":", "-").replace("/", "-")
    return folder / f"{name}-{photos.split}{f'-view{view}' if view else ''}-{digest}"


def count_missing(
    encoder: Encoder, photos: CaptionedPhotos, folder: Path = FEATURES_FOLDER, *, view: int = 0
) -> int:
    """Return how many photos ``cache_features`` would have to pass through the encoder."""
    try:
        state = json.loads((_home(encoder, photos, folder, view) / _STATE).read_text())
        return len(photos) - int(state["done"])
    except (OSError, ValueError, KeyError):
        return len(photos)


def cache_features(
    encoder: Encoder,
    photos: CaptionedPhotos,
    folder: Path = FEATURES_FOLDER,
    *,
    view: int = 0,
    device: str = "cpu",
    batch_size: int | None = None,
) -> Features:
    """Return the features of ``photos``, extracting only what is not on disk yet.

    The cache is keyed by the photos' contents and order, the encoder with its weights and
    transform, and ``view`` (see ``data.view_of``); a change of any makes a new one. A killed run
    goes on where it last saved, and a second process waits for the first.

    Raises:
        DataError: the disk is too small, or no photo can be opened.
        EncoderError: the features are too large for float16.
    """
    home = _home(encoder, photos, folder, view)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {home}: {error.strerror}; choose another --cache") from error
    shape = (len(photos), GRID * GRID, encoder.channels)
    # A few photos at a time stay in a CPU's cache.
    batch_size = batch_size or (4 if device == "cpu" else 32)
    with filelock.FileLock(home / ".lock"):
        unreadable = _extract(encoder, photos, home, shape, view, device, batch_size)
    if len(unreadable) == len(photos):
        raise DataError(f"none of the {len(photos)} photos of {photos.source} can be opened")
    if unreadable:
        log.warning("%s: skipped %d photos that cannot be opened", home.name, len(unreadable))
    array = np.load(home / "features.npy", mmap_mode="r")
    readable = np.setdiff1d(np.arange(len(photos)), unreadable).tolist()
    return Features(array, readable, home)


def _extract(
    encoder: Encoder,
    photos: CaptionedPhotos,
    home: Path,
    shape: tuple[int, int, int],
    view: int,
    device: str,
    batch_size: int,
) -> list[int]:
    """Fill ``features.npy`` from the last saved row on; return the unreadable rows."""
    array_path, state_path = home / "features.npy", home / _STATE
    done, unreadable = 0, []
    if state_path.is_file() and array_path.is_file():
        try:
            state = json.loads(state_path.read_text())
            if np.load(array_path, mmap_mode="r").shape == shape:
                done, unreadable = state["done"], state["unreadable"]
        except (ValueError, KeyError):
            log.warning("%s is damaged: extracting the features anew", home)
    if done == shape[0]:
        return unreadable
    if done == 0:
        needed = int(np.prod(shape)) * 2
        free = shutil.disk_usage(home).free
        if free < needed + _SPARE_BYTES:
            raise DataError(
                f"the features of {shape[0]} photos need {needed / 1e9:.1f} GB in {home} and only "
                f"{free / 1e9:.1f} GB are free: make room, or choose another --cache or a --limit"
            )
        np.lib.format.open_memmap(array_path, mode="w+", dtype=np.float16, shape=shape).flush()
    array = np.lib.format.open_memmap(array_path, mode="r+")
    loader = torch.utils.data.DataLoader(
        PhotoDataset(photos, encoder.transform, view=view, start=done),
        batch_size=batch_size,
        collate_fn=list,
    )
    encoder = encoder.to(device)
    label = f"features, {encoder.name}, {photos.split}{f', view {view}' if view else ''}"
    saved = done

    def save() -> None:
        # The rows must be on disk before the count says so.
        array.flush()
        _write_state(
            state_path, {"done": done, "unreadable": [row for row in unreadable if row < done]}
        )

    with tqdm(total=shape[0], initial=done, desc=label, unit="photo", smoothing=0.05) as bar:
        try:
            for batch in loader:
                readable = [(row, pixels) for row, pixels in batch if pixels is not None]
                unreadable += [row for row, pixels in batch if pixels is None]
                if readable:
                    grid = encoder(torch.stack([pixels for _, pixels in readable]).to(device))
                    cells = grid.flatten(2).transpose(1, 2).half().cpu()  # (B, P, C)
                    if not cells.isfinite().all():
                        raise EncoderError(
                            f"{encoder.name} gives values that float16 cannot hold: choose another"
                        )
                    array[[row for row, _ in readable]] = cells.numpy()
                done += len(batch)
                bar.update(len(batch))
                if done - saved >= _SAVE_EVERY:
                    save()
                    saved = done
        finally:
            save()  # also when it is stopped
    return unreadable
