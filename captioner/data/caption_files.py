"""Captions in files beside photos: COCO's and Karpathy's JSON, and text tables.

They are recognized by their content, not by their name. Knows nothing of ``datasets``.
"""

from __future__ import annotations

import codecs
import collections
import csv
import io
import itertools
import json
import logging
import mmap
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from captioner.data.columns import Columns, captions_in
from captioner.errors import DataError
from captioner.images import SUFFIXES, find_photos

log = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".psv", ".tab")
_DELIMITERS = "\t|;,"  # the rarest in a caption first
_SAMPLE = 50  # lines by which a table is recognized
_NAME_HEADINGS = ("image_name", "image_id", "file", "name")  # where no cell names a photo
# Flickr8k's lists, such as Flickr_8k.trainImages.txt.
_SPLIT_LIST = re.compile(r"(?:.*[._-])?(train|dev|val|test)images\.txt", re.IGNORECASE)
# A split in a file's name: train.csv, captions_val2017.json, my-test-photos.tsv.
_SPLIT_IN_NAME = re.compile(
    r"(?<![a-z])(train|validation|valid|val|dev|test)(?:ing)?(?![a-z])", re.IGNORECASE
)
# What stands between two letters in Latin-1: apostrophes, hyphens, a dot in Catalan.
_INSIDE_WORDS = "\u2019\u2018\u00b4\u2013\u2014\u00b7\u00ad"


class Row(NamedTuple):
    """Some captions of a photo.

    Attributes:
        name: of the photo, as written in the file; empty if the file has captions only.
        captions: not cleaned.
        split: as written; empty if the file names none.
    """

    name: str
    captions: list[str]
    split: str


class PhotoFinder:
    """The photo files in a folder and its subfolders, by the names that captions files write."""

    def __init__(self, folder: Path) -> None:
        """Search in ``folder``; its subfolders are read when they are first needed."""
        self.folder = folder
        self._bases = [
            base for name in ("Images", "images", "") if (base := folder / name).is_dir()
        ]
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path | None:
        """Return the photo with this name, None if there is none, or more than one.

        The name may be a path from the folder, or from a folder of someone else's machine; it may
        lack its suffix, and end in the number of a caption (``#0``).
        """
        for written in dict.fromkeys((name, without_number(name))):
            if not written:
                continue
            for base in self._bases:
                if _is_file(base / written):
                    return base / written
            if len(written) < 1000 and (path := self._find_by_last_part(written)):
                return path
        return None

    def _find_by_last_part(self, name: str) -> Path | None:
        parts = [part.casefold() for part in PurePosixPath(name.replace("\\", "/")).parts]
        if not parts:
            return None
        candidates = self._photos_by_name().get(parts[-1], [])
        if len(candidates) < 2:
            return candidates[0] if candidates else None

        def common_folders(path: Path) -> int:
            pairs = zip(reversed(parts[:-1]), reversed(path.parts[:-1]), strict=False)
            return sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1].casefold(), pairs)
            )

        first, second, *_ = sorted(candidates, key=common_folders, reverse=True)
        return first if common_folders(first) > common_folders(second) else None

    def _photos_by_name(self) -> dict[str, list[Path]]:
        """Return the photos by file name, and by file name without suffix, in lower case."""
        if self._index is None:
            self._index = collections.defaultdict(list)
            for path, _ in find_photos(self.folder):
                for key in {path.name.casefold(), path.stem.casefold()}:
                    self._index[key].append(path)
        return self._index


def without_number(name: str) -> str:
    """Return a photo's name without the number of its caption, as in Flickr8k's "a.jpg#0"."""
    return re.sub(r"#\w+$", "", name)


def _is_file(path: Path) -> bool:
    """Return whether a file exists; one with an impossible name does not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def split_in_name(path: Path) -> str:
    """Return the split that a file is named after, empty if there is none."""
    match = _SPLIT_IN_NAME.search(path.stem)
    return match[1].lower() if match else ""


# JSON


def json_reader(path: Path) -> Callable[[Path, str], list[Row]] | None:
    """Return the function that reads a file of COCO's or Karpathy's captions, None for others."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{" or data.find(b'"images"') < 0:
                return None
            if data.find(b'"sentences"') >= 0:
                return read_karpathy
            is_coco = data.find(b'"annotations"') >= 0 and data.find(b'"caption"') >= 0
            return read_coco if is_coco else None
    except (OSError, ValueError):  # ValueError: an empty file
        return None


def _load_json(path: Path, kind: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} starts like {kind} captions but is no valid JSON ({error}): download it again"
        ) from error


def read_coco(path: Path, split: str = "") -> list[Row]:
    """Read COCO's captions_*.json: ``images`` with id and file_name, ``annotations`` with caption.

    ``split`` is that of all its photos.

    Raises:
        DataError: the file is damaged, or an entry lacks a field.
    """
    content = _load_json(path, "COCO's")
    try:
        captions = collections.defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(str(annotation["caption"]))
        return [
            Row(image["file_name"], captions[image["id"]], split) for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no file of COCO captions: an entry lacks {error}; images need id and "
            "file_name, annotations image_id and caption"
        ) from error


def read_karpathy(path: Path, split: str = "") -> list[Row]:
    """Read Karpathy's dataset_*.json: ``images`` with filename, sentences and split.

    ``split`` is that of photos without one.

    Raises:
        DataError: the file is damaged, or an entry lacks a field.
    """
    content = _load_json(path, "Karpathy's")
    try:
        return [
            Row(
                "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                captions_in(image["sentences"], "sentences"),
                str(image.get("split") or split),
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no file of Karpathy's captions: an entry lacks {error}; images need "
            "filename and sentences, a list of {raw}"
        ) from error


# Text tables


class TextTable(NamedTuple):
    """A text table whose columns are recognized.

    Attributes:
        path: of the file.
        rows: the cells below the headings.
        image: the index of the column with the photos' names, None if there is none.
        captions: the indices of the columns with captions.
        split: the index of the column with the split, or None.
        names_photos: whether its first lines name photos that are there.
        taken: the columns in words, for a message.
    """

    path: Path
    rows: list[list[str]]
    image: int | None
    captions: list[int]
    split: int | None
    names_photos: bool
    taken: str

    def read(self, split: str = "") -> list[Row]:
        """Return the rows; ``split`` is that of rows without one.

        Lists such as Flickr_8k.trainImages.txt beside the file name the splits of all photos.
        """
        lists = _read_split_lists(self.path.parent)

        def cell(cells: list[str], index: int | None) -> str:
            return cells[index].strip() if index is not None and index < len(cells) else ""

        rows = []
        for cells in self.rows:
            name = cell(cells, self.image)
            of_row = cell(cells, self.split) or split
            if lists:
                of_row = lists.get(without_number(name), "")
                if not of_row:  # Flickr8k has photos of no split
                    continue
            texts = [text for index in self.captions for text in _texts(cell(cells, index))]
            rows.append(Row(name, texts, of_row))
        return rows


def _texts(cell: str) -> list[str]:
    """Return the captions in a cell, which may be a JSON list, as in flickr_annotations_30k.csv."""
    if cell.startswith('["') and cell.endswith('"]'):
        try:
            return captions_in(json.loads(cell), "")
        except (ValueError, TypeError):
            pass
    return [cell]


def _read_split_lists(folder: Path) -> dict[str, str]:
    """Return the split of each photo that the lists in a folder name."""
    return {
        name.strip(): match[1]
        for path in sorted(folder.glob("*.txt"))
        if (match := _SPLIT_LIST.fullmatch(path.name))
        for name in read_text(path).splitlines()
    }


def is_split_list(path: Path) -> bool:
    """Return whether a file is a list of the photos of a split, such as *.trainImages.txt."""
    return _SPLIT_LIST.fullmatch(path.name) is not None


def open_table(path: Path, finder: PhotoFinder, columns: Columns) -> TextTable:
    """Recognize the delimiter, the headings and the columns of a text table.

    The photos' names are in the column whose cells name photos of ``finder``, else under one of the
    usual headings. The captions are under one of the usual headings, else in the columns with the
    most words.

    Raises:
        DataError: the file has no such columns, lacks those of ``columns``, or its encoding is
            unknown.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty: write lines of image,caption into it")
    sample = "\n".join(itertools.islice(filter(str.strip, text.splitlines()), _SAMPLE))
    hits = {each: _hits(sample, each, finder, columns) for each in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda each: hits[each])
    rows = list(_parse(text, delimiter, path))
    first = [cell.strip() for cell in rows[0]]
    image = _best_column(rows[:_SAMPLE], finder)
    names_photos = image is not None
    has_headings = _has_both(first) or not any(
        finder.find(cell) or _is_photo_name(cell) for cell in first
    )
    if image is None and not has_headings:  # the photos that it names are elsewhere
        image = next(index for index, cell in enumerate(first) if _is_photo_name(cell))
    if has_headings and image is None and not _known_headings(first, columns):
        has_headings = False
    if not has_headings and (columns.image or columns.captions):
        has_headings = True  # or the error that lists the columns
    names = first if has_headings else []
    body = rows[1:] if has_headings else rows
    if columns.image is not None or (has_headings and image is None):
        heading = columns.find_image(names, str(path))
        if heading is None:
            heading = next((name for name in names if name.lower() in _NAME_HEADINGS), None)
        image = None if heading is None else names.index(heading)
    found = columns.find_captions(names, str(path)) if has_headings else []
    captions = [names.index(name) for name in found]
    width = len(names) or _width(body, delimiter)
    split = next((index for index, name in enumerate(names) if name.lower() == "split"), None)
    if not names:
        split = _split_column(body, width)
    if not captions:
        captions = _wordy_columns(body, width, {image, split}, several=not names)
    if not captions:
        raise DataError(
            f"{path} has no column with captions, only: {', '.join(names or first)}; name the "
            "column in the first line (image,caption), or with --caption-column"
        )
    if len(captions) == 1:
        body = [_join_extra(cells, captions[0], width, delimiter) for cells in body]
    shown = [f"column {index + 1}" if not names else names[index] for index in captions]
    source = "none" if image is None else names[image] if names else f"column {image + 1}"
    taken = f"photos from {source}, captions from {', '.join(shown)}"
    return TextTable(path, body, image, captions, split, names_photos, taken)


def _hits(
    sample: str, delimiter: str, finder: PhotoFinder, columns: Columns
) -> tuple[int, bool, int]:
    """Return how well a delimiter fits: lines with a photo, known headings, lines with columns."""
    rows = [cells for _, cells in _reader(sample, delimiter) if len(cells) > 1]
    named = sum(any(finder.find(cell.strip()) for cell in cells) for cells in rows)
    headings = bool(rows) and _known_headings([cell.strip() for cell in rows[0]], columns)
    return named, headings, len(rows)


def _known_headings(cells: Sequence[str], columns: Columns) -> bool:
    """Return whether a line has a heading that the rules or the user name."""
    rules = Columns()
    wanted = {name.lower() for name in (columns.image, *columns.captions) if name}
    return bool(
        rules.find_image(cells, "")
        or rules.find_captions(cells, "")
        or wanted & {cell.lower() for cell in cells}
    )


def _has_both(cells: Sequence[str]) -> bool:
    """Return whether a line has headings for photos and for captions."""
    return bool(Columns().find_image(cells, "") and Columns().find_captions(cells, ""))


def _reader(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each line; only commas and semicolons come with quotes.

    The captions of Flickr's tables hold single quotation marks, which would swallow lines.
    """
    quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    for cells in filter(None, reader):
        is_plain = quoting == csv.QUOTE_NONE
        yield reader.line_num, [_unquoted(cell) for cell in cells] if is_plain else cells


def _unquoted(cell: str) -> str:
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _parse(text: str, delimiter: str, path: Path) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty."""
    try:
        for number, cells in _reader(text, delimiter):
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise DataError(
                    f"{path}: a file name or a caption spans several lines up to line {number}: "
                    "close the quotation mark before it, or rename the file"
                )
            yield cells
    except csv.Error as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8 CSV") from error


def _is_photo_name(cell: str) -> bool:
    suffix = PurePosixPath(without_number(cell.strip())).suffix
    return suffix.lower() in SUFFIXES


def _best_column(rows: Sequence[list[str]], finder: PhotoFinder) -> int | None:
    """Return the column in which most cells name a photo, None if none does."""
    counts = collections.Counter(
        index
        for cells in rows
        for index, cell in enumerate(cells)
        if finder.find(cell.strip()) is not None
    )
    return max(counts, key=lambda index: (counts[index], -index)) if counts else None


def _width(rows: Sequence[list[str]], delimiter: str) -> int:
    """Return the number of columns without headings; commas inside captions make more cells."""
    counts = {len(cells) for cells in rows if len(cells) > 1} or {1}
    return min(counts) if len(counts) == 1 or delimiter != "," else 2


def _split_column(rows: Sequence[list[str]], width: int) -> int | None:
    """Return the column that holds nothing but splits."""
    for index in range(width):
        cells = {cells[index].strip() for cells in rows if index < len(cells)}
        if cells and all(_SPLIT_IN_NAME.fullmatch(cell) or cell == "restval" for cell in cells):
            return index
    return None


def _wordy_columns(
    rows: Sequence[list[str]], width: int, taken: set[int | None], *, several: bool
) -> list[int]:
    """Return the column with the most words per cell, or ``several`` with about as many."""
    words = {
        index: statistics.fmean(
            len(re.findall(r"[^\W\d_]+", cells[index])) * (not _is_photo_name(cells[index]))
            for cells in rows
            if index < len(cells)
        )
        for index in range(width)
        if index not in taken and any(index < len(cells) for cells in rows)
    }
    most = max(words.values(), default=0.0)
    if not most:
        return []
    wordy = [index for index, count in words.items() if count >= most / 2]
    return wordy if several else [max(words, key=lambda index: words[index])]


def _join_extra(cells: list[str], caption: int, width: int, delimiter: str) -> list[str]:
    """Join a caption that delimiters without quotation marks have split."""
    end = caption + 1 + max(len(cells) - width, 0)
    return [*cells[:caption], f"{delimiter} ".join(cells[caption:end]), *cells[end:]]


# Encodings

_MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, UTF-16 or Latin-1.

    Raises:
        DataError: it is in another encoding.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    marked = (encoding for mark, encoding in _MARKS if data.startswith(mark))
    encoding = next(marked, None) or _guess(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no valid {encoding.upper()} ({error.reason} at byte {error.start}): save "
            "it as UTF-8"
        ) from error
    if encoding == "cp1252":
        if not _is_western(text):
            raise DataError(
                f"{path} is neither UTF-8 nor UTF-16, and as Latin-1 (Windows-1252) its letters "
                "make no words: save it as UTF-8"
            )
        log.warning("%s is read as Latin-1 (Windows-1252), because it is not UTF-8", path)
    return text


def _guess(data: bytes) -> str:
    """Return the likely encoding of text without a byte order mark."""
    start = data[:4096]
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = start[offset::2].count(0)
        if zeros > len(start) / 5 and zeros > 2 * start[1 - offset :: 2].count(0):
            return encoding
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252" if not data.translate(None, bytes(_CP1252)) else "utf-8"
    return "utf-8"


_CP1252 = [byte for byte in range(256) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)]


def _is_western(text: str) -> bool:
    """Return whether text decoded as Latin-1 reads like a Western European language.

    Other alphabets use the bytes above 127 for most letters, and Eastern European ones for letters
    where Latin-1 has signs and digits.
    """
    letters = [character for character in text if character.isalpha()]
    others = sum(not letter.isascii() for letter in letters)
    pattern = rf"(?<=[^\W\d_])[^\x00-\x7f{_INSIDE_WORDS}](?=[^\W\d_])"
    inner = re.findall(pattern, text)
    return others <= len(letters) / 4 and all(
        unicodedata.category(sign).startswith("L") for sign in inner
    )


# Photos


def join_photos(
    rows: Iterable[Row], finder: PhotoFinder, what: str
) -> tuple[dict[str, list[tuple[str, str, list[str]]]], int]:
    """Group rows by photo.

    Args:
        rows: of one or more files.
        finder: finds their photos.
        what: the files, for messages.

    Returns:
        for each split as written (empty means "train") the photos as (path, name, captions), and
        the number of photos that are missing.

    Raises:
        DataError: no photo can be found.
    """
    paths: dict[str, Path | None] = {}
    photos: dict[Path, tuple[str, str, list[str]]] = {}  # split, name, captions
    for name, captions, split in rows:
        if name not in paths:
            paths[name] = finder.find(name) if name else None
        if (path := paths[name]) is None:
            continue
        short = name if name.endswith(path.name) else without_number(name)
        photos.setdefault(path, (split or "train", short, []))[2].extend(captions)
    names = {without_number(name): path for name, path in paths.items()}
    if not photos:
        raise DataError(
            f"{what} names {len(names)} photos, but none of them is in {finder.folder}"
            + (f" (the first is {next(iter(names))!r})" if names else "")
            + ": put the photos there, or give the folder that holds both"
        )
    if num_missing := sum(path is None for path in names.values()):
        log.warning(
            "%s: %d of %d photos are not in %s", what, num_missing, len(names), finder.folder
        )
    splits: dict[str, list[tuple[str, str, list[str]]]] = {}
    for path, (split, name, captions) in photos.items():
        splits.setdefault(split, []).append((str(path.resolve()), name, captions))
    return splits, num_missing
