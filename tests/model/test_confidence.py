"""The confidence in a caption: its features, and the regression on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from captioner.config import EOS, ModelConfig
from captioner.model.confidence import (
    confidence_features,
    confidence_of,
    num_features,
    visual_ids,
)
from captioner.model.decoder import CaptionModel
from captioner.model.search import Hypothesis
from tests.model.tiny import CHANNELS, make_cells, make_model

DETECTORS = 5  # of the ids 4 to 8


def _hypothesis(*ids: int, log_probability: float = -1.0) -> Hypothesis:
    nothing = torch.zeros(len(ids), 1)
    return Hypothesis(
        list(ids), torch.full((len(ids),), log_probability), nothing, nothing, nothing, 0.0
    )


@pytest.fixture
def model() -> CaptionModel:
    model = make_model(evidence=True, num_detectors=DETECTORS)
    torch.nn.init.normal_(model.detectors.linear.weight)
    torch.nn.init.constant_(model.detectors.linear.bias, -3.0)
    model.detectors.mean_logits.normal_()
    return model


def _log_odds(model: CaptionModel, cells: Tensor, index: int) -> float:
    """Return the log-odds that any cell (P, C) shows a word, from the detectors' own logits."""
    shown = torch.sigmoid(model.detectors(cells[None])[0, :, index - 4])
    absent = math.prod((1 - shown).tolist())
    return math.log((1 - absent) / absent)


def test_features_are_likelihood_log_odds_and_number_of_visual_words(model: CaptionModel) -> None:
    cells = make_cells(2)
    _, memory = model.start(cells)
    captions = [
        _hypothesis(3, 5, 20, 7, EOS, log_probability=-0.5),  # 3 and 20 have no detector
        _hypothesis(4, 4, EOS, log_probability=-2.0),  # a word counts once
    ]
    features = confidence_features(model, memory, captions)
    first = [_log_odds(model, cells[0], index) for index in (5, 7)]
    second = _log_odds(model, cells[1], 4)
    expected = [[-0.5, sum(first) / 2, min(first), 2], [-2.0, second, second, 1]]
    torch.testing.assert_close(features, torch.tensor(expected).double(), atol=1e-3, rtol=1e-3)


def test_caption_without_visual_words_has_the_least_log_odds(model: CaptionModel) -> None:
    _, memory = model.start(make_cells(1))
    features = confidence_features(model, memory, [_hypothesis(3, 20, EOS)])
    assert features.tolist() == [[-1.0, math.log(1e-4), math.log(1e-4), 0]]


def test_names_of_classes_are_visual_words_with_or_without_a_detector() -> None:
    model = make_model(
        evidence=True, num_detectors=DETECTORS, class_names=[[6], [9, 15]], classifier_channels=3
    )
    assert visual_ids(model.config) == {4, 5, 6, 7, 8, 9, 15}
    _, memory = model.start(make_cells(1))
    features = confidence_features(model, memory, [_hypothesis(6, 15, EOS)])
    assert features[0, 3] == 2
    assert features[0, 1] == features[0, 2]  # of the only detector


def test_without_evidence_the_likelihood_is_the_only_feature() -> None:
    model = make_model()
    _, memory = model.start(make_cells(1))
    features = confidence_features(model, memory, [_hypothesis(5, EOS, log_probability=-0.25)])
    assert features.tolist() == [[-0.25]]


@pytest.mark.parametrize("evidence", [False, True])
def test_number_of_features(evidence: bool) -> None:
    config = ModelConfig(
        vocabulary_size=23, encoder_channels=CHANNELS, evidence=evidence, num_detectors=DETECTORS
    )
    model = make_model(evidence=evidence, num_detectors=DETECTORS)
    _, memory = model.start(make_cells(1))
    features = confidence_features(model, memory, [_hypothesis(5, EOS)])
    assert features.shape == (1, num_features(config))


def test_confidence_is_the_sigmoid_of_bias_and_weighted_features() -> None:
    found = confidence_of(torch.tensor([[1.0, 2.0], [1e4, 0.0]]).double(), [0.5, 1.0, -1.0])
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 1.0])
