"""Captions for any number of photos, in bounded memory, into a folder of Parquet files.

A job that was stopped goes on where it stood. Knows nothing of the command line, and has no
scheduler of its own: many workers are Ray Data's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from captioner.caches import cache_access
from captioner.config import DecodingOptions
from captioner.errors import CaptionerError, ConfigError, DataError, ImageError, first_line
from captioner.files import claimed, write_whole, writing
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
# What the photos come as.
_ROWS = pa.schema(
    [
        ("photo", pa.string()),
        ("filename", pa.string()),
        ("path", pa.binary()),  # where the file lies,
        ("data", pa.binary()),  # or what is in it
    ]
)
ENGINES = ("local", "ray")
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


@cache_access()
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
    load: Callable[[], Captioner],
    photos: datasets.IterableDataset,
    output: Path,
    options: DecodingOptions,
    *,
    source: str = "",
    engine: str = "local",
    workers: int = 2,
    gpus: int = 0,
) -> tuple[int, int]:
    """Write a row of ``SCHEMA`` for each photo that ``output`` has none of yet.

    Args:
        load: makes the captioner, with "ray" once in each worker.
        photos: from ``photos_at`` or ``photos_of``.
        output: a folder of Parquet files, which datasets, pandas, DuckDB and their like read as
            one table. With "ray" all machines need to see it, and the photos' files.
        options: of the decoding.
        source: the data and split whose rows the photos are; paths stand for themselves.
        engine: "local", or "ray": Ray Data, on this machine or on the cluster of ``RAY_ADDRESS``.
        workers: of Ray, each with its own model.
        gpus: of each worker.

    Returns:
        how many photos have a row in ``output`` now, and how many of those have an error.

    Raises:
        ConfigError: the engine is unknown or not installed, ``workers`` is no number of them, or
            ``output`` is a file, or holds captions of other data, options or another checkpoint.
        DataError: ``output`` holds something else, or the photos cannot be read on.
        WriteError: ``output`` cannot be written.
        CheckpointError: the checkpoint cannot be loaded.
        EncoderError: the encoder's weights cannot be had.
        CaptionerError: a worker failed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if not 1 <= workers <= 10_000:
        raise ConfigError(f"workers is {workers}; it must be a whole number from 1 to 10000")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: choose another --output, which becomes a folder")
    captioner = load()  # with "ray" too: what is wrong with it is told before anything starts
    with claimed(output):
        done = _done(output)
        _begin(output, source, captioner, options)
        left = photos.filter(lambda row: not _is_in(done, _key(row["photo"])))
        with tqdm(desc="captions", unit="photo", initial=len(done), smoothing=0.05) as bar:
            if engine == "ray":
                del captioner
                _with_ray(load, left, output, options, workers, gpus, bar)
            else:
                _alone(captioner, left, output, options, bar)
        return _count(output)


def _begin(output: Path, source: str, captioner: Captioner, options: DecodingOptions) -> None:
    """Clear away what a kill left; write down whose captions these are, or refuse other ones."""
    for partial in output.glob(f".{'?' * 32}.part"):
        partial.unlink()
    weights = hashlib.sha256()
    for _, tensor in sorted(captioner.checkpoint.model.state_dict().items()):
        weights.update(tensor.cpu().numpy().tobytes())
    job = {"data": source, "weights": weights.hexdigest(), "options": options.to_dict()}
    path = output / ".job.json"
    try:
        before = json.loads(path.read_bytes())
        others = [name for name in job if before[name] != job[name]]
    except (OSError, ValueError, LookupError, TypeError):  # none there, or one that is damaged
        others = []
    if others and any(output.glob("*.parquet")):
        raise ConfigError(
            f"{output} holds captions of other {' and '.join(others)}: choose another --output"
        )
    write_whole(path, json.dumps(job, indent=1).encode())


def _batches(photos: datasets.IterableDataset) -> Iterator[dict[str, list[Any]]]:
    """Read on; a file of the data may be damaged, and is opened late."""
    try:
        yield from photos.iter(batch_size=_BATCH)
    except Exception as error:
        raise DataError(
            f"the photos cannot be read on ({first_line(error)[:160]}): mend the data and start "
            "again; what is written stays"
        ) from error


def _alone(
    captioner: Captioner,
    photos: datasets.IterableDataset,
    output: Path,
    options: DecodingOptions,
    bar: tqdm[Any],
) -> None:
    """Caption in this process."""
    batches = _batches(photos)
    while True:
        tables = []
        try:
            for batch in itertools.islice(batches, _PART // _BATCH):
                tables.append(_caption(captioner, options, batch))
                bar.update(len(tables[-1]))
        finally:  # after Ctrl-C too
            if tables:
                _write(pa.concat_tables(tables), output)
        if not tables:
            break


class _Worker:
    """Captions and writes a file's rows at a time, in a process of Ray's."""

    def __init__(
        self, load: Callable[[], Captioner], options: DecodingOptions, output: Path
    ) -> None:
        self._captioner, self._options, self._output = load(), options, output

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[int]]:
        """Return how many rows were written."""
        _write(_caption(self._captioner, self._options, rows), self._output)
        return {"rows": [len(rows["photo"])]}


def _with_ray(
    load: Callable[[], Captioner],
    photos: datasets.IterableDataset,
    output: Path,
    options: DecodingOptions,
    workers: int,
    gpus: int,
    bar: tqdm[Any],
) -> None:
    """Read in one task of Ray's, caption and write in its workers."""
    try:
        import ray
        import ray.data
        from ray.data.block import BlockMetadata
    except ImportError as error:
        raise ConfigError(
            'the engine "ray" is not installed: pip install "ray[data]", or leave --engine away'
        ) from error

    def read() -> Iterator[pa.Table]:
        for batch in _batches(photos):
            yield pa.table(batch, schema=_ROWS)

    class Stream(ray.data.Datasource):
        """The photos one after the other; Ray's own reader of datasets takes no such stream."""

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
            return [ray.data.ReadTask(read, BlockMetadata(None, None, None))]

    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        # Reading is light, and must go on where the workers hold all processors.
        rows = ray.data.read_datasource(
            Stream(),  # type: ignore[no-untyped-call]
            override_num_blocks=1,
            num_cpus=0,
        )
        written = rows.map_batches(
            _Worker,
            fn_constructor_args=(load, options, output.resolve()),
            batch_size=_PART,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus or None,
            # A photo that ends its worker ends the job, not before it was tried again.
            max_restarts=3,
            max_task_retries=3,
        )
        for row in written.iter_rows():
            bar.update(row["rows"])
    except ray.exceptions.RayError as error:
        # Our own error stands in the midst of Ray's; of others the last line says why.
        lines = [line for line in str(error).splitlines() if line.strip()]
        own = [line.partition(": ")[2] for line in lines if line.startswith("captioner.errors.")]
        why = (own or lines)[-1]
        raise CaptionerError(
            f"a worker of Ray failed ({why.strip()[:200]}); what is written stays"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _write(table: pa.Table, output: Path) -> None:
    """Add a file whole or not at all: one that is being written has another name.

    It is called by its photos: where Ray does a task again, the same file comes of it.
    """
    photos = "\0".join(table.column("photo").to_pylist())
    name = f"{hashlib.blake2b(photos.encode(), digest_size=16).hexdigest()}.parquet"
    partial = output / f".{uuid.uuid4().hex}.part"
    with writing(output):
        try:
            pq.write_table(table, partial)
            partial.replace(output / name)
        finally:
            partial.unlink(missing_ok=True)


def _count(output: Path) -> tuple[int, int]:
    rows = errors = 0
    for part in output.glob("*.parquet"):
        column = pq.read_table(part, columns=["error"]).column("error")
        rows, errors = rows + len(column), errors + len(column) - column.null_count
    return rows, errors
