"""Photos to grids, once a data set, kept on disk and memory-mapped.

The backbone is frozen, so every photo passes it once. Knows nothing of captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
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

_ARRAY, _DONE = "features.npy", "done.npy"
# What ``done.npy`` says of a photo.
_MISSING, _READ, _UNREADABLE = range(3)
_SAVE_EVERY = 512


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


def _home(encoder: Encoder, photos: CaptionedPhotos, folder: Path, view: int) -> Path:
    """Return the folder of a cache."""
    key = {"photos": photos.fingerprint, "encoder": encoder.spec(), "view": view}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = encoder.name.replace(":", "-").replace("/", "-")
    return folder / f"{name}-{photos.split}{f'-view{view}' if view else ''}-{digest}"


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Map an array into memory, read-only; None where there is none of this shape."""
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
    """Return the features of ``photos``, extracting only what is not on disk yet.

    The cache is keyed by the photos' contents and order, the encoder with its weights and
    transform, and ``view`` (see ``augment``); a change of any makes a new one. A killed run
    goes on where it last saved, and a second one waits for the first; a whole cache is only read.
    Of several ``processes`` each extracts a part; all must call this.

    Raises:
        DataError: no photo can be opened.
        EncoderError: the features are too large for float16.
        WriteError: the disk is too small or read-only.
    """
    processes = processes or DistributedContext()
    home = _home(encoder, photos, folder, view)
    shape = (len(photos), GRID * GRID, encoder.channels)
    if not processes.broadcast(_is_whole(home, shape)):
        with contextlib.ExitStack() as stack:
            if processes.is_main:
                with reraise_os_errors(home):
                    home.mkdir(parents=True, exist_ok=True)
                    lock = filelock.FileLock(home / ".lock")
                    try:
                        stack.enter_context(lock.acquire(timeout=0))
                    except filelock.Timeout:
                        log.warning("waiting for another process that makes %s", home)
                        stack.enter_context(lock.acquire())
                    _begin(home, shape)
            processes.barrier()
            left = np.flatnonzero(np.load(home / _DONE, mmap_mode="r") == _MISSING)
            processes.barrier()  # or this one would count what another has done already
            if len(left):
                _extract(encoder, photos, home, left, view, processes)
            processes.barrier()
    done = np.load(home / _DONE, mmap_mode="r")
    if (done == _MISSING).any():
        raise DataError(
            f"{home} lacks features that were just made, as where several machines write into one "
            "file: start once more on one machine, and then on all"
        )
    readable = np.flatnonzero(done == _READ).tolist()
    if not readable:
        raise DataError(f"none of the {len(photos)} photos of {photos.source} can be opened")
    if len(readable) < len(photos) and processes.is_main:
        log.warning(
            "%s: skipped %d photos that cannot be opened", home.name, len(photos) - len(readable)
        )
    return Features(np.load(home / _ARRAY, mmap_mode="r"), readable, home)


def _is_whole(home: Path, shape: tuple[int, int, int]) -> bool:
    """Say whether nothing is left to be extracted."""
    done = _mapped(home / _DONE, shape[:1])
    return (
        done is not None
        and _mapped(home / _ARRAY, shape) is not None
        and not (done == _MISSING).any()
    )


def _begin(home: Path, shape: tuple[int, int, int]) -> None:
    """Make the two files, unless they are there, and take the room that they need."""
    if _mapped(home / _DONE, shape[:1]) is None or _mapped(home / _ARRAY, shape) is None:
        if (home / _DONE).exists():
            log.warning("%s is damaged: extracting the features anew", home)
            (home / _DONE).unlink()
        (home / _ARRAY).unlink(missing_ok=True)
        needed = int(np.prod(shape)) * 2
        free = shutil.disk_usage(home).free
        if free < needed:
            raise WriteError(
                f"the features of {shape[0]} photos need {needed / 1e9:.3f} GB in {home} and only "
                f"{free / 1e9:.3f} GB are free: make room, or choose another --cache or a --limit"
            )
        open_memmap = np.lib.format.open_memmap
        open_memmap(home / _ARRAY, mode="w+", dtype=np.float16, shape=shape).flush()
        # Zero, that is _MISSING.
        open_memmap(home / _DONE, mode="w+", dtype=np.uint8, shape=shape[:1]).flush()
    if hasattr(os, "posix_fallocate"):
        # On a full disk, writing into a mapped hole would end the process without a word.
        for path in (home / _ARRAY, home / _DONE):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _extract(
    encoder: Encoder,
    photos: CaptionedPhotos,
    home: Path,
    left: np.ndarray,
    view: int,
    processes: DistributedContext,
) -> None:
    """Extract this process's part of the rows that are ``left``."""
    array = np.lib.format.open_memmap(home / _ARRAY, mode="r+")
    done = np.lib.format.open_memmap(home / _DONE, mode="r+")
    own = np.array_split(left, processes.world_size)[processes.rank]
    dataset = PhotoDataset(photos, encoder.transform, view=view)
    seen: list[tuple[int, int]] = []  # rows, and what is to be said of them

    def see(rows: list[int]) -> tuple[list[int], list[int]]:
        """Fill in rows; return those whose photo could be opened, and those whose could not."""
        opened = [dataset[row] for row in rows]
        readable = {row: pixels for row, pixels in opened if pixels is not None}
        if readable:
            cells = encoder(torch.stack(list(readable.values()))).half().cpu()  # (B, P, C)
            if not cells.isfinite().all():
                raise EncoderError(
                    f"{encoder.name} gives values that float16 cannot hold: choose another"
                )
            array[list(readable)] = cells.numpy()
        return list(readable), [row for row in rows if row not in readable]

    def save() -> None:
        # The features must be on disk before the count says so.
        array.flush()
        for row, state in seen:
            done[row] = state
        done.flush()
        seen.clear()

    label = f"features, {encoder.name}, {photos.split}{f', view {view}' if view else ''}"
    with (
        tqdm(
            total=len(done),
            initial=len(done) - len(left),
            desc=label,
            unit="photo",
            smoothing=0.05,
            disable=not processes.is_main,
        ) as bar,
        contextlib.closing(encoder.map(see, own.tolist())) as found,
    ):
        try:
            for readable, unreadable in found:
                seen += [(row, _READ) for row in readable]
                seen += [(row, _UNREADABLE) for row in unreadable]
                # The others are about as far.
                count = (len(readable) + len(unreadable)) * processes.world_size
                bar.update(min(count, len(done) - bar.n))
                if len(seen) >= _SAVE_EVERY:
                    save()
        finally:
            save()  # also when it is stopped
