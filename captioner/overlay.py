"""What of a caption can be taken away: PNG sheet, GIF, JSON, a web page that works offline.

Sees a ``Caption`` and a picture, no model. Draws on ``Figure`` objects: no global plotting state.
No file carries the photo's metadata.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from captioner.caption import Beam, Caption, Word
from captioner.config import FORMATS
from captioner.errors import ConfigError

# Perceptually even, and read alike by people who do not see red or green.
COLORS = "inferno"


@__import__("dataclasses").dataclass(frozen=True)
class Appearance(__import__("captioner.config").config._Config):
    colors: str = "inferno"
    shape: str = "smooth"
    scale: str = "word"
    strength: float = 0.75


_THUMBNAIL = 480
_PAGE = 1024
_COLUMNS = 5
_FRAME_MS = 900


def blend(photo: Image.Image, word: Word, *, strength: float = 0.75) -> Image.Image:
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


def _thumbnail(photo: Image.Image, side: int = _THUMBNAIL) -> Image.Image:
    """Return a copy of at most ``side`` pixels a side; it carries no metadata."""
    copy = Image.new("RGB", photo.size)
    copy.paste(photo)
    copy.thumbnail((side, side))
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


def gif(photo: Image.Image, beam: Beam) -> bytes:
    """Return an animated GIF: the caption under the photo, one frame a word with its map.

    Args:
        photo: upright RGB.
        beam: the caption to play.
    """
    small = _thumbnail(photo)
    width = max(small.width, 240)
    font = ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 16)
    # The place of each word in the strip below, broken into lines as it must be.
    places, x, y = [], 10, 6
    for word in beam.words:
        length = math.ceil(font.getlength(word.text))
        if x > 10 and x + length > width - 10:
            x, y = 10, y + 24
        places.append((x, y))
        x += length + 8
    strip = Image.new("RGB", (width, y + 30), "white")
    for word, place in zip(beam.words, places, strict=True):
        ImageDraw.Draw(strip).text(place, word.text, "#27272a", font)
    left = (width - small.width) // 2
    frames = []
    for word, (x, y) in zip(beam.words, places, strict=True):
        shown = strip.copy()
        draw = ImageDraw.Draw(shown)
        box = (x - 4, y - 2, x + font.getlength(word.text) + 4, y + 21)
        draw.rounded_rectangle(box, 4, fill="#c2410c")
        draw.text((x, y), word.text, "white", font)
        frame = Image.new("RGB", (width, small.height + strip.height), "white")
        frame.paste(blend(small, word), (left, 0))
        frame.paste(shown, (0, small.height))
        # Its own 256 colours a frame, dithered: without that the map's glow falls into bands.
        palette = frame.quantize(method=Image.Quantize.FASTOCTREE)
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    # A caption without words is a still.
    first, *others = frames or [small]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=_FRAME_MS, loop=0)
    return file.getvalue()


def page(photo: Image.Image, caption: Caption, beam: int = 0) -> bytes:
    """Return a web page that holds everything it needs: the app's viewer, for this one caption.

    Args:
        photo: upright RGB.
        caption: its beams can be compared; without a model nothing can be written on.
        beam: which one it shows first.
    """
    parts = {
        name: (Path(__file__).parent / "viewer" / name).read_text(encoding="utf-8")
        for name in ("viewer.html", "viewer.css", "viewer.js")
    }
    file = io.BytesIO()
    _thumbnail(photo, _PAGE).save(file, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    value = {"photo": {"url": url}, "caption": caption.to_dict(), "beam": beam}
    # "<" must not end the script element; inside a JSON string it may be written as \u003c.
    data = json.dumps(value).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{html.escape(caption.beams[beam].text)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem; font-family: sans-serif; }}
main {{ {parts["viewer.css"]} }}
</style>
</head>
<body>
<main>{parts["viewer.html"]}</main>
<script type="application/json" id="value">{data}</script>
<script>
{parts["viewer.js"]}
const value = JSON.parse(document.getElementById("value").textContent);
mountViewer(document.querySelector("main")).show(value);
</script>
</body>
</html>
""".encode()


def render(
    photo: Image.Image, caption: Caption, kind: str, beam: int = 0, word=None, appearance=None
) -> bytes:
    """Return a file of one of ``FORMATS``.

    Args:
        photo: upright RGB.
        caption: what to show.
        kind: "png" and "gif" show one beam; "json" and "html" hold them all.
        beam: which one is shown, or shown first.

    Raises:
        ConfigError: there is no such format or beam.
    """
    if kind not in FORMATS:
        raise ConfigError(f"no format is called {kind!r}; there are: {', '.join(FORMATS)}")
    if not 0 <= beam < len(caption.beams):
        raise ConfigError(f"there is no beam {beam}; there are {len(caption.beams)}")
    if kind == "json":
        return json.dumps(caption.to_dict(), indent=1, ensure_ascii=False).encode()
    if kind == "html":
        return page(photo, caption, beam)
    return (sheet if kind == "png" else gif)(photo, caption.beams[beam])


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
