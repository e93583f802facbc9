"""When a caption is right, how the confidence is fitted, and the figures of its calibration."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

from captioner.config import ModelConfig
from captioner.model.confidence import confidence_of
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.training.confidence import (
    Reliability,
    are_right,
    cross_fitted,
    fit_weights,
    visual_words,
)

VISUAL = {"dog", "dogs", "man", "women", "ball", "city", "wolf", "child", "box", "red", "runs"}


# Right captions


@pytest.mark.parametrize(
    ("caption", "references", "is_right"),
    [
        ("a dog runs", ["the dog runs on grass"], True),
        ("a red dog runs", ["a dog runs"], True),  # two of three
        ("a red dog", ["a dog"], False),  # one of two
        ("a dog and a ball", ["a ball is thrown", "the dog jumps"], True),  # in any reference
        ("a dog and the the the", ["a dog"], True),  # other words do not count
        ("dogs", ["one dog"], True),
        ("a dog", ["two dogs"], True),
        ("a man", ["two men"], True),
        ("women", ["a woman"], True),
        ("a city", ["two cities"], True),
        ("a wolf", ["wolves"], True),
        ("a child", ["children"], True),
        ("a box", ["boxes"], True),
        ("a man", ["a woman"], False),
        ("red dog red", ["a red cat"], False),  # a repeated word counts once
        ("this is the", ["this is the"], False),  # it names nothing
        ("", ["a dog"], False),
    ],
)
def test_two_thirds_of_the_visual_words_make_a_caption_right(
    caption: str, references: list[str], is_right: bool
) -> None:
    assert are_right([caption], [references], VISUAL).tolist() == [is_right]


def test_visual_words_have_a_detector_or_name_a_class() -> None:
    vocabulary = Vocabulary([*SPECIALS, "dog", "runs", "a", "siamese", "the"])
    config: dict[str, Any] = {"vocabulary_size": len(vocabulary), "encoder_channels": 8}
    plain = ModelConfig(**config)
    assert visual_words(plain, vocabulary) == {"dog", "runs", "siamese"}
    best = ModelConfig(**config, num_detectors=2, class_names=[[4], [7]], classifier_channels=3)
    assert visual_words(best, vocabulary) == {"dog", "runs", "siamese"}
    assert visual_words(ModelConfig(**config, num_detectors=1), vocabulary) == {"dog"}


# The regression


def _samples(number: int, weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    features = 3 + 10 * torch.randn(number, len(weights) - 1, generator=random).double()
    chances = confidence_of(features, weights)
    return features, torch.rand(number, generator=random) < chances


def test_fit_finds_the_weights() -> None:
    features, right = _samples(20_000, [1.0, 0.3, -0.2])
    assert fit_weights(features, right) == pytest.approx([1.0, 0.3, -0.2], abs=0.06)


@pytest.mark.parametrize("right", [[True] * 60, [False] * 60, [False] * 30 + [True] * 30])
def test_fit_stays_finite_without_errors_to_learn_from(right: list[bool]) -> None:
    features = torch.stack(
        [torch.arange(60.0), torch.ones(60)], dim=1
    ).double()  # the last is constant
    weights = fit_weights(features, torch.tensor(right))
    assert all(abs(weight) < 100 for weight in weights)
    found = confidence_of(features, weights) > 0.5
    assert found.tolist() == right


def test_cross_fitting_learns_nothing_from_noise() -> None:
    """Fitted and tested on the same captions, twenty random features would look useful."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(100, 20, generator=random).double()
    right = torch.rand(100, generator=random) < 0.5
    honest = Reliability.of(cross_fitted(features, right), right)
    flattered = Reliability.of(confidence_of(features, fit_weights(features, right)), right)
    assert flattered.brier < flattered.base_brier < honest.brier


# Calibration


def test_reliability_by_hand() -> None:
    found = Reliability.of(
        torch.tensor([0.0, 0.05, 0.55, 0.55, 1.0]), torch.tensor([False, True, True, False, True])
    )
    assert found.base_rate == pytest.approx(0.6)
    assert found.base_brier == pytest.approx(0.24)
    assert found.brier == pytest.approx((0.95**2 + 0.45**2 + 0.55**2) / 5)
    # Distances of the three bins: 0.475 of two captions, 0.05 of two, 0 of one.
    assert found.calibration_error == pytest.approx((0.95 + 0.1) / 5)
    assert len(found.bins) == 10
    assert [each["photos"] for each in found.bins] == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert found.bins[0] == {
        "from": 0.0,
        "mean_confidence": pytest.approx(0.025),
        "share_right": 0.5,
        "photos": 2,
    }
    assert found.bins[1]["share_right"] is None
    assert "60% of the captions are right" in str(found)
    Image.open(io.BytesIO(found.plot())).verify()


def test_calibrated_confidence_has_small_errors() -> None:
    features, right = _samples(20_000, [0.5, 0.1])
    found = Reliability.of(confidence_of(features, [0.5, 0.1]), right)
    assert found.calibration_error < 0.015
    assert found.brier < found.base_brier
