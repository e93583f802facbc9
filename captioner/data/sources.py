"""Photos with captions: from the Hub, a folder of Parquet, or a folder of photos.

Photos stay lazy: a row is decoded when it is asked for, and nothing keeps it.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image

from captioner.config import DEFAULT_SOURCE
from captioner.environment import cache_access
from captioner.errors import ConfigError, DataError, ImageError, causes_of, first_line
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
_LOCAL_WAY = (
    "give a local folder with --data: Parquet files with the columns image and alt_text, or "
    "photos beside a captions.csv (image,caption)"
)


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
        data = _stored_photo(self._table[row]["image"], self.source)
        if data is None:
            raise ImageError(f"row {row} holds no photo")
        return data

    def photo(self, row: int) -> Image.Image:
        """Decode one photo; ``ImageError`` where that fails."""
        return open_photo(self.data(row))

    def captions(self) -> Iterator[list[str]]:
        """Yield each photo's captions, in order, without touching the photos."""
        for batch in self._table.select_columns("alt_text").iter(batch_size=1000):
            yield from (_texts(value) for value in batch["alt_text"])

    def names(self) -> list[str]:
        """Return each photo's file name or id, or its row number if the data has neither."""
        names: list[str | None] = []
        # Without the photos' bytes, unless a file name is stored nowhere else.
        for wanted in (_NAME_COLUMNS, (*_NAME_COLUMNS, "image", *_ID_COLUMNS)):
            columns = [column for column in wanted if column in self._table.column_names]
            names = [
                _photo_name(dict(zip(batch, cells, strict=True)), self.source)
                for batch in self._table.select_columns(columns).iter(batch_size=100)
                for cells in zip(*batch.values(), strict=True)
            ]
            if names and None not in names:
                break
        return [str(row) if name is None else name for row, name in enumerate(names)]

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


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    """Return what a cell of the column ``image`` holds: datasets leaves some cells as stored."""
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
    """Return what the data calls a photo: its file name, else its id, else None."""
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


def split_name(name: str) -> str:
    """Return the usual name of a split: "Val" and "dev" are "validation"."""
    name = name.strip().lower()
    return _SPLIT_NAMES.get(name, name)


@cache_access()
def _open_source(source: str, *, streaming: bool) -> tuple[dict[str, Table], int]:
    """Return the splits of a source, photos not decoded, and how many photos are missing.

    Only streaming reads a folder of photos without captions.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file() and path.name in CAPTION_FILES:
            path = path.parent
        is_folder = path.is_dir()
    except (OSError, RuntimeError):  # no name that a folder could have, or no such user
        is_folder = False
    if not is_folder:
        return _load_from_hub(source, streaming=streaming), 0
    for name in CAPTION_FILES:
        if (path / name).is_file():
            table, missing = _read_captions_file(path / name)
            return {"train": table.to_iterable_dataset() if streaming else table}, missing
    if not streaming and not any(
        next(path.rglob(pattern), None) for pattern in ("*.parquet", *_METADATA_FILES)
    ):
        raise DataError(
            f"{path} holds neither Parquet files nor {' or '.join(CAPTION_FILES)}; {_LOCAL_WAY}"
        )
    try:
        return dict(datasets.load_dataset(str(path), streaming=streaming)), 0
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        if configurations := _configurations(str(error)):
            reason = f"they have several configurations: keep the files of one of {configurations}"
        for file in sorted(path.rglob("*.parquet")):
            with contextlib.suppress(Exception):
                if pyarrow.parquet.read_metadata(file).num_rows == 0:
                    reason = f"{file.relative_to(path)} is empty"
        raise DataError(f"cannot read the Parquet files in {path}: {reason}") from error


def _load_from_hub(source: str, *, streaming: bool) -> dict[str, Table]:
    """Return the splits of a data set on the Hub: owner/name, or owner/name:configuration."""
    hub_id, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_id, flags=re.ASCII):
        raise DataError(f"there is no folder {source}, and it is no Hub id (owner/name)")
    try:
        return dict(datasets.load_dataset(hub_id, configuration or None, streaming=streaming))
    except Exception as error:
        raise DataError(
            f"cannot load {source} from the Hugging Face Hub ({type(error).__name__}: "
            f"{first_line(error)[:160]}). {_hub_way_out(hub_id, error)}, or {_LOCAL_WAY}"
        ) from error


def _configurations(text: str) -> str:
    """Return the configurations among which an error of datasets asks to choose, or nothing."""
    found = re.search(r"[Aa]vailable(?: configs)?: (\[.*\])", text)
    return ", ".join(ast.literal_eval(found[1])) if found else ""


def _hub_way_out(hub_id: str, error: BaseException) -> str:
    """Say what to do about an error of the Hub."""
    causes = causes_of(error)
    text = "\n".join(map(str, causes))
    kinds = tuple(map(type, causes))
    if GatedRepoError in kinds or "gated dataset" in text:
        return (
            f"It is gated: accept its terms on https://huggingface.co/datasets/{hub_id} and run "
            "`hf auth login`"
        )
    if configurations := _configurations(text):
        return f"Choose a configuration, as in {hub_id}:NAME, from {configurations}"
    if "OfflineModeIsEnabled" in text or "HF_HUB_OFFLINE" in text:
        return "HF_HUB_OFFLINE is set: unset it and check your internet connection"
    if RepositoryNotFoundError in kinds or datasets.exceptions.DatasetNotFoundError in kinds:
        return "There is no such data set, or it is private: check the name or run `hf auth login`"
    return "Check the name and your internet connection"


def _columns(table: Table) -> list[str]:
    """Return the columns; a stream may know them only from its first row."""
    return list(table.column_names or next(iter(table), {}))


def _choose_split(source: str, splits: Mapping[str, Table], split: str) -> Table:
    """Return one split; a single table for all is divided by its column ``split``."""

    def name_of(cell: str | None) -> str:
        return split_name(str(cell or "train"))

    named = {split_name(name): table for name, table in splits.items()}
    names = list(named)
    (table, *others) = named.values()
    if not others and "split" in _columns(table):
        if isinstance(table, datasets.Dataset):
            names = [name_of(cell) for cell in table["split"]]
            rows = [row for row, name in enumerate(names) if name == split]
            named = {split: table.select(rows)}
        else:
            names = []
            for row in table.select_columns("split"):
                if (name := name_of(row["split"])) not in names:
                    names.append(name)
                if name == split:  # far enough: the rest may be gigabytes
                    break
            if "image" in _columns(table):  # or the filter would decode every photo
                table = table.cast_column("image", datasets.Image(decode=False))
            named = {split: table.filter(lambda row: name_of(row["split"]) == split)}
    if split not in names:
        raise DataError(
            f"{source} has no split {split!r}, only: {', '.join(dict.fromkeys(names))}; choose one "
            "of these"
        )
    return named[split]


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

    def row(values: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            photo = _stored_photo(values["image"], source)
        except ImageError:
            photo = b""
        return {
            "photo": str(number),
            "filename": _photo_name(values, source),
            "path": os.fsencode(photo) if isinstance(photo, Path) else None,
            "data": photo if isinstance(photo, bytes) else None,
        }

    table = table.cast_column("image", datasets.Image(decode=False))
    return table.map(row, with_indices=True, remove_columns=columns)


def load_captions(
    source: str = DEFAULT_SOURCE, split: str = "train", *, limit: int = 0
) -> CaptionedPhotos:
    """Load one split of photos with captions.

    Args:
        source: a Hub id, with ``:NAME`` behind it if there are several configurations; a folder
            of Parquet with the columns ``image`` and ``alt_text`` (others are optional); or a
            folder of photos with ``captions.csv`` or ``captions.txt`` (``image,caption``, several
            lines per photo, ``split`` optional).
        split: "train", "validation" or "test", in any case, or "val", "valid" or "dev".
        limit: at most so many photos, from the start; 0 takes all.

    Raises:
        DataError: the source, the split or a column is missing, no row has a caption, or the
            captions have no spaces between words.
    """
    if limit < 0:
        raise ConfigError(f"limit is {limit}; it must be 0, which takes all, or more")
    splits, missing = _open_source(source, streaming=False)
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
        photos = CaptionedPhotos(source, split, table)
        captions = list(photos.captions())
    except (
        *(TypeError, ValueError, AttributeError),
        *(datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    ) as error:
        raise DataError(
            f"{source}: the columns must hold photos (image) and lists of text (alt_text): "
            f"{first_line(error)}"
        ) from error
    captioned = [row for row, texts in enumerate(captions) if texts]
    if not captioned:
        raise DataError(f"the split {split!r} of {source} has no photo with a caption")
    _check_words(f"{source} {split}", captions)
    photos.skipped = len(table) - len(captioned)
    if photos.skipped:
        log.warning("%s %s: skipped %d rows without a caption", source, split, photos.skipped)
    if photos.skipped or (limit and limit < len(captioned)):
        photos = photos.select(captioned[: limit or None])
    photos.skipped += missing
    return photos


def _check_words(what: str, captions: Iterable[Sequence[str]]) -> None:
    """Warn about captions of about one word; ``DataError`` if they need to be segmented."""
    words = mean_words(clean(text) for texts in captions for text in texts)
    if words < ONE_WORD:
        log.warning(
            "%s: the captions have %.1f words on average. Words are split at spaces: if these are "
            "sentences, put spaces between their words; if they are labels, the model learns no "
            "sentences",
            what,
            words,
        )


@cache_access()
def load_texts(source: str) -> list[list[str]]:
    """Read captions without photos: Parquet files with the column ``alt_text``, five a row or so.

    Raises:
        DataError: they cannot be read, or hold no caption.
    """
    try:
        splits, _ = _open_source(source, streaming=False)
        table = _choose_split(source, splits, "train")
        rows = [_texts(value) for value in table["alt_text"]]
    except Exception as error:
        raise DataError(
            f"cannot read captions from {source} ({first_line(error)[:160]}); give a folder of "
            "Parquet files with the column alt_text"
        ) from error
    if not any(rows):
        raise DataError(f"{source} holds no caption")
    _check_words(source, rows)
    return [row for row in rows if row]
