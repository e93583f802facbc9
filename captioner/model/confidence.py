"""How likely a whole caption is right: a logistic regression on what captioning computes anyway.

Its weights are fitted on validation photos by ``training/confidence.py``, which also defines
"right". Knows nothing of words or photos.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captioner.config import UNK, ModelConfig
from captioner.model.decoder import CaptionModel, Memory
from captioner.model.search import Hypothesis
from captioner.model.words import photo_probability

# Detectors are not trusted beyond this probability, or one minus it.
_LEAST = 1e-4


def num_features(config: ModelConfig) -> int:
    """Return F of ``confidence_features``."""
    return 4 if config.evidence and config.num_detectors else 1


def visual_ids(config: ModelConfig) -> set[int]:
    """Return the ids of the words that a photo can show: with a detector, or in a class's name."""
    detected = range(UNK + 1, UNK + 1 + config.num_detectors)
    return {*detected, *itertools.chain.from_iterable(config.class_names)}


def confidence_features(
    model: CaptionModel, memory: Memory, hypotheses: Sequence[Hypothesis]
) -> Tensor:
    """Return features (B, F), float64, of one caption of each photo.

    The first is the mean log-probability per token. With evidence there are three more: the mean
    and the minimum, over the caption's visual words, of the log-odds that the photo shows the word
    according to its detector; and the number of visual words.

    Args:
        model: which wrote the captions.
        memory: of the B photos.
        hypotheses: B captions.
    """
    likelihood = [float(each.log_probabilities.mean()) for each in hypotheses]
    if num_features(model.config) == 1:
        return _as_tensor([[value] for value in likelihood])
    logits = memory.evidence.float() + model.detectors.mean_logits
    log_odds = torch.logit(photo_probability(logits), eps=_LEAST).tolist()  # (B, D)
    visual = visual_ids(model.config)
    rows = []
    for row, hypothesis in enumerate(hypotheses):
        words = visual.intersection(hypothesis.ids)
        detected = [index - UNK - 1 for index in words if index <= UNK + model.config.num_detectors]
        seen = [log_odds[row][index] for index in detected] or [math.log(_LEAST)]
        rows.append([likelihood[row], statistics.fmean(seen), min(seen), len(words)])
    return _as_tensor(rows)


def confidence_of(features: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the probabilities (B,) that captions are right.

    Args:
        features: (B, F), as ``confidence_features`` returns them.
        weights: the bias, then a weight per feature.
    """
    bias, *slopes = weights
    return torch.sigmoid(features @ _as_tensor(slopes) + bias)


def _as_tensor(values: Sequence[Any]) -> Tensor:
    # Whatever torch's defaults are.
    return torch.tensor(values, dtype=torch.float64, device="cpu")
