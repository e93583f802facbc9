"""Photos that caption files name, and COCO's and Karpathy's JSON.

Files are recognized by their content, not by their name. Knows nothing of ``datasets``.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
import mmap
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from captioner.data.columns import captions_in
from captioner.errors import DataError
from captioner.images import find_photos

log = logging.getLogger(__name__)

# A split in a file's name: train.csv, captions_val2017.json, my-test-photos.tsv.
SPLIT_IN_NAME = re.compile(
    r"(?<![a-z])(train|validation|valid|val|dev|test)(?:ing)?(?![a-z])", re.IGNORECASE
)


class Row(NamedTuple):
    """Some captions of a photo.

    Attributes:
        name: of the photo, as written in the file; empty if the file has captions only.
        captions: not cleaned.
        split: as written; empty if the file names none.
        folder: of the file, in which its photo is looked for first; None if there is no other.
    """

    name: str
    captions: list[str]
    split: str
    folder: Path | None = None


class PhotoFinder:
    """The photo files in a folder and its subfolders, by the names that captions files write."""

    def __init__(self, folder: Path) -> None:
        """Search in ``folder``; its subfolders are read when they are first needed."""
        self.folder = folder
        self._bases = [
            base for name in ("Images", "images", "") if (base := folder / name).is_dir()
        ]
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """Return the photo with this name; None unless there is exactly one.

        The name may be a path from the folder, or from a folder of someone else's machine; it may
        lack its suffix, and end in the number of a caption (``#0``). Of several photos the one in
        the folder ``near`` is meant: train/ and val/ may use the same names.
        """
        bases = self._bases if near is None else [near, *self._bases]
        for written in dict.fromkeys((name, without_number(name))):
            if not written:
                continue
            for base in bases:
                if _is_file(base / written):
                    return base / written
            if len(written) < 1000 and (path := self._find_by_last_part(written, near)):
                return path
        return None

    def _find_by_last_part(self, name: str, near: Path | None) -> Path | None:
        parts = [part.casefold() for part in PurePosixPath(name.replace("\\", "/")).parts]
        if not parts:
            return None
        candidates = self._photos_by_name().get(parts[-1], [])
        if len(candidates) > 1 and near is not None:
            candidates = [path for path in candidates if near in path.parents] or candidates
        if len(candidates) < 2:
            return candidates[0] if candidates else None

        def common_folders(path: Path) -> int:
            pairs = zip(reversed(parts[:-1]), reversed(path.parts[:-1]), strict=False)
            return sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1].casefold(), pairs)
            )

        first, second, *_ = sorted(candidates, key=common_folders, reverse=True)
        return first if common_folders(first) > common_folders(second) else None

    def _photos_by_name(self) -> dict[str, list[Path]]:
        """Return the photos by file name, and by file name without suffix, in lower case."""
        if self._index is None:
            self._index = collections.defaultdict(list)
            for path, _ in find_photos(self.folder):
                for key in {path.name.casefold(), path.stem.casefold()}:
                    self._index[key].append(path)
        return self._index


def without_number(name: str) -> str:
    """Return a photo's name without the number of its caption, as in Flickr8k's "a.jpg#0"."""
    return re.sub(r"#\w+$", "", name)


def _is_file(path: Path) -> bool:
    """Return whether a file exists; one with an impossible name does not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def split_in_name(path: Path) -> str:
    """Return the split that a file or one of its folders is named after, empty if there is none."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        if match := SPLIT_IN_NAME.search(name):
            return match[1].lower()
    return ""


# JSON


def json_reader(path: Path) -> Callable[[Path, str], list[Row]] | None:
    """Return the function that reads a file of COCO's or Karpathy's captions, None for others."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{" or data.find(b'"images"') < 0:
                return None
            if data.find(b'"sentences"') >= 0:
                return read_karpathy
            is_coco = data.find(b'"annotations"') >= 0 and data.find(b'"caption"') >= 0
            return read_coco if is_coco else None
    except (OSError, ValueError):  # ValueError: an empty file
        return None


def _load_json(path: Path, kind: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} starts like {kind} captions but is no valid JSON ({error}): download it again"
        ) from error


def read_coco(path: Path, split: str = "") -> list[Row]:
    """Read COCO's captions_*.json: ``images`` with id and file_name, ``annotations`` with caption.

    ``split`` is that of all its photos.

    Raises:
        DataError: the file is damaged, or an entry lacks a field.
    """
    content = _load_json(path, "COCO's")
    try:
        captions = collections.defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(str(annotation["caption"]))
        return [
            Row(image["file_name"], captions[image["id"]], split) for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no file of COCO captions: an entry lacks {error}; images need id and "
            "file_name, annotations image_id and caption"
        ) from error


def read_karpathy(path: Path, split: str = "") -> list[Row]:
    """Read Karpathy's dataset_*.json: ``images`` with filename, sentences and split.

    ``split`` is that of photos without one.

    Raises:
        DataError: the file is damaged, or an entry lacks a field.
    """
    content = _load_json(path, "Karpathy's")
    try:
        return [
            Row(
                "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                captions_in(image["sentences"], "sentences"),
                str(image.get("split") or split),
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no file of Karpathy's captions: an entry lacks {error}; images need "
            "filename and sentences, a list of {raw}"
        ) from error


# Photos


def join_photos(
    rows: Iterable[Row], finder: PhotoFinder, what: str
) -> tuple[dict[str, list[tuple[str, str, list[str]]]], int]:
    """Group rows by photo.

    Args:
        rows: of one or more files.
        finder: finds their photos.
        what: the files, for messages.

    Returns:
        for each split as written (empty means "train") the photos as (path, name, captions), and
        the number of photos that are missing.

    Raises:
        DataError: no photo can be found.
    """
    paths: dict[tuple[str, Path | None], Path | None] = {}
    photos: dict[Path, tuple[str, str, list[str]]] = {}  # split, name, captions
    for name, captions, split, folder in rows:
        if (name, folder) not in paths:
            paths[name, folder] = finder.find(name, folder) if name else None
        if (path := paths[name, folder]) is None:
            continue
        short = name if name.endswith(path.name) else without_number(name)
        photos.setdefault(path, (split or "train", short, []))[2].extend(captions)
    names = {(without_number(name), folder): path for (name, folder), path in paths.items()}
    if names and not any(name for name, _ in names):
        raise DataError(
            f"no column of {what} names photos: name it with --image-column, and put the photos "
            f"into {finder.folder}"
        )
    if not photos:
        raise DataError(
            f"{what} names {len(names)} photos, but none of them is in {finder.folder}"
            + (f" (the first is {first!r}): " if (first := next(iter(names), ("",))[0]) else ": ")
            + ("download" if "://" in first else "put")
            + " the photos there, or give the folder that holds both"
        )
    if num_missing := sum(path is None for path in names.values()):
        log.warning(
            "%s: %d of %d photos are not in %s", what, num_missing, len(names), finder.folder
        )
    splits: dict[str, list[tuple[str, str, list[str]]]] = {}
    for path, (split, name, captions) in photos.items():
        splits.setdefault(split, []).append((str(path.resolve()), name, captions))
    return splits, num_missing
