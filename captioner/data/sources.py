"""Photos with captions: from the Hub, a folder of Parquet, or a folder of photos.

Photos stay encoded until they are requested. Captions are cleaned here, where they enter.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
from PIL import Image

from captioner.config import DEFAULT_SOURCE, split_share
from captioner.environment import cache_access
from captioner.errors import ConfigError, DataError, ImageError, causes_of, first_line, hub_reason
from captioner.images import open_photo
from captioner.model.vocabulary import ONE_WORD, clean, mean_words

log = logging.getLogger(__name__)

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset

CAPTION_FILES = ("captions.csv", "captions.txt")
_METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # beside photos, read by datasets
# Columns with a photo's file name, and those that identify it if there is no file name.
_NAME_COLUMNS = ("filename", "file_name", "image_name")
_ID_COLUMNS = ("img_id", "image_id", "__key__", "id")
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
_LOCAL_DATA_HINT = (
    "give a local folder with --data: Parquet files with the columns image and alt_text, or "
    "photos beside a captions.csv (image,caption)"
)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A source of a training run.

    Attributes:
        source: as for ``load_captions``.
        name: short and unique in the run: the last part of its path or Hub id, or more of them if
            that is the name of another source too.
        share: its share of each epoch, above 0 to 1; None if it has its part of the rest.
        is_local: whether it is a path of this machine.
    """

    source: str
    name: str
    share: float | None
    is_local: bool

    @property
    def portable(self) -> str:
        """The source with its share, without the path of this machine."""
        source = self.name if self.is_local else self.source
        return source if self.share is None else f"{source}={self.share}"


def parse_sources(texts: Sequence[str]) -> list[DataSource]:
    """Parse the sources of a run, each with an optional share, as in "photos=0.3".

    Raises:
        ConfigError: a share is not above 0 and at most 1, the shares leave no or too much of the
            epoch, or a source is given twice.
    """
    parsed = [_parse_share(text) for text in texts]
    paths = [_local_path(source) for source, _ in parsed]
    places = [
        path.resolve() if path else Path(source)
        for (source, _), path in zip(parsed, paths, strict=True)
    ]
    for number, (source, _) in enumerate(parsed):
        if places[number] in places[:number]:
            raise ConfigError(f"--data {source} is given twice: give each source once")
    _check_shares(parsed)
    names = next(
        names
        for depth in itertools.count(1)
        if len(set(names := ["/".join(place.parts[-depth:]) for place in places])) == len(places)
    )
    return [
        DataSource(source, name, share, path is not None)
        for (source, share), name, path in zip(parsed, names, paths, strict=True)
    ]


def _parse_share(text: str) -> tuple[str, float | None]:
    """Split "photos=0.3" into source and share, unless it is a path as a whole."""
    source, written = ("", "") if _local_path(text) else split_share(text)
    if not written:
        return text, None
    try:
        share = float(written)
    except ValueError:
        raise DataError(
            f"there is no {text}, and {written!r} is not a share of an epoch: write "
            f"--data {source} or --data {source}=0.5"
        ) from None
    if not 0 < share <= 1:
        raise ConfigError(
            f"the share of {source} is {written}; it must be a number above 0 and at most 1"
        )
    return source, share


def _check_shares(parsed: Sequence[tuple[str, float | None]]) -> None:
    """Raise ``ConfigError`` unless the shares leave a rest exactly if sources divide it."""
    total = sum(share or 0.0 for _, share in parsed)
    others = [source for source, share in parsed if share is None]
    is_whole = math.isclose(total, 1)
    if total > 1 and not is_whole:
        raise ConfigError(f"the shares of --data add up to {total:g}; they can be 1 at most")
    if others and is_whole:
        raise ConfigError(
            f"the shares of --data leave nothing for {', '.join(others)}: lower them, or leave it "
            "out"
        )
    if not others and not is_whole:
        raise ConfigError(
            f"the shares of --data add up to {total:g}: raise them to 1, or leave one source "
            "without a share, which then gets the rest"
        )


def _local_path(source: str) -> Path | None:
    """Return the folder of a local source, or another path of this name; None if there is none."""
    try:
        path = Path(source).expanduser()
        if path.is_file() and path.name in CAPTION_FILES:
            path = path.parent
        return path if path.exists() else None
    except (OSError, RuntimeError):  # an impossible path, or no such user
        return None


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
        skipped: int = 0,
    ) -> None:
        """Wrap ``table``, whose column ``image`` must not decode."""
        self.source, self.split = source, split
        self.captions, self.skipped = captions, skipped
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def select(self, rows: Sequence[int]) -> CaptionedPhotos:
        """Return a view of these rows."""
        captions = [self.captions[row] for row in rows]
        table = self._table.select(rows)
        return CaptionedPhotos(self.source, self.split, table, captions, self.skipped)

    def data(self, row: int) -> bytes | Path:
        """Return one photo's file as it is stored: its bytes, or its path."""
        data = _stored_photo(self._table[row]["image"], self.source)
        if data is None:
            raise ImageError(f"row {row} holds no photo")
        return data

    def photo(self, row: int) -> Image.Image:
        """Decode one photo; ``ImageError`` if that fails."""
        return open_photo(self.data(row))

    def names(self) -> list[str]:
        """Return each photo's file name or id, or its row number if the data has neither."""
        names: list[str | None] = []
        # Without the photos' bytes, unless a file name is stored nowhere else.
        for candidates in (_NAME_COLUMNS, (*_NAME_COLUMNS, "image", *_ID_COLUMNS)):
            columns = [column for column in candidates if column in self._table.column_names]
            names = [
                _photo_name(dict(zip(batch, cells, strict=True)), self.source)
                for batch in self._table.select_columns(columns).iter(batch_size=100)
                for cells in zip(*batch.values(), strict=True)
            ]
            if names and None not in names:
                break
        return [str(row) if name is None else name for row, name in enumerate(names)]

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
            try:
                data = self.data(row)
                data = data.read_bytes() if isinstance(data, Path) else data
            except (ImageError, OSError, ValueError):  # ValueError: an impossible file name
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def load_captions(
    source: str = DEFAULT_SOURCE, split: str = "train", *, limit: int = 0
) -> CaptionedPhotos:
    """Load one split of photos with captions.

    Args:
        source: a Hub id, followed by ``:NAME`` if there are several configurations; a folder of
            Parquet with the columns ``image`` and ``alt_text`` (others are optional); or a folder
            of photos with ``captions.csv`` or ``captions.txt`` (``image,caption``, several lines
            per photo, ``split`` optional).
        split: "train", "validation" or "test", in any case, or "val", "valid" or "dev".
        limit: the maximum number of photos, from the start; 0 means all.

    Raises:
        DataError: the source, the split or a column is missing, no row has a caption, or the
            captions have no spaces between words.
    """
    if limit < 0:
        raise ConfigError(f"limit is {limit}; it must be 0 (all photos) or more")
    splits, num_missing = _open_source(source, streaming=False)
    split = split_name(split)
    for table in splits.values():
        for column in ("image", "alt_text"):
            if column not in table.column_names:
                raise DataError(
                    f"{source} has no column {column!r}, only: {', '.join(table.column_names)}; "
                    "image and alt_text are needed"
                )
    table = _choose_split(source, splits, split)
    try:
        table = table.cast_column("image", datasets.Image(decode=False))
        captions = _read_captions(table)
    except (
        *(TypeError, ValueError, AttributeError),
        *(datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    ) as error:
        raise DataError(
            f"{source}: the columns must hold photos (image) and lists of text (alt_text): "
            f"{first_line(error)}"
        ) from error
    rows = [row for row, texts in enumerate(captions) if texts]
    if not rows:
        raise DataError(f"the split {split!r} of {source} has no photo with a caption")
    _check_words(f"{source} {split}", captions)
    if num_empty := len(table) - len(rows):
        log.warning("%s %s: skipped %d rows without a caption", source, split, num_empty)
    photos = CaptionedPhotos(source, split, table, captions, num_empty + num_missing)
    return photos.select(rows[: limit or None])


@cache_access()
def load_texts(source: str) -> list[list[str]]:
    """Read captions without photos from the column ``alt_text`` of Parquet files.

    Returns:
        the cleaned captions of each row that has any.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    try:
        splits, _ = _open_source(source, streaming=False)
        captions = _read_captions(_choose_split(source, splits, "train"))
    except Exception as error:
        raise DataError(
            f"cannot read captions from {source} ({first_line(error)[:160]}); give a folder of "
            "Parquet files with the column alt_text"
        ) from error
    if not any(captions):
        raise DataError(f"{source} holds no caption")
    _check_words(source, captions)
    return [texts for texts in captions if texts]


def stream_photos(source: str, split: str = "train") -> datasets.IterableDataset:
    """Stream the photos of one split as rows for ``bulk.caption_all``, in bounded memory.

    Args:
        source: as for ``load_captions``, or a folder of photos with or without a
            ``metadata.csv``, as ``datasets`` reads them. It needs no captions.
        split: as for ``load_captions``.

    Returns:
        rows with ``photo``, the number of the row in the split; ``filename``, the photo's file
        name or id, or None if the data has neither; and ``path`` or ``data``.

    Raises:
        DataError: the source, the split or the column ``image`` is missing.
    """
    try:
        splits, _ = _open_source(source, streaming=True)
    except DataError as error:
        raise DataError(f"cannot read the split {split!r} of {source}: {error}") from error
    try:
        table = _choose_split(source, splits, split_name(split))
        columns = _columns(table)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot read the split {split!r} of {source}: {first_line(error)[:160]}"
        ) from error
    if "image" not in columns:
        raise DataError(f"{source} has no column 'image', only: {', '.join(columns)}")

    def to_row(cells: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            photo = _stored_photo(cells["image"], source)
        except ImageError:
            photo = b""
        return {
            "photo": str(number),
            "filename": _photo_name(cells, source),
            "path": os.fsencode(photo) if isinstance(photo, Path) else None,
            "data": photo if isinstance(photo, bytes) else None,
        }

    table = table.cast_column("image", datasets.Image(decode=False))
    return table.map(to_row, with_indices=True, remove_columns=columns)


# Readers


@cache_access()
def _open_source(source: str, *, streaming: bool) -> tuple[dict[str, Table], int]:
    """Return the splits of a source, photos not decoded, and the number of missing photos.

    Only streaming reads a folder of photos without captions.
    """
    path = _local_path(source)
    if path is None or not path.is_dir():
        return _load_from_hub(source, streaming=streaming), 0
    for name in CAPTION_FILES:
        if (path / name).is_file():
            table, num_missing = _read_captions_file(path / name)
            return {"train": table.to_iterable_dataset() if streaming else table}, num_missing
    if not streaming and not any(
        next(path.rglob(pattern), None) for pattern in ("*.parquet", *_METADATA_FILES)
    ):
        raise DataError(
            f"{path} holds neither Parquet files nor {' or '.join(CAPTION_FILES)}; "
            f"{_LOCAL_DATA_HINT}"
        )
    try:
        return dict(datasets.load_dataset(str(path), streaming=streaming)), 0
    except Exception as error:
        raise DataError(
            f"cannot read the Parquet files in {path}: {_parquet_reason(path, error)}"
        ) from error


def _parquet_reason(folder: Path, error: Exception) -> str:
    """Return why ``datasets`` cannot read a folder."""
    for file in sorted(folder.rglob("*.parquet")):
        with contextlib.suppress(Exception):
            if pyarrow.parquet.read_metadata(file).num_rows == 0:
                return f"{file.relative_to(folder)} is empty"
    if names := _configurations(error):
        return f"they have several configurations: keep the files of one of {names}"
    return first_line(error.__cause__ or error)


def _load_from_hub(source: str, *, streaming: bool) -> dict[str, Table]:
    """Return the splits of a data set on the Hub: owner/name, or owner/name:configuration."""
    hub_id, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_id, flags=re.ASCII):
        raise DataError(f"there is no folder {source}, and it is not a Hub id (owner/name)")
    try:
        return dict(datasets.load_dataset(hub_id, configuration or None, streaming=streaming))
    except Exception as error:
        if names := _configurations(error):
            reason = f"choose a configuration, as in {hub_id}:NAME, from {names}"
        else:
            reason = hub_reason(error, f"datasets/{hub_id}")
        raise DataError(
            f"cannot load {source} from the Hugging Face Hub: {reason}. For local data, "
            f"{_LOCAL_DATA_HINT}"
        ) from error


def _configurations(error: BaseException) -> str:
    """Return the names that an error of ``datasets`` asks to choose from, or an empty string."""
    match = re.search(r"[Aa]vailable(?: configs)?: (\[.*\])", "\n".join(map(str, causes_of(error))))
    return ", ".join(ast.literal_eval(match[1])) if match else ""


def _read_captions_file(path: Path) -> tuple[datasets.Dataset, int]:
    """Return the photos that a captions file names, and the number of missing ones."""
    folder = next(
        (path.parent / name for name in ("Images", "images") if (path.parent / name).is_dir()),
        path.parent,
    ).resolve()
    try:
        captions, splits = _parse_captions_file(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8 CSV") from error
    names = [name for name in captions if name and _is_file(folder / name)]
    if not names:
        raise DataError(
            f"{path} names {len(captions)} photos, but none of them is in {folder}"
            + (f" (the first is {next(iter(captions))!r})" if captions else "")
        )
    if num_missing := len(captions) - len(names):
        log.warning("%s: %d of %d photos are not in %s", path, num_missing, len(captions), folder)
    table = datasets.Dataset.from_dict(
        {
            "image": [str(folder / name) for name in names],
            "alt_text": [captions[name] for name in names],
            "filename": names,
            "split": [splits[name] for name in names],
        }
    )
    return table, num_missing


def _parse_captions_file(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return each photo's captions and split from ``image,caption[,split]`` lines."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        fields = [name.strip() for name in next(reader, [])]
        for column in ("image", "caption"):
            if column not in fields:
                raise DataError(
                    f"{path} has no column {column!r} in its first line, only: "
                    f"{', '.join(fields) or 'nothing'}; start it with image,caption"
                )
        start = fields.index("caption")
        for cells in filter(None, reader):
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise DataError(
                    f"{path}: a file name or a caption spans several lines up to line "
                    f"{reader.line_num}: close the quotation mark before it, or rename the file"
                )
            # Unquoted commas split a caption; join it again.
            end = start + 1 + max(len(cells) - len(fields), 0)
            cells[start:end] = [", ".join(cells[start:end])]
            row = dict(zip(fields, cells, strict=False))
            name = row.get("image", "").strip()
            captions.setdefault(name, []).append(row.get("caption", ""))
            splits[name] = row.get("split", "").strip() or "train"
    return captions, splits


def _is_file(path: Path) -> bool:
    """Return whether a file exists; one with an impossible name does not."""
    try:
        return path.is_file()
    except OSError:
        return False


# Splits


def split_name(name: str) -> str:
    """Return the usual name of a split: "Val" and "dev" are "validation"."""
    name = name.strip().lower()
    return _SPLIT_NAMES.get(name, name)


def _choose_split(source: str, splits: Mapping[str, Table], split: str) -> Table:
    """Return one split; a single table is divided by its column ``split``, if it has one."""
    tables = {split_name(name): table for name, table in splits.items()}
    names: Iterable[str] = tables
    (table, *others) = tables.values()
    if not others and "split" in _columns(table):
        names, tables[split] = _rows_of_split(table, split)
    if split not in names:
        raise DataError(
            f"{source} has no split {split!r}, only: {', '.join(names)}; choose one of these"
        )
    return tables[split]


def _rows_of_split(table: Table, split: str) -> tuple[list[str], Table]:
    """Return the names in the column ``split``, and the rows of one of them."""

    def name_of(cell: str | None) -> str:
        return split_name(str(cell or "train"))

    if isinstance(table, datasets.Dataset):
        cells = [name_of(cell) for cell in table["split"]]
        rows = [row for row, name in enumerate(cells) if name == split]
        return list(dict.fromkeys(cells)), table.select(rows)
    names: dict[str, None] = {}
    for row in table.select_columns("split"):
        names[name_of(row["split"])] = None
        if split in names:  # the rest may be gigabytes
            break
    if "image" in _columns(table):  # or the filter would decode every photo
        table = table.cast_column("image", datasets.Image(decode=False))
    return list(names), table.filter(lambda row: name_of(row["split"]) == split)


def _columns(table: Table) -> list[str]:
    """Return the column names; a stream may learn them only from its first row."""
    return list(table.column_names or next(iter(table), {}))


# Cells


def _read_captions(table: datasets.Dataset) -> list[list[str]]:
    """Return the cleaned captions of each row, without touching the photos."""
    batches = table.select_columns("alt_text").iter(batch_size=1000)
    return [_cleaned_captions(cell) for batch in batches for cell in batch["alt_text"]]


def _cleaned_captions(cell: str | Sequence[str] | None) -> list[str]:
    """Return the captions that hold at least one word; a bare string is one caption."""
    texts = [cell] if isinstance(cell, str) else cell or []
    if not isinstance(texts, list):
        raise TypeError(f"captions cannot be a {type(cell).__name__}")
    return [cleaned for text in texts if text and (cleaned := clean(text))]


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


def _stored_photo(cell: Any, source: str) -> bytes | Path | None:
    """Return the bytes or the path in a cell of the column ``image``, None if it is empty."""
    data, path = _bytes_and_path(cell)
    if data is not None or not path:
        return data
    if "://" in path:  # on the Hub, or inside an archive
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:
            raise ImageError(f"cannot read {path}: {first_line(error)}") from error
    # Relative paths start at the folder of the data.
    return Path(source).expanduser() / path


def _photo_name(row: Mapping[str, Any], source: str) -> str | None:
    """Return a photo's file name, else its id, else None."""
    for column in _NAME_COLUMNS:
        if row.get(column):
            return str(row[column])
    _, path = _bytes_and_path(row.get("image"))
    if path:
        return _relative_name(path, source)
    ids = (row[column] for column in _ID_COLUMNS if row.get(column) not in (None, ""))
    return next(map(str, ids), None)


def _relative_name(path: str, source: str) -> str:
    """Return a photo's path inside its data set: folders keep equal file names apart."""
    inner = path.split("::")[0].split("://")[-1]  # of zip://folder/a.png::/home/me/photos.zip
    if inner != path:
        return re.sub(r"^datasets/[^/]+/[^/]+/", "", inner)  # hf://datasets/owner/name@commit/
    folder = Path(source).expanduser()
    for root in (folder, folder.absolute(), folder.resolve()):
        with contextlib.suppress(ValueError):
            return Path(path).relative_to(root).as_posix()
    return Path(path).name if Path(path).is_absolute() else path
