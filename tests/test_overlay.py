"""The pictures: sizes, places, and that no metadata of the photo goes along."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from captioner.caption import Beam, Caption, Word
from captioner.config import FORMATS
from captioner.errors import ConfigError
from captioner.overlay import blend, comparison, gif, page, render, sheet

ROOT = Path(__file__).resolve().parent.parent


def one_hot(row: int, column: int) -> np.ndarray:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[row, column] = 1
    return attention


def word(text: str, attention: np.ndarray) -> Word:
    return Word(text, 0.5, (("a", 0.5),), attention)


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


@pytest.mark.parametrize("size", [(280, 280), (630, 210), (210, 630)])
@pytest.mark.parametrize("cell", [(0, 0), (2, 5), (6, 6)])
def test_the_brightest_pixel_lies_in_the_strongest_cell(
    size: tuple[int, int], cell: tuple[int, int]
) -> None:
    photo = Image.new("RGB", size, (40, 40, 40))
    pixels = np.asarray(blend(photo, word("dog", one_hot(*cell))).convert("L")).astype(int)
    row, column = divmod(int(pixels.argmax()), size[0])
    assert (row * 7 // size[1], column * 7 // size[0]) == cell


def test_strength_zero_is_the_photo() -> None:
    photo = Image.effect_noise((70, 70), 50).convert("RGB")
    same = blend(photo, word("dog", one_hot(3, 3)), strength=0)
    assert np.array_equal(np.asarray(same), np.asarray(photo))


def test_an_even_map_is_drawn_without_a_division_by_zero() -> None:
    even = np.full((7, 7), 1 / 49, dtype=np.float32)
    assert blend(Image.new("RGB", (70, 70), "white"), word("dog", even)).size == (70, 70)


@pytest.mark.parametrize("words", [0, 1, 4, 18])
@pytest.mark.parametrize("size", [(300, 200), (900, 100), (100, 900)])
def test_a_sheet_is_a_png_without_metadata_for_any_number_of_words(
    words: int, size: tuple[int, int]
) -> None:
    data = sheet(secretive(size), beam_of(*(f"word{number}" for number in range(words))))
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert b"secret" not in data
    assert not picture.getexif()
    assert min(picture.size) > 100


def test_a_comparison_holds_every_photo() -> None:
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


@pytest.mark.parametrize("size", [(300, 200), (5000, 20), (20, 5000), (1, 5000), (5000, 1)])
def test_a_gif_has_a_frame_a_word_of_nine_tenths_of_a_second(size: tuple[int, int]) -> None:
    data = gif(secretive(size), beam_of("a", "dog", "runs"))
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


def test_each_frame_of_a_gif_shows_its_word_in_the_strip_and_its_map_on_the_photo() -> None:
    frames = frames_of(gif(Image.new("RGB", (300, 210), (40, 40, 40)), beam_of("a", "dog", "runs")))
    marked = []
    for number, frame in enumerate(frames):
        assert frame.size[0] == 300
        assert frame.size[1] > 210
        pixels = np.asarray(frame).astype(int)
        brightest = int(pixels[:210].sum(axis=-1).argmax())
        assert divmod(brightest, 300)[0] * 7 // 210 == number
        # The box of #c2410c behind the word: much more red than blue.
        box = np.flatnonzero((pixels[210:, :, 0] - pixels[210:, :, 2] > 120).any(axis=0))
        marked.append((box.min(), box.max()))
    assert all(left[1] <= right[0] + 1 for left, right in itertools.pairwise(marked))


def test_a_gif_without_words_is_a_still_of_the_photo() -> None:
    data = gif(secretive((300, 200), "red"), beam_of())
    (frame,) = frames_of(data)
    assert frame.size == (300, 200)
    assert frame.getpixel((150, 100)) == pytest.approx((254, 0, 0), abs=4)
    assert b"secret" not in data


def test_many_long_words_of_a_gif_wrap_and_none_is_cut_off() -> None:
    photo = Image.new("RGB", (240, 100), "white")
    texts = ["wonderfully", "photographed", "Mississippi", "steamboats"] * 5
    frames = frames_of(gif(photo, beam_of(*texts)))
    (few,) = frames_of(gif(photo, beam_of("a")))
    assert frames[0].height > few.height + 5 * 24
    font = ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 16)
    for text, frame in zip(texts, frames, strict=True):
        strip = np.asarray(frame).astype(int)[100:]
        rows, columns = np.nonzero(strip[..., 0] - strip[..., 2] > 120)
        assert columns.max() - columns.min() >= font.getlength(text)
        assert rows.max() - rows.min() >= 20
        for edge in (strip[:, :5], strip[:, -5:], strip[-3:]):
            assert edge.min() > 200  # paper, dithered; the ink is at 39


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


def test_a_page_holds_everything_that_it_needs() -> None:
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


def test_the_photo_in_a_page_carries_nothing_but_pixels() -> None:
    data = page(secretive((2000, 1000)), caption_of("a", "dog"))
    kind, _, code = Elements(data).value()["photo"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    file = base64.b64decode(code)
    assert b"secret" not in file
    assert b"Exif" not in file
    photo = Image.open(io.BytesIO(file))
    assert photo.size == (1024, 512)
    assert not {"exif", "comment"} & set(photo.info)


def test_a_page_starts_with_the_beam_that_was_asked_for() -> None:
    caption = caption_of("a", "dog")
    data = page(Image.new("RGB", caption.size), caption, 1)
    assert Elements(data).value()["beam"] == 1
    assert b"<title>a cat</title>" in data


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
def test_no_word_breaks_out_of_the_json_of_a_page(text: str) -> None:
    photo = Image.new("RGB", (9, 6))
    harmless = Elements(page(photo, caption_of("a", "dog")))
    shown = Elements(page(photo, caption_of("a", text)))
    assert shown.elements == harmless.elements
    assert shown.value()["caption"] == caption_of("a", text).to_dict()
    # The script is the same, whatever the words are: nothing is filled into its code.
    assert shown.texts[-1] == harmless.texts[-1]


@given(st.text())
def test_a_page_shows_any_word_as_it_is(text: str) -> None:
    shown = Elements(page(Image.new("RGB", (3, 2)), caption_of(text)))
    assert shown.value()["caption"]["beams"][0]["words"][0]["text"] == text
    assert [tag for tag, _ in shown.elements].count("script") == 2


def test_every_format_is_rendered_as_what_it_is_called() -> None:
    caption = caption_of("a", "dog", size=(300, 200))
    photo = secretive(caption.size)
    files = {kind: render(photo, caption, kind) for kind in FORMATS}
    assert files["png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert files["gif"].startswith(b"GIF89a")
    assert files["html"].startswith(b"<!doctype html>")
    assert Caption.from_dict(json.loads(files["json"])).to_dict() == caption.to_dict()
    assert not [kind for kind, data in files.items() if b"secret" in data]


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_rendered_picture_shows_the_beam_that_was_asked_for(kind: str) -> None:
    caption, photo = caption_of("a", "dog", "runs"), Image.new("RGB", (90, 60), "teal")
    draw = {"png": sheet, "gif": gif}[kind]
    assert render(photo, caption, kind, 1) == draw(photo, caption.beams[1])
    assert render(photo, caption, kind, 1) != render(photo, caption, kind)


@pytest.mark.parametrize("kind", ["bmp", "", "PNG", "../png"])
def test_a_format_that_there_is_not_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="there are: png, gif, json, html"):
        render(Image.new("RGB", (9, 6)), caption_of("a"), kind)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("beam", [-1, 2])
def test_a_beam_that_there_is_not_is_refused(kind: str, beam: int) -> None:
    with pytest.raises(ConfigError, match=rf"no beam {beam}; there are 2"):
        render(Image.new("RGB", (9, 6)), caption_of("a"), kind, beam)


def test_nothing_is_drawn_through_pyplot() -> None:
    code = (
        "import sys; from tests.test_overlay import *; "
        "[render(Image.new('RGB', (90, 60)), caption_of('a'), kind) for kind in FORMATS]; "
        "comparison([Image.new('RGB', (9, 6))], ['a'], [['b']]); "
        "print([name for name in ('matplotlib', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "['matplotlib']"
