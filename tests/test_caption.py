"""The result: plain numbers, ready for JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from captioner.caption import Beam, Caption, Word


def look_at(row: int, column: int, weight: float = 1.0) -> np.ndarray:
    """Attention that puts ``weight`` on one cell and the rest evenly on the others."""
    attention = np.full((7, 7), (1 - weight) / 48, dtype=np.float32)
    attention[row, column] = weight
    return attention


def make_word(text: str, attention: np.ndarray | None = None, probability: float = 0.5) -> Word:
    attention = look_at(3, 3) if attention is None else attention
    return Word(text, probability, ((text, probability), ("other", 0.25)), attention)


def make_beam(text: str, log_probability: float = -4.0) -> Beam:
    words = tuple(
        make_word(word, look_at(number, 0)) for number, word in enumerate(text.split()[:7])
    )
    return Beam(words, make_word("<eos>"), log_probability, log_probability / 2)


CAPTION = Caption((make_beam("a dog runs"), make_beam("a cat", -5.0)), (640, 480))


def test_entropy_of_one_cell_is_nothing_and_of_all_cells_log_49() -> None:
    assert make_word("dog", look_at(2, 5)).entropy == 0
    assert make_word("dog", look_at(2, 5)).cells == 1
    even = make_word("dog", np.full((7, 7), 1 / 49, dtype=np.float32))
    assert even.entropy == pytest.approx(math.log(49), abs=1e-6)
    assert even.cells == pytest.approx(49, abs=1e-4)


def test_entropy_by_hand() -> None:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[0, 0], attention[0, 1], attention[6, 6] = 0.5, 0.25, 0.25

    word = make_word("dog", attention)

    assert word.entropy == pytest.approx(1.5 * math.log(2))
    assert word.cells == pytest.approx(2**1.5)


def test_strongest_cell_is_row_and_column() -> None:
    assert make_word("dog", look_at(1, 5, 0.3)).strongest == (1, 5)
    assert make_word("dog", look_at(6, 0, 0.3)).strongest == (6, 0)


@pytest.mark.parametrize(
    ("row", "column", "place"),
    [
        (0, 0, "upper left"),
        (0, 3, "upper centre"),
        (1, 6, "upper right"),
        (3, 1, "middle left"),
        (3, 3, "centre"),
        (2, 4, "centre"),
        (4, 2, "centre"),
        (3, 5, "middle right"),
        (5, 0, "lower left"),
        (6, 2, "lower centre"),
        (5, 5, "lower right"),
        (1, 1, "upper left"),
        (6, 6, "lower right"),
    ],
)
def test_place_in_words(row: int, column: int, place: str) -> None:
    assert make_word("dog", look_at(row, column, 0.4)).place == place


def test_places_are_mirror_images() -> None:
    """No side is favoured: what is left of the middle is right of it in a mirror."""
    mirrored = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
    for row in range(7):
        for column in range(7):
            here = make_word("dog", look_at(row, column, 0.4)).place
            there = make_word("dog", look_at(6 - row, 6 - column, 0.4)).place
            assert there == " ".join(mirrored.get(part, part) for part in here.split())


def test_text_is_the_words_without_the_end() -> None:
    assert make_beam("a dog runs").text == "a dog runs"
    assert Beam((), make_word("<eos>"), -1.0, -1.0).text == ""


def test_attention_has_a_map_for_each_word() -> None:
    attention = make_beam("a dog runs").attention

    assert attention.shape == (3, 7, 7)
    assert attention.dtype == np.float32
    assert [int(each.argmax()) for each in attention] == [0, 7, 14]
    np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, rtol=1e-6)


def test_a_caption_without_words_has_no_maps() -> None:
    attention = Beam((), make_word("<eos>"), -1.0, -1.0).attention

    assert attention.shape == (0, 7, 7)
    assert attention.dtype == np.float32


def test_a_caption_shows_its_best_beam() -> None:
    assert CAPTION.text == "a dog runs"
    assert [word.text for word in CAPTION.words] == ["a", "dog", "runs"]
    assert CAPTION.log_probability == -4.0
    assert CAPTION.attention.shape == (3, 7, 7)


def test_json_holds_every_number() -> None:
    values = json.loads(json.dumps(CAPTION.to_dict(), allow_nan=False))

    assert values["text"] == "a dog runs"
    assert values["size"] == [640, 480]
    assert [beam["text"] for beam in values["beams"]] == ["a dog runs", "a cat"]
    beam = values["beams"][0]
    assert beam["log_probability"] == -4.0
    assert beam["score"] == -2.0
    assert beam["end"]["text"] == "<eos>"
    assert [word["text"] for word in beam["words"]] == ["a", "dog", "runs"]
    word = beam["words"][1]
    assert word["probability"] == 0.5
    assert word["alternatives"] == [
        {"text": "dog", "probability": 0.5},
        {"text": "other", "probability": 0.25},
    ]
    assert np.array(word["attention"]).shape == (7, 7)
    assert word["attention"][1][0] == 1
    assert (word["entropy"], word["cells"], word["place"]) == (0, 1, "upper left")


def test_json_keeps_attention_to_six_places() -> None:
    attention = np.random.default_rng(0).dirichlet(np.ones(49)).reshape(7, 7).astype(np.float32)

    values = make_word("dog", attention).to_dict()

    np.testing.assert_allclose(values["attention"], attention, atol=1e-6)
