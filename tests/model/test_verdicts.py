"""Verdicts on maps made by hand, and on swapped photos."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captioner.model.maps import CaptionMaps, Occlusion
from captioner.model.verdicts import hottest_places, verdicts


def spot(*cells: tuple[int, int], weight: float = 1.0) -> Tensor:
    """Return a map (49,) with the given cells hot."""
    grid = torch.zeros(7, 7)
    for row, column in cells:
        grid[row, column] = weight
    return grid.flatten()


def judge(
    evidence: Tensor,
    falls: Tensor,
    *,
    fall: float = 3.0,
    recognized: float = 0.9,
    has_evidence: bool = True,
) -> str:
    maps = CaptionMaps(
        torch.tensor([-1.0]),
        torch.full((1, 49), 1 / 49),
        evidence[None],
        torch.zeros(1, 49),
        torch.tensor([has_evidence]),
        torch.tensor([has_evidence]),
        torch.tensor([recognized]),
    )
    (verdict,) = verdicts(maps, Occlusion(falls[None], torch.tensor([fall])))
    return verdict


def test_word_is_seen_where_its_evidence_is_if_covering_that_place_matters() -> None:
    assert judge(spot((2, 2)), spot((2, 2))) == "seen there"
    assert judge(spot((2, 2)), spot((3, 3))) == "seen there"
    assert judge(spot((2, 2)), spot((2, 4))) == "from the scene"
    assert judge(spot((2, 2)), spot((2, 2)), has_evidence=False) == "from the scene"


def test_word_that_the_photo_hardly_changes_comes_from_the_sentence() -> None:
    assert judge(spot((2, 2)), spot((2, 2)), fall=0.9) == "from the sentence"
    assert judge(spot((2, 2)), spot((2, 2)), fall=-0.9) == "from the sentence"
    assert judge(spot(), spot(), fall=0.9, has_evidence=False) == "from the sentence"


@pytest.mark.parametrize("fall", [0.1, 5.0])
def test_word_that_no_detector_recognizes_is_guessed(fall: float) -> None:
    assert judge(spot((2, 2)), spot((2, 2)), fall=fall, recognized=0.09) == "guessed"
    # Words that have no detector are never recognized, and are no guesses for that.
    verdict = judge(spot(), spot(), fall=fall, recognized=0.0, has_evidence=False)
    assert verdict in ("from the sentence", "from the scene")


def test_word_that_the_photo_speaks_against_is_guessed() -> None:
    assert judge(spot((2, 2)), spot((2, 2)), fall=-1.1) == "guessed"
    assert judge(spot(), spot(), fall=-1.1, has_evidence=False) == "from the sentence"


def test_hottest_place_counts_neighbors_and_ignores_what_speaks_against_the_word() -> None:
    lonely = spot((4, 5), weight=1.5)
    cluster = spot((1, 1), (1, 2), (2, 1))
    against = spot((3, 0), weight=-50.0)
    assert hottest_places((lonely + cluster + against)[None]).tolist() == [[1, 1]]
    # At the border the missing neighbors are like the cell itself.
    assert hottest_places(spot((0, 6))[None]).tolist() == [[0, 6]]
