"""Testing a word's map by covering the photo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from captioner import Captioner, DecodingOptions
from captioner.errors import ConfigError
from captioner.images import open_photo
from captioner.inference.cover import NUM_RANDOM_COVERS, check_cells, random_covers
from captioner.model.cover import BLUR

CELLS = [16, 17, 23, 24, 25, 31]


def differences(cells: Sequence[int]) -> list[tuple[int, ...]]:
    """Return how often two cells lie so far apart, which no move and no turn changes."""
    places = np.array([divmod(cell, 7) for cell in cells])
    apart = np.abs(places[:, None] - places[None]).reshape(-1, 2)
    return sorted(tuple(sorted(pair)) for pair in np.minimum(apart, 7 - apart).tolist())


@given(st.sets(st.integers(0, 48), min_size=1, max_size=48), st.integers(0, 2**32))
def test_random_covers_have_the_covers_shape_and_are_never_the_cover(
    cells: set[int], seed: int
) -> None:
    covers = random_covers(sorted(cells), NUM_RANDOM_COVERS, seed)
    assert covers.shape == (NUM_RANDOM_COVERS, 49)
    found = [frozenset(np.flatnonzero(each).tolist()) for each in covers]
    assert len({*found, frozenset(cells)}) == NUM_RANDOM_COVERS + 1
    assert all(differences(sorted(each)) == differences(sorted(cells)) for each in found)
    assert (covers == random_covers(sorted(cells), NUM_RANDOM_COVERS, seed)).all()


def test_random_covers_fall_everywhere_and_follow_the_seed() -> None:
    first, *others = (random_covers(CELLS, NUM_RANDOM_COVERS, seed) for seed in range(200))
    assert any((first != other).any() for other in others)
    share = np.mean([first, *others], axis=(0, 1))
    assert share == pytest.approx(np.full(49, len(CELLS) / 49), abs=0.05)


@pytest.mark.parametrize("cells", [[], range(49), [3, 3], [-1], [49]])
def test_impossible_cells_are_refused(cells: Sequence[int]) -> None:
    with pytest.raises(ConfigError, match="from 0 to 48, at least one and not all"):
        check_cells(cells)


def covered_photo(captioner: Captioner, path: Path, cells: Sequence[int]) -> Image.Image:
    """Cover a photo with Pillow alone, at the encoder's size."""
    size = captioner.encoder.transform.size
    resized = open_photo(path).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    rows, columns = (7 * np.indices((size, size))) // size
    mask = Image.fromarray(np.isin(7 * rows + columns, cells))
    resized.paste(resized.filter(ImageFilter.GaussianBlur(BLUR * size)), mask=mask)
    return resized


def test_probabilities_are_those_of_scoring_the_whole_and_the_covered_photo(
    captioner: Captioner, example_photos: list[Path]
) -> None:
    photo, text = example_photos[0], "a close up of a striped cat"
    covered = covered_photo(captioner, photo, CELLS)
    whole, rest = (captioner.score(each, text).beams[0] for each in (photo, covered))
    steps = list(zip([*whole.words, whole.end], [*rest.words, rest.end], strict=True))
    for place in (0, 6, len(whole.words)):
        test = captioner.cover(photo, text, place, CELLS[::-1])
        assert test.cells == tuple(CELLS)
        before, after = steps[place]
        assert test.before == pytest.approx(before.probability, abs=1e-3)
        assert test.after == pytest.approx(after.probability, abs=1e-3)
    assert test.caption.text == captioner.caption(covered).text
    assert test.caption.size == whole_size(photo)


def whole_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_random_covers_are_measured_like_the_cover(
    captioner: Captioner, example_photos: list[Path]
) -> None:
    photo, text = example_photos[0], "a cat"
    test = captioner.cover(photo, text, 1, CELLS, seed=5)
    assert len(test.random) == NUM_RANDOM_COVERS
    cells = np.flatnonzero(random_covers(CELLS, NUM_RANDOM_COVERS, 5)[3]).tolist()
    assert captioner.cover(photo, text, 1, cells).after == pytest.approx(test.random[3], abs=1e-3)
    assert captioner.cover(photo, text, 1, CELLS, seed=5).random == pytest.approx(test.random)
    assert captioner.cover(photo, text, 1, CELLS, seed=6).random != pytest.approx(test.random)


def test_cover_takes_options_and_has_plain_json(
    captioner: Captioner, example_photos: list[Path]
) -> None:
    options = DecodingOptions(prefix="two women", beam_size=1)
    test = captioner.cover(example_photos[1], "a dog", 1, CELLS, options=options)
    assert test.caption.text.startswith("two women ")
    values = test.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["cells"] == CELLS
    assert values["caption"] == test.caption.to_dict()
    random = values["random"]
    assert random["low"] == min(test.random) < random["mean"] < random["high"] == max(test.random)
    assert random["mean"] == pytest.approx(sum(test.random) / random["covers"])


@pytest.mark.parametrize("word", [-1, 3])
def test_cover_needs_a_word_of_the_text(
    captioner: Captioner, example_photos: list[Path], word: int
) -> None:
    with pytest.raises(ConfigError, match=f"no word {word}; there are 2, and the end"):
        captioner.cover(example_photos[0], "a dog", word, CELLS)
