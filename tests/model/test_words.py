"""Word detectors and the pointer: what they learn from, and what they add."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from captioner.config import BOS, ModelConfig
from captioner.model.words import Pointer, WordDetectors, detection_loss, photo_probability
from tests.model.tiny import HIDDEN, VOCABULARY, WORDS, make_cells, make_model


def make_pointer(**options: Any) -> Pointer:
    config = ModelConfig(
        vocabulary_size=VOCABULARY,
        encoder_channels=6,
        hidden_size=HIDDEN,
        **{**WORDS, **options},
    )
    pointer = Pointer(config).eval()
    torch.nn.init.zeros_(pointer.gate.weight)
    torch.nn.init.constant_(pointer.gate.bias, 5.0)
    return pointer


def point(pointer: Pointer, class_id: int, previous: int = BOS, copies: int = 1) -> Tensor:
    """Return the probabilities (copies, V) after a photo of one class, written words all equal."""
    torch.nn.init.zeros_(pointer.classifier.weight)
    torch.nn.init.zeros_(pointer.classifier.bias)
    with torch.no_grad():
        pointer.classifier.bias[class_id] = 20.0
    names = pointer.recognize(torch.zeros(1, 1, 6))[:, 0].expand(copies, -1)
    logits = pointer(
        torch.zeros(copies, VOCABULARY),
        torch.zeros(copies, HIDDEN),
        names,
        torch.full((copies,), previous),
    )
    return logits.softmax(dim=-1)


# Detectors


def test_photo_shows_a_word_if_any_cell_does() -> None:
    logits = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    expected = 1 - (1 - logits.sigmoid()).prod(dim=1)
    torch.testing.assert_close(photo_probability(logits), expected)


def test_detection_loss_is_the_cross_entropy_of_the_noisy_or() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, generator=generator)
    is_shown = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    probabilities = 1 - (1 - logits.sigmoid()).prod(dim=1)
    expected = torch.nn.functional.binary_cross_entropy(probabilities, is_shown, reduction="sum")
    torch.testing.assert_close(detection_loss(logits, is_shown), expected / 3)


def test_detection_loss_is_finite_where_nothing_is_seen() -> None:
    logits = torch.full((1, 49, 1), -100.0, requires_grad=True)
    loss = detection_loss(logits, torch.ones(1, 1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_detectors_find_the_cell_from_captions_alone() -> None:
    """A word is in the caption if any cell has its pattern; no label says which."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(200, 9, 8, generator=generator)
    patterns = 3 * torch.randn(2, 8, generator=generator)
    places = torch.randint(9, (200, 2), generator=generator)
    is_shown = (torch.rand(200, 2, generator=generator) < 0.5).float()
    for photo, word in is_shown.nonzero().tolist():
        cells[photo, places[photo, word]] += patterns[word]
    detectors = WordDetectors(8, 2)
    optimizer = torch.optim.Adam(detectors.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = detection_loss(detectors(cells), is_shown)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = detectors(cells).argmax(dim=1) == places
    assert found[is_shown > 0].float().mean() > 0.9


def test_new_detectors_add_no_evidence() -> None:
    assert not WordDetectors(6, 3).evidence(make_cells()).any()


# Pointer


@pytest.mark.parametrize(("class_id", "word"), [(0, 5), (1, 12), (2, 12), (4, 21), (5, 22)])
def test_pointer_raises_the_first_word_of_the_recognized_name(class_id: int, word: int) -> None:
    probabilities = point(make_pointer(), class_id)[0]
    assert probabilities.argmax() == word
    assert probabilities[word] > 0.5


def test_second_word_of_a_name_follows_its_first() -> None:
    pointer = make_pointer()
    assert point(pointer, 2, previous=12)[0].argmax() == 13
    assert point(pointer, 3, previous=12)[0].argmax() == 14
    assert point(pointer, 1, previous=12)[0].argmax() == 12  # this name has one word


def test_names_that_no_caption_held_are_written_only_by_pointing() -> None:
    probabilities = point(make_pointer(), 0)[0]
    assert (probabilities[21:] < 1e-6).all()
    assert point(make_pointer(), 5)[0, 22] > 0.5


@torch.no_grad()
def test_cells_give_each_name_the_probability_of_its_classes() -> None:
    pointer = make_pointer()
    cells = make_cells()
    probabilities = pointer.classifier(cells[..., :4]).softmax(dim=-1)
    names = pointer.recognize(cells)
    by_word = {
        (int(first), int(pointer.words[place])): names[..., entry]
        for entry, (first, place) in enumerate(zip(pointer.firsts, pointer.places, strict=True))
    }
    assert len(by_word) == names.shape[-1] == 7
    torch.testing.assert_close(by_word[-1, 12], probabilities[..., 1])
    torch.testing.assert_close(by_word[12, 12], probabilities[..., 2:4].sum(dim=-1))
    torch.testing.assert_close(by_word[12, 13], probabilities[..., 2])
    torch.testing.assert_close(by_word[-1, 22], probabilities[..., 5])


def test_name_dropout_hides_only_names_that_the_pointer_can_supply() -> None:
    pointer = make_pointer(name_dropout=0.5).train()
    torch.nn.init.constant_(pointer.gate.bias, -4.0)
    probabilities = point(pointer, 0, copies=400)
    hidden = probabilities[:, 5] < probabilities[:, 6]
    assert 0.4 < hidden.float().mean() < 0.6
    torch.testing.assert_close(probabilities[:, 12], probabilities[:, 7])  # not recognized: written
    assert not (point(pointer.eval(), 0, copies=20)[:, 5] < 1 / VOCABULARY).any()


def test_names_that_no_caption_held_borrow_their_embedding() -> None:
    model = make_model(words=True)
    vectors = model.embed(torch.tensor([19, 20, 21, 22]))
    torch.testing.assert_close(vectors, model.embedding.weight[[19, 20, 5, 12]])


@torch.no_grad()
def test_word_the_detectors_see_in_attended_cells_is_likelier() -> None:
    model = make_model(words=True)
    torch.nn.init.constant_(model.evidence_gain.bias, 2.0)
    logits, hidden = torch.zeros(1, VOCABULARY), torch.zeros(1, HIDDEN)
    evidence = torch.tensor([[0.0, 3.0, 0.0, 0.0, -3.0]])
    added = model.add_recognized(logits, hidden, evidence, torch.zeros(1, 7), torch.tensor([BOS]))
    gain = math.log1p(math.exp(float(model.evidence_gain(hidden))))
    assert added[0, 8] == pytest.approx(-3 * gain, rel=1e-4)
    assert added[0, 4] == 0
