"""Tables of captions in text files: CSV and the like, Flickr8k's and Flickr30k's own files.

Delimiter, headings, columns and encoding are recognized by the content.
"""

from __future__ import annotations

import codecs
import collections
import csv
import functools
import io
import itertools
import json
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

from captioner.data.caption_files import SPLIT_IN_NAME, PhotoFinder, Row, without_number
from captioner.data.columns import Columns, captions_in, shorten
from captioner.errors import DataError
from captioner.images import SUFFIXES

_Find: TypeAlias = Callable[[str], Path | None]

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".psv", ".tab")
_DELIMITERS = "\t|;,"  # the rarest in a caption first
_SAMPLE = 50  # lines by which a table is recognized
_NAME_HEADINGS = ("image_name", "image_id", "file", "name")  # where no cell names a photo
# Flickr8k's lists, such as Flickr_8k.trainImages.txt.
_SPLIT_LIST = re.compile(r"(?:.*[._-])?(train|dev|val|test)images\.txt", re.IGNORECASE)
# What stands between two letters in Latin-1: apostrophes, hyphens, a dot in Catalan.
_INSIDE_WORDS = "\u2019\u2018\u00b4\u2013\u2014\u00b7\u00ad"


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
        text, encoding = _decode(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty: write lines of image,caption into it")
    find = functools.partial(finder.find, near=path.parent)
    sample = "\n".join(itertools.islice(filter(str.strip, text.splitlines()), _SAMPLE))
    hits = {each: _hits(sample, each, find, columns) for each in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda each: hits[each])
    rows = list(_parse(text, delimiter, path))
    found = _column_of_names(rows[:_SAMPLE], find)
    first = [cell.strip() for cell in rows[0]]
    named = (_is_photo_name(cell.strip()) for cells in rows[1:_SAMPLE] for cell in cells)
    is_found = found is not None or any(named)
    names = first if _is_heading(first, find, columns, is_found=is_found) else []
    rows = rows[1:] if names else rows
    image = _image_column(names, rows[:_SAMPLE] or [first], found, columns, path)
    width = len(names) or _width(rows, delimiter)
    split = next((index for index, name in enumerate(names) if name.lower() == "split"), None)
    if not names:
        split = _split_column(rows, width)
    captions = [names.index(name) for name in columns.find_captions(names, str(path))]
    captions = captions or _wordy_columns(rows, names, width, {image, split})
    if not captions:
        raise DataError(
            f"{path} has no column with captions, only: {shorten(names or first)}; name the column "
            "in the first line (image,caption), or with --caption-column"
        )
    if len(captions) == 1:
        rows = [_join_extra(cells, captions[0], width, delimiter) for cells in rows]
    shown = names or [f"column {index + 1}" for index in range(width)]
    taken = (
        f"photos from {'none' if image is None else shown[image]}, "
        f"captions from {', '.join(shown[index] for index in captions)} of {path.name}"
        + (", read as Latin-1 (Windows-1252)" if encoding == _LATIN_1 else "")
    )
    return TextTable(path, rows, image, captions, split, found is not None, taken)


def _is_heading(first: Sequence[str], find: _Find, columns: Columns, *, is_found: bool) -> bool:
    """Return whether the first line holds headings; ``is_found``: some lines name photos."""
    if columns.image or columns.captions or _has_both(first):
        return True
    is_row = any(find(cell) or _is_photo_name(cell) for cell in first)
    return not is_row and (is_found or _known_headings(first, columns))


def _image_column(
    names: Sequence[str],
    sample: Sequence[Sequence[str]],
    found: int | None,
    columns: Columns,
    path: Path,
) -> int | None:
    """Return the column with the photos' names, None if there is none.

    Args:
        names: the headings, if there are any.
        sample: some of the lines.
        found: the column in which cells name photos that are there, or None.
        columns: those that the user named.
        path: of the table, for messages.
    """
    if found is not None and columns.image is None:
        return found
    if names:
        heading = columns.find_image(names, str(path))
        if heading is None:
            heading = next((name for name in names if name.lower() in _NAME_HEADINGS), None)
        if heading is not None:
            return names.index(heading)
    # Its photos are elsewhere.
    named = (
        index for row in sample for index, cell in enumerate(row) if _is_photo_name(cell.strip())
    )
    return next(named, None)


def _hits(sample: str, delimiter: str, find: _Find, columns: Columns) -> tuple[int, bool, int]:
    """Return how well a delimiter fits: lines with a photo, known headings, lines with columns."""
    rows = [cells for _, cells in _reader(sample, delimiter) if len(cells) > 1]
    named = sum(any(find(cell.strip()) for cell in cells) for cells in rows)
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
    is_plain = delimiter not in ",;"
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
    )
    for cells in filter(None, reader):
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


def _column_of_names(rows: Sequence[list[str]], find: _Find) -> int | None:
    """Return the column in which most cells name a photo, None if none does."""
    counts = collections.Counter(
        index
        for cells in rows
        for index, cell in enumerate(cells)
        if find(cell.strip()) is not None
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
        if cells and all(SPLIT_IN_NAME.fullmatch(cell) or cell == "restval" for cell in cells):
            return index
    return None


def _wordy_columns(
    rows: Sequence[list[str]], names: Sequence[str], width: int, taken: set[int | None]
) -> list[int]:
    """Return the columns with the most words per cell.

    Without headings these are all that have at least half as many as the first of them; with
    headings, which tell a description from an author, those of the same name but for a number.
    """
    words = {
        index: statistics.fmean(
            len(re.findall(r"[^\W\d_]+", cells[index])) * (not _is_photo_name(cells[index]))
            for cells in rows
            if index < len(cells)
        )
        for index in range(width)
        if index not in taken and any(index < len(cells) for cells in rows)
    }
    most = max(words, key=lambda index: words[index], default=0)
    if not words.get(most):
        return []
    if not names:
        return [index for index, count in words.items() if count >= words[most] / 2]
    stems = [re.sub(r"[\W\d_]+$", "", name) for name in names]
    return [index for index in words if stems[index] == stems[most] or index == most]


def _join_extra(cells: list[str], caption: int, width: int, delimiter: str) -> list[str]:
    """Join a caption that delimiters without quotation marks have split."""
    end = caption + 1 + max(len(cells) - width, 0)
    return [*cells[:caption], f"{delimiter} ".join(cells[caption:end]), *cells[end:]]


# Encodings

_LATIN_1 = "cp1252"  # with Windows' quotation marks and dashes
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
    return _decode(path)[0]


def _decode(path: Path) -> tuple[str, str]:
    """Return the text and the encoding of a file; errors as for ``read_text``."""
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
    if encoding == _LATIN_1 and not _is_western(text):
        raise DataError(
            f"{path} is neither UTF-8 nor UTF-16, and as Latin-1 (Windows-1252) its letters make "
            "no words: save it as UTF-8"
        )
    return text, encoding


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
        return _LATIN_1 if not data.translate(None, bytes(_CP1252)) else "utf-8"
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
