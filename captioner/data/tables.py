"""The tables of a source by split, and those that the readers of ``datasets`` make.

Photos are not decoded. Nothing is fetched or converted until a split is loaded.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.dataset
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.parquet.parquet import Parquet

from captioner.errors import CaptionerError, DataError, causes_of, first_line

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Builder: TypeAlias = datasets.DatasetBuilder
Explain: TypeAlias = Callable[[BaseException], DataError]

# The default is to read 32 MiB ahead, twice.
_SMALL_REQUESTS = pyarrow.dataset.ParquetFragmentScanOptions(
    cache_options=pyarrow.CacheOptions(lazy=True, range_size_limit=4 << 20)
)
ACCEPTED = (
    "Parquet, Arrow, JSON Lines, JSON or WebDataset (.tar) files, a folder of save_to_disk, photos "
    "beside a metadata.csv or .jsonl, COCO's or Karpathy's captions as JSON, or a table such as "
    "captions.csv (image,caption)"
)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of a source, by the names of the splits that it stores.

    Attributes:
        load: for each split a function of ``streaming`` that returns its table.
        root: the folder, or the address on the Hub, at which relative paths of photos start.
        explain: turns an error in reading the tables into one that names the cause.
        columns: the columns with photos (None: none) and captions, if a reader chose them.
        taken: these columns in words, as the source calls them.
        num_missing: photos that the source names but that are not there.
        builder: the reader of ``datasets``, if it is one.
    """

    load: Mapping[str, Callable[[bool], Table]]
    root: str
    explain: Explain
    columns: tuple[str | None, list[str]] | None = None
    taken: str = ""
    num_missing: int = 0
    builder: Builder | None = None


@contextlib.contextmanager
def explained(explain: Explain) -> Iterator[None]:
    """Turn errors other than our own into those of ``explain``."""
    try:
        yield
    except CaptionerError:
        raise
    except Exception as error:
        raise explain(error) from error


def cannot_read(what: object) -> Explain:
    """Return an ``Explain`` that names what cannot be read."""
    return lambda error: DataError(f"cannot read {what}: {first_line(error.__cause__ or error)}")


def in_memory(table: datasets.Dataset) -> Callable[[bool], Table]:
    """Return a loader of a split, as ``Tables`` has them, for a table that is read already."""
    return lambda streaming: table.to_iterable_dataset() if streaming else table


def columns_of(table: Table) -> list[str]:
    """Return the column names; a stream may learn them only from its first row."""
    return list(table.column_names or next(iter(table), {}))


# What datasets reads


def open_builder(root: str, explain: Explain, load_builder: Callable[[], Builder]) -> Tables:
    """Return the tables of a reader of ``datasets``; ``explain`` makes its errors readable."""

    def load(split: str, streaming: bool) -> Table:
        with explained(explain):
            if streaming and isinstance(builder, Parquet):
                return stream_parquet(builder, split)
            if streaming:
                # Else datasets opens a folder's photos itself, 32 ahead.
                if getattr(builder.config, "decode_num_threads", None):
                    builder.config.decode_num_threads = 0
                return builder.as_streaming_dataset(split=split)
            of_split = _only_split(builder, split)
            of_split.download_and_prepare(verification_mode="no_checks")
            return of_split.as_dataset(split=split)

    def loader(split: str) -> Callable[[bool], Table]:
        return lambda streaming: load(split, streaming)

    with explained(explain):
        builder = load_builder()
        # A converted copy in the cache, for want of a connection, has no files.
        names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    return Tables({name: loader(name) for name in names}, root, explain, builder=builder)


def _only_split(builder: Builder, split: str, **options: Any) -> Builder:
    """Return a reader of one split, which downloads and converts no other.

    Args:
        builder: of all splits.
        split: as stored.
        options: changed settings of the reader.
    """
    files = builder.config.data_files
    if not files or (len(files) == 1 and not options):
        return builder
    return type(builder)(
        dataset_name=builder.dataset_name,
        config_name=None if builder.config.name.startswith("default-") else builder.config.name,
        hash=builder.hash,
        base_path=builder.base_path,
        repo_id=builder.repo_id,
        data_files=DataFilesDict({name: files[name] for name in files if name == split}),
        **options,
    )


def stream_parquet(
    builder: Builder, split: str, *, columns: list[str] | None = None, filters: Any = None
) -> datasets.IterableDataset:
    """Stream a split of Parquet files, fetching no more than the rows that are read.

    Args:
        builder: of all splits.
        split: as stored.
        columns: to read; None means all. They are assumed to be small.
        filters: rows to read, as for ``pyarrow.parquet.read_table``; row groups whose statistics
            exclude them are skipped.
    """
    options: dict[str, Any] = {"fragment_scan_options": _SMALL_REQUESTS}
    if columns is not None:  # without reading ahead into the photos
        options |= {"columns": columns, "storage_options": {"hf": {"block_size": 1 << 16}}}
    if filters is not None:
        options["filters"] = filters
    return _only_split(builder, split, **options).as_streaming_dataset(split=split)


def configurations(error: BaseException) -> str:
    """Return the names that an error of ``datasets`` asks to choose from, or an empty string."""
    match = re.search(r"[Aa]vailable(?: configs)?: (\[.*\])", "\n".join(map(str, causes_of(error))))
    return ", ".join(ast.literal_eval(match[1])) if match else ""
