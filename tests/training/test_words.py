"""Which words a run knows, and the losses that teach where they are."""

from __future__ import annotations

import pytest
import torch

from captioner.config import BOS, EOS, PAD, UNK
from captioner.model.vocabulary import SPECIALS
from captioner.training.loop import attention_loss, words_shown
from captioner.training.words import FUNCTION_WORDS, choose_words, imagenet_names

CAPTIONS = [
    ["a lion in the grass", "the lion sleeps"],
    ["a dog in the grass"],
    ["a dog and a hot dog"],
]
LION, CHEETAH, HOT_DOG, WINE = 291, 293, 934, 966


def class_weights() -> torch.Tensor:
    """Return weights by which a cheetah looks most like a lion."""
    weights = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    weights[CHEETAH] = weights[LION] + 0.1
    return weights


# The vocabulary


def test_without_detectors_and_names_the_words_are_in_alphabetical_order() -> None:
    words = choose_words(CAPTIONS, 1)
    assert words.vocabulary.idx2word[len(SPECIALS) :] == sorted(
        {word for texts in CAPTIONS for text in texts for word in text.split()}
    )
    assert (words.num_detectors, words.class_names, words.kinds) == (0, [], [])


def test_words_of_enough_photos_get_a_detector_unless_they_show_nothing() -> None:
    words = choose_words(CAPTIONS, 1, detector_photos=2)
    first = words.vocabulary.idx2word[len(SPECIALS) :][: words.num_detectors]
    assert first == ["dog", "grass"]  # "lion" is in two captions of one photo
    assert {"a", "in", "the", "and"} <= FUNCTION_WORDS


def test_names_of_classes_join_the_vocabulary_however_rare() -> None:
    words = choose_words(CAPTIONS, 2, detector_photos=2, class_weights=class_weights())
    known = words.vocabulary.word2idx
    assert len(words.class_names) == 1000
    assert words.class_names[LION] == [known["lion"]]
    assert words.class_names[HOT_DOG] == [known["hot"], known["dog"]]
    assert "sleeps" not in known  # once, and the name of nothing
    first_unwritten = len(known) - len(words.kinds)
    assert known["lion"] < first_unwritten <= known["cheetah"]
    assert known["hot"] < first_unwritten  # once, but the name of something


def test_name_without_captions_borrows_from_what_looks_alike() -> None:
    words = choose_words(CAPTIONS, 1, class_weights=class_weights())
    known = words.vocabulary.word2idx
    first_unwritten = len(known) - len(words.kinds)
    assert words.kinds[known["cheetah"] - first_unwritten] == known["lion"]
    assert all(UNK < kind < first_unwritten for kind in words.kinds)


def test_captions_without_any_name_give_names_no_kind() -> None:
    words = choose_words([["so blue"]], 1, class_weights=class_weights())
    assert set(words.kinds) == {UNK}


def test_names_are_one_or_two_words() -> None:
    assert {len(name) for name in imagenet_names()} == {1, 2}


# Losses


def test_words_shown_are_those_of_any_caption_that_have_a_detector() -> None:
    captions = torch.tensor([[[BOS, 4, 9, EOS], [BOS, UNK, 6, EOS]], [[BOS, 7, 7, EOS], [PAD] * 4]])
    assert words_shown(captions, 3).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert words_shown(captions, 4).tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]


def test_attention_loss_is_the_weighted_cross_entropy_with_the_detectors_map() -> None:
    captions = torch.tensor([[[BOS, 5, 9, EOS, PAD]]])
    logits = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0))
    attention = torch.tensor([[[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.0] * 3]]])

    shown = logits[0, :, 1].sigmoid()  # the word 5 has the second detector, the others none
    certainty = 1 - (1 - shown).prod()
    distance = -(shown / shown.sum() * attention[0, 0, 0].log()).sum()
    expected = certainty * distance / 3
    torch.testing.assert_close(attention_loss(attention, logits, captions), expected)


def test_attention_loss_draws_attention_to_the_cell_and_leaves_the_detectors() -> None:
    captions = torch.tensor([[[BOS, 4, EOS]]])
    logits = torch.tensor([[[-6.0], [5.0], [-6.0]]], requires_grad=True)
    scores = torch.zeros(1, 1, 2, 3, requires_grad=True)
    attention_loss(scores.softmax(dim=-1), logits, captions).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is None
    assert scores.grad is not None
    left, middle, right = scores.grad[0, 0, 0].tolist()
    assert middle < 0 < left == pytest.approx(right)
    assert not scores.grad[0, 0, 1].any()
