"""Captions for any number of photos, in bounded memory, as Parquet, CSV or JSON Lines.

A stopped job resumes where it stopped. Ray Data schedules several workers. Knows nothing of the
command line.
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
from functools import partial
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
        ("filename", pa.string()),  # its name without folders, or its name in the data
        ("caption", pa.string()),
        ("log_probability", pa.float32()),
        ("confidence", pa.float32()),  # that the caption is right; none if the model has none
        ("error", pa.string()),  # why there is no caption
    ]
)
# The stream of photos to caption.
_INPUT_SCHEMA = pa.schema(
    [
        ("photo", pa.string()),
        ("filename", pa.string()),
        ("path", pa.binary()),  # of the file,
        ("data", pa.binary()),  # or the file's content
    ]
)
ENGINES = ("local", "ray")
# First bytes of the output files that are not folders of Parquet.
_MAGIC = {".csv": ",".join(SCHEMA.names).encode(), ".jsonl": b'{"photo":'}
_BATCH = 64  # photos per batch of the model
_PART = 512  # rows per Parquet file; a killed job loses no more


def from_paths(paths: Callable[[], Iterable[Path]]) -> datasets.IterableDataset:
    """Return a stream of photo files for ``caption_all``; ``paths`` is called when it is read."""

    def rows() -> Iterator[dict[str, Any]]:
        for path in paths():
            # A file name may not be valid Unicode.
            photo, filename = (
                os.fsencode(text).decode(errors="backslashreplace") for text in (path, path.name)
            )
            yield {"photo": photo, "filename": filename, "path": os.fsencode(path), "data": None}

    return datasets.IterableDataset.from_generator(rows)


def _caption(
    captioner: Captioner, options: DecodingOptions, rows: dict[str, list[Any]]
) -> pa.Table:
    """Caption columns of ``_INPUT_SCHEMA``; return a table of ``SCHEMA``."""
    photos = [
        data if data is not None else (b"" if path is None else Path(os.fsdecode(path)))
        for path, data in zip(rows["path"], rows["data"], strict=True)
    ]
    results = [
        {"error": str(result)}
        if isinstance(result, ImageError)
        else {
            "caption": result.text,
            "log_probability": result.log_probability,
            "confidence": result.confidence,
        }
        for result in captioner.caption_each(photos, options, with_evidence=False)
    ]
    names = zip(rows["photo"], rows["filename"], strict=True)
    return pa.Table.from_pylist(
        [
            {"photo": photo, "filename": filename, **result}
            for (photo, filename), result in zip(names, results, strict=True)
        ],
        schema=SCHEMA,
    )


def _key(photo: str) -> int:
    """Return a 64-bit hash of a photo's name, because millions of names would fill the memory."""
    return int.from_bytes(hashlib.blake2b(photo.encode(), digest_size=8).digest())


def _text_rows(output: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of a CSV or JSON Lines file, each with the offset of its end in bytes.

    Leaves out a last row that was cut off by a kill or a full disk.
    """
    if not output.exists():
        return
    end, num_rows = 0, 0

    def complete_lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield line.decode()

    with output.open("rb") as file:
        magic = _MAGIC[output.suffix.lower()]
        if not magic.startswith(file.read(len(magic))):
            raise DataError(f"{output} is not a file of captions: choose another --output")
        file.seek(0)
        parse = _parse_csv if output.suffix.lower() == ".csv" else partial(map, json.loads)
        try:
            for row in parse(complete_lines()):
                if (
                    not isinstance(row, dict)
                    or list(row) != SCHEMA.names
                    or not isinstance(row["photo"], str)
                ):
                    raise ValueError("it has other columns")
                yield row, end
                num_rows += 1
        except (ValueError, csv.Error) as error:
            if "unexpected end of data" in str(error):  # inside quotation marks
                return
            raise DataError(
                f"{output} is damaged after {num_rows} rows ({first_line(error)[:160]}): repair or "
                "delete it, or choose another --output"
            ) from error


def _parse_csv(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows after the header."""
    rows = csv.reader(lines, strict=True)
    next(rows, None)
    for row in rows:
        yield dict(zip(SCHEMA.names, row, strict=True))


def _rows(output: Path) -> Iterator[tuple[list[str], int]]:
    """Yield batches of the photos in ``output``, each with its number of errors."""
    if output.suffix.lower() in _MAGIC:
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
            f"{part} is not a file of captions (its columns are "
            f"{', '.join(file.schema_arrow.names)}): choose another --output"
        )
    return file


def _done(output: Path) -> np.ndarray:
    """Return the sorted keys of the photos in ``output``."""
    photos = itertools.chain.from_iterable(photos for photos, _ in _rows(output))
    return np.sort(np.fromiter(map(_key, photos), np.uint64))


def _is_in(keys: np.ndarray, key: int) -> bool:
    index = np.searchsorted(keys, np.uint64(key))
    return bool(index < len(keys) and keys[index] == key)


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
    """Write a row of ``SCHEMA`` for each photo that has none in ``output`` yet.

    Args:
        load: returns the captioner; with "ray" it is called once in each worker.
        photos: from ``from_paths`` or ``captioner.data.sources.stream_photos``.
        output: a .csv or .jsonl (JSON Lines) file; or, with .parquet or no suffix, a folder of
            Parquet files, which datasets, pandas and DuckDB read as one table. A hidden folder
            ``.NAME.job`` beside a file keeps the state to resume from. With "ray" all machines
            must see the output's folder and the photos.
        options: of the decoding.
        source: the data and split that the photos come from; empty for paths.
        engine: "local", or "ray": Ray Data, on this machine or on the cluster of ``RAY_ADDRESS``.
        workers: of Ray, each with its own model.
        gpus: per worker.

    Returns:
        the number of photos in ``output`` now, and how many of them have an error.

    Raises:
        ConfigError: the engine is unknown or not installed, ``workers`` is out of range, or
            ``output`` has another suffix, is a file instead of a folder or the reverse, or holds
            captions of other data, options or weights.
        DataError: ``output`` holds something else, or the photos are damaged.
        WriteError: ``output`` cannot be written.
        CheckpointError: the checkpoint cannot be loaded.
        EncoderError: the encoder's weights cannot be downloaded or read.
        CaptionerError: a worker failed.
    """
    _check_arguments(output, engine, workers)
    captioner = load()  # with "ray" too: its errors are reported before anything starts
    with locked_dir(_home(output)):
        _recover(output)
        done = _done(output)
        _record_job(output, source, captioner, options, has_rows=len(done) > 0)
        pending = photos.filter(lambda row: not _is_in(done, _key(row["photo"])))
        with tqdm(desc="captions", unit="photo", initial=len(done), smoothing=0.05) as bar:
            try:
                if engine == "ray":
                    del captioner
                    _caption_with_ray(load, pending, output, options, workers, gpus, bar)
                else:
                    _caption_locally(captioner, pending, output, options, bar)
            finally:
                _collect(output)
        return _count(output)


def _check_arguments(output: Path, engine: str, workers: int) -> None:
    """Check the arguments before the model is loaded."""
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if not 1 <= workers <= 10_000:
        raise ConfigError(f"workers is {workers}; it must be a whole number from 1 to 10000")
    suffix = output.suffix.lower()
    if suffix not in ("", ".parquet", *_MAGIC):
        raise ConfigError(
            f"{output}: captions are written as .csv, as .jsonl (JSON Lines), or as a folder of "
            f"Parquet files (.parquet or no suffix), not as {suffix}: choose another --output"
        )
    if output.exists() and output.is_dir() == _is_text(output):
        now, wanted = ("folder", "file") if _is_text(output) else ("file", "folder")
        raise ConfigError(f"{output} is a {now}: choose another --output, which becomes a {wanted}")
    if _is_text(output):
        next(_text_rows(output), None)  # refuses a file of something else


def _is_text(output: Path) -> bool:
    return output.suffix.lower() in _MAGIC


def _recover(output: Path) -> None:
    """Clean up after a killed job: drop a torn row, and collect the Parquet files left behind."""
    if _is_text(output) and output.exists():
        with reraise_os_errors(output):
            os.truncate(output, max((end for _, end in _text_rows(output)), default=0))
    _collect(output, _done(output))
    for partial_file in _home(output).glob(f".{'?' * 32}.part"):
        partial_file.unlink()


def _home(output: Path) -> Path:
    """Return the folder of a job's lock, its record, and its Parquet files."""
    return output.with_name(f".{output.name}.job") if _is_text(output) else output


def _record_job(
    output: Path, source: str, captioner: Captioner, options: DecodingOptions, *, has_rows: bool
) -> None:
    """Record data, weights and options; refuse to continue captions of others."""
    weights = hashlib.sha256()
    for _, tensor in sorted(captioner.checkpoint.model.state_dict().items()):
        weights.update(tensor.cpu().numpy().tobytes())
    job = {"data": source, "weights": weights.hexdigest(), "options": options.to_dict()}
    path = _home(output) / ".job.json"
    try:
        recorded = json.loads(path.read_bytes())
        changed = [name for name in job if recorded[name] != job[name]]
    except (OSError, ValueError, LookupError, TypeError):  # no record, or a damaged one
        changed = []
    if changed and has_rows:
        raise ConfigError(
            f"{output} holds captions of other {' and '.join(changed)}: choose another --output"
        )
    atomic_write(path, json.dumps(job, indent=1).encode())


def _batches(photos: datasets.IterableDataset) -> Iterator[dict[str, list[Any]]]:
    """Yield batches of columns. Files of the data are opened one by one, so errors come late."""
    try:
        yield from photos.iter(batch_size=_BATCH)
    except Exception as error:
        raise DataError(
            f"cannot read the remaining photos ({first_line(error)[:160]}): repair the data and "
            "start again; finished captions are kept"
        ) from error


def _caption_locally(
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
    """Captions photos and writes a Parquet file per batch, in one of Ray's processes."""

    def __init__(
        self, load: Callable[[], Captioner], options: DecodingOptions, folder: Path
    ) -> None:
        self._captioner, self._options, self._folder = load(), options, folder

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[int]]:
        """Return the number of rows written."""
        _write(_caption(self._captioner, self._options, rows), self._folder)
        return {"rows": [len(rows["photo"])]}


def _caption_with_ray(
    load: Callable[[], Captioner],
    photos: datasets.IterableDataset,
    output: Path,
    options: DecodingOptions,
    workers: int,
    gpus: int,
    bar: tqdm[Any],
) -> None:
    """Read in one of Ray's tasks; caption and write in its workers."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            'the engine "ray" is not installed: pip install "ray[data]<2.64", or leave out --engine'
        ) from error

    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        # Reading takes little, and must proceed while the workers hold all processors.
        rows = ray.data.read_datasource(_ray_source(photos), override_num_blocks=1, num_cpus=0)
        written = rows.map_batches(
            _Worker,
            fn_constructor_args=(load, options, _home(output).resolve()),
            batch_size=_PART,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus or None,
            # A photo that kills its worker ends the job, but only after retries.
            max_restarts=3,
            max_task_retries=3,
        )
        for row in written.iter_rows():
            bar.update(row["rows"])
    except ray.exceptions.RayError as error:
        raise CaptionerError(
            f"a Ray worker failed ({_ray_reason(error)}); finished captions are kept"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _ray_source(photos: datasets.IterableDataset) -> Any:
    """Return the stream as a Ray data source; Ray's own reader of datasets takes no filter."""
    import ray.data
    from ray.data.block import BlockMetadata

    def read() -> Iterator[pa.Table]:
        for batch in _batches(photos):
            yield pa.table(batch, schema=_INPUT_SCHEMA)

    class Stream(ray.data.Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
            return [ray.data.ReadTask(read, BlockMetadata(None, None, None))]

    return Stream()  # type: ignore[no-untyped-call]


def _ray_reason(error: BaseException) -> str:
    """Return our own error from within Ray's text, or the last line of others."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    own = [line.partition(": ")[2] for line in lines if line.startswith("captioner.errors.")]
    return (own or lines)[-1].strip()[:200]


def _write(table: pa.Table, folder: Path) -> None:
    """Add a Parquet file in one step, by writing it under another name first.

    It is named after its photos: if Ray repeats a task, the file is replaced by its equal.
    """
    photos = "\0".join(table.column("photo").to_pylist())
    name = f"{hashlib.blake2b(photos.encode(), digest_size=16).hexdigest()}.parquet"
    partial_file = folder / f".{uuid.uuid4().hex}.part"
    with reraise_os_errors(folder):
        try:
            pq.write_table(table, partial_file)
            partial_file.replace(folder / name)
        finally:
            partial_file.unlink(missing_ok=True)


def _collect(output: Path, done: np.ndarray | None = None) -> None:
    """Move the rows of the job's Parquet files to the end of a CSV or JSON Lines file.

    Skips photos in ``done``, which have a row there already.
    """
    if not _is_text(output):
        return
    for part in sorted(_home(output).glob("*.parquet")):
        rows = _open_part(part).read().to_pylist()
        if done is not None:
            rows = [row for row in rows if not _is_in(done, _key(row["photo"]))]
        with reraise_os_errors(output):
            with output.open("ab") as file:
                file.write(_as_text(rows, output.suffix.lower(), header=file.tell() == 0))
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
    """Return the number of rows, and how many of them have an error."""
    rows = errors = 0
    for photos, failed in _rows(output):
        rows, errors = rows + len(photos), errors + failed
    return rows, errors
