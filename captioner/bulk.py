"""Captions for any number of photos, in bounded memory, into a folder of Parquet files.

A job that was stopped goes on where it stood. Knows nothing of the command line.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from captioner.config import DecodingOptions
from captioner.errors import DataError, ImageError, first_line
from captioner.predictor import Captioner

SCHEMA = pa.schema(
    [
        ("photo", pa.string()),  # its path as given, or its row in the data
        ("filename", pa.string()),  # without folders, or as the data calls it
        ("caption", pa.string()),
        ("log_probability", pa.float32()),
        ("error", pa.string()),  # why there is no caption
    ]
)
_BATCH = 64  # photos captioned at once
_PART = 512  # photos a file, and at most lost by a kill


def photos_at(paths: Callable[[], Iterable[Path]]) -> datasets.IterableDataset:
    """Return the photos at the paths that ``paths`` yields as rows for ``caption_all``."""

    def rows() -> Iterator[dict[str, Any]]:
        for path in paths():
            # A file's name may be no valid text.
            photo, filename = (
                os.fsencode(text).decode(errors="backslashreplace") for text in (path, path.name)
            )
            yield {"photo": photo, "filename": filename, "path": os.fsencode(path), "data": None}

    return datasets.IterableDataset.from_generator(rows)


def photos_of(source: str, split: str = "train") -> datasets.IterableDataset:
    """Stream the photos of a Hub id or a folder of Parquet as rows for ``caption_all``.

    Args:
        source: has a column ``image``; needs no captions.
        split: of the data.

    Raises:
        DataError: it cannot be had, or has no such split or column.
    """
    try:
        table = datasets.load_dataset(source, split=split, streaming=True)
        columns = list(table.column_names or next(iter(table)))
    except Exception as error:
        raise DataError(
            f"cannot read the split {split!r} of {source} ({first_line(error)[:160]}): give a Hub "
            "id or a folder of Parquet files, and one of its splits"
        ) from error
    if "image" not in columns:
        raise DataError(f"{source} has no column 'image', only: {', '.join(columns)}")
    name = next((name for name in ("filename", "img_id") if name in columns), None)

    def row(values: dict[str, Any], number: int) -> dict[str, Any]:
        image = values["image"] or {"bytes": None, "path": None}
        path = image["path"] if image["bytes"] is None else None
        return {
            "photo": str(number),
            "filename": str(values[name]) if name else None,
            # Paths in a local folder's Parquet are meant from there.
            "path": os.fsencode(Path(source, path)) if path else None,
            "data": image["bytes"],
        }

    table = table.cast_column("image", datasets.Image(decode=False))
    return table.map(row, with_indices=True, remove_columns=columns)


def _caption(
    captioner: Captioner, options: DecodingOptions, rows: dict[str, list[Any]]
) -> pa.Table:
    """Turn columns of photos into a table of ``SCHEMA``."""
    photos = [
        data if data is not None else (b"" if path is None else Path(os.fsdecode(path)))
        for path, data in zip(rows["path"], rows["data"], strict=True)
    ]
    found: list[dict[str, Any]] = [
        {"error": str(each)}
        if isinstance(each, ImageError)
        else {"caption": each.text, "log_probability": each.log_probability}
        for each in captioner.caption_each(photos, options)
    ]
    names = {column: rows[column] for column in ("photo", "filename")}
    written = ("caption", "log_probability", "error")
    return pa.table(
        names | {column: [row.get(column) for row in found] for column in written}, schema=SCHEMA
    )


def _key(photo: str) -> int:
    """Return 64 bits that stand for a photo: names would fill the memory."""
    return int.from_bytes(hashlib.blake2b(photo.encode(), digest_size=8).digest())


def _done(output: Path) -> np.ndarray:
    """Return the sorted keys of the photos that ``output`` has rows of."""
    keys: list[np.ndarray] = [np.empty(0, np.uint64)]
    for part in sorted(output.glob("*.parquet")):
        try:
            file = pq.ParquetFile(part)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{part} is damaged: delete it, and its photos are captioned again"
            ) from error
        if file.schema_arrow.names != SCHEMA.names:
            raise DataError(
                f"{part} is no file of captions (its columns are "
                f"{', '.join(file.schema_arrow.names)}): choose another --output"
            )
        for batch in file.iter_batches(columns=["photo"]):
            photos = batch.column(0).to_pylist()
            keys.append(np.fromiter(map(_key, photos), np.uint64, len(photos)))
    return np.sort(np.concatenate(keys))


def _is_in(keys: np.ndarray, key: int) -> bool:
    place = np.searchsorted(keys, np.uint64(key))
    return bool(place < len(keys) and keys[place] == key)


def caption_all(
    captioner: Captioner, photos: datasets.IterableDataset, output: Path, options: DecodingOptions
) -> tuple[int, int]:
    """Write a row of ``SCHEMA`` for each photo that ``output`` has none of yet.

    Args:
        captioner: captions them.
        photos: from ``photos_at`` or ``photos_of``.
        output: a folder of Parquet files, which datasets, pandas, DuckDB and their like read as
            one table.
        options: of the decoding.

    Returns:
        how many photos have a row in ``output`` now, and how many of those have an error.

    Raises:
        DataError: ``output`` is something else.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file: choose another --output, which becomes a folder")
    output.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(output / ".lock", timeout=0):
            return _caption_all(captioner, photos, output, options)
    except filelock.Timeout as error:
        raise DataError(f"another process is writing into {output}") from error


def _caption_all(
    captioner: Captioner, photos: datasets.IterableDataset, output: Path, options: DecodingOptions
) -> tuple[int, int]:
    """Do what ``caption_all`` says, alone in ``output``."""
    for partial in output.glob(".*.part"):
        partial.unlink()  # of a job that was killed
    done = _done(output)
    left = photos.filter(lambda row: not _is_in(done, _key(row["photo"])))
    batches = left.iter(batch_size=_BATCH)
    with tqdm(desc="captions", unit="photo", initial=len(done), smoothing=0.05) as bar:
        while True:
            tables = []
            for batch in itertools.islice(batches, _PART // _BATCH):
                tables.append(_caption(captioner, options, batch))
                bar.update(len(tables[-1]))
            if not tables:
                break
            # Whole or not at all: a file that is being written has another name.
            name = f"{uuid.uuid4().hex}.parquet"
            partial = output / f".{name}.part"
            pq.write_table(pa.concat_tables(tables), partial)
            partial.replace(output / name)
    return _count(output)


def _count(output: Path) -> tuple[int, int]:
    rows = errors = 0
    for part in output.glob("*.parquet"):
        column = pq.read_table(part, columns=["error"]).column("error")
        rows, errors = rows + len(column), errors + len(column) - column.null_count
    return rows, errors
