"""The pictures: sizes, places, and that no metadata of the photo goes along."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from captioner.config import FORMATS
from captioner.errors import ConfigError
from captioner.inference import render as rendering
from captioner.inference.caption import Beam, Caption, Word
from captioner.inference.render import Appearance, blend, comparison, gif, page, render, sheet

ROOT = Path(__file__).resolve().parents[2]


def one_hot(row: int, column: int) -> np.ndarray:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[row, column] = 1
    return attention


def word(text: str, attention: np.ndarray) -> Word:
    return Word(text, 0.5, (("a", 0.5),), {"attended": attention})


def beam_of(*texts: str) -> Beam:
    words = tuple(word(text, one_hot(number % 7, 0)) for number, text in enumerate(texts))
    return Beam(words, word("<eos>", one_hot(0, 0)), -3.0, -1.0)


def caption_of(*texts: str, size: tuple[int, int] = (90, 60)) -> Caption:
    return Caption((beam_of(*texts), beam_of("a", "cat")), size, (0,))


def secretive(size: tuple[int, int], colour: str = "teal") -> Image.Image:
    """A photo as it is opened, with what a camera or its owner wrote into the file."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGB", size, colour).save(file, "JPEG", exif=exif, comment="secret comment")
    photo = Image.open(file)
    photo.load()
    assert "comment" in photo.info
    assert "exif" in photo.info
    return photo


def grey(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (90, 90, 90))


def framed(picture: Image.Image) -> tuple[int, int, int, int]:
    """Return the box of the one panel of a sheet that has a frame."""
    pixels = np.asarray(picture.convert("RGB"))
    # Rows and columns with a long run of the frame's colour; letters have none.
    accent = (pixels == (0xC2, 0x41, 0x0C)).all(axis=-1)
    rows, columns = (np.flatnonzero(accent.sum(axis=axis) > 60) for axis in (1, 0))
    assert len(rows) == len(columns) == 8  # four pixels on either side
    return columns[3] + 1, rows[3] + 1, columns[4], rows[4]


# Maps


@pytest.mark.parametrize(
    ("size", "cell"), [((280, 280), (0, 0)), ((630, 210), (2, 5)), ((210, 630), (6, 6))]
)
def test_brightest_pixel_lies_in_the_strongest_cell(
    size: tuple[int, int], cell: tuple[int, int]
) -> None:
    photo = Image.new("RGB", size, (40, 40, 40))
    pixels = np.asarray(blend(photo, one_hot(*cell)).convert("L")).astype(int)
    row, column = divmod(int(pixels.argmax()), size[0])
    assert (row * 7 // size[1], column * 7 // size[0]) == cell


@pytest.mark.parametrize(
    ("colors", "strength"),
    [("inferno", 1), ("viridis", 0.3), ("cividis", 0), ("light", 1), ("light", 0.3)],
)
def test_cell_colors_match_the_page(colors: str, strength: float) -> None:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[0, 0], attention[3, 4] = 0.4, 0.6
    appearance = Appearance(colors=colors, shape="cells", strength=strength)  # type: ignore[arg-type]
    pixels = np.asarray(blend(grey((70, 140)), attention, appearance)).astype(float)
    cells = pixels.reshape(7, 20, 7, 10, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    # As viewer/viewer.js: the photo is darker where the map is weak, and glows where it is strong.
    amount = 0.7 * strength
    for cell, weight in (((0, 0), 2 / 3), ((3, 4), 1), ((6, 6), 0)):
        expected = np.full(3, 90 * (1 - amount * (1 - weight)))
        if colors != "light":
            color = np.array(mpl.colormaps[colors](round(weight * 255))[:3]) * 255
            expected = expected * (1 - amount * weight) + color * amount * weight
        np.testing.assert_allclose(cells[cell[0], 0, cell[1], 0], expected, atol=1)


def test_smooth_map_interpolates_cell_centers() -> None:
    appearance = Appearance(colors="light", strength=1)
    attention = np.repeat(np.linspace(0, 1, 7, dtype=np.float32)[:, None], 7, axis=1)
    pixels = np.asarray(blend(grey((210, 210)), attention, appearance))[..., 0]
    assert (np.ptp(pixels, axis=1) == 0).all()
    assert (np.diff(pixels[:, 0].astype(int)) >= 0).all()
    middles = pixels[15::30, 0]
    np.testing.assert_allclose(middles, 90 * (0.3 + 0.7 * np.linspace(0, 1, 7)), atol=1.5)
    even = np.full((7, 7), 1 / 49, dtype=np.float32)
    pixels = np.asarray(blend(grey((70, 70)), even, appearance, (0, 1 / 49)))
    assert (pixels == 90).all()


def test_uniform_map_does_not_divide_by_zero() -> None:
    even = np.full((7, 7), 1 / 49, dtype=np.float32)
    assert blend(Image.new("RGB", (70, 70), "white"), even).size == (70, 70)


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_caption_scale_is_shared_by_all_words(kind: str) -> None:
    weak = np.full((7, 7), 0.5 / 48, dtype=np.float32)
    weak[3, 3] = 0.5
    words = (word("a", one_hot(0, 0)), word("dog", weak))
    caption = Caption((Beam(words, word("<eos>", weak), -3.0, -1.0),), (210, 210))
    middles = []
    for scale in ("word", "caption"):
        appearance = Appearance(colors="light", shape="cells", scale=scale, strength=1)
        data = render(grey((210, 210)), caption, kind, 0, 1, appearance)
        if kind == "png":
            picture = Image.open(io.BytesIO(data))
            panel = picture.crop(framed(picture))
        else:
            panel = frames_of(data)[1].crop((0, 0, 210, 210))
        middles.append(panel.getpixel((panel.width // 2, panel.height // 2)))
    assert middles[0] == pytest.approx((90, 90, 90), abs=4)
    assert middles[1] == pytest.approx((90 * 0.65,) * 3, abs=4)


# The sheet


@pytest.mark.parametrize(
    ("words", "size"),
    [(0, (300, 200)), (18, (900, 100)), (18, (100, 900)), (1, (5000, 20)), (18, (1, 5000))],
)
def test_sheet_is_png_without_metadata(words: int, size: tuple[int, int]) -> None:
    data = sheet(secretive(size), caption_of(*(f"word{number}" for number in range(words))))
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert b"secret" not in data
    assert not picture.getexif()
    assert 550 <= picture.width <= 1430
    assert 100 < picture.height < 3500


@pytest.mark.parametrize("size", [(120, 300), (900, 200)])
def test_sheet_frames_the_chosen_word(size: tuple[int, int]) -> None:
    caption = caption_of("a", "dog", "runs", "on", "grass", size=size)
    boxes = []
    for number, step in enumerate([*caption.words, caption.beams[0].end]):
        appearance = Appearance(colors="viridis", shape="cells")
        data = render(grey(size), caption, "png", 0, number, appearance)
        picture = Image.open(io.BytesIO(data))
        box = framed(picture)
        panel = np.asarray(picture.crop(box))
        height, width, _ = panel.shape
        assert width / height == pytest.approx(size[0] / size[1], rel=0.03)
        assert np.array_equal(
            panel, np.asarray(blend(grey((width, height)), step.attention, appearance))
        )
        boxes.append((box[1], box[0]))
    boxes.pop()  # the end, which moves the others
    assert boxes == sorted(boxes)  # in rows, from left to right
    assert len(set(boxes)) == 5


def test_sheet_frames_nothing_by_default() -> None:
    with pytest.raises(AssertionError):
        framed(Image.open(io.BytesIO(sheet(grey((300, 200)), caption_of("a", "dog")))))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The texts that are written into pictures, and their styles."""
    texts: list[tuple[str, dict[str, Any]]] = []
    write = Figure.text

    def spy(self: Figure, x: float, y: float, text: str, **style: Any) -> Any:
        if text:
            texts.append((text, style))
        return write(self, x, y, text, **style)

    monkeypatch.setattr(Figure, "text", spy)
    return texts


def test_sheet_labels_match_the_page(
    written: list[tuple[str, dict[str, Any]]],
) -> None:
    shares = {"a": 0.4349, "dog": 0.0994, "runs": 0.0995, "on": 0.00004, "grass": 0.125}
    words = tuple(
        dataclasses.replace(word(text, one_hot(0, 0)), probability=share)
        for text, share in shares.items()
    )
    caption = Caption((Beam(words, word("<eos>", one_hot(0, 0)), -3.0, -1.0),), (30, 20))
    sheet(grey((30, 20)), caption, 0, 5, Appearance(scale="caption"))
    texts = [re.sub("[\u2066\u2069]", "", text) for text, _ in written]
    for label in ("a  43%", "dog  9.9%", "runs  10%", "on  0.0%", "grass  13%", "end  50%"):
        assert label in texts
    assert "a dog runs on grass" in texts
    assert "weakest cell: 0.0%" in texts
    assert "strongest cell: 100%" in texts
    assert "one scale" in " ".join(texts)


def test_sheet_shortens_long_words(written: list[tuple[str, dict[str, Any]]]) -> None:
    sheet(grey((30, 20)), caption_of("a", "x" * 2000, "two\nlines $x^2$"))
    texts = [text for text, _ in written]
    assert "two lines $x^2$  \u206650%\u2069" in texts
    (label,) = [text for text in texts if re.match(r"x+…  \u206650%", text)]
    assert 10 < len(label) < 60


def test_comparison_holds_every_photo() -> None:
    photos = [Image.new("RGB", (50, 50), (red, 0, 0)) for red in (60, 120, 180, 240, 30)]
    data = comparison(photos, ["a dog"] * 5, [["a cat", "two cats"]] * 5)
    colors = Image.open(io.BytesIO(data)).convert("RGB").getcolors(10**7)
    assert colors is not None
    assert {(red, 0, 0) for red in (60, 120, 180, 240, 30)} <= {color for _, color in colors}


def frames_of(data: bytes) -> list[Image.Image]:
    """Return an animation's frames, whole and in colour."""
    animation: Any = Image.open(io.BytesIO(data))
    assert animation.format == "GIF"
    frames = []
    for number in range(animation.n_frames):
        animation.seek(number)
        frames.append(animation.convert("RGB"))
    return frames


@pytest.mark.parametrize("size", [(300, 200), (1, 5000), (5000, 1)])
def test_gif_has_one_frame_of_900_ms_per_word(size: tuple[int, int]) -> None:
    data = gif(secretive(size), caption_of("a", "dog", "runs"))
    animation: Any = Image.open(io.BytesIO(data))
    assert animation.n_frames == 3
    for number in range(3):
        animation.seek(number)
        assert animation.info["duration"] == 900
    assert animation.info["loop"] == 0
    assert "comment" not in animation.info
    assert b"secret" not in data
    assert 240 <= animation.width <= 480
    assert animation.height <= 480 + 60


def test_gif_frame_shows_its_word_and_map() -> None:
    frames = frames_of(
        gif(Image.new("RGB", (300, 210), (40, 40, 40)), caption_of("a", "dog", "runs"))
    )
    marked = []
    for number, frame in enumerate(frames):
        assert frame.size[0] == 300
        assert frame.size[1] > 210
        pixels = np.asarray(frame).astype(int)
        brightest = int(pixels[:210].sum(axis=-1).argmax())
        assert divmod(brightest, 300)[0] * 7 // 210 == number
        marked.append(marked_columns(frame, 210))
    assert all(left[1] <= right[0] + 1 for left, right in itertools.pairwise(marked))


def marked_columns(frame: Image.Image, photo_height: int) -> tuple[int, int]:
    """Return the first and last column of the box behind the marked word of a GIF's frame."""
    strip = np.asarray(frame).astype(int)[photo_height:]
    # The box is #c2410c: much more red than blue.
    columns = np.flatnonzero((strip[..., 0] - strip[..., 2] > 120).any(axis=0))
    return int(columns.min()), int(columns.max())


def test_gif_plays_the_end_only_if_chosen() -> None:
    caption = caption_of("a", "dog")
    assert len(frames_of(gif(grey((90, 60)), caption, 0, 1))) == 2
    assert len(frames_of(gif(grey((90, 60)), caption, 0, 2))) == 3


def test_gif_without_words_is_a_still() -> None:
    data = gif(secretive((300, 200), "red"), caption_of())
    (frame,) = frames_of(data)
    assert frame.size == (300, 200)
    assert frame.getpixel((150, 100)) == pytest.approx((254, 0, 0), abs=4)
    assert b"secret" not in data


def test_gif_wraps_long_captions() -> None:
    photo = Image.new("RGB", (240, 100), "white")
    texts = ["wonderfully", "photographed", "Mississippi", "steamboats"] * 5
    frames = frames_of(gif(photo, caption_of(*texts)))
    (few,) = frames_of(gif(photo, caption_of("a")))
    assert frames[0].height > few.height + 5 * 20
    for text, frame in zip(texts, frames, strict=True):
        strip = np.asarray(frame).astype(int)[100:]
        rows, columns = np.nonzero(strip[..., 0] - strip[..., 2] > 120)
        assert columns.max() - columns.min() >= 8 * len(text)
        assert rows.max() - rows.min() >= 18
        for edge in (strip[:, :5], strip[:, -5:], strip[-3:]):
            assert edge.min() > 200  # paper, dithered; the ink is at 39


# Scripts


ARABIC, HEBREW = "كلب يجري على العشب", "כלב רץ על הדשא"
HINDI, CHINESE = "कुत्ता घास पर", "一只 狗 在 草地 上"


@pytest.mark.parametrize(("text", "leftwards"), [(ARABIC, True), (HEBREW, True), ("a b c", False)])
def test_words_follow_the_direction_of_their_script(text: str, leftwards: bool) -> None:
    size = (300, 300)
    caption = caption_of(*text.split(), size=size)
    middles = [sum(marked_columns(frame, 300)) for frame in frames_of(gif(grey(size), caption))]
    assert middles == sorted(middles, reverse=leftwards)
    assert (middles[0] > 2 * 200) == leftwards
    # All panels of the sheet are in one row.
    sheets = [sheet(grey(size), caption, 0, number) for number in (0, 1)]
    first, second = (framed(Image.open(io.BytesIO(data)))[0] for data in sheets)
    assert (first > second) == leftwards


def dejavu_only(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    """Make this a machine that has only matplotlib's DejaVu, and ``others``."""
    data = mpl.get_data_path()
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.fname.startswith(data) and entry.name.startswith(("DejaVu", "Last", *others))
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    rendering._fonts_for.cache_clear()
    rendering._warn_of_missing_glyphs.cache_clear()


@pytest.fixture
def fresh_fonts() -> Iterator[None]:
    """Forget afterwards which fonts a test has seen."""
    yield
    rendering._fonts_for.cache_clear()
    rendering._warn_of_missing_glyphs.cache_clear()


@pytest.mark.usefixtures("fresh_fonts")
def test_letters_that_no_font_has_are_said_once_per_script(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dejavu_only(monkeypatch)
    photo = grey((30, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib would warn of each glyph
        for text in (ARABIC, HEBREW, "ein süßer Hund", "собака", "σκύλος", "a\u200db"):
            render(photo, caption_of(*text.split()), "gif")
        assert not caplog.records
        for text in (HINDI, CHINESE, HINDI[::-1], "狗"):
            for kind in ("png", "gif"):
                render(photo, caption_of(*text.split()), kind)
    scripts = [record.getMessage().split(" characters")[0] for record in caplog.records]
    assert scripts == ["no installed font has all DEVANAGARI", "no installed font has all CJK"]
    assert "fonts-noto" in caplog.text


@pytest.mark.usefixtures("fresh_fonts")
@pytest.mark.parametrize("listed", [True, False])
def test_fallback_font_is_found(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    written: list[tuple[str, dict[str, Any]]],
    listed: bool,
) -> None:
    """Also one that was installed after matplotlib wrote its list of fonts."""
    script_a = "\U0001d49c"  # mathematical script A: STIX has it and DejaVu Sans has not
    if listed:
        dejavu_only(monkeypatch, "STIX")
    else:
        dejavu_only(monkeypatch)
        stix = [str(Path(mpl.get_data_path(), "fonts/ttf/STIXGeneral.ttf")), "/nowhere.ttf"]
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: stix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gif(grey((30, 20)), dataclasses.replace(caption_of(script_a, "dog"), language="zh-Hant"))
    assert not caplog.records
    styles = [style for text, style in written if text == script_a]
    assert len(styles) == 2  # once plain, once marked
    for style in styles:
        assert style["family"][:2] == ["STIXGeneral", "DejaVu Sans"]
        assert style["language"] == "zh-Hant"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=4), st.sampled_from(["png", "gif"]))
def test_any_word_can_be_drawn(texts: Sequence[str], kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(grey((9, 6)), caption_of(*texts), kind)


# The web page


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and the texts of its scripts."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def value(self) -> dict[str, Any]:
        """Return what the page shows."""
        ((_, text),) = [
            (element, text)
            for element, text in zip(self.elements, self.texts, strict=True)
            if element[1].get("id") == "value"
        ]
        value: dict[str, Any] = json.loads(text)
        return value


def test_page_loads_nothing_external() -> None:
    data = page(secretive((2000, 1000)), caption_of("a", "dog"))
    text = data.decode()
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?data:)", text)
    shown = Elements(data)
    for _, attributes in shown.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    (policy,) = [
        attributes["content"]
        for tag, attributes in shown.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy


def test_page_photo_has_no_metadata() -> None:
    data = page(secretive((2000, 1000)), caption_of("a", "dog"))
    kind, _, code = Elements(data).value()["photo"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    file = base64.b64decode(code)
    assert b"secret" not in file
    assert b"Exif" not in file
    photo = Image.open(io.BytesIO(file))
    assert photo.size == (1024, 512)
    assert not {"exif", "comment"} & set(photo.info)


def test_page_opens_at_the_chosen_beam() -> None:
    caption = caption_of("a", "dog")
    data = page(Image.new("RGB", caption.size), caption, 1)
    value = Elements(data).value()
    assert (value["beam"], value["word"]) == (1, None)
    assert b"<title>a cat</title>" in data


def test_page_opens_at_the_chosen_word_and_appearance() -> None:
    caption = caption_of("a", "dog")
    appearance = Appearance(colors="light", shape="cells", scale="caption", strength=0.5)
    value = Elements(render(grey((9, 6)), caption, "html", 0, 1, appearance)).value()
    assert value["word"] == 1
    assert value["appearance"] == {
        "map": "evidence",
        "special": False,
        "colors": "light",
        "shape": "cells",
        "scale": "caption",
        "strength": 0.5,
    }


def test_page_has_heading_language_and_noscript_text() -> None:
    caption = dataclasses.replace(caption_of(*ARABIC.split()), language="ar")
    shown = Elements(page(grey((9, 6)), caption))
    tags = [tag for tag, _ in shown.elements]
    assert tags.count("h1") == 1
    assert "attention" in shown.texts[tags.index("h1")]
    assert shown.texts[tags.index("h1") + 1].endswith(".\n")
    assert dict(shown.elements)["html"] == {"lang": "en", "dir": "ltr"}
    assert shown.texts[tags.index("title")].strip() == ARABIC
    # For readers that run no scripts, as previews of e-mail do.
    fallback = tags.index("noscript") + 1
    assert shown.elements[fallback] == ("p", {"lang": "ar", "dir": "auto"})
    assert shown.texts[fallback].strip() == ARABIC
    assert shown.value()["caption"]["language"] == "ar"


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "${alert(1)}",
        "<!--<script>",
        "--></SCRIPT >",
        "`${x}`",
        "</title><b>",
        "\"'&\\\u2028",
    ],
)
def test_page_escapes_hostile_words(text: str) -> None:
    photo = Image.new("RGB", (9, 6))
    harmless = Elements(page(photo, caption_of("a", "dog")))
    shown = Elements(page(photo, caption_of("a", text)))
    assert shown.elements == harmless.elements
    assert shown.value()["caption"] == caption_of("a", text).to_dict()
    # The script is the same, whatever the words are: nothing is filled into its code.
    assert shown.texts[-1] == harmless.texts[-1]


@given(st.text())
def test_page_keeps_any_word_unchanged(text: str) -> None:
    shown = Elements(page(Image.new("RGB", (3, 2)), caption_of(text)))
    assert shown.value()["caption"]["beams"][0]["words"][0]["text"] == text
    assert [tag for tag, _ in shown.elements].count("script") == 2


def test_every_format_has_its_signature() -> None:
    caption = caption_of("a", "dog", size=(300, 200))
    photo = secretive(caption.size)
    files = {kind: render(photo, caption, kind) for kind in FORMATS}
    assert files["png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert files["gif"].startswith(b"GIF89a")
    assert files["html"].startswith(b"<!doctype html>")
    values = json.loads(files["json"])
    assert Caption.from_dict(values).to_dict() == caption.to_dict()
    assert values.pop("chosen") == 0
    assert values == caption.to_dict()
    assert not [kind for kind, data in files.items() if b"secret" in data]


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_picture_shows_the_chosen_beam(kind: str) -> None:
    caption, photo = caption_of("a", "dog", "runs"), Image.new("RGB", (90, 60), "teal")
    alone = dataclasses.replace(caption, beams=caption.beams[1:])
    assert render(photo, caption, kind, 1) == render(photo, alone, kind)
    assert render(photo, caption, kind, 1) != render(photo, caption, kind)


def test_json_marks_the_chosen_beam() -> None:
    caption = caption_of("a", "dog")
    values = json.loads(render(grey((9, 6)), caption, "json", 1))
    assert (values["text"], values["chosen"]) == ("a dog", 1)
    assert values["beams"][values["chosen"]]["text"] == "a cat"


@pytest.mark.parametrize("kind", ["bmp", "", "PNG", "../png"])
def test_unknown_format_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="must be one of png, gif, json, html"):
        render(Image.new("RGB", (9, 6)), caption_of("a"), kind)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("index", [-1, 2])
def test_beam_or_word_out_of_range_is_refused(kind: str, index: int) -> None:
    with pytest.raises(ConfigError, match=rf"no beam {index}; there are 2"):
        render(grey((9, 6)), caption_of("a"), kind, index)
    with pytest.raises(ConfigError, match=rf"no word {index}; there are 1, and the end"):
        render(grey((9, 6)), caption_of("a"), kind, 0, index)


@pytest.mark.slow
def test_rendering_does_not_import_pyplot() -> None:
    code = (
        "import sys; from tests.inference.test_render import *; "
        "[render(Image.new('RGB', (90, 60)), caption_of('a'), kind) for kind in FORMATS]; "
        "comparison([Image.new('RGB', (9, 6))], ['a'], [['b']]); "
        "print([name for name in ('matplotlib', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "['matplotlib']"
