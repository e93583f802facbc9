"""A folder of files with attention maps, one per caption."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.config import FORMATS
from captioner.errors import ConfigError
from captioner.files import atomic_write, reraise_os_errors
from captioner.images import SUFFIXES, open_photo

if TYPE_CHECKING:
    from captioner.images import Photo
    from captioner.inference.caption import Caption

_MAX_NAME_BYTES = 255


class HeatmapFolder:
    """Writes the maps of captions into a folder, under the names of their photos."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Check the folder; ``make`` creates it.

        Args:
            folder: of the files.
            kind: of the files, one of ``config.FORMATS``.

        Raises:
            ConfigError: ``folder`` is a file, or has the suffix of one.
        """
        self._folder, self._kind = folder, kind
        self._used: set[Path] = set()
        if os.path.lexists(folder) and not os.path.isdir(folder):  # noqa: PTH112 -- Path may raise
            raise ConfigError(f"{folder} is not a folder: --heatmaps needs one for the maps")
        suffixes = SUFFIXES | {f".{each}" for each in FORMATS} | {".htm", ".pdf", ".svg"}
        if folder.suffix.lower() in suffixes and not os.path.lexists(folder):
            raise ConfigError(
                f"--heatmaps is a folder, not the file {folder}: use --heatmaps "
                f"{folder.with_suffix('')}, and --format for the kind of its files"
            )

    def make(self) -> None:
        """Create the folder, so that a disk error shows before the first caption.

        Raises:
            WriteError: it cannot be made.
        """
        with reraise_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, photo: Photo, name: Path, caption: Caption) -> None:
        """Write the maps of a caption.

        Args:
            photo: opened again.
            name: of the photo, with its folders; the file gets it with one more suffix.
            caption: of the photo.

        Raises:
            ImageError: the photo can no longer be read.
            WriteError: the file cannot be written.
        """
        from captioner.inference.render import render

        path = self.unused_path(name)
        write_file(path, render(open_photo(photo), caption, self._kind))

    def unused_path(self, name: Path) -> Path:
        """Return the file of a photo's maps, numbered if the name is taken already.

        A name that would be too long is cut, and a digest of the whole keeps it apart from others.
        """
        full_name, number = os.fsencode(name.name), 1
        while True:
            end = f".{self._kind}" if number == 1 else f"-{number}.{self._kind}"
            stem = full_name
            if len(stem) + len(end) > _MAX_NAME_BYTES:
                digest = hashlib.blake2b(stem, digest_size=4).hexdigest()
                stem = stem[: _MAX_NAME_BYTES - len(end) - len(digest) - 1]
                # Half a character at the end is dropped.
                stem = f"{stem.decode(errors='ignore')}-{digest}".encode()
            path = self._folder / name.with_name(os.fsdecode(stem) + end)
            if path not in self._used:
                self._used.add(path)
                return path
            number += 1


def write_file(path: Path, data: bytes) -> None:
    """Write a file and the folders that it needs; ``WriteError`` if that fails."""
    with reraise_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, say
            path.write_bytes(data)
            return
    atomic_write(path, data)
