"""Captions for any number of photos, in bounded memory, as Parquet, CSV or JSON Lines.

A stopped job resumes where it stopped. Knows nothing of the command line, and has no scheduler of
its own: Ray Data runs several workers.
"""

from __future__ import annotations

import csv
import hashlib
import io
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

from captioner.config import DecodingOptions
from captioner.errors import CaptionerError, ConfigError, DataError, ImageError, first_line
from captioner.files import atomic_write, locked_dir, reraise_os_errors
from captioner.inference.captioner import Captioner

SCHEMA = pa.schema(
    [
        ("photo", pa.string()),  # its path as given, or its row number in the split of the data
        ("filename", pa.string()),  # its name without folders, or what the data calls it
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
# How the files begin that are no folder of Parquet.
_BEGINNINGS = {".csv": ",".join(SCHEMA.names).encode(), ".jsonl": b'{"photo":'}
_BATCH = 64  # photos captioned at once
_PART = 512  # photos written at once; a kill loses no more


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


def _text_rows(output: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of a CSV or JSON Lines file, each with the offset of its end in bytes.

    A last row that a kill or a full disk cut off is left out.
    """
    if not output.exists():
        return
    suffix, end, number = output.suffix.lower(), 0, 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield line.decode()

    with output.open("rb") as file:
        beginning = _BEGINNINGS[suffix]
        if not beginning.startswith(file.read(len(beginning))):
            raise DataError(f"{output} is no file of captions: choose another --output")
        file.seek(0)
        rows: Iterator[Any]
        if suffix == ".csv":
            cells = csv.reader(lines(), strict=True)
            rows = (dict(zip(SCHEMA.names, row, strict=True)) for row in cells)
        else:
            rows = map(json.loads, lines())
        try:
            if suffix == ".csv":
                next(cells, None)  # the header
            for row in rows:
                if (
                    not isinstance(row, dict)
                    or list(row) != SCHEMA.names
                    or not isinstance(row["photo"], str)
                ):
                    raise ValueError("it has other columns")
                yield row, end
                number += 1
        except (ValueError, csv.Error) as error:
            if "unexpected end of data" in str(error):  # inside quotation marks
                return
            raise DataError(
                f"{output} is damaged after {number} rows ({first_line(error)[:160]}): repair or "
                "delete it, or choose another --output"
            ) from error


def _rows(output: Path) -> Iterator[tuple[list[str], int]]:
    """Yield photos that ``output`` has rows of, and how many of them have an error."""
    if output.suffix.lower() in _BEGINNINGS:
        for row, _ in _text_rows(output):
            yield [row["photo"]], bool(row["error"])
        return
    for part in sorted(output.glob("*.parquet")):
        for batch in _open_part(part).iter_batches(columns=["photo", "error"]):
            photos, errors = batch.columns
            yield photos.to_pylist(), len(errors) - errors.null_count


def _open_part(part: Path) -> pq.ParquetFile:
    """Open a Parquet file of captions."""
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
    return file


def _done(output: Path) -> np.ndarray:
    """Return the sorted keys of the photos that ``output`` has rows of."""
    photos = itertools.chain.from_iterable(photos for photos, _ in _rows(output))
    return np.sort(np.fromiter(map(_key, photos), np.uint64))


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
        output: a .csv or .jsonl (JSON Lines) file; or, with .parquet or no suffix, a folder of
            Parquet files, which datasets, pandas and DuckDB read as one table. Beside a file, the
            hidden folder ``.NAME.job`` keeps what is needed to resume. With "ray" all machines
            need to see the folder of the output, and the photos' files.
        options: of the decoding.
        source: the data and split whose rows the photos are; paths stand for themselves.
        engine: "local", or "ray": Ray Data, on this machine or on the cluster of ``RAY_ADDRESS``.
        workers: of Ray, each with its own model.
        gpus: of each worker.

    Returns:
        how many photos have a row in ``output`` now, and how many of those have an error.

    Raises:
        ConfigError: the engine is unknown or not installed, ``workers`` is no number of them, or
            ``output`` has another suffix, is a file or folder where it must not be, or holds
            captions of other data, options or another checkpoint.
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
    suffix = output.suffix.lower()
    if suffix not in ("", ".parquet", *_BEGINNINGS):
        raise ConfigError(
            f"{output}: captions are written as .csv, as .jsonl (JSON Lines), or as a folder of "
            f"Parquet files (.parquet or no suffix), not as {suffix}: choose another --output"
        )
    is_file = suffix in _BEGINNINGS
    if output.exists() and output.is_dir() == is_file:
        now, wanted = ("folder", "file") if is_file else ("file", "folder")
        raise ConfigError(f"{output} is a {now}: choose another --output, which becomes a {wanted}")
    if is_file:
        next(_text_rows(output), None)  # refuses a file that is not ours
    captioner = load()  # with "ray" too: its errors are reported before anything starts
    with locked_dir(_home(output)):
        if is_file and output.exists():
            with reraise_os_errors(output):
                os.truncate(output, max((end for _, end in _text_rows(output)), default=0))
        _collect(output, _done(output))  # what a kill left
        done = _done(output)
        _begin(output, source, captioner, options, has_rows=len(done) > 0)
        left = photos.filter(lambda row: not _is_in(done, _key(row["photo"])))
        with tqdm(desc="captions", unit="photo", initial=len(done), smoothing=0.05) as bar:
            try:
                if engine == "ray":
                    del captioner
                    _with_ray(load, left, output, options, workers, gpus, bar)
                else:
                    _alone(captioner, left, output, options, bar)
            finally:
                _collect(output)
        return _count(output)


def _home(output: Path) -> Path:
    """Return the folder with a job's lock, its record, and the Parquet files that it writes."""
    is_file = output.suffix.lower() in _BEGINNINGS
    return output.with_name(f".{output.name}.job") if is_file else output


def _begin(
    output: Path, source: str, captioner: Captioner, options: DecodingOptions, *, has_rows: bool
) -> None:
    """Delete what a kill left; record what the captions are of, or refuse captions of others."""
    home = _home(output)
    for partial in home.glob(f".{'?' * 32}.part"):
        partial.unlink()
    weights = hashlib.sha256()
    for _, tensor in sorted(captioner.checkpoint.model.state_dict().items()):
        weights.update(tensor.cpu().numpy().tobytes())
    job = {"data": source, "weights": weights.hexdigest(), "options": options.to_dict()}
    path = home / ".job.json"
    try:
        before = json.loads(path.read_bytes())
        others = [name for name in job if before[name] != job[name]]
    except (OSError, ValueError, LookupError, TypeError):  # none there, or one that is damaged
        others = []
    if others and has_rows:
        raise ConfigError(
            f"{output} holds captions of other {' and '.join(others)}: choose another --output"
        )
    atomic_write(path, json.dumps(job, indent=1).encode())


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
                _write(pa.concat_tables(tables), _home(output))
                _collect(output)
        if not tables:
            break


class _Worker:
    """Captions photos and writes a file of their rows at a time, in a process of Ray's."""

    def __init__(
        self, load: Callable[[], Captioner], options: DecodingOptions, folder: Path
    ) -> None:
        self._captioner, self._options, self._folder = load(), options, folder

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[int]]:
        """Return how many rows were written."""
        _write(_caption(self._captioner, self._options, rows), self._folder)
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
    """Read in one task of Ray's; caption and write in its workers."""
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
            fn_constructor_args=(load, options, _home(output).resolve()),
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


def _write(table: pa.Table, folder: Path) -> None:
    """Add a Parquet file whole or not at all: while it is being written, it has another name.

    It is named after its photos: where Ray repeats a task, the same file comes of it.
    """
    photos = "\0".join(table.column("photo").to_pylist())
    name = f"{hashlib.blake2b(photos.encode(), digest_size=16).hexdigest()}.parquet"
    partial = folder / f".{uuid.uuid4().hex}.part"
    with reraise_os_errors(folder):
        try:
            pq.write_table(table, partial)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)


def _collect(output: Path, done: np.ndarray | None = None) -> None:
    """Move the rows of the job's Parquet files to the end of a CSV or JSON Lines file.

    Photos in ``done`` have a row there already.
    """
    suffix = output.suffix.lower()
    if suffix not in _BEGINNINGS:
        return
    for part in sorted(_home(output).glob("*.parquet")):
        rows = _open_part(part).read().to_pylist()
        if done is not None:
            rows = [row for row in rows if not _is_in(done, _key(row["photo"]))]
        with reraise_os_errors(output):
            with output.open("ab") as file:
                file.write(_as_text(rows, suffix, header=file.tell() == 0))
                file.flush()
                os.fsync(file.fileno())
            part.unlink()


def _as_text(rows: list[dict[str, Any]], suffix: str, *, header: bool) -> bytes:
    """Return the rows as CSV or JSON Lines, UTF-8."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SCHEMA.names, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _count(output: Path) -> tuple[int, int]:
    """Return how many rows there are, and how many of them have an error."""
    rows = errors = 0
    for photos, failed in _rows(output):
        rows, errors = rows + len(photos), errors + failed
    return rows, errors
