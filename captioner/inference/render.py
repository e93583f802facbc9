"""Exports of a caption: PNG sheet, GIF, JSON, and a web page that works offline.

Sees a ``Caption`` and a photo, no model. Draws on ``Figure`` objects: no global plotting state.
No file carries the photo's metadata. Matplotlib sets all text, since it shapes complex scripts and
falls back from font to font.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import functools
import html
import io
import itertools
import json
import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.transforms import IdentityTransform
from PIL import Image, ImageDraw, ImageOps

from captioner.config import FORMATS
from captioner.config import Appearance as Appearance  # exported with render
from captioner.errors import ConfigError
from captioner.inference.caption import Beam, Caption, Word, percent

log = logging.getLogger(__name__)

_DEFAULT = Appearance()
# Sides in pixels.
_THUMBNAIL = 480
_PAGE = 1024
_SHEET = (550, 1430)  # least and largest width
_DPI = 110
_FRAME_MS = 900
_INK, _ACCENT = "#27272a", "#c2410c"
_FONT = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT = "Last Resort High-Efficiency"  # so does this: a box for every character


# Maps


def value_range(beam: Beam, word: Word, appearance: Appearance = _DEFAULT) -> tuple[float, float]:
    """Return the shares of attention at the two ends of a map's colour scale."""
    words = [word] if appearance.scale == "word" else [*beam.words, beam.end]
    cells = np.stack([each.attention for each in words])
    return float(cells.min()), float(cells.max())


def blend(
    photo: Image.Image,
    word: Word,
    appearance: Appearance = _DEFAULT,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Lay a word's map over the photo. ``heat`` in viewer.js paints the same.

    Args:
        photo: upright RGB; the map covers all of it, as the encoder saw all of it.
        word: whose map.
        appearance: how it is drawn.
        limits: ends of the colour scale; by default the map's weakest and strongest cell.
    """
    low, high = limits or (float(word.attention.min()), float(word.attention.max()))
    scaled = ((word.attention - low) / max(high - low, 1e-9)).astype(np.float32)
    if appearance.shape == "cells":
        grid = Image.fromarray(scaled).resize(photo.size, Image.Resampling.NEAREST)
    else:
        # A cell is an area with its value in the middle; beyond the border the values go on.
        rows, columns = scaled.shape
        padded = Image.fromarray(np.pad(scaled, 2, mode="edge"))
        box = (2, 2, columns + 2, rows + 2)
        grid = padded.resize(photo.size, Image.Resampling.BICUBIC, box)
    weights = np.asarray(grid).clip(0, 1)
    amount = 0.7 * appearance.strength
    pixels = np.asarray(photo, dtype=np.float32) / 255
    pixels = pixels * (1 - amount * (1 - weights[..., None]))  # darker where it did not look
    if appearance.colors != "light":
        levels = np.rint(weights * 255).astype(np.uint8)
        colors = mpl.colormaps[appearance.colors](levels)[..., :3]
        glow = amount * weights[..., None]
        pixels = pixels * (1 - glow) + colors * glow
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _thumbnail(photo: Image.Image, side: int = _THUMBNAIL) -> Image.Image:
    """Return a copy of at most ``side`` pixels a side; it carries no metadata."""
    copy = Image.new("RGB", photo.size)
    copy.paste(photo)
    copy.thumbnail((side, side))
    return copy


# Text


def _is_right_to_left(text: str) -> bool:
    """Return whether the first letter with a direction is of a right-to-left script."""
    directions = (unicodedata.bidirectional(character) for character in text)
    return next((each != "L" for each in directions if each in ("L", "R", "AL")), False)


def _has(entry: font_manager.FontEntry, characters: str) -> set[str]:
    """Return the ``characters`` that a font has glyphs for."""
    with contextlib.suppress(OSError, RuntimeError):  # a damaged file
        font = FT2Font(entry.fname, face_index=entry.index)
        return {each for each in characters if font.get_char_index(ord(each))}
    return set()


def _search_fonts(characters: str) -> tuple[list[str], str]:
    """Return installed font families for ``characters``, and those that no font has."""

    def preference(entry: font_manager.FontEntry) -> tuple[Any, ...]:
        weight = entry.weight
        if isinstance(weight, str):
            weight = font_manager.weight_dict.get(weight, 400)
        with_serifs = any(part in entry.name for part in ("Serif", "Mono", "Naskh", "Nastaliq"))
        return entry.style != "normal", with_serifs, abs(weight - 400), entry.name, entry.fname

    # One file per family, upright and regular where there is a choice.
    families: dict[str, font_manager.FontEntry] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=preference):
        families.setdefault(entry.name, entry)
    families.pop(_LAST_RESORT, None)
    covered = {name: _has(entry, characters) for name, entry in families.items()}
    found: list[str] = []
    missing = set(characters)
    while missing:
        best = max(covered, key=lambda name: len(covered[name] & missing))
        if not covered[best] & missing:
            break
        found.append(best)
        missing -= covered[best]
    return found, "".join(sorted(missing))


@functools.lru_cache(maxsize=256)
def _fonts_for(characters: str) -> tuple[str, ...]:
    """Return installed font families that have what DejaVu Sans lacks; warn if there are none."""
    found, missing = _search_fonts(characters)
    if missing:
        # Matplotlib keeps its list of fonts on disk: look for fonts installed since.
        known = {entry.fname for entry in font_manager.fontManager.ttflist}
        for path in set(map(str, font_manager.findSystemFonts())) - known:
            with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
                font_manager.fontManager.addfont(path)
        found, missing = _search_fonts(characters)
    for character in missing:
        _warn_of_missing_glyphs(unicodedata.name(character, "unnamed").split()[0])
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _warn_of_missing_glyphs(script: str) -> None:
    """Warn once per script."""
    log.warning(
        "no installed font has all %s characters of the caption: PNG and GIF show boxes instead. "
        "Install one, such as Noto Sans (Debian: fonts-noto)",
        script,
    )


def _families(text: str) -> list[str]:
    """Return font families to set ``text`` in, first choice first."""
    font = FT2Font(font_manager.findfont(_FONT))
    lacking = {
        each
        for each in text
        if not each.isspace()
        and unicodedata.category(each) not in ("Cc", "Cf", "Cs")
        and not font.get_char_index(ord(each))
    }
    return [*_fonts_for("".join(sorted(lacking))), _FONT, _LAST_RESORT]


class _Typesetter:
    """Measures, cuts and breaks text of one language and size.

    Args:
        text: all that will be set; decides on the fonts.
        language: BCP 47 tag, for characters that languages draw differently.
        size: in points.
    """

    def __init__(self, text: str, language: str | None, size: float) -> None:
        self.style: dict[str, Any] = {
            "family": _families(text),
            "language": language,
            "fontsize": size,
            "parse_math": False,
        }
        self.gap = size * _DPI / 72 / 2  # pixels between words
        self._probe = Figure(dpi=_DPI).text(0, 0, "", **self.style)
        _, self.height, self.descent = self.measure(" ".join(["lp", *text.split()]))

    def measure(self, text: str) -> tuple[float, float, float]:
        """Return the width of a line in pixels, its height, and how much is under the baseline."""
        self._probe.set_text(text)
        box = self._probe.get_window_extent()
        return box.width, box.height, -box.y0

    def shorten(self, text: str, width: float) -> str:
        """Cut ``text`` to ``width`` pixels, with an ellipsis; white space becomes single spaces."""
        text = " ".join(text.split())
        if self.measure(text)[0] <= width:
            return text
        lengths = range(len(text))
        fitting = bisect.bisect(
            lengths, False, key=lambda length: self.measure(f"{text[:length]}…")[0] > width
        )
        return f"{text[: max(fitting - 1, 0)]}…"

    def wrap(self, words: Sequence[str], width: float) -> list[list[str]]:
        """Break ``words`` into lines of at most ``width`` pixels; longer words are cut."""
        lines: list[list[str]] = [[]]
        x = 0.0
        for word in (self.shorten(each, width) for each in words):
            length = self.measure(word)[0]
            if lines[-1] and x + length > width:
                lines.append([])
                x = 0.0
            lines[-1].append(word)
            x += length + self.gap
        return lines


class _Line(NamedTuple):
    """A line of text in a picture.

    Attributes:
        typesetter: knows fonts, size and language.
        text: what to write.
        x: of its left end or, with ``align`` "center", of its middle, in pixels.
        top: in pixels from the top of the picture.
    """

    typesetter: _Typesetter
    text: str
    x: float
    top: float
    color: str = _INK
    align: str = "center"


def _write_text(picture: Image.Image, lines: Sequence[_Line]) -> None:
    """Write text into a picture."""
    figure = Figure(figsize=(*picture.size, "px"), dpi=_DPI, facecolor="none")
    canvas = FigureCanvasAgg(figure)
    for line in lines:
        baseline = picture.height - line.top - line.typesetter.height + line.typesetter.descent
        figure.text(
            line.x,
            baseline,
            line.text,
            color=line.color,
            ha=line.align,
            va="baseline",
            transform=IdentityTransform(),
            **line.typesetter.style,
        )
    canvas.draw()  # type: ignore[no-untyped-call]
    text = Image.fromarray(np.asarray(canvas.buffer_rgba()))  # type: ignore[no-untyped-call]
    picture.paste(text, mask=text)


# Files


def _steps(beam: Beam, word: int | None) -> list[tuple[str, Word]]:
    """Return the words with their labels; the end is one of them if it is the chosen one."""
    steps = [(each.text, each) for each in beam.words]
    return [*steps, ("end", beam.end)] if word == len(beam.words) else steps


def _explanation(appearance: Appearance) -> str:
    """Return what a reader of the sheet has to know."""
    scale = "All maps share one scale"
    if appearance.scale == "word":
        scale = "Each map has its own scale, from its weakest to its strongest cell"
    return (
        f"Where the model looked before each word. {scale}. Percentages are the probabilities of "
        "the words. Attention is no proof of cause."
    )


def _color_scale(appearance: Appearance, size: tuple[int, int]) -> Image.Image:
    """Return a bar of the map's colours, the weakest cell's on the left."""
    name = "gray" if appearance.colors == "light" else appearance.colors
    colors = mpl.colormaps[name](np.linspace(0, 1, size[0]))[None, :, :3]
    return Image.fromarray((colors * 255).round().astype(np.uint8)).resize(size)


def sheet(
    photo: Image.Image,
    caption: Caption,
    beam: int = 0,
    word: int | None = None,
    appearance: Appearance = _DEFAULT,
) -> bytes:
    """Return a PNG: the photo, then each word's map and probability. See ``render``."""
    chosen = caption.beams[beam]
    steps = _steps(chosen, word)
    ratio = photo.width / photo.height
    # Wide photos get fewer columns and tall ones more, so that all have about the same area.
    columns = min(max(round(5 / math.sqrt(ratio)), 2), 8)
    side, gap = _SHEET[1] // columns, 12
    rows = math.ceil((len(steps) + 1) / columns)
    columns = math.ceil((len(steps) + 1) / rows)
    width = max(side * columns, _SHEET[0])
    small = ImageOps.contain(_thumbnail(photo, 2 * side), (side - gap, round(2.5 * side)))

    titles = _Typesetter(chosen.text, caption.language, 13)
    labels = _Typesetter(chosen.text, caption.language, 10)
    notes = _Typesetter("", None, 8)
    texts: list[_Line] = []
    top = float(gap)
    for line in titles.wrap(
        [each.text for each in chosen.words] or ["(no words)"], width - 2 * gap
    ):
        texts.append(_Line(titles, " ".join(line), width / 2, top))
        top += titles.height + 4
    first_row = round(top) + gap
    row_height = round(labels.height) + 6 + small.height + gap
    top = first_row + rows * row_height + gap
    bar = (width // 2 - 150, round(top))
    if steps:
        limits = value_range(chosen, steps[0][1], appearance)
        for x, name, end in zip((0, 300), ("weakest", "strongest"), limits, strict=True):
            text = f"{name} cell" + f": {percent(end)}" * (appearance.scale == "caption")
            texts.append(_Line(notes, text, bar[0] + x, bar[1] + 20))
        top += 20 + notes.height + gap
        for line in notes.wrap(_explanation(appearance).split(), width - 2 * gap):
            texts.append(_Line(notes, " ".join(line), width / 2, top))
            top += notes.height + 4

    picture = Image.new("RGB", (width, math.ceil(top) + gap), "white")
    if steps:
        picture.paste(_color_scale(appearance, (300, 14)), bar)
    for number, (label, step) in enumerate([("photo", None), *steps]):
        row, column = divmod(number, columns)
        if _is_right_to_left(chosen.text):
            column = columns - 1 - column
        left = (width - side * columns) // 2 + side * column + (side - small.width) // 2
        top = first_row + row_height * row
        corner = (left, round(top + labels.height) + 6)
        if step is None:
            picture.paste(small, corner)
        else:
            limits = value_range(chosen, step, appearance)
            picture.paste(blend(small, step, appearance, limits), corner)
            share = percent(step.probability)
            label = labels.shorten(label, side - gap - labels.measure(f"  {share}")[0])
            # Isolated: letters of other scripts would turn "43%" round.
            label = f"{label}  \u2066{share}\u2069"
        color = _INK
        if step is not None and number - 1 == word:
            color = _ACCENT
            right, bottom = corner[0] + small.width, corner[1] + small.height
            box = (corner[0] - 4, corner[1] - 4, right + 3, bottom + 3)
            ImageDraw.Draw(picture).rectangle(box, outline=color, width=4)
        texts.append(_Line(labels, label, left + small.width / 2, top, color))
    _write_text(picture, texts)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _strip(
    words: Sequence[str], width: int, language: str
) -> tuple[Image.Image, Image.Image, list[tuple[int, int, int, int]]]:
    """Set words in lines, from right to left where they are read so.

    Returns:
        the strip, the same with every word marked, and each word's box in both.
    """
    margin, padding = 10, 4
    typesetter = _Typesetter(" ".join(words), language, 16 * 72 / _DPI)
    lines = typesetter.wrap(words, width - 2 * margin)
    pitch = math.ceil(typesetter.height) + 2 * padding
    boxes = []
    for number, line in enumerate(lines):
        left = float(margin)
        top = padding + pitch * number
        for text in line:
            right = left + typesetter.measure(text)[0]
            boxes.append((int(left) - padding, top, math.ceil(right) + padding, top + pitch - 2))
            left = right + typesetter.gap
    if _is_right_to_left(" ".join(words)):
        boxes = [(width - right, top, width - left, bottom) for left, top, right, bottom in boxes]

    def draw(ink: str, paper: str) -> Image.Image:
        strip = Image.new("RGB", (width, pitch * len(lines) + 2 * padding), "white")
        texts = []
        for text, (left, top, right, bottom) in zip(itertools.chain(*lines), boxes, strict=True):
            box = (left, top, right - 1, bottom - 1)
            ImageDraw.Draw(strip).rounded_rectangle(box, 4, fill=paper)
            start = left + padding
            texts.append(_Line(typesetter, text, start, top + padding - 1, ink, "left"))
        _write_text(strip, texts)
        return strip

    return draw(_INK, "white"), draw("white", _ACCENT), boxes


def gif(
    photo: Image.Image,
    caption: Caption,
    beam: int = 0,
    word: int | None = None,
    appearance: Appearance = _DEFAULT,
) -> bytes:
    """Return an animated GIF: the caption under the photo, a frame per word with its map.

    See ``render``.
    """
    chosen = caption.beams[beam]
    small = _thumbnail(photo)
    steps = _steps(chosen, word)
    pictures = []
    if steps:
        width = max(small.width, 240)
        strip, marked, boxes = _strip([label for label, _ in steps], width, caption.language)
        for (_, step), box in zip(steps, boxes, strict=True):
            picture = Image.new("RGB", (width, small.height + strip.height), "white")
            limits = value_range(chosen, step, appearance)
            picture.paste(blend(small, step, appearance, limits), ((width - small.width) // 2, 0))
            picture.paste(strip, (0, small.height))
            picture.paste(marked.crop(box), (box[0], small.height + box[1]))
            pictures.append(picture)
    frames = []
    for picture in pictures or [small]:  # a caption without words is a still
        # Its own 256 colours per frame, dithered: else the map's glow falls into bands.
        palette = picture.quantize(method=Image.Quantize.FASTOCTREE)
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return file.getvalue()


def page(
    photo: Image.Image,
    caption: Caption,
    beam: int = 0,
    word: int | None = None,
    appearance: Appearance = _DEFAULT,
) -> bytes:
    """Return a web page that works offline: the app's viewer, for this one caption.

    Its beams can be compared, but without a model no caption can be continued. See ``render``.
    """
    parts = {
        name: (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("viewer.html", "viewer.css", "viewer.js")
    }
    file = io.BytesIO()
    _thumbnail(photo, _PAGE).save(file, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    value = {
        "photo": {"url": url},
        "caption": caption.to_dict(),
        "beam": beam,
        "word": word,
        "appearance": appearance.to_dict(),
    }
    # "<" must not end the script element; inside a JSON string it may be written as \u003c.
    data = json.dumps(value).replace("<", "\\u003c")
    language = html.escape(caption.language)
    text = html.escape(caption.beams[beam].text or "(no words)")
    return f"""<!doctype html>
<html lang="en" dir="ltr">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{text}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem; font-family: sans-serif; }}
h1 {{ margin: 0 0 0.25rem; font-size: 1.5rem; }}
h1 + p {{ margin: 0 0 1rem; }}
main {{ {parts["viewer.css"]} }}
</style>
</head>
<body>
<h1>Caption with attention maps</h1>
<p>Choose a word to see where in this photo the model looked for it, and what it would have written
  instead.</p>
<noscript>
<p lang="{language}" dir="auto">{text}</p>
<p>Your browser runs no scripts on this page, so it cannot draw the maps.</p>
</noscript>
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
    photo: Image.Image,
    caption: Caption,
    kind: str,
    beam: int = 0,
    word: int | None = None,
    appearance: Appearance = _DEFAULT,
) -> bytes:
    """Return a file of one of ``FORMATS``.

    Args:
        photo: upright RGB.
        caption: what to show.
        kind: "png" and "gif" show one beam, "json" and "html" hold all of them. The JSON is
            ``Caption.to_dict()`` with the index of the chosen beam as "chosen"; its "text" is
            still the best beam's, as it is wherever a caption is written as JSON.
        beam: the chosen one, which is shown, or shown first.
        word: index of the chosen word, or the number of words for the end, which is drawn only
            then. The PNG frames it and the web page opens at it. The GIF plays all words.
        appearance: of the maps. JSON has none.

    Raises:
        ConfigError: there is no such format, beam or word.
    """
    if kind not in FORMATS:
        raise ConfigError(f"no format is called {kind!r}; there are: {', '.join(FORMATS)}")
    if not 0 <= beam < len(caption.beams):
        raise ConfigError(f"there is no beam {beam}; there are {len(caption.beams)}")
    words = len(caption.beams[beam].words)
    if word is not None and not 0 <= word <= words:
        raise ConfigError(f"there is no word {word}; there are {words}, and the end")
    if kind == "json":
        values = {"text": caption.text, "chosen": beam, **caption.to_dict()}
        return json.dumps(values, indent=1, ensure_ascii=False).encode()
    return {"png": sheet, "gif": gif, "html": page}[kind](photo, caption, beam, word, appearance)


def comparison(
    photos: Sequence[Image.Image], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> bytes:
    """Return a PNG of photos with a reference (GT) and the model's caption (PRED) under each."""
    columns = 4
    side = 3.2  # inches
    rows = math.ceil(len(photos) / columns)
    figure = Figure(figsize=(side * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for panel, photo, caption, texts in zip(axes.flat, photos, captions, references, strict=False):
        panel.imshow(_thumbnail(photo))
        typesetter = _Typesetter(f"{texts[0]} {caption}", None, 9)
        lines = [
            " ".join(line)
            for text in (f"GT: {texts[0]}", f"PRED: {caption}")
            for line in typesetter.wrap(text.split(), side * _DPI * 0.9)
        ]
        panel.set_title("\n".join(lines), y=-0.02, va="top", loc="left", **typesetter.style)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()
