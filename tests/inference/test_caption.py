"""The result: plain numbers, ready for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from captioner.config import VERDICTS
from captioner.errors import DataError
from captioner.inference.caption import Beam, Caption, Word, percent
from tests.mutation import mutated_values


def look_at(row: int, column: int, weight: float = 1.0) -> np.ndarray:
    """Attention that puts ``weight`` on one cell and the rest evenly on the others."""
    attention = np.full((7, 7), (1 - weight) / 48, dtype=np.float32)
    attention[row, column] = weight
    return attention


def make_word(text: str, attention: np.ndarray | None = None, probability: float = 0.5) -> Word:
    attention = look_at(3, 3) if attention is None else attention
    return Word(text, probability, ((text, probability), ("other", 0.25)), {"attended": attention})


def make_beam(text: str, log_probability: float = -4.0) -> Beam:
    words = tuple(
        make_word(word, look_at(number, 0)) for number, word in enumerate(text.split()[:7])
    )
    return Beam(words, make_word("<eos>"), log_probability, log_probability / 2)


CAPTION = Caption((make_beam("a dog runs"), make_beam("a cat", -5.0)), (640, 480), (0, 2))


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0%"),
        (-0.0, "0.0%"),
        (1e-9, "0.0%"),
        (0.0005, "0.1%"),
        (0.0625, "6.3%"),
        (0.0994, "9.9%"),
        (0.09949999, "9.9%"),
        (0.0995, "10%"),
        (0.125, "13%"),
        (0.4349, "43%"),
        (0.995, "100%"),
        (1, "100%"),
    ],
)
def test_percent_rounds_half_up(share: float, text: str) -> None:
    assert percent(share) == text


def test_entropy_is_zero_for_one_cell_and_log_49_for_uniform() -> None:
    assert make_word("dog", look_at(2, 5)).entropy == 0
    assert make_word("dog", look_at(2, 5)).cells == 1
    even = make_word("dog", np.full((7, 7), 1 / 49, dtype=np.float32))
    assert even.entropy == pytest.approx(math.log(49), abs=1e-6)
    assert even.cells == pytest.approx(49, abs=1e-4)


def test_entropy_matches_hand_computed_value() -> None:
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[0, 0], attention[0, 1], attention[6, 6] = 0.5, 0.25, 0.25

    word = make_word("dog", attention)

    assert word.entropy == pytest.approx(1.5 * math.log(2))
    assert word.cells == pytest.approx(2**1.5)


def test_strongest_is_row_then_column() -> None:
    assert make_word("dog", look_at(1, 5, 0.3)).strongest == (1, 5)
    assert make_word("dog", look_at(6, 0, 0.3)).strongest == (6, 0)


@pytest.mark.parametrize(
    ("row", "column", "region"),
    [
        (0, 0, "top left"),
        (0, 3, "top center"),
        (1, 6, "top right"),
        (3, 1, "middle left"),
        (3, 3, "center"),
        (2, 4, "center"),
        (4, 2, "center"),
        (3, 5, "middle right"),
        (5, 0, "bottom left"),
        (6, 2, "bottom center"),
        (5, 5, "bottom right"),
        (1, 1, "top left"),
        (6, 6, "bottom right"),
    ],
)
def test_region_names_the_strongest_cell(row: int, column: int, region: str) -> None:
    assert make_word("dog", look_at(row, column, 0.4)).region == region


def test_region_is_symmetric() -> None:
    """No side is favoured: what is left of the middle is right of it in a mirror."""
    mirrored = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    for row in range(7):
        for column in range(7):
            here = make_word("dog", look_at(row, column, 0.4)).region
            there = make_word("dog", look_at(6 - row, 6 - column, 0.4)).region
            assert there == " ".join(mirrored.get(part, part) for part in here.split())


def test_text_joins_words_without_the_end() -> None:
    assert make_beam("a dog runs").text == "a dog runs"
    assert make_beam("一 只 dog 在 跑").text == "一只 dog 在跑"
    assert Beam((), make_word("<eos>"), -1.0, -1.0).text == ""


def test_attention_has_one_map_per_word() -> None:
    attention = make_beam("a dog runs").attention

    assert attention.shape == (3, 7, 7)
    assert attention.dtype == np.float32
    assert [int(each.argmax()) for each in attention] == [0, 7, 14]
    np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, rtol=1e-6)


def test_empty_caption_has_no_maps() -> None:
    attention = Beam((), make_word("<eos>"), -1.0, -1.0).attention

    assert attention.shape == (0, 7, 7)
    assert attention.dtype == np.float32


def test_caption_properties_are_the_best_beams() -> None:
    assert CAPTION.text == "a dog runs"
    assert [word.text for word in CAPTION.words] == ["a", "dog", "runs"]
    assert CAPTION.log_probability == -4.0
    assert CAPTION.attention.shape == (3, 7, 7)


def test_to_dict_holds_every_number() -> None:
    values = json.loads(json.dumps(CAPTION.to_dict(), allow_nan=False))

    assert values["text"] == "a dog runs"
    assert values["size"] == [640, 480]
    assert values["given"] == [0, 2]
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
    assert np.array(word["maps"]["attended"]).shape == (7, 7)
    assert word["maps"]["attended"][1][0] == 1
    assert (word["entropy"], word["cells"], word["region"]) == (0, 1, "top left")


def test_to_dict_rounds_attention_to_six_places() -> None:
    attention = np.random.default_rng(0).dirichlet(np.ones(49)).reshape(7, 7).astype(np.float32)

    values = make_word("dog", attention).to_dict()

    np.testing.assert_allclose(values["maps"]["attended"], attention, atol=1e-6)


SHARES = st.floats(0, 1)
# Shares that sum to 1 and that six places tell apart.
ATTENTIONS = arrays(np.int64, (7, 7), elements=st.integers(0, 1000)).map(
    lambda counts: ((counts + 1) / (counts + 1).sum()).astype(np.float32)
)
NATS = arrays(np.float32, (7, 7), elements=st.integers(-50, 50).map(float))
PAIRS = st.lists(st.tuples(st.text(), SHARES), max_size=5).map(tuple)
WORDS = st.builds(
    Word,
    st.text(),
    SHARES,
    PAIRS,
    st.fixed_dictionaries(
        {"attended": ATTENTIONS}, optional={"evidence": NATS, "mattered": NATS, "shown": ATTENTIONS}
    ),
    st.booleans(),
    st.none() | st.floats(-1e3, 1e3),
    st.none() | st.sampled_from(VERDICTS),
)
SCORES = st.floats(-1e6, 0)
BEAMS = st.builds(Beam, st.lists(WORDS, max_size=3).map(tuple), WORDS, SCORES, SCORES)
CAPTIONS = st.builds(
    Caption,
    st.lists(BEAMS, min_size=1, max_size=2).map(tuple),
    st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)),
    st.lists(st.integers(0, 20), max_size=4).map(tuple),
    st.sampled_from(["en", "de-AT", "zh-Hant"]),
    st.booleans(),
    st.none() | SHARES,
    st.none() | st.lists(PAIRS, min_size=49, max_size=49).map(tuple),
)


def without_entropy(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is computed of the attention before it is rounded."""
    for beam in values["beams"]:
        for word in [*beam["words"], beam["end"]]:
            del word["entropy"], word["cells"]
    return values


@given(CAPTIONS)
def test_caption_round_trips_through_json(caption: Caption) -> None:
    values = json.loads(json.dumps(caption.to_dict()))

    back = Caption.from_dict(values)

    assert without_entropy(back.to_dict()) == without_entropy(values)
    for name in ("text", "size", "given", "language", "sampled", "confidence", "seen"):
        assert getattr(back, name) == getattr(caption, name)
    assert isinstance(back.given, tuple)
    assert isinstance(back.beams, tuple)
    for old, new in zip(caption.words, back.words, strict=True):
        assert new.attention.dtype == np.float32
        np.testing.assert_allclose(new.attention, old.attention, atol=1e-6)
        assert new.maps.keys() == old.maps.keys()
        for name, cells in old.maps.items():
            np.testing.assert_allclose(new.maps[name], cells, atol=1e-6)
        assert new.entropy == pytest.approx(old.entropy, abs=1e-3)


def test_given_defaults_to_empty() -> None:
    caption = Caption(CAPTION.beams, CAPTION.size)

    assert caption.given == ()
    assert caption.to_dict()["given"] == []
    assert Caption.from_dict(caption.to_dict()).given == ()


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    """Return a function that puts ``value`` at a place in the JSON of a caption."""

    def change(values: dict[str, Any]) -> object:
        *folders, last = path
        place: Any = values
        for folder in folders:
            place = place[folder]
        place[last] = value
        return values

    return change


def leave_out(*path: str | int) -> Callable[[dict[str, Any]], object]:
    """Return a function that takes a key out of the JSON of a caption."""

    def change(values: dict[str, Any]) -> object:
        *folders, last = path
        place: Any = values
        for folder in folders:
            place = place[folder]
        del place[last]
        return values

    return change


WORD = ("beams", 0, "words", 0)


@pytest.mark.parametrize(
    "change",
    [
        *(
            leave_out(key)
            for key in ("size", "given", "beams", "language", "sampled", "confidence", "seen")
        ),
        *(leave_out("beams", 0, key) for key in ("words", "end", "score", "log_probability")),
        *(
            leave_out(*WORD, key)
            for key in ("text", "probability", "alternatives", "maps", "known", "fall", "verdict")
        ),
        leave_out(*WORD, "alternatives", 0, "text"),
        leave_out("size", 1),
        put("size", value=[1, 2, 3]),
        put("size", value=["wide", "tall"]),
        put("size", value=None),
        put("size", value=[math.inf, 1]),
        put("size", value=[-640, 480]),
        put("size", value=[10**400, 480]),
        put("given", value=[-1]),
        put("given", value=[201]),
        put("given", value=[0] * 202),
        put("beams", value=[CAPTION.to_dict()["beams"][0]] * 101),
        put("beams", 0, "words", value=[make_word("a").to_dict()] * 201),
        put("beams", 0, "score", value=math.nan),
        put("beams", 0, "score", value=-math.inf),
        put("beams", 0, "log_probability", value=1),
        put("given", value=["first"]),
        put("language", value=None),
        put("language", value=""),
        put("language", value='en" onload="'),
        put("language", value="e" * 100),
        put("sampled", value="no"),
        put("sampled", value=1),
        put("sampled", value=None),
        put("confidence", value=1.5),
        put("confidence", value=-0.1),
        put("confidence", value=math.nan),
        put("confidence", value="high"),
        put("given", value=3),
        put("beams", value=[]),
        put("beams", value=None),
        put("beams", value={"0": 1}),
        put("beams", 0, value=[]),
        put("beams", 0, "score", value="good"),
        put("beams", 0, "end", value=None),
        put(*WORD, "probability", value="likely"),
        put(*WORD, "probability", value=None),
        put(*WORD, "probability", value=math.nan),
        put(*WORD, "probability", value=1.5),
        put(*WORD, "text", value=7),
        put(*WORD, "text", value="\ud800"),
        put(*WORD, "text", value="a" * 2001),
        put(*WORD, "alternatives", value=[{"text": "a", "probability": 0.5}] * 101),
        put(*WORD, "alternatives", value=[{"text": "a", "probability": math.inf}]),
        put(*WORD, "alternatives", value=[["dog", 0.5]]),
        put(*WORD, "maps", "attended", value=[]),
        put(*WORD, "maps", "attended", value=[[]]),
        put(*WORD, "maps", "attended", value=[0.5, 0.5]),
        put(*WORD, "maps", "attended", value=0.5),
        put(*WORD, "maps", "attended", value=[[[0.5]]]),
        put(*WORD, "maps", "attended", value=[[0.5, 0.5], [0.5]]),
        put(*WORD, "maps", "attended", value=[[math.nan] * 7] * 7),
        put(*WORD, "maps", "attended", value=[[math.inf] * 7] * 7),
        put(*WORD, "maps", "attended", value=[[-0.1] * 7] * 7),
        put(*WORD, "maps", "attended", value=[[0.5] * 8] * 7),
        put(*WORD, "maps", "attended", value=[[0.5] * 1000] * 1000),
        put(*WORD, "maps", "attended", value=[["much"]]),
        put(*WORD, "maps", "attended", value=None),
        put("beams", 1, "end", "maps", "attended", value=[[-math.inf] * 7] * 7),
        put(*WORD, "maps", value={}),
        put(*WORD, "maps", value=None),
        put(*WORD, "maps", "heat", value=[[0.5] * 7] * 7),
        put(*WORD, "maps", "evidence", value=[[1e9] * 7] * 7),
        put(*WORD, "maps", "shown", value=[[-0.1] * 7] * 7),
        put(*WORD, "verdict", value="true"),
        put(*WORD, "verdict", value=["guessed"]),
        put(*WORD, "fall", value=math.nan),
        put("seen", value=[[]] * 48),
        put("seen", value=[[{"text": "cup", "probability": 2}]] * 49),
        lambda _: [],
        lambda values: [values],
        lambda _: {},
        lambda _: "a dog",
        lambda _: None,
        lambda _: 7,
    ],
)
def test_from_dict_refuses_invalid_json_in_one_line(
    change: Callable[[dict[str, Any]], Any],
) -> None:
    values = change(CAPTION.to_dict())

    with pytest.raises(DataError, match=r"^this is not the JSON of a caption: .+$") as refused:
        Caption.from_dict(values)

    assert len(str(refused.value).splitlines()) == 1


@settings(derandomize=True, deadline=None, max_examples=200)
@given(mutated_values(CAPTION.to_dict()))
def test_from_dict_refuses_or_repairs_mutated_json(values: Any) -> None:
    try:
        caption = Caption.from_dict(values)
    except DataError:
        return
    written = json.dumps(caption.to_dict(), allow_nan=False, ensure_ascii=False)
    assert Caption.from_dict(json.loads(written.encode())).to_dict() == json.loads(written)
