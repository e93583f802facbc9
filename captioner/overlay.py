"""Pictures of a caption: the photo once a word, with the map of where the model looked.

Sees a ``Caption`` and a picture, no model. Draws on ``Figure`` objects: no global plotting state.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from captioner.caption import Beam, Word

# Perceptually even, and read alike by people who do not see red or green.
COLORS = "inferno"
_THUMBNAIL = 480
_COLUMNS = 5


def blend(photo: Image.Image, word: Word, *, strength: float = 0.9) -> Image.Image:
    """Lay a word's map over the photo, smoothed, over exactly what the encoder saw: all of it.

    Args:
        photo: upright RGB.
        word: its weakest cell gets no colour, its strongest the brightest.
        strength: 0 shows the photo alone, 1 the strongest map.
    """
    low, high = float(word.attention.min()), float(word.attention.max())
    scaled = (word.attention - low) / max(high - low, 1e-9)
    # Cells are areas: a resized picture of 7 x 7 pixels keeps each over its part of the photo.
    cells = Image.fromarray(scaled.astype(np.float32))
    weights = np.asarray(cells.resize(photo.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colors = mpl.colormaps[COLORS](weights)[..., :3]
    weights = weights[..., None]
    pixels = np.asarray(photo, dtype=np.float32) / 255
    # What is looked at glows; the rest stays the photo, darker.
    pixels = pixels * (1 - strength * 0.7 * (1 - weights))
    mixed = pixels * (1 - strength * 0.7 * weights) + colors * (strength * 0.7 * weights)
    return Image.fromarray((mixed * 255).round().clip(0, 255).astype(np.uint8))


def _thumbnail(photo: Image.Image) -> Image.Image:
    """Return a copy of at most ``_THUMBNAIL`` pixels a side; it carries no metadata."""
    copy = Image.new("RGB", photo.size)
    copy.paste(photo)
    copy.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return copy


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def sheet(photo: Image.Image, beam: Beam) -> bytes:
    """Return a PNG: the photo, then once a word with its map and the word's probability.

    Args:
        photo: upright RGB, as ``open_photo`` gives it.
        beam: the caption to draw.
    """
    small = _thumbnail(photo)
    panels: list[tuple[Image.Image, str]] = [(small, "the photo")]
    panels += [(blend(small, word), f"{word.text}  {word.probability:.0%}") for word in beam.words]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 2.6 * columns
    # Very wide or tall photos still leave room for their titles.
    height = rows * (2.6 * min(max(small.height / small.width, 0.4), 2.5) + 0.4)
    figure = Figure(figsize=(width, height + 0.8), layout="constrained")
    title = "\n".join(textwrap.wrap(beam.text or "(no words)", width=int(12 * columns)))
    figure.suptitle(title, fontsize=13, parse_math=False)
    figure.supxlabel(
        "Where the decoder read for each word, each map scaled from its weakest to its strongest "
        "cell; % is the word's probability. No proof of cause.",
        fontsize=8,
        wrap=True,
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (picture, label) in zip(axes, panels, strict=False):
        place.imshow(picture)
        place.set_title(label, fontsize=10, parse_math=False)
    for place in axes:
        place.set_axis_off()
    return _png(figure)


def comparison(
    photos: Sequence[Image.Image], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> bytes:
    """Return a PNG of photos with a reference (GT) and the model's caption (PRED) under each."""
    columns = 4
    rows = math.ceil(len(photos) / columns)
    figure = Figure(figsize=(3.2 * columns, 4.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, photo, caption, texts in zip(axes, photos, captions, references, strict=False):
        place.imshow(_thumbnail(photo))
        lines = [*textwrap.wrap(f"GT: {texts[0]}", 38), *textwrap.wrap(f"PRED: {caption}", 38)]
        style = {"fontsize": 9, "y": -0.02, "va": "top", "loc": "left", "parse_math": False}
        place.set_title("\n".join(lines), **style)
    for place in axes:
        place.set_axis_off()
    return _png(figure)
