"""Photos with captions: from the Hub, a folder of Parquet, or a folder of photos.

Photos stay lazy: a row is decoded when it is asked for, and nothing keeps it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from captioner.caches import cache_access
from captioner.config import DEFAULT_SOURCE, PAD
from captioner.errors import ConfigError, DataError, ImageError, first_line
from captioner.images import Transform, open_photo
from captioner.vocab import Vocabulary, clean

log = logging.getLogger(__name__)

CAPTION_FILES = ("captions.csv", "captions.txt")
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
_LOCAL_WAY = (
    "give a local folder with --data: Parquet files with the columns image and alt_text, or "
    "photos beside a captions.csv (image,caption)"
)
_SIDES = {"left": "right", "right": "left"}
# torch draws from one generator, whatever the thread.
_DRAWING = threading.Lock()


class CaptionedPhotos:
    """The photos of one split, each with its captions; a thin view of a ``datasets.Dataset``.

    Attributes:
        source: what ``load_captions`` was given.
        split: "train", "validation" or "test".
        skipped: rows left out because they had no caption, or whose file was missing.
    """

    def __init__(self, source: str, split: str, table: datasets.Dataset, skipped: int = 0) -> None:
        """Wrap ``table``, whose column ``image`` must not decode."""
        self.source = source
        self.split = split
        self.skipped = skipped
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def select(self, rows: Sequence[int]) -> CaptionedPhotos:
        """Return a view of some rows."""
        return CaptionedPhotos(self.source, self.split, self._table.select(rows), self.skipped)

    def data(self, row: int) -> bytes | Path:
        """Return one photo's file as it is stored: its bytes, or its path."""
        image = self._table[row]["image"]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ImageError(f"row {row} holds no photo")
        # Paths in a local folder's Parquet are meant from there.
        return Path(self.source, image["path"]) if image["bytes"] is None else image["bytes"]

    def photo(self, row: int) -> Image.Image:
        """Decode one photo; ``ImageError`` where that fails."""
        return open_photo(self.data(row))

    def captions(self) -> Iterator[list[str]]:
        """Yield each photo's captions, in order, without touching the photos."""
        for batch in self._table.select_columns("alt_text").iter(batch_size=1000):
            yield from (_texts(value) for value in batch["alt_text"])

    def names(self) -> list[str]:
        """Return each photo's file name, or its row number where the data has none."""
        for column in ("filename", "img_id"):
            if column in self._table.column_names:
                return [str(name) for name in self._table[column]]
        return [str(row) for row in range(len(self))]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the photos' files in order: another photo or order gives another one."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            try:
                data = self.data(row)
                data = data.read_bytes() if isinstance(data, Path) else data
            except (ImageError, OSError, ValueError):  # ValueError: no name that a file has
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def _texts(value: str | Sequence[str] | None) -> list[str]:
    """Return the captions of a cell that hold at least one word; a bare string is one caption."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list):
        raise TypeError(f"captions cannot be a {type(value).__name__}")
    return [text for text in texts if text and clean(text)]


def _is_file(path: Path) -> bool:
    """Say whether a file lies there; one with an impossible name does not."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read_captions_file(path: Path) -> tuple[datasets.Dataset, int]:
    """Read ``image,caption[,split]`` lines, several a photo; also count the missing photos."""
    images = next(
        (path.parent / name for name in ("Images", "images") if (path.parent / name).is_dir()),
        path.parent,
    ).resolve()
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            fields = [name.strip() for name in next(reader, [])]
            for column in ("image", "caption"):
                if column not in fields:
                    raise DataError(
                        f"{path} has no column {column!r} in its first line, only: "
                        f"{', '.join(fields) or 'nothing'}; start it with image,caption"
                    )
            place = fields.index("caption")
            for cells in filter(None, reader):
                if any("\n" in cell or "\r" in cell for cell in cells):
                    raise DataError(
                        f"{path}: a file's name or a caption runs over several lines up to "
                        f"{reader.line_num}: close the quotation mark before it, or rename the file"
                    )
                # Unquoted commas cut a caption; put it together again.
                end = place + 1 + max(len(cells) - len(fields), 0)
                cells[place:end] = [", ".join(cells[place:end])]
                row = dict(zip(fields, cells, strict=False))
                name = row.get("image", "").strip()
                captions.setdefault(name, []).append(row.get("caption", ""))
                splits[name] = row.get("split", "").strip() or "train"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8 CSV") from error
    found = [name for name in captions if name and _is_file(images / name)]
    if not found:
        raise DataError(
            f"{path} names {len(captions)} photos and none of them lies in {images}"
            + (f" (the first is {next(iter(captions))!r})" if captions else "")
        )
    if missing := len(captions) - len(found):
        log.warning("%s: %d photos of %d are missing in %s", path, missing, len(captions), images)
    table = datasets.Dataset.from_dict(
        {
            "image": [str(images / name) for name in found],
            "alt_text": [captions[name] for name in found],
            "filename": found,
            "split": [splits[name] for name in found],
        }
    )
    return table, missing


def _by_split(table: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Part one table for all by its column ``split``; a row that names none is for training."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table["split"]):
        name = str(name or "train")
        rows.setdefault(_SPLIT_NAMES.get(name, name), []).append(row)
    return {name: table.select(some) for name, some in rows.items()}


@cache_access()
def _load_splits(source: str) -> tuple[dict[str, datasets.Dataset], int]:
    """Return the splits of a source by name, nothing decoded, and how many photos are missing."""
    try:
        path = Path(source).expanduser()
        if path.is_file() and path.name in CAPTION_FILES:
            path = path.parent
        is_folder = path.is_dir()
    except (OSError, RuntimeError):  # no name that a folder could have, or no such user
        is_folder = False
    if is_folder:
        for name in CAPTION_FILES:
            if (path / name).is_file():
                table, missing = _read_captions_file(path / name)
                return _by_split(table), missing
        if next(path.rglob("*.parquet"), None) is None:
            raise DataError(
                f"{path} holds neither Parquet files nor {' or '.join(CAPTION_FILES)}; {_LOCAL_WAY}"
            )
        try:
            return dict(datasets.load_dataset(str(path))), 0
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            for file in sorted(path.rglob("*.parquet")):
                with contextlib.suppress(Exception):
                    if pyarrow.parquet.read_metadata(file).num_rows == 0:
                        reason = f"{file.relative_to(path)} is empty"
            raise DataError(f"cannot read the Parquet files in {path}: {reason}") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise DataError(f"there is no folder {source}, and it is no Hub id (owner/name)")
    try:
        return dict(datasets.load_dataset(source)), 0
    except Exception as error:
        raise DataError(
            f"cannot load {source} from the Hugging Face Hub ({type(error).__name__}: "
            f"{first_line(error)[:160]}). Check the name and your internet connection, "
            f"or {_LOCAL_WAY}"
        ) from error


def load_captions(
    source: str = DEFAULT_SOURCE, split: str = "train", *, limit: int = 0
) -> CaptionedPhotos:
    """Load one split of photos with captions.

    Args:
        source: a Hub id; a folder of Parquet with the columns ``image`` and ``alt_text`` (others
            are optional); or a folder of photos with ``captions.csv`` or ``captions.txt``
            (``image,caption``, several lines a photo, ``split`` optional).
        split: "train", "validation" or "test".
        limit: at most so many photos, from the start; 0 takes all.

    Raises:
        DataError: the source, the split or a column is missing, or no row has a caption.
    """
    if limit < 0:
        raise ConfigError(f"limit is {limit}; it must be 0, which takes all, or more")
    splits, missing = _load_splits(source)
    split = _SPLIT_NAMES.get(split, split)
    for table in splits.values():
        for column in ("image", "alt_text"):
            if column not in table.column_names:
                raise DataError(
                    f"{source} has no column {column!r}, only: {', '.join(table.column_names)}; "
                    "image and alt_text are needed"
                )
    named = {_SPLIT_NAMES.get(name, name): table for name, table in splits.items()}
    if len(splits) == 1 and "split" in (only := next(iter(splits.values()))).column_names:
        named = _by_split(only)
    if split not in named:
        raise DataError(
            f"{source} has no split {split!r}, only: {', '.join(named)}; choose one of these"
        )
    try:
        table = named[split].cast_column("image", datasets.Image(decode=False))
        photos = CaptionedPhotos(source, split, table)
        captioned = [row for row, texts in enumerate(photos.captions()) if texts]
    except (
        *(TypeError, ValueError, AttributeError),
        *(datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    ) as error:
        raise DataError(
            f"{source}: the columns must hold photos (image) and lists of text (alt_text): "
            f"{first_line(error)}"
        ) from error
    if not captioned:
        raise DataError(f"the split {split!r} of {source} has no photo with a caption")
    photos.skipped = len(table) - len(captioned)
    if photos.skipped:
        log.warning("%s %s: skipped %d rows without a caption", source, split, photos.skipped)
    if photos.skipped or (limit and limit < len(captioned)):
        photos = photos.select(captioned[: limit or None])
    photos.skipped += missing
    return photos


@cache_access()
def load_texts(source: str) -> list[list[str]]:
    """Read captions without photos: Parquet files with the column ``alt_text``, five a row or so.

    Raises:
        DataError: they cannot be read, or hold no caption.
    """
    try:
        (table,) = datasets.load_dataset(source, split=["train"])
        rows = [_texts(value) for value in table["alt_text"]]
    except Exception as error:
        raise DataError(
            f"cannot read captions from {source} ({first_line(error)[:160]}); give a folder of "
            "Parquet files with the column alt_text"
        ) from error
    if not any(rows):
        raise DataError(f"{source} holds no caption")
    return [row for row in rows if row]


def mirror_text(text: str) -> str:
    """Swap "left" and "right", as in the caption of a mirrored photo."""
    return " ".join(_SIDES.get(word, word) for word in clean(text).split())


def is_mirrored(view: int, row: int) -> bool:
    """Say whether ``view_of`` mirrors the photo in this row: view 1 all of them, crops half."""
    return view == 1 or (view > 1 and np.random.default_rng((view, row)).random() < 0.5)


def view_of(image: Image.Image, view: int, row: int) -> Image.Image:
    """Return the photo as it is (view 0), mirrored (1), or a random part of it (2 and on).

    A part has 55 to 95 % of the area and three quarters to four thirds of the shape. The same view
    of the same row is always the same part.
    """
    if view > 1:
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(view * 1_000_003 + row)
            top, left, height, width = RandomResizedCrop.get_params(
                image, scale=[0.55, 0.95], ratio=[3 / 4, 4 / 3]
            )
        image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if is_mirrored(view, row) else image


class PhotoDataset(torch.utils.data.Dataset[tuple[int, Tensor | None]]):
    """Photos as an encoder's input; an unreadable one is (row, None)."""

    def __init__(self, photos: CaptionedPhotos, transform: Transform, *, view: int = 0) -> None:
        """Serve the photos as ``view_of`` shows them."""
        self.photos = photos
        self.transform = transform
        self.view = view

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        try:
            photo = view_of(self.photos.photo(row), self.view, row)
        except ImageError:
            return row, None
        return row, torch.from_numpy(self.transform(photo))


class CaptionDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Features (P, C) of a photo with K tokenized captions (K, T), for training.

    A photo with fewer than K captions is filled up with rows of ``<pad>``, which no loss counts.
    """

    def __init__(
        self,
        features: np.ndarray,
        rows: Sequence[int],
        captions: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
        *,
        max_length: int,
    ) -> None:
        """Join ``features[rows[i]]`` with ``captions[i]``."""
        self.features = features
        self.rows = np.asarray(rows)
        per_photo = max((len(texts) for texts in captions), default=1)
        # One small array for all captions: a list of lists would grow by kilobytes a photo.
        self.tokens = np.full((len(captions), per_photo, max_length), PAD, dtype=np.int32)
        for photo, texts in enumerate(captions):
            for number, text in enumerate(texts):
                self.tokens[photo, number] = vocabulary.tokenize(text, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features = torch.from_numpy(np.array(self.features[self.rows[index]]))
        return features, torch.from_numpy(self.tokens[index]).long()
