"""The pictures: sizes, places, and that no metadata of the photo goes along."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from captioner.caption import Beam, Word
from captioner.overlay import blend, comparison, sheet


def one_hot(row: int, column: int) -> np.ndarray:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[row, column] = 1
    return attention


def word(text: str, attention: np.ndarray) -> Word:
    return Word(text, 0.5, (("a", 0.5),), attention)


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
    photo = Image.new("RGB", size, "teal")
    photo.info["exif"] = b"Exif\x00\x00secret place"
    beam = Beam(
        tuple(word(f"word{number}", one_hot(number % 7, 0)) for number in range(words)),
        word("<eos>", one_hot(0, 0)),
        -3.0,
        -1.0,
    )
    data = sheet(photo, beam)
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
