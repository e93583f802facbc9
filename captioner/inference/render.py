"""Exports of a caption: PNG sheet, GIF, JSON, and a web page that works offline.

Knows a ``Caption`` and a photo, but no model. Draws on ``Figure`` objects, without global plotting
state. No file carries the photo's metadata. Matplotlib sets all text, since it shapes complex
scripts and supports fallback fonts.
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
import string
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

from captioner.config import BETWEEN_CHARACTERS, FORMATS, INNER_SPACE
from captioner.config import Appearance as Appearance  # exported with render
from captioner.errors import ConfigError
from captioner.inference.caption import Beam, Caption, Word, percent

log = logging.getLogger(__name__)

_DEFAULT = Appearance()
# Sides in pixels.
_THUMBNAIL_SIDE = 480
_PAGE_SIDE = 1024
_SHEET_WIDTHS = (550, 1430)  # least and largest
_DPI = 110
_FRAME_MS = 900
_INK, _ACCENT = "#27272a", "#c2410c"
_COLD = np.array((96, 165, 250)) / 255  # cells that speak against a word
_FONT = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT_FONT = "Last Resort High-Efficiency"  # comes with it, too: a box per character


# Maps


def shown_map(word: Word, appearance: Appearance = _DEFAULT) -> str:
    """Return the name of the map that is drawn for a word."""
    return appearance.map if appearance.map in word.maps else "attended"


def map_cells(beam: Beam, word: Word, appearance: Appearance = _DEFAULT) -> np.ndarray:
    """Return the cells (7, 7) that are drawn for a word: of its map, or what is special in it."""
    name = shown_map(word, appearance)
    cells = word.maps[name]
    if appearance.special:
        cells = cells - np.mean([each.maps[name] for each in _with_map(beam, name)], axis=0)
    return cells


def value_range(beam: Beam, word: Word, appearance: Appearance = _DEFAULT) -> tuple[float, float]:
    """Return the values at the two ends of a map's color scale; with negative ones 0 is between."""
    name = shown_map(word, appearance)
    words = [word] if appearance.scale == "word" else _with_map(beam, name)
    cells = np.stack([map_cells(beam, each, appearance) for each in words])
    low, high = float(cells.min()), float(cells.max())
    if name in ("attended", "shown") and not appearance.special:
        return low, high
    most = max(-low, high)
    return -most, most


def _with_map(beam: Beam, name: str) -> list[Word]:
    """Return the beam's words and its end, as far as they have the map."""
    return [each for each in (*beam.words, beam.end) if name in each.maps]


def blend(
    photo: Image.Image,
    cells: np.ndarray,
    appearance: Appearance = _DEFAULT,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw a map over the photo, as ``heat`` in viewer.js does.

    Args:
        photo: upright RGB; the map covers all of it, because the encoder sees all of it.
        cells: (7, 7).
        appearance: how it is drawn.
        limits: ends of the color scale; by default the weakest and the strongest cell. If the first
            is negative, they are -m and m, and cells below zero glow in a cold color.
    """
    low, high = limits or (float(cells.min()), float(cells.max()))
    if low < 0 and appearance.colors != "light":
        scaled = (cells / max(high, 1e-9)).astype(np.float32)
    else:
        scaled = ((cells - low) / max(high - low, 1e-9)).astype(np.float32)
    if appearance.shape == "cells":
        grid = Image.fromarray(scaled).resize(photo.size, Image.Resampling.NEAREST)
    else:
        # A cell's value belongs to its center; edge padding extends the map to the border.
        rows, columns = scaled.shape
        padded = Image.fromarray(np.pad(scaled, 2, mode="edge"))
        box = (2, 2, columns + 2, rows + 2)
        grid = padded.resize(photo.size, Image.Resampling.BICUBIC, box)
    # Overshoot below zero must not glow where no cell is below zero.
    weights = np.asarray(grid).clip(-1 if low < 0 else 0, 1)
    heat = np.abs(weights)[..., None]
    amount = 0.7 * appearance.strength
    pixels = np.asarray(photo, dtype=np.float32) / 255
    pixels = pixels * (1 - amount * (1 - heat))  # darker where the map is weak
    if appearance.colors != "light":
        glow = amount * heat
        pixels = pixels * (1 - glow) + _map_colors(weights, appearance) * glow
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _map_colors(weights: np.ndarray, appearance: Appearance) -> np.ndarray:
    """Return the colors (..., 3) of weights from -1 to 1."""
    levels = np.rint(weights.clip(min=0) * 255).astype(np.uint8)
    colors = mpl.colormaps[appearance.colors](levels)[..., :3]
    return np.where(weights[..., None] < 0, _COLD, colors)


def _thumbnail(photo: Image.Image, side: int = _THUMBNAIL_SIDE) -> Image.Image:
    """Return a copy of at most ``side`` pixels per side, without metadata."""
    copy = Image.new("RGB", photo.size)
    copy.paste(photo)
    copy.thumbnail((side, side))
    return copy


# Text


def _is_right_to_left(text: str) -> bool:
    """Return whether the first letter with a direction is of a right-to-left script."""
    directions = (unicodedata.bidirectional(character) for character in text)
    return next((each != "L" for each in directions if each in ("L", "R", "AL")), False)


def _covered(entry: font_manager.FontEntry, characters: str) -> set[str]:
    """Return the ``characters`` that a font has glyphs for."""
    with contextlib.suppress(OSError, RuntimeError):  # a damaged file
        font = FT2Font(entry.fname, face_index=entry.index)
        return {each for each in characters if font.get_char_index(ord(each))}
    return set()


def _search_fonts(characters: str) -> tuple[list[str], str]:
    """Return installed font families for ``characters``, and the characters that none covers."""

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
    families.pop(_LAST_RESORT_FONT, None)
    covered = {name: _covered(entry, characters) for name, entry in families.items()}
    chosen: list[str] = []
    missing = set(characters)
    while missing:
        best = max(covered, key=lambda name: len(covered[name] & missing))
        if not covered[best] & missing:
            break
        chosen.append(best)
        missing -= covered[best]
    return chosen, "".join(sorted(missing))


@functools.lru_cache(maxsize=256)
def _fonts_for(characters: str) -> tuple[str, ...]:
    """Return installed font families for characters not in DejaVu Sans; warn if none has one."""
    families, missing = _search_fonts(characters)
    if missing:
        # Matplotlib caches its list of fonts on disk: look for fonts installed since.
        known = {entry.fname for entry in font_manager.fontManager.ttflist}
        for path in set(map(str, font_manager.findSystemFonts())) - known:
            # A font that FreeType cannot read is no help here.
            with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
                font_manager.fontManager.addfont(path)
        families, missing = _search_fonts(characters)
    for character in missing:
        _warn_of_missing_glyphs(unicodedata.name(character, "unnamed").split()[0])
    return tuple(families)


@functools.lru_cache(maxsize=64)
def _warn_of_missing_glyphs(script: str) -> None:
    """Warn once per script."""
    log.warning(
        "no installed font has all %s characters of the caption: PNG and GIF show boxes instead. "
        "Install one, such as Noto Sans (Debian: fonts-noto)",
        script,
    )


def _families(text: str) -> list[str]:
    """Return font families for ``text``, in order of preference."""
    font = FT2Font(font_manager.findfont(_FONT))
    missing = {
        each
        for each in text
        if not each.isspace()
        and unicodedata.category(each) not in ("Cc", "Cf", "Cs")
        and not font.get_char_index(ord(each))
    }
    return [*_fonts_for("".join(sorted(missing))), _FONT, _LAST_RESORT_FONT]


class _Typesetter:
    """Measures, shortens and wraps text of one language and size.

    Args:
        text: all text that will be set; decides the fonts.
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
        """Return a line's width, height and depth below the baseline, in pixels."""
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
        typesetter: decides fonts, size and language.
        text: the line.
        x: its left end or, with ``align`` "center", its middle, in pixels.
        top: pixels from the top of the picture.
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
    """Return the words with their labels, and the end if it is the chosen word."""
    steps = [(each.text, each) for each in beam.words]
    return [*steps, ("end", beam.end)] if word == len(beam.words) else steps


_LOOKED = "where the model looked before it wrote the word"
_EXPLANATIONS = {
    "attended": f"Each map: {_LOOKED}",
    "evidence": "Each map: what the cells gave to the word through its detector or its class's "
    f"name; words without either show {_LOOKED}",
    "mattered": "Each map: how far the word's log-probability falls without the cell",
    "shown": f"Each map: where the word's detector sees it; words without one show {_LOOKED}",
}


def _explanation(appearance: Appearance, *, is_signed: bool) -> str:
    """Return the note under a sheet."""
    scale = "All maps share one scale"
    if appearance.scale == "word":
        scale = "Each map has its own scale, from its weakest to its strongest cell"
    special = "; drawn is the difference from the caption's mean map" if appearance.special else ""
    cold = " Blue cells speak against the word." if is_signed else ""
    if is_signed and appearance.special:
        cold = " Blue: less than in the mean map."
    return (
        f"{_EXPLANATIONS[appearance.map]}{special}. {scale}.{cold} Percentages are the "
        "probabilities of the words. No map proves what caused a word."
    )


def _ends(appearance: Appearance, *, is_signed: bool) -> tuple[str, str]:
    """Return the names of the ends of the color scale."""
    if not is_signed:
        return "weakest cell", "strongest cell"
    if appearance.special:
        return "less than the mean map", "more"
    return "against the word", "for the word"


def _color_scale(appearance: Appearance, size: tuple[int, int], *, is_signed: bool) -> Image.Image:
    """Return a bar of the map's colors, the weakest on the left."""
    if appearance.colors == "light":
        colors = mpl.colormaps["gray"](np.linspace(0, 1, size[0]))[None, :, :3]
    else:
        weights = np.linspace(-1 if is_signed else 0, 1, size[0])[None]
        colors = _map_colors(weights, appearance)
        colors = np.where(weights[..., None] < 0, colors * -weights[..., None], colors)
    return Image.fromarray((colors * 255).round().astype(np.uint8)).resize(size)


class _Grid:
    """The panels of a sheet: the photo, then a map per step, in rows.

    Args:
        photo: at full size.
        num_panels: with the photo's.
        label_height: of the text above each panel, in pixels.
        right_to_left: whether the first panel of a row is the rightmost.
    """

    gap = 12

    def __init__(
        self, photo: Image.Image, num_panels: int, label_height: float, *, right_to_left: bool
    ) -> None:
        # Wide photos get fewer columns and tall ones more, so that panels have about equal areas.
        most = min(max(round(5 / math.sqrt(photo.width / photo.height)), 2), 8)
        self.side = _SHEET_WIDTHS[1] // most
        self._rows = math.ceil(num_panels / most)
        self._columns = math.ceil(num_panels / self._rows)
        self.width = max(self.side * self._columns, _SHEET_WIDTHS[0])
        panel_size = (self.side - self.gap, round(2.5 * self.side))
        self.photo = ImageOps.contain(_thumbnail(photo, 2 * self.side), panel_size)
        self._label_height = round(label_height) + 6
        self._row_height = self._label_height + self.photo.height + self.gap
        self._right_to_left = right_to_left

    @property
    def height(self) -> int:
        return self._rows * self._row_height

    def corner(self, index: int) -> tuple[int, int]:
        """Return the left and top pixel of a panel, relative to the grid's top."""
        row, column = divmod(index, self._columns)
        if self._right_to_left:
            column = self._columns - 1 - column
        margin = (self.width - self.side * self._columns) // 2
        left = margin + self.side * column + (self.side - self.photo.width) // 2
        return left, self._row_height * row + self._label_height


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
    titles = _Typesetter(chosen.text, caption.language, 13)
    labels = _Typesetter(chosen.text, caption.language, 10)
    grid = _Grid(photo, len(steps) + 1, labels.height, right_to_left=_is_right_to_left(chosen.text))
    title = [each.text for each in chosen.words] or ["(no words)"]
    texts, top = _paragraph(titles, title, grid.width, float(grid.gap))
    first_row = round(top) + grid.gap
    top = first_row + grid.height + grid.gap
    bar = (grid.width // 2 - 150, round(top))
    # The scale is that of the first word with the chosen map, as most others are.
    first = next((each for _, each in steps if appearance.map in each.maps), chosen.end)
    limits = value_range(chosen, first, appearance)
    if steps:
        notes, top = _legend(limits, shown_map(first, appearance), appearance, grid.width, bar)
        texts += notes
    picture = Image.new("RGB", (grid.width, math.ceil(top) + grid.gap), "white")
    if steps:
        scale = _color_scale(appearance, (300, 14), is_signed=limits[0] < 0)
        picture.paste(scale, bar)
    for index, (label, step) in enumerate([("photo", None), *steps]):
        left, panel_top = grid.corner(index)
        corner = (left, first_row + panel_top)
        panel, color = grid.photo, _INK
        if step is not None:
            panel = _blend_word(grid.photo, chosen, step, appearance)
            label = _panel_label(labels, label, step, grid.side - grid.gap)
        picture.paste(panel, corner)
        if step is not None and index - 1 == word:
            color = _ACCENT
            _frame(picture, corner, panel.size)
        label_top = corner[1] - round(labels.height) - 6
        texts.append(_Line(labels, label, left + panel.width / 2, label_top, color))
    _write_text(picture, texts)
    return _png(picture)


def _paragraph(
    typesetter: _Typesetter, words: Sequence[str], width: int, top: float
) -> tuple[list[_Line], float]:
    """Wrap words into centered lines; return them and the pixel below the last one."""
    lines = []
    for words_of_line in typesetter.wrap(words, width - 2 * _Grid.gap):
        text = INNER_SPACE.sub("", " ".join(words_of_line))
        lines.append(_Line(typesetter, text, width / 2, top))
        top += typesetter.height + 4
    return lines, top


def _blend_word(photo: Image.Image, beam: Beam, word: Word, appearance: Appearance) -> Image.Image:
    limits = value_range(beam, word, appearance)
    return blend(photo, map_cells(beam, word, appearance), appearance, limits)


def _legend(
    limits: tuple[float, float],
    name: str,
    appearance: Appearance,
    width: int,
    bar: tuple[int, int],
) -> tuple[list[_Line], float]:
    """Return the texts under the color scale at ``bar``, and the pixel below the last one.

    Args:
        limits: the values at the ends of the scale.
        name: of the map.
        appearance: of the maps.
        width: of the picture.
        bar: the left and top pixel of the color scale.
    """
    notes = _Typesetter("", None, 8)
    is_signed = limits[0] < 0
    ends = []
    for x, text, value in zip(
        (0, 300),
        _ends(appearance, is_signed=is_signed),
        limits,
        strict=True,
    ):
        if appearance.scale == "caption":
            is_share = name in ("attended", "shown")
            sign = "\u2212" if value < 0 else ""
            text += f": {sign}{percent(abs(value))}" if is_share else f": {value:+.2f} nats"
        ends.append(_Line(notes, text, bar[0] + x, bar[1] + 20))
    top = bar[1] + 20 + notes.height + _Grid.gap
    explanation = _explanation(appearance, is_signed=is_signed)
    lines, top = _paragraph(notes, explanation.split(), width, top)
    return ends + lines, top


def _panel_label(typesetter: _Typesetter, label: str, word: Word, width: float) -> str:
    """Return the word, shortened to ``width`` pixels, with its probability."""
    share = percent(word.probability)
    label = typesetter.shorten(label, width - typesetter.measure(f"  {share}")[0])
    # Isolated: letters of right-to-left scripts would reverse "43%".
    return f"{label}  \u2066{share}\u2069"


def _frame(picture: Image.Image, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw the frame of the chosen panel."""
    box = (corner[0] - 4, corner[1] - 4, corner[0] + size[0] + 3, corner[1] + size[1] + 3)
    ImageDraw.Draw(picture).rectangle(box, outline=_ACCENT, width=4)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _strip(
    words: Sequence[str], width: int, language: str
) -> tuple[Image.Image, Image.Image, list[tuple[int, int, int, int]]]:
    """Set words in lines, from right to left in scripts that are read so.

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
    """Return an animated GIF: a frame per word with its map, above the caption. See ``render``."""
    chosen = caption.beams[beam]
    small = _thumbnail(photo)
    steps = _steps(chosen, word)
    pictures = []
    if steps:
        width = max(small.width, 240)
        strip, marked, boxes = _strip([label for label, _ in steps], width, caption.language)
        for (_, step), box in zip(steps, boxes, strict=True):
            picture = Image.new("RGB", (width, small.height + strip.height), "white")
            blended = _blend_word(small, chosen, step, appearance)
            picture.paste(blended, ((width - small.width) // 2, 0))
            picture.paste(strip, (0, small.height))
            picture.paste(marked.crop(box), (box[0], small.height + box[1]))
            pictures.append(picture)
    frames = []
    for picture in pictures or [small]:  # a caption without words is a still
        # 256 colors per frame, dithered: otherwise the map's glow shows bands.
        palette = picture.quantize(method=Image.Quantize.FASTOCTREE)
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return file.getvalue()


_PAGE = string.Template("""<!doctype html>
<html lang="en" dir="ltr">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$text</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem; font-family: sans-serif; }
h1 { margin: 0 0 0.25rem; font-size: 1.5rem; }
h1 + p { margin: 0 0 1rem; }
main { $style }
</style>
</head>
<body>
<h1>Caption with attention maps</h1>
<p>Choose a word to see where in this photo the model looked for it, and what it would have written
  instead.</p>
<noscript>
<p lang="$language" dir="auto">$text</p>
<p>Your browser runs no scripts on this page, so it cannot draw the maps.</p>
</noscript>
<main>$template</main>
<script type="application/json" id="value">$value</script>
<script>
$script
const value = JSON.parse(document.getElementById("value").textContent);
mountViewer(document.querySelector("main")).show(value);
</script>
</body>
</html>
""")


def page(
    photo: Image.Image,
    caption: Caption,
    beam: int = 0,
    word: int | None = None,
    appearance: Appearance = _DEFAULT,
) -> bytes:
    """Return a web page that works offline: the app's viewer for this caption.

    Its beams can be compared, but without a model no caption can be continued. See ``render``.
    """
    file = io.BytesIO()
    _thumbnail(photo, _PAGE_SIDE).save(file, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    value = {
        "photo": {"url": url},
        "caption": caption.to_dict(),
        "beam": beam,
        "word": word,
        "appearance": appearance.to_dict(),
    }
    style, template, script = (
        (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.html", "viewer.js")
    )
    return _PAGE.substitute(
        # "<" must not end the script element; a JSON string may write it as \u003c.
        value=json.dumps(value).replace("<", "\\u003c"),
        language=html.escape(caption.language),
        text=html.escape(caption.beams[beam].text or "(no words)"),
        style=style,
        template=template,
        script=script,
    ).encode()


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
        caption: with all its beams.
        kind: "png" and "gif" show one beam, "json" and "html" hold all. The JSON is
            ``Caption.to_dict()`` plus the index of the chosen beam as "chosen"; its "text" is the
            best beam's, as in every caption's JSON.
        beam: index of the beam to show, or to show first.
        word: index of the chosen word, or the number of words for the end, which is drawn only
            then. The PNG frames it, the web page opens at it, and the GIF plays all words.
        appearance: of the maps; unused in JSON.

    Raises:
        ConfigError: the format is unknown, or the beam or word is out of range.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format is {kind!r}; it must be one of {', '.join(FORMATS)}")
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
    photos: Sequence[Image.Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str | None = None,
) -> bytes:
    """Return a PNG of photos with a reference (GT) and the model's caption (PRED) under each.

    ``language`` is the BCP 47 tag of the captions.
    """
    columns = 4
    side = 3.2  # inches
    rows = math.ceil(len(photos) / columns)
    figure = Figure(figsize=(side * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for panel, photo, caption, texts in zip(axes.flat, photos, captions, references, strict=False):
        panel.imshow(_thumbnail(photo))
        typesetter = _Typesetter(f"{texts[0]} {caption}", language, 9)
        lines = [
            INNER_SPACE.sub("", " ".join(line))
            for text in (f"GT: {texts[0]}", f"PRED: {caption}")
            for line in typesetter.wrap(
                BETWEEN_CHARACTERS.sub(" ", text).split(), side * _DPI * 0.9
            )
        ]
        panel.set_title("\n".join(lines), y=-0.02, va="top", loc="left", **typesetter.style)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()
