"""Scores equal those of coco-caption and those computed by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioner.errors import DataError
from captioner.training.metrics import (
    CiderD,
    bleu,
    invented_people,
    repetition,
    rouge_l,
    score_captions,
)

# Common words first, as in captions.
WORDS = """a in the on man is and of with woman two dog white black boy shirt girl young wearing
blue people red standing playing grass water ball running green child beach street jumps brown
snow over camera field bike mountain""".split()  # noqa: SIM905
WEIGHTS = [1 / (rank + 2) for rank in range(len(WORDS))]


def make_captions(
    seed: int, num_photos: int, max_references: int, min_references: int
) -> tuple[list[str], list[list[str]]]:
    """Return a random caption per photo, and references that resemble it."""
    draw = random.Random(seed)

    def text(length: int) -> list[str]:
        return draw.choices(WORDS, WEIGHTS, k=length)

    def retell(words: list[str]) -> list[str]:
        kept = [word if draw.random() < 0.8 else text(1)[0] for word in words]
        start, end = sorted(draw.sample(range(len(kept) + 1), 2))
        return kept[start:end] + text(draw.randint(1, 6)) if draw.random() < 0.3 else kept

    candidates, references = [], []
    for _ in range(num_photos):
        story = text(draw.randint(4, 22))
        candidates.append(" ".join(retell(story)))
        count = draw.randint(min_references, max_references)
        references.append([" ".join(retell(story)) for _ in range(count)])
    return candidates, references


def coco(
    candidates: list[str], references: list[list[str]]
) -> tuple[list[float], list[float], list[float]]:
    """Return coco-caption's BLEU-1..4 of the corpus, CIDEr-D and ROUGE-L of each photo."""
    wanted = dict(enumerate(references))
    single = {photo: [text] for photo, text in enumerate(candidates)}
    bleus, _ = Bleu(4).compute_score(wanted, single, verbose=0)
    _, ciders = Cider().compute_score(wanted, single)
    _, rouges = Rouge().compute_score(wanted, single)
    return bleus, list(ciders), list(rouges)


@pytest.mark.parametrize(
    ("num_photos", "max_references", "min_references"),
    [(40, 5, 5), (60, 5, 1), (30, 1, 1), (2, 3, 1)],
)
def test_scores_equal_coco_caption(
    num_photos: int, max_references: int, min_references: int
) -> None:
    candidates, references = make_captions(0, num_photos, max_references, min_references)
    bleus, ciders, rouges = coco(candidates, references)

    scores = score_captions(candidates, references)

    for order, expected in enumerate(bleus, start=1):
        # Without a common n-gram, coco-caption gives a tiny number instead of 0.
        expected = expected if expected > 1e-3 else 0
        assert scores[f"BLEU-{order}"] / 100 == pytest.approx(expected, abs=1e-6)
    assert scores["CIDEr"] / 100 == pytest.approx(np.mean(ciders), abs=1e-6)
    assert scores["ROUGE-L"] / 100 == pytest.approx(np.mean(rouges), abs=1e-6)
    np.testing.assert_allclose(CiderD(references).scores(candidates), ciders, atol=1e-6)
    np.testing.assert_allclose(
        [rouge_l(text, some) for text, some in zip(candidates, references, strict=True)],
        rouges,
        atol=1e-6,
    )


def test_compared_scores_are_not_trivial() -> None:
    candidates, references = make_captions(0, 40, 5, 5)
    bleus, ciders, rouges = coco(candidates, references)

    assert min(bleus) > 0.1
    assert np.mean(ciders) > 0.5
    assert 0.3 < np.mean(rouges) < 0.95


def test_copied_references_get_full_scores() -> None:
    # Longer than the 20 ids of training.
    long = " ".join(f"word{number}" for number in range(30))
    references = [[long, "a dog"], ["a black dog runs on the beach", "two dogs"]]

    scores = score_captions([long, "A black dog runs, on the beach."], references)

    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(100)
    assert scores["mean_length"] == 18.5


def test_references_are_not_truncated() -> None:
    start = [f"word{number}" for number in range(18)]
    whole = [*start, *(f"more{number}" for number in range(12))]

    def score(caption: list[str]) -> dict[str, float]:
        return score_captions([" ".join(caption), "a dog"], [[" ".join(whole)], ["a dog"]])

    assert score(start)["BLEU-1"] < 80
    assert score(start)["CIDEr"] < score(whole)["CIDEr"]
    assert score(start)["ROUGE-L"] < score(whole)["ROUGE-L"]


def test_captions_without_common_words_score_zero() -> None:
    scores = score_captions(["x y z w v", "u t s r q"], [["a b c d e"], ["f g h i j"]])

    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L"):
        assert scores[name] == 0


def test_empty_captions_score_zero() -> None:
    references = [["a dog runs"], ["two men talk"], ["a cat sleeps"]]

    scores = score_captions(["", "!!", ""], references)

    assert scores["BLEU-1"] == scores["CIDEr"] == scores["ROUGE-L"] == 0
    assert scores["mean_length"] == 0
    # One among others: coco-caption agrees.
    candidates, references = make_captions(3, 30, 5, 5)
    candidates[4] = ""
    bleus, ciders, rouges = coco(candidates, references)
    scores = score_captions(candidates, references)
    assert scores["BLEU-4"] / 100 == pytest.approx(bleus[3], abs=1e-6)
    assert scores["CIDEr"] / 100 == pytest.approx(np.mean(ciders), abs=1e-6)
    assert scores["ROUGE-L"] / 100 == pytest.approx(np.mean(rouges), abs=1e-6)


def test_score_captions_ignores_case_and_punctuation() -> None:
    candidates, references = make_captions(1, 30, 3, 3)
    loud = [f"{text.upper()} ." for text in candidates]
    dotted = [[text.replace(" ", ", ").title() for text in some] for some in references]

    assert score_captions(loud, dotted) == pytest.approx(score_captions(candidates, references))


def test_bleu_matches_hand_computation() -> None:
    # 5 of 6 words and 3 of 5 pairs are in the reference, which is one word longer.
    scores = bleu(["the cat sat on a mat"], [["the cat sat on the red mat"]])

    brevity = np.exp(1 - 7 / 6)
    assert scores[0] == pytest.approx(100 * brevity * 5 / 6)
    assert scores[1] == pytest.approx(100 * brevity * np.sqrt(5 / 6 * 3 / 5))


def test_rouge_matches_hand_computation() -> None:
    # "a c d": 3 of 4 words of the caption, 3 of 5 of the reference.
    precision, recall = 3 / 4, 3 / 5
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)

    assert rouge_l("a b c d", ["a c d e f"]) == pytest.approx(expected)
    assert rouge_l("a b c d", ["x", "a c d e f"]) == pytest.approx(expected)
    assert rouge_l("a b", ["b a"]) == pytest.approx(0.5)
    assert rouge_l("", ["a"]) == 0


texts = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join)


@settings(deadline=None)
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_rouge_equals_coco_caption_on_random_words(candidate: str, references: list[str]) -> None:
    assert rouge_l(candidate, references) == pytest.approx(
        Rouge().calc_score([candidate], references)
    )


# At least four words: coco-caption gives texts without 4-grams a tiny number.
sentences = st.lists(st.sampled_from("abcde"), min_size=4, max_size=8).map(" ".join)
scored = st.lists(
    st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=2, max_size=5
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(scored)
def test_scores_equal_coco_caption_on_random_words(
    photos: list[tuple[str, list[str]]],
) -> None:
    candidates, references = [text for text, _ in photos], [some for _, some in photos]
    bleus, ciders, rouges = coco(candidates, references)

    scores = score_captions(candidates, references)

    for order, expected in enumerate(bleus, start=1):
        expected = expected if expected > 1e-3 else 0
        assert scores[f"BLEU-{order}"] / 100 == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(CiderD(references).scores(candidates), ciders, atol=1e-6)
    assert scores["ROUGE-L"] / 100 == pytest.approx(np.mean(rouges), abs=1e-6)


any_texts = st.text(max_size=30) | texts


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(any_texts, st.lists(any_texts, min_size=1, max_size=3)), min_size=2, max_size=6
    ),
    st.randoms(use_true_random=False),
)
def test_scores_stay_in_range_and_ignore_order(
    photos: list[tuple[str, list[str]]], random: random.Random
) -> None:
    scores = score_captions([text for text, _ in photos], [some for _, some in photos])

    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert 0 <= scores[name] <= 100 + 1e-9
    assert 0 <= scores["CIDEr"] <= 1000 + 1e-9
    assert 0 <= scores["repetition"] <= 1
    assert 0 < scores["distinct_captions"] <= 1
    assert scores["distinct_words"] <= len(photos) * scores["mean_length"] + 1e-9
    shuffled = [(text, random.sample(some, len(some))) for text, some in photos]
    random.shuffle(shuffled)
    again = score_captions([text for text, _ in shuffled], [some for _, some in shuffled])
    assert again == pytest.approx(scores, abs=1e-9)


def test_cider_weighs_words_by_rarity() -> None:
    references = [["a dog"], ["a cat"], ["a bird"], ["a horse"]]
    cider = CiderD(references)

    # "a" describes every photo.
    assert cider.score(0, ["a", "cat"]) == [0, 0]
    assert cider.score(0, ["dog"])[0] > 0
    known, unknown = cider.score(0, ["a dog", "the dog"])
    assert known > unknown


def test_cider_does_not_reward_repetition() -> None:
    cider = CiderD([["a brown dog runs"], ["a cat sleeps"], ["two men talk"]])

    once, often = cider.score(0, ["a brown dog runs", "a brown dog runs dog dog dog dog"])
    assert once > often


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("a dog runs", False),
        ("a dog and a cat and a bird", False),
        ("a a dog", True),
        ("a dog runs runs", True),
        ("人 人 看 看 か わ い い", False),
        ("人 人 人", True),
        ("a dog runs and a dog sleeps", False),
        ("a dog runs a dog runs", True),
        ("in the snow in the snow", True),
        ("on and on and on", True),
        ("", False),
        ("dog", False),
    ],
)
def test_repetition_detects_repeated_words_and_trigrams(text: str, repeats: bool) -> None:
    assert repetition([text]) == repeats


def test_repetition_is_a_share_of_captions() -> None:
    assert repetition(["a a dog", "a dog", "dog dog dog dog", "a cat"]) == 0.5
    assert repetition([]) == 0


def test_invented_people_are_those_that_no_reference_mentions() -> None:
    references = [["a dog", "two women and a dog"], ["a dog"], ["an empty room"], ["a cat"]]

    captions = ["a man with a dog", "a boy with a dog", "a manly room", "people and a cat"]

    assert invented_people(captions, references) == (2, 3)
    assert invented_people(["a dog"] * 4, references) == (0, 3)
    assert invented_people(captions[:1], references[:1]) == (0, 0)


def test_variety_matches_hand_computation() -> None:
    references = [["a dog"]] * 4

    scores = score_captions(["A dog.", "a dog", "a cat cat", "the bird sings well"], references)

    assert scores["distinct_words"] == 7
    assert scores["distinct_captions"] == 0.75
    assert scores["mean_length"] == pytest.approx(11 / 4)
    assert scores["repetition"] == 0.25


def test_score_captions_refuses_single_photo() -> None:
    with pytest.raises(DataError, match="at least two"):
        score_captions(["a dog"], [["a dog"]])
    with pytest.raises(DataError, match="at least two"):
        score_captions([], [])


def test_scores_refuse_different_lengths() -> None:
    with pytest.raises(DataError, match="3 captions, but references of 2 photos"):
        score_captions(["a"] * 3, [["a"]] * 2)
    with pytest.raises(DataError, match="3 captions against references of 2 photos"):
        CiderD([["a"]] * 2).scores(["a"] * 3)


def test_score_captions_names_photo_without_reference() -> None:
    with pytest.raises(DataError, match="photo number 2 has no reference"):
        score_captions(["a"] * 4, [["a"], ["b"], [], ["c"]])


def test_cider_of_a_caption_is_independent_of_others() -> None:
    references = [["a dog runs", "the dog is running on grass"], ["two men"], ["a b c d e " * 40]]
    cider = CiderD(references)
    assert CiderD([]).scores([]) == []
    assert CiderD([[]]).scores(["a b"]) == [0]
    texts = ["a dog runs", "two men", "a b c d e"]
    for row, score in enumerate(cider.scores(texts)):
        assert cider.score(row, texts)[row] == score > 0
    zebras, unicorns = cider.score(1, ["two zebras", "two unicorns"])
    assert zebras == unicorns > 0
    same, different = cider.score(1, ["two zebras zebras", "two zebras unicorns"])
    assert same != different
