"""Finds out what a source is, and opens it: the Hub, a folder, a file.

Folders and files are read by ``datasets`` where it can, else as caption files.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from captioner.data.caption_files import (
    PhotoFinder,
    Row,
    join_photos,
    json_reader,
    read_coco,
    split_in_name,
)
from captioner.data.columns import Columns, captions_in, shorten
from captioner.data.hub import open_hub
from captioner.data.tables import (
    ACCEPTED,
    Table,
    Tables,
    cannot_read,
    columns_of,
    configurations,
    explained,
    in_memory,
    open_builder,
)
from captioner.data.text_tables import (
    TABLE_SUFFIXES,
    TextTable,
    is_split_list,
    open_table,
    read_text,
)
from captioner.errors import DataError, first_line
from captioner.images import find_photos

CAPTION_FILES = ("captions.csv", "captions.txt")  # read before anything else in their folder
_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # beside photos
# The files that datasets reads, and the names of its readers.
_READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".tar": "webdataset",
}
# Folders of caption files whose photos are in a folder beside, such as coco/annotations.
_ANNOTATIONS = re.compile("annotation|caption|karpathy|text", re.IGNORECASE)
_SAVED_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # by save_to_disk


def local_path(source: str) -> Path | None:
    """Return the path of a local source, None if there is none.

    A captions.csv stands for its folder.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file() and path.name in CAPTION_FILES:
            path = path.parent
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # an impossible path, or no such user
        return None


def open_tables(source: str, columns: Columns, *, photos: bool, captions: bool) -> Tables:
    """Find out what a source is and open it.

    Args:
        source: a Hub id or web address, a folder or a file.
        columns: those that the user named.
        photos: whether photos are needed; without them, caption files are read alone.
        captions: whether captions are needed; only without them is a mere folder of photos read.

    Raises:
        DataError: there is no such source, it holds nothing that can be read, or it is damaged.
    """
    path = local_path(source)
    if path is None:
        tables = open_hub(source)
    elif path.is_dir():
        tables = _open_folder(path, columns, photos=photos, captions=captions)
    else:
        tables = _open_file(path, columns, photos=photos)
    if path is not None and photos and tables.columns is None:
        with explained(tables.explain):
            return _with_found_photos(path, tables, columns)
    return tables


def _open_folder(folder: Path, columns: Columns, *, photos: bool, captions: bool) -> Tables:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_saved(folder)
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return _open_caption_files([folder / name], folder, columns, photos=photos)
    files = _data_files(folder)
    if any(_is_for_datasets(file, folder) for file in files):
        return _open_with_datasets(folder)
    annotations = [file for file in files if file.suffix.lower() == ".json" and json_reader(file)]
    if annotations:
        _check_splits(annotations, folder)
        return _open_caption_files(annotations, folder, columns, photos=photos)
    readable = [
        file for file in files if file.suffix.lower() in _READERS and file.name not in _SAVED_FILES
    ]
    has_photos = next(find_photos(folder), None) is not None
    if readable and not has_photos:
        return _open_with_datasets(folder)
    if readable:  # datasets would read the photos alone
        kinds = collections.Counter(file.suffix.lower() for file in readable)
        kind, _ = kinds.most_common(1)[0]
        return _open_data_files(folder, [file for file in readable if file.suffix.lower() == kind])
    tables = [
        file for file in files if file.suffix.lower() in TABLE_SUFFIXES and not is_split_list(file)
    ]
    if captions and (pairs := _text_files_of_photos(folder, tables)):
        rows = (
            Row(
                str(photo),
                read_text(text).splitlines(),
                split_in_name(photo.parent.relative_to(folder)),
            )
            for photo, text in pairs
        )
        taken = "captions from a text file per photo"
        return _tables_of(rows, PhotoFinder(folder), str(folder), taken, photos=photos)
    if tables and (has_photos or not photos):
        try:
            opened = _caption_tables(tables, folder, columns, photos=photos)
            return _open_caption_files(list(opened), folder, columns, opened, photos=photos)
        except DataError:
            if captions:
                raise
    if not captions and (has_photos or any(file.suffix.lower() == ".zip" for file in files)):
        return _open_with_datasets(folder, "imagefolder", data_dir=str(folder))
    names = shorten([str(file.relative_to(folder)) for file in tables])
    raise _nothing_to_read(folder, [f"no photo lies beside {names}"] if tables else ())


def _text_files_of_photos(folder: Path, files: list[Path]) -> list[tuple[Path, Path]]:
    """Return the photos with a text file of the same name; none if most texts are something else.

    The lines of such a file are captions.
    """
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    if not texts:
        return []
    pairs = [
        (photo, texts[photo.with_suffix("")])
        for photo, _ in find_photos(folder)
        if photo.with_suffix("") in texts
    ]
    return pairs if 2 * len(pairs) > len(texts) else []


def _data_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders that may hold captions, sorted."""
    suffixes = {*_READERS, *TABLE_SUFFIXES, ".zip", ".md"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _is_for_datasets(path: Path, folder: Path) -> bool:
    """Return whether a file describes photos, or data files, for ``datasets``."""
    if path == folder / "README.md":
        with path.open("rb") as file:
            return b"data_files:" in file.read(100_000)
    if path.name not in _METADATA_FILES:
        return False
    with path.open("rb") as file:
        return path.suffix == ".parquet" or b"file_name" in file.readline(100_000)


def _nothing_to_read(folder: Path, reasons: Iterable[str] = ()) -> DataError:
    found = collections.Counter(
        path.suffix or path.name for path in folder.rglob("*") if path.is_file()
    )
    shown = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(6))
    return DataError(
        f"{folder} holds no captions that can be read, only: {shown or 'nothing'}. "
        + "".join(f"{reason}. " for reason in reasons)
        + f"It can hold {ACCEPTED}"
    )


def _open_file(path: Path, columns: Columns, *, photos: bool) -> Tables:
    if path.suffix.lower() == ".json" and json_reader(path):
        return _open_caption_files([path], path.parent, columns, photos=photos)
    if path.suffix.lower() in _READERS:
        return _open_data_files(path.parent, [path])
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _open_caption_files([path], path.parent, columns, photos=photos)
    raise DataError(
        f"{path} is no file of captions: it can be "
        f"{', '.join((*_READERS, *TABLE_SUFFIXES))}. Give such a file, or a folder"
    )


def _open_with_datasets(folder: Path, reader: str = "", **options: Any) -> Tables:
    """Open a folder with the reader that ``datasets`` chooses, or with the one that is named."""
    return open_builder(
        str(folder),
        lambda error: DataError(f"cannot read the files in {folder}: {_reason(folder, error)}"),
        lambda: datasets.load_dataset_builder(reader or str(folder), **options),
    )


def _open_data_files(folder: Path, files: list[Path]) -> Tables:
    """Open files of one kind; a file among several belongs to the split in its name."""
    splits: dict[str, list[str]] = {}
    for file in files:
        split = split_in_name(file.relative_to(folder)) if len(files) > 1 else ""
        splits.setdefault(split or "train", []).append(str(file))
    reader = _READERS[files[0].suffix.lower()]
    name = str(files[0] if len(files) == 1 else folder)
    return open_builder(
        str(folder),
        lambda error: DataError(f"cannot read {name}: {_reason(folder, error)}"),
        lambda: datasets.load_dataset_builder(reader, data_files=splits),
    )


def _reason(folder: Path, error: BaseException) -> str:
    """Return why ``datasets`` cannot read a folder, and the way out."""
    for file in sorted(folder.rglob("*.parquet")):
        try:
            num_rows = pyarrow.parquet.read_metadata(file).num_rows
        except Exception as damage:
            reason = first_line(damage)[:200]
            return f"{file.relative_to(folder)} is damaged ({reason}): replace or remove it"
        if num_rows == 0:
            return f"{file.relative_to(folder)} is empty: remove it"
    if names := configurations(error):
        return f"they have several configurations: keep the files of one of {names}"
    return f"{first_line(error.__cause__ or error)[:300]}; replace or remove the damaged file"


def _open_saved(folder: Path) -> Tables:
    """Open a folder that ``save_to_disk`` wrote."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"cannot read {folder}, which looks like a folder of save_to_disk: "
            f"{first_line(error)[:160]}; save it again"
        ) from error
    # A lone table is training data, whatever part of another it was.
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    load = {name: in_memory(table) for name, table in splits.items()}
    return Tables(load, str(folder), cannot_read(folder))


# Caption files


def _caption_tables(
    files: list[Path], folder: Path, columns: Columns, *, photos: bool
) -> dict[Path, TextTable]:
    """Return those text tables of a folder that hold captions.

    Raises:
        DataError: there is none, or several that are not called after splits.
    """
    finder, reasons = PhotoFinder(folder), list[str]()
    with_photos, others = dict[Path, TextTable](), dict[Path, TextTable]()
    for file in files:
        try:
            table = open_table(file, finder, columns)
        except DataError as error:
            reasons.append(str(error))
        else:
            (with_photos if table.names_photos else others)[file] = table
            if photos and not table.names_photos:
                reasons.append(f"{file.relative_to(folder)} names no photo that is in {folder}")
    tables = with_photos or ({} if photos else others)
    # Flickr8k.lemma.token.txt holds the captions of Flickr8k.token.txt without endings.
    tables = {file: tables[file] for file in tables if "lemma" not in file.name} or tables
    if not tables:
        raise _nothing_to_read(folder, reasons[:3])
    _check_splits(list(tables), folder)
    return tables


def _check_splits(files: list[Path], folder: Path) -> None:
    """Raise ``DataError`` if several caption files are not called after different splits."""
    inner = [file.relative_to(folder) for file in files]
    if len(files) > 1 and len(set(map(split_in_name, inner))) < len(files):
        names = shorten([str(file) for file in inner])
        raise DataError(
            f"{folder} has several files of captions: {names}; give one of them, as in --data "
            f"{files[0]}, or call each after its split (train, val, test)"
        )


def _open_caption_files(
    files: list[Path],
    folder: Path,
    columns: Columns,
    opened: Mapping[Path, TextTable] | None = None,
    *,
    photos: bool,
) -> Tables:
    """Read caption files, as far as they are not ``opened``.

    One among several belongs to the split in its name.
    """
    rows: list[Row] = []
    taken, root = list[str](), folder
    if photos and _ANNOTATIONS.search(folder.name) and next(find_photos(folder), None) is None:
        folder = folder.resolve().parent
    finder = PhotoFinder(folder)
    for file in files:
        split = split_in_name(file.relative_to(root)) if len(files) > 1 else ""
        if file.suffix.lower() == ".json" and (reader := json_reader(file)):
            kind = "COCO" if reader is read_coco else "Karpathy"
            taken.append(f"photos and captions from {file.name} in {kind}'s format")
            found = reader(file, split)
        else:
            table = (opened or {}).get(file) or open_table(file, finder, columns)
            taken.append(table.taken)
            found = table.read(split)
        rows += (row._replace(folder=file.parent) for row in found)
    name = str(files[0]) if len(files) == 1 else f"{folder} ({len(files)} files of captions)"
    return _tables_of(rows, finder, name, "; ".join(taken), photos=photos)


def _tables_of(
    rows: Iterable[Row], finder: PhotoFinder, name: str, taken: str, *, photos: bool
) -> Tables:
    """Return the tables of photos that rows name."""
    if not photos:
        texts = datasets.Dataset.from_dict({"captions": [row.captions for row in rows]})
        load = {"train": in_memory(texts)}
        return Tables(load, "", cannot_read(name), (None, ["captions"]), taken)
    splits, num_missing = join_photos(rows, finder, name)
    load = {}
    for split, found in splits.items():
        paths, names, captions = zip(*found, strict=True)
        table = {"image": paths, "captions": captions, "filename": names}
        load[split] = in_memory(datasets.Dataset.from_dict(table))
    columns = ("image", ["captions"])
    return Tables(load, str(finder.folder), cannot_read(name), columns, taken, num_missing)


def _with_found_photos(path: Path, tables: Tables, columns: Columns) -> Tables:
    """Return tables that hold the names of local photos with the paths of these photos.

    Raises:
        DataError: none of the photos is there, or a cell holds no caption.
    """
    rows: list[Row] = []
    taken = ""
    for split, load in tables.load.items():
        table = load(True)
        image, texts = _path_columns(table, columns, str(path))
        if image is None:
            return tables
        taken = f"photos from {image}, captions from {', '.join(texts) or 'none'}"
        has_splits = len(tables.load) == 1 and "split" in columns_of(table)
        cells: dict[str, Any]
        for cells in table:
            try:
                captions = [text for name in texts for text in captions_in(cells[name], name)]
            except TypeError as error:
                raise DataError(f"{path}: {error}; name others with --caption-column") from error
            stored = cells["split"] if has_splits else split
            rows.append(Row(str(cells[image] or ""), captions, str(stored or "")))
    folder = path if path.is_dir() else path.parent
    return _tables_of(rows, PhotoFinder(folder), str(path), taken, photos=True)


def _path_columns(table: Table, columns: Columns, where: str) -> tuple[str | None, list[str]]:
    """Return the columns with the names of photos (None: it holds the photos) and captions."""
    features = table.features
    if features is None:  # a list of objects in a JSON file, whose types only its rows show
        names = next(iter(table), dict[str, Any]())
        features = datasets.Features({name: datasets.Value("string") for name in names})
    image = columns.find_image(list(features), where)
    if image is None or getattr(features[image], "dtype", "") not in ("string", "large_string"):
        return None, []
    return image, columns.find_captions(list(features), where)
