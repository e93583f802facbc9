"""Find the photos at a path: a single file, or all photos in a folder and its subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from captioner.errors import ImageError
from captioner.images import SUFFIXES, find_photos


def search(path: Path) -> Iterator[tuple[Path, Path, ImageError | None]]:
    """Yield the photos at a path, whether or not they can be read.

    Each comes with its path relative to the folder, and the error if it cannot be read.
    """
    if not os.path.isdir(path):  # noqa: PTH112 -- Path raises where a name is too long
        yield path, Path(path.name), None
        return
    empty = True
    for photo, error in find_photos(path):
        empty = False
        yield photo, photo.relative_to(path), error
    if empty:
        suffixes = " ".join(sorted(SUFFIXES))
        yield path, Path(path.name), ImageError(f"{path} holds no photo ({suffixes})")


def readable_photos(path: Path) -> Iterator[Path]:
    """Yield the photos at a path without those that come with an error.

    Raises:
        ImageError: there is none; the first photo's error.
    """
    first_error, empty = None, True
    for photo, _, error in search(path):
        first_error = first_error or error
        if error is None:
            empty = False
            yield photo
    if first_error and empty:
        raise first_error
