"""Which columns of a table hold the photos and the captions, and the captions in a cell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from captioner.errors import DataError

# Compared without regard to case; the first that a table has is taken.
# fmt: off
IMAGE_COLUMNS = (
    "image", "img", "jpg", "jpeg", "png", "webp", "photo", "image_path", "file_name", "filename",
)
CAPTION_COLUMNS = (
    "alt_text", "caption", "captions", "text", "txt", "sentences", "sentence", "comment",
)
# fmt: on
_NUMBERED = re.compile(r"caption_?(\d+)", re.IGNORECASE)
_MAX_SHOWN = 20
# What the dictionaries of Karpathy's and COCO's annotations call a caption.
_TEXT_KEYS = ("raw", "caption")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that the user named.

    Attributes:
        image: with the photos, or their names; None chooses it by rule.
        captions: empty chooses them by rule.
    """

    image: str | None = None
    captions: tuple[str, ...] = ()

    def find_image(self, names: Sequence[str], where: str) -> str | None:
        """Return the column with the photos among a table's ``names``, None if there is none.

        ``where`` is the table, for the message.

        Raises:
            DataError: the table lacks the column that the user named.
        """
        if self.image is not None:
            return _named(self.image, names, where, "--image-column")
        return _first_hit(IMAGE_COLUMNS, names)

    def find_captions(self, names: Sequence[str], where: str) -> list[str]:
        """Return the columns with captions among a table's ``names``, none if there are none.

        ``where`` is the table, for the message.

        Raises:
            DataError: the table lacks a column that the user named.
        """
        if self.captions:
            return [_named(name, names, where, "--caption-column") for name in self.captions]
        if (name := _first_hit(CAPTION_COLUMNS, names)) is not None:
            return [name]
        numbered = [(int(match[1]), name) for name in names if (match := _NUMBERED.fullmatch(name))]
        return [name for _, name in sorted(numbered)]


def _first_hit(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def _named(wanted: str, names: Sequence[str], where: str, option: str) -> str:
    name = wanted if wanted in names else _first_hit([wanted.lower()], names)
    if name is None:
        raise DataError(
            f"{where} has no column {wanted!r}, only: {shorten(names)}; name one of these with "
            f"{option}"
        )
    return name


def shorten(names: Sequence[str]) -> str:
    """Return names for a message; where there is no table, they may be thousands of texts."""
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:_MAX_SHOWN]]
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return f"{', '.join(shown) or 'nothing'}{more}"


def missing_column(kind: str, names: Sequence[str], where: str) -> DataError:
    """Return the error for a table without a column of a kind, "image" or "caption"."""
    wanted = IMAGE_COLUMNS if kind == "image" else (*CAPTION_COLUMNS, "caption_0 ...")
    what = "photos" if kind == "image" else "captions"
    return DataError(
        f"{where} has no column with {what} ({', '.join(wanted)}), only: {shorten(names)}; name it "
        f"with --{kind}-column"
    )


def captions_in(cell: Any, column: str) -> list[str]:
    """Return the captions in a cell: a text, a list of texts, or of dictionaries with a text.

    Each line of a WebDataset's .txt is a caption.

    Raises:
        TypeError: the cell holds something else.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        return cell.splitlines() if column.lower() == "txt" else [cell]
    if isinstance(cell, Mapping):
        for key in _TEXT_KEYS:
            if key in cell:
                return captions_in(cell[key], key)
        raise TypeError(f"captions cannot be a dict of {', '.join(map(str, cell))}")
    if isinstance(cell, list):
        return [text for item in cell for text in captions_in(item, column)]
    raise TypeError(f"captions cannot be a {type(cell).__name__}")
