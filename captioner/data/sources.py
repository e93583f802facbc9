"""Photos with captions from any source: the Hub, folders and files of many layouts.

Photos stay encoded until they are requested. Captions are cleaned here, where they enter.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from captioner.config import DEFAULT_SOURCE
from captioner.data.columns import Columns, captions_in, missing_column
from captioner.data.readers import open_tables
from captioner.data.tables import Table, Tables, columns_of, explained, stream_parquet
from captioner.environment import cache_access
from captioner.errors import ConfigError, DataError, ImageError, first_line
from captioner.images import open_photo
from captioner.model.vocabulary import ONE_WORD, clean, mean_words

log = logging.getLogger(__name__)

# Columns with a photo's file name, and those that identify it if there is no file name.
_NAME_COLUMNS = ("filename", "file_name", "image_name")
_ID_COLUMNS = ("img_id", "image_id", "__key__", "id")
# What is kept beside photos and captions.
_OTHER_COLUMNS = (*_NAME_COLUMNS, *_ID_COLUMNS, "boxes")
_SPLIT_NAMES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "restval": "train",  # Karpathy's name for COCO's validation photos that are trained on
}


class SplitError(DataError):
    """A source has no split of this name; training then holds photos back."""


class Box(NamedTuple):
    """An object in a photo: its category, and its sides as shares of width and height."""

    category: str
    left: float
    top: float
    right: float
    bottom: float


class CaptionedPhotos:
    """The photos of one split, each with its captions; a thin view of a ``datasets.Dataset``.

    Attributes:
        source: as given to ``load_captions``.
        split: "train", "validation" or "test".
        captions: the cleaned captions of each photo.
        skipped: number of rows left out: no caption, or a missing file.
    """

    def __init__(
        self,
        source: str,
        split: str,
        table: datasets.Dataset,
        captions: list[list[str]],
        *,
        root: str,
        skipped: int = 0,
    ) -> None:
        """Wrap ``table``, whose column ``image`` must not decode.

        ``root`` is where the relative paths of photos start.
        """
        self.source, self.split = source, split
        self.captions, self.skipped = captions, skipped
        self._table, self._root = table, root

    def __len__(self) -> int:
        return len(self._table)

    def select(self, rows: Sequence[int]) -> CaptionedPhotos:
        """Return a view of these rows."""
        captions = [self.captions[row] for row in rows]
        table = self._table.select(rows)
        return CaptionedPhotos(
            self.source, self.split, table, captions, root=self._root, skipped=self.skipped
        )

    def data(self, row: int) -> bytes | Path:
        """Return one photo's file as it is stored: its bytes, or its path."""
        data = _stored_photo(self._table[row]["image"], self._root)
        if data is None:
            raise ImageError(f"row {row} holds no photo")
        return data

    def photo(self, row: int) -> Image.Image:
        """Decode one photo; ``ImageError`` if that fails."""
        return open_photo(self.data(row))

    def names(self) -> list[str]:
        """Return each photo's file name or id, or its row number if the data has neither."""
        table = self._table.flatten()  # without the photos' bytes
        columns = [
            column
            for column in (*_NAME_COLUMNS, "image.path", *_ID_COLUMNS)
            if column in table.column_names
        ]
        names = [
            _photo_name(dict(zip(batch, cells, strict=True)), self._root)
            for batch in table.select_columns(columns).iter(batch_size=1000)
            for cells in zip(*batch.values(), strict=True)
        ]
        return [str(row) if name is None else name for row, name in enumerate(names)]

    def digest(self, row: int) -> bytes:
        """Return the SHA-256 of one photo's file, of nothing if it cannot be read."""
        try:
            data = self.data(row)
            data = data.read_bytes() if isinstance(data, Path) else data
        except (ImageError, OSError, ValueError):  # ValueError: an impossible file name
            data = b""
        return hashlib.sha256(data).digest()

    def boxes(self) -> list[list[Box]] | None:
        """Return the boxes of the objects in each photo; None if the source has none.

        Raises:
            DataError: the column ``boxes`` has something else.
        """
        if "boxes" not in self._table.column_names:
            return None
        try:
            return [
                [Box(str(each["category"]), *map(float, each["box"])) for each in cell or ()]
                for cell in self._table["boxes"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.source}: the column boxes must hold lists of category and box (left, top, "
                f"right, bottom as shares of width and height): {first_line(error)}"
            ) from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all photo files, in order."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            digest.update(self.digest(row))
        return digest.hexdigest()


class OpenedSource:
    """A source with its splits under their usual names, and its columns.

    Attributes:
        source: as given to ``open_source``.
        root: the folder or address where the relative paths of photos start.
        num_missing: photos that the source names but that are not there.
    """

    def __init__(self, source: str, columns: Columns, tables: Tables) -> None:
        """Wrap the tables of ``source``."""
        self.source, self.root, self.num_missing = source, tables.root, tables.num_missing
        self._columns, self._tables = columns, tables
        self._stored: dict[str, list[str]] = {}  # the splits as stored, by their usual names
        for name in tables.load:
            self._stored.setdefault(split_name(name), []).append(name)

    @property
    def can_stream(self) -> bool:
        """Whether streaming saves anything: caption files are in memory already."""
        return self._tables.builder is not None

    def table(self, split: str, *, streaming: bool) -> Table:
        """Return one split; a single table is divided by its column ``split``, if it has one.

        Raises:
            SplitError: there is no such split.
            DataError: it cannot be read.
        """
        names: Iterable[str] = self._stored
        if len(self._tables.load) == 1:
            ((stored, load),) = self._tables.load.items()
            table = load(streaming)
            if "split" in columns_of(table):
                names, table = self._rows_of_split(table, stored, split)
                if split in names:
                    return table
        if split not in self._stored or names is not self._stored:
            raise SplitError(
                f"{self.source} has no split {split!r}, only: {', '.join(names)}; choose one of "
                "these"
            )
        tables = [self._tables.load[stored](streaming) for stored in self._stored[split]]
        return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)

    def _rows_of_split(self, table: Table, stored: str, split: str) -> tuple[list[str], Table]:
        """Return the names in the column ``split``, and the rows of one of them."""
        if isinstance(table, datasets.Dataset):
            cells = [_split_in_cell(cell) for cell in table["split"]]
            rows = [row for row, name in enumerate(cells) if name == split]
            return list(dict.fromkeys(cells)), table.select(rows)
        builder, column = self._tables.builder, table.select_columns("split")
        is_parquet = isinstance(builder, Parquet)
        if is_parquet:  # reads this column alone
            column = stream_parquet(builder, stored, columns=["split"])
        written: dict[str | None, None] = {}
        try:
            for row in column:
                written[row["split"]] = None
        except Exception:  # a damaged file at the end is reported when its photos are due
            if split not in map(_split_in_cell, written):
                raise
        names = list(dict.fromkeys(map(_split_in_cell, written)))
        chosen = [name for name in written if _split_in_cell(name) == split]
        if is_parquet and None not in chosen:  # skips the row groups of other splits
            filters = [("split", "in", chosen or [""])]
            return names, stream_parquet(builder, stored, filters=filters)
        image, _ = self.find_columns(table)
        if image is not None:  # or the filter would decode every photo
            table = table.cast_column(image, datasets.Image(decode=False))
        return names, table.filter(lambda row: _split_in_cell(row["split"]) == split)

    def find_columns(self, table: Table) -> tuple[str | None, list[str]]:
        """Return the column with the photos, if there is one, and those with captions."""
        if self._tables.columns is not None:
            return self._tables.columns
        names = columns_of(table)
        image = self._columns.find_image(names, self.source)
        return image, self._columns.find_captions(names, self.source)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which errors of reading name their cause, as ``DataError``."""
        return explained(self._tables.explain)

    def taken(self, image: str, captions: Sequence[str]) -> str:
        """Return in words where photos and captions come from."""
        return self._tables.taken or f"photos from {image}, captions from {', '.join(captions)}"


@cache_access()
def open_source(
    source: str, columns: Columns | None = None, *, photos: bool = True, captions: bool = True
) -> OpenedSource:
    """Open a source without reading its photos.

    Args:
        source: a Hub id, also with ``:NAME`` for a configuration or ``@REVISION``, or its web
            address; a folder or a file in one of the layouts that the README lists.
        columns: named by the user instead of chosen by rule.
        photos: False reads captions without photos.
        captions: False also accepts photos without captions.

    Raises:
        DataError: there is no such source, or it holds nothing that can be read.
    """
    columns = columns or Columns()
    return OpenedSource(
        source, columns, open_tables(source, columns, photos=photos, captions=captions)
    )


@cache_access()
def load_captions(
    source: str = DEFAULT_SOURCE,
    split: str = "train",
    *,
    limit: int = 0,
    columns: Columns | None = None,
) -> CaptionedPhotos:
    """Load one split of photos with captions; rows of the same photo become one.

    With a limit, only the beginning of the split is downloaded and converted.

    Args:
        source: as for ``open_source``.
        split: "train", "validation" or "test", in any case, or "val", "valid" or "dev".
        limit: the maximum number of photos, from the start; 0 means all.
        columns: as for ``open_source``.

    Raises:
        SplitError: there is no such split.
        DataError: the source or a column is missing, no row has a caption, or the captions have no
            spaces between words.
    """
    if limit < 0:
        raise ConfigError(f"limit is {limit}; it must be 0 (all photos) or more")
    opened = open_source(source, columns)
    split = split_name(split)
    with opened.reading():
        table = opened.table(split, streaming=limit > 0 and opened.can_stream)
        image, texts = opened.find_columns(table)
        if image is None or not texts:
            kind = "image" if image is None else "caption"
            raise missing_column(kind, columns_of(table), source)
        if isinstance(table, datasets.IterableDataset):
            table = _fetch(table, image, texts, limit, opened.root)
    try:
        captions = _read_captions(table, texts)
        photo_table = _photo_table(table, image)
    except (
        *(TypeError, ValueError, AttributeError),
        *(datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    ) as error:
        raise DataError(
            f"{source}: the columns must hold photos ({image}) and texts or lists of texts "
            f"({', '.join(texts)}): {first_line(error.__cause__ or error)}; name others with "
            "--image-column and --caption-column"
        ) from error
    photos = CaptionedPhotos(source, split, photo_table, captions, root=opened.root)
    photos = _merge_rows(photos)
    rows = [row for row, texts in enumerate(photos.captions) if texts]
    if not rows:
        raise DataError(f"the split {split!r} of {source} has no photo with a caption")
    _check_words(f"{source} {split}", photos.captions)
    if num_empty := len(photos) - len(rows):
        log.warning("%s %s: skipped %d rows without a caption", source, split, num_empty)
    photos.skipped = num_empty + opened.num_missing
    log.info("%s %s: %s", source, split, opened.taken(image, texts))
    return photos.select(rows[: limit or None])


@cache_access()
def load_texts(source: str, columns: Columns | None = None) -> list[list[str]]:
    """Read captions without photos.

    Args:
        source: as for ``open_source``; caption files need no photos.
        columns: as for ``open_source``; ignored where the source does not have them, because they
            may be those of the photos' source.

    Returns:
        the cleaned captions of each row that has any.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    try:
        opened = open_source(source, photos=False)
        table = opened.table("train", streaming=False)
        _, texts = opened.find_columns(table)
        if columns is not None and set(columns.captions) & set(columns_of(table)):
            texts = columns.find_captions(columns_of(table), source)
        if not texts:
            raise missing_column("caption", columns_of(table), source)
        captions = _read_captions(table, texts)
    except Exception as error:
        raise DataError(f"cannot read captions from {source}: {first_line(error)[:700]}") from error
    if not any(captions):
        raise DataError(f"{source} holds no caption")
    _check_words(source, captions)
    return [texts for texts in captions if texts]


def stream_photos(
    source: str, split: str = "train", columns: Columns | None = None
) -> datasets.IterableDataset:
    """Stream the photos of one split as rows for ``bulk.caption_all``, in bounded memory.

    Args:
        source: as for ``open_source``, or a folder of photos; it needs no captions.
        split: as for ``load_captions``.
        columns: as for ``open_source``.

    Returns:
        rows with ``photo``, the number of the row in the split; ``filename``, the photo's file
        name or id, or None if the data has neither; and ``path`` or ``data``.

    Raises:
        DataError: the source, the split or the column with the photos is missing.
    """
    try:
        opened = open_source(source, columns, captions=False)
        with opened.reading():
            table = opened.table(split_name(split), streaming=True)
            names = columns_of(table)
            image, _ = opened.find_columns(table)
    except DataError as error:
        raise DataError(f"cannot read the split {split!r} of {source}: {error}") from error
    if image is None:
        raise missing_column("image", names, source)
    root = opened.root

    def to_row(cells: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            photo = _stored_photo(cells["image"], root)
        except ImageError:
            photo = b""
        _, path = _bytes_and_path(cells["image"])
        return {
            "photo": str(number),
            "filename": _photo_name({**cells, "image.path": path}, root),
            "path": os.fsencode(photo) if isinstance(photo, Path) else None,
            "data": photo if isinstance(photo, bytes) else None,
        }

    table = _photo_table(table, image)
    return table.map(to_row, with_indices=True, remove_columns=columns_of(table))


# Splits


def split_name(name: str) -> str:
    """Return the usual name of a split: "Val" and "dev" are "validation"."""
    name = name.strip().lower()
    return _SPLIT_NAMES.get(name, name)


def _split_in_cell(cell: object) -> str:
    """Return the split in a cell of the column ``split``; rows of no split are for training."""
    return split_name(str(cell or "train"))


# Rows


def _photo_table(table: Table, image: str) -> Table:
    """Return a table of photos, not decoded, as ``image``, with their names and boxes."""
    names = [name for name in columns_of(table) if name in _OTHER_COLUMNS]
    table = table.select_columns([image, *(name for name in names if name != image)])
    if image != "image":
        table = table.rename_column(image, "image")
    return table.cast_column("image", datasets.Image(decode=False))


@functools.cache
def _fetched_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of the rows that are fetched one by one, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="captioner-", ignore_cleanup_errors=True)


def _fetch(
    table: datasets.IterableDataset, image: str, texts: Sequence[str], limit: int, root: str
) -> datasets.Dataset:
    """Store the rows of the first ``limit`` photos that have a caption."""
    names = [name for name in columns_of(table) if name in _OTHER_COLUMNS]
    table = table.select_columns(list(dict.fromkeys([image, *names, *texts])))
    table = table.cast_column(image, datasets.Image(decode=False))

    def rows() -> Iterator[dict[str, Any]]:
        photos = set[object]()
        for number, row in enumerate(table):
            data, path = _bytes_and_path(row[image])
            if data is None and "://" in _full_path(path or "", root):
                with contextlib.suppress(ImageError):  # reported when the photo is opened
                    row[image] = {"bytes": _stored_photo(row[image], root), "path": path}
            name = _photo_name({**row, "image.path": path}, root)
            if _has_caption(row, texts):
                # Rows of one photo have its name and its data.
                photos.add(number if name is None else (name, data))
                if len(photos) > limit:
                    return
            yield row

    folder = tempfile.mkdtemp(dir=_fetched_folder().name)
    return datasets.Dataset.from_generator(
        rows, features=table.features, cache_dir=folder, fingerprint=Path(folder).name
    )


def _has_caption(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Return whether a row has a caption, or something that will be refused as one."""
    try:
        return any(_cleaned_captions(row[column], column) for column in columns)
    except TypeError:
        return True


def _merge_rows(photos: CaptionedPhotos) -> CaptionedPhotos:
    """Merge the rows of the same photo: those of the same name whose files are equal."""
    names = photos.names()
    counts = Counter(names)
    if len(counts) == len(names):
        return photos
    unreadable = hashlib.sha256(b"").digest()
    first: dict[object, int] = {}
    for row, name in enumerate(names):
        digest = photos.digest(row) if counts[name] > 1 else unreadable
        key: object = row if digest == unreadable else (name, digest)
        if (kept := first.setdefault(key, row)) != row:
            photos.captions[kept] += photos.captions[row]
    return photos.select(list(first.values()))


# Cells


def _read_captions(table: datasets.Dataset, columns: Sequence[str]) -> list[list[str]]:
    """Return the cleaned captions of each row, without touching the photos."""
    batches = table.select_columns(list(columns)).iter(batch_size=1000)
    return [
        [
            text
            for column, cell in zip(batch, cells, strict=True)
            for text in _cleaned_captions(cell, column)
        ]
        for batch in batches
        for cells in zip(*batch.values(), strict=True)
    ]


def _cleaned_captions(cell: Any, column: str) -> list[str]:
    """Return the captions in a cell that hold at least one word."""
    return [cleaned for text in captions_in(cell, column) if text and (cleaned := clean(text))]


def _check_words(name: str, captions: Iterable[Sequence[str]]) -> None:
    """Warn about captions of about one word; ``DataError`` if they need to be segmented."""
    words = mean_words(clean(text) for texts in captions for text in texts)
    if words < ONE_WORD:
        log.warning(
            "%s: the captions have %.1f words on average. Words are split at spaces: if these are "
            "sentences, put spaces between their words; if they are labels, the model learns no "
            "sentences",
            name,
            words,
        )


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    """Return the contents of a cell of the column ``image``; datasets leaves some as stored."""
    if isinstance(cell, Mapping):
        return cell.get("bytes"), cell.get("path")
    return (cell, None) if isinstance(cell, bytes) else (None, cell)


def _full_path(path: str, root: str) -> str:
    """Return the path or address of a photo; relative ones start at ``root``."""
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{root}/{path}" if "://" in root else str(Path(root) / path)


def _stored_photo(cell: Any, root: str) -> bytes | Path | None:
    """Return the bytes or the path in a cell of the column ``image``, None if it is empty."""
    data, path = _bytes_and_path(cell)
    if data is not None or not path:
        return data
    path = _full_path(path, root)
    if "://" in path:  # on the Hub, or inside an archive
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:
            raise ImageError(f"cannot read {path}: {first_line(error)}") from error
    return Path(path)


def _photo_name(row: Mapping[str, Any], root: str) -> str | None:
    """Return a photo's file name, else its path, ``image.path``, else its id, else None."""
    for column in _NAME_COLUMNS:
        if row.get(column):
            return str(row[column])
    if path := row.get("image.path"):
        return _relative_name(path, root)
    ids = (row[column] for column in _ID_COLUMNS if row.get(column) not in (None, ""))
    return next(map(str, ids), None)


def _relative_name(path: str, root: str) -> str:
    """Return a photo's path inside its data set: folders keep equal file names apart."""
    inner = path.split("::")[0].split("://")[-1]  # of zip://folder/a.png::/home/me/photos.zip
    if inner != path:
        return re.sub(r"^datasets/[^/]+/[^/]+/", "", inner)  # hf://datasets/owner/name@commit/
    folder = Path(root)
    for base in (folder, folder.absolute(), folder.resolve()):
        with contextlib.suppress(ValueError):
            return Path(path).relative_to(base).as_posix()
    return Path(path).name if Path(path).is_absolute() else path
