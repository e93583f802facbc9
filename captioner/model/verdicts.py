"""Where each word of a caption comes from, judged by this photo's own maps.

Knows nothing of photos or words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from captioner.config import VERDICTS
from captioner.model.maps import CaptionMaps, Occlusion

_SEEN, _SCENE, _SENTENCE, _GUESSED = VERDICTS
# A word depends on the photo if without it the probability falls to less than 37 %; the photo
# speaks against the word if it rises as much.
_LEAST_FALL = 1.0
# People use a word that is recognized less than this in a quarter of the photos for which the model
# writes it, and all words together in three of five.
_LEAST_RECOGNIZED = 0.1
# How many cells apart the hottest places of two maps that agree may lie, diagonals included.
_NEAR = 1


def verdicts(maps: CaptionMaps, occlusion: Occlusion) -> list[str]:
    """Return one of ``VERDICTS`` for each of T words.

    In this order: "guessed" if the word has a detector or a class's name, but neither is recognized
    in the photo, or the photo speaks against the word; "from the sentence" if covering the whole
    photo hardly changes it; "seen there" if the evidence and what mattered have their hottest
    places together; else "from the scene": it mattered, nowhere in particular. Without detectors
    and names a model sees no word anywhere.

    Args:
        maps: of the caption.
        occlusion: of the same words.
    """
    evidence, falls = hottest_places(maps.evidence), hottest_places(occlusion.cells)
    is_near = (evidence - falls).abs().amax(dim=1) <= _NEAR
    result = []
    for has_evidence, recognized, fall, near in zip(
        maps.has_evidence.tolist(),
        maps.recognized.tolist(),
        occlusion.photo.tolist(),
        is_near.tolist(),
        strict=True,
    ):
        if has_evidence and (recognized < _LEAST_RECOGNIZED or fall < -_LEAST_FALL):
            result.append(_GUESSED)
        elif fall < _LEAST_FALL:
            result.append(_SENTENCE)
        else:
            result.append(_SEEN if has_evidence and near else _SCENE)
    return result


def hottest_places(maps: Tensor) -> Tensor:
    """Return row and column (T, 2) where the positive part of each map (T, P) is hottest.

    Each cell counts with its neighbors: single cells say little about a backbone's coarse grid.
    """
    side = math.isqrt(maps.shape[1])
    kernel = maps.new_tensor([1.0, 2.0, 1.0])
    grid = pad(maps.clamp(min=0).view(-1, 1, side, side), (1, 1, 1, 1), mode="replicate")
    smooth = conv2d(grid, torch.outer(kernel, kernel)[None, None])
    cell = smooth.flatten(1).argmax(dim=1)
    return torch.stack([cell // side, cell % side], dim=1)
