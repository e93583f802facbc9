"""The encoder's cells of each photo, extracted once and memory-mapped from disk.

The backbone is frozen, so every photo needs to pass through it only once. Knows nothing of
captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from captioner.config import FEATURES_FOLDER
from captioner.data.dataset import PhotoDataset
from captioner.data.sources import CaptionedPhotos
from captioner.distributed import DistributedContext
from captioner.errors import DataError, EncoderError, WriteError
from captioner.files import reraise_os_errors
from captioner.model.encoder import GRID, Encoder

log = logging.getLogger(__name__)

# Part of the cache key. Raise it when the same file gives the encoder other pixels.
# 2: photos with an ICC profile are converted to sRGB.
_PREPROCESSING_VERSION = 2
_ARRAY, _STATUS = "features.npy", "done.npy"
# The values of the status array.
_MISSING, _READ, _UNREADABLE = range(3)
_SAVE_EVERY = 512


@dataclasses.dataclass(frozen=True)
class Features:
    """A data set's cached features.

    Attributes:
        array: float16 (N, P, C), memory-mapped and read-only.
        readable: the rows of the readable photos, in order.
        folder: of the cache.
    """

    array: np.ndarray
    readable: list[int]
    folder: Path


def _cache_folder(encoder: Encoder, photos: CaptionedPhotos, parent: Path, view: int) -> Path:
    """Return the folder for these features, named after everything they depend on."""
    key = {
        "preprocessing": _PREPROCESSING_VERSION,
        "photos": photos.fingerprint,
        "encoder": encoder.spec(),
        "view": view,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = encoder.name.replace(":", "-").replace("/", "-")
    return parent / f"{name}-{photos.split}{f'-view{view}' if view else ''}-{digest}"


def _load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Map an array into memory, read-only; None if there is no array of this shape."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def cache_features(
    encoder: Encoder,
    photos: CaptionedPhotos,
    folder: Path = FEATURES_FOLDER,
    *,
    view: int = 0,
    processes: DistributedContext | None = None,
) -> Features:
    """Return the features of ``photos``, extracting those that are not on disk yet.

    The cache is keyed by the photos' contents and order, the encoder with its weights and
    transform, ``view`` (see ``augment``) and the version of the preprocessing. A killed run
    resumes from its last save, and a second run waits for the first; a complete cache is only
    read. All ``processes`` must call this; each extracts its share.

    Raises:
        DataError: no photo can be opened.
        EncoderError: the features are too large for float16.
        WriteError: the disk is too small or read-only.
    """
    processes = processes or DistributedContext()
    home = _cache_folder(encoder, photos, folder, view)
    shape = (len(photos), GRID * GRID, encoder.channels)
    if not processes.broadcast(_is_complete(home, shape)):
        with contextlib.ExitStack() as stack:
            if processes.is_main:
                stack.enter_context(_lock(home))
                with reraise_os_errors(home):
                    _create_files(home, shape)
            processes.barrier()
            missing = np.flatnonzero(np.load(home / _STATUS, mmap_mode="r") == _MISSING)
            processes.barrier()  # until all have read the status that extraction changes
            if len(missing):
                _extract(encoder, photos, home, missing, view, processes)
            processes.barrier()
    status = np.load(home / _STATUS, mmap_mode="r")
    if (status == _MISSING).any():
        raise DataError(
            f"{home} lacks features that were just extracted; several machines may have written "
            "to the same file: extract on one machine first, then start all"
        )
    readable = np.flatnonzero(status == _READ).tolist()
    if not readable:
        raise DataError(f"none of the {len(photos)} photos of {photos.source} can be opened")
    if len(readable) < len(photos) and processes.is_main:
        log.warning("%s: skipped %d unreadable photos", home.name, len(photos) - len(readable))
    return Features(np.load(home / _ARRAY, mmap_mode="r"), readable, home)


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Hold a cache folder's lock, waiting for another run if necessary."""
    with reraise_os_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(home / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("waiting for another process that extracts %s", home)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_complete(home: Path, shape: tuple[int, int, int]) -> bool:
    """Return whether every photo has been processed."""
    status = _load_array(home / _STATUS, shape[:1])
    return (
        status is not None
        and _load_array(home / _ARRAY, shape) is not None
        and not (status == _MISSING).any()
    )


def _create_files(home: Path, shape: tuple[int, int, int]) -> None:
    """Create the two files, unless they exist, and reserve their disk space."""
    if _load_array(home / _STATUS, shape[:1]) is None or _load_array(home / _ARRAY, shape) is None:
        if (home / _STATUS).exists():
            log.warning("%s is damaged: extracting the features again", home)
            (home / _STATUS).unlink()
        (home / _ARRAY).unlink(missing_ok=True)
        needed = int(np.prod(shape)) * 2
        free = shutil.disk_usage(home).free
        if free < needed:
            raise WriteError(
                f"the features of {shape[0]} photos need {needed / 1e9:.3f} GB in {home}, but only "
                f"{free / 1e9:.3f} GB are free: make room, or choose another --cache or a --limit"
            )
        open_memmap = np.lib.format.open_memmap
        open_memmap(home / _ARRAY, mode="w+", dtype=np.float16, shape=shape).flush()
        # Zero is _MISSING.
        open_memmap(home / _STATUS, mode="w+", dtype=np.uint8, shape=shape[:1]).flush()
    if hasattr(os, "posix_fallocate"):
        # On a full disk, writing to a hole in a mapped file would kill the process silently.
        for path in (home / _ARRAY, home / _STATUS):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _extract(
    encoder: Encoder,
    photos: CaptionedPhotos,
    home: Path,
    missing: np.ndarray,
    view: int,
    processes: DistributedContext,
) -> None:
    """Extract this process's share of the ``missing`` rows."""
    array = np.lib.format.open_memmap(home / _ARRAY, mode="r+")
    status = np.lib.format.open_memmap(home / _STATUS, mode="r+")
    own_rows = np.array_split(missing, processes.world_size)[processes.rank]
    dataset = PhotoDataset(photos, encoder.transform, view=view)
    process = functools.partial(_extract_rows, encoder, dataset, array)
    unsaved: list[tuple[int, int]] = []  # rows and their status

    def save() -> None:
        # The features must be on disk before their status.
        array.flush()
        for row, value in unsaved:
            status[row] = value
        status.flush()
        unsaved.clear()

    label = f"features, {encoder.name}, {photos.split}{f', view {view}' if view else ''}"
    with (
        tqdm(
            total=len(status),
            initial=len(status) - len(missing),
            desc=label,
            unit="photo",
            smoothing=0.05,
            disable=not processes.is_main,
        ) as bar,
        contextlib.closing(encoder.map(process, own_rows.tolist())) as batches,
    ):
        try:
            for batch in batches:
                unsaved += batch
                # The other processes have done about as much.
                bar.update(min(len(batch) * processes.world_size, len(status) - bar.n))
                if len(unsaved) >= _SAVE_EVERY:
                    save()
        finally:
            save()  # also when interrupted


def _extract_rows(
    encoder: Encoder, dataset: PhotoDataset, array: np.ndarray, rows: list[int]
) -> list[tuple[int, int]]:
    """Write the features of some rows to ``array``; return each row with its status."""
    opened = [dataset[row] for row in rows]
    readable = {row: pixels for row, pixels in opened if pixels is not None}
    if readable:
        cells = encoder(torch.stack(list(readable.values()))).half().cpu()  # (B, P, C)
        if not cells.isfinite().all():
            raise EncoderError(
                f"{encoder.name} gives values that float16 cannot hold: choose another"
            )
        array[list(readable)] = cells.numpy()
    return [(row, _READ if row in readable else _UNREADABLE) for row in rows]
