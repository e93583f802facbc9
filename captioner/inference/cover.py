"""A test of a word's map: the photo is covered where the map is hottest, and captioned anew.

Beside it stand covers of the same size elsewhere. The decoder reads the photo through nothing but
its cells, so any cover may take something from a word; a map says something true only if the cover
that follows it takes more than the others do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioner.errors import ConfigError
from captioner.inference.caption import Caption
from captioner.model.cover import BLUR, cover, sharp_and_blurred
from captioner.model.encoder import GRID, Encoder

NUM_RANDOM_COVERS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class CoverTest:
    """What covering some cells of a photo does to its caption, and to one word of the old caption.

    Every probability is the model's after the same words as in the old caption.

    Attributes:
        cells: covered, row * 7 + column, in order.
        caption: written anew from the covered photo.
        before: probability of the word in the whole photo.
        after: the same in the covered photo.
        random: the same under each of several random covers of equal size: the cover's own shape,
            turned or mirrored and moved, with what leaves at one edge coming in at the opposite.
            Each cell is covered equally often on average. None is the cover itself, but they may
            overlap it.
    """

    cells: tuple[int, ...]
    caption: Caption
    before: float
    after: float
    random: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``blur`` is that of the cover, as a share of a side."""
        return {
            "cells": list(self.cells),
            "blur": BLUR,
            "caption": self.caption.to_dict(),
            "before": self.before,
            "after": self.after,
            "random": {
                "mean": float(np.mean(self.random)),
                "low": min(self.random),
                "high": max(self.random),
                "covers": len(self.random),
            },
        }


def check_cells(cells: Sequence[int]) -> tuple[int, ...]:
    """Return cells in order; ``ConfigError`` unless they are some, but not all, of the grid's."""
    distinct = set(cells)
    if len(distinct) != len(cells) or not distinct < set(range(GRID * GRID)) or not cells:
        raise ConfigError(
            f"the cells must be different whole numbers from 0 to {GRID * GRID - 1}, at least one "
            "and not all of them"
        )
    return tuple(sorted(cells))


def random_covers(cells: Sequence[int], count: int, seed: int) -> np.ndarray:
    """Return different covers (count, P) of the shape of ``cells``; see ``CoverTest.random``.

    There are enough: even a whole row can be moved to six others and turned into seven columns.

    Args:
        cells: at least one and not all.
        count: up to 13.
        seed: of the choice.
    """
    shape = np.zeros((GRID, GRID), dtype=bool)
    shape.flat[list(cells)] = True
    turned = [np.rot90(side, turns) for side in (shape, shape.T) for turns in range(4)]
    moved = [
        np.roll(each, (down, right), axis=(0, 1)).ravel()
        for each in turned
        for down in range(GRID)
        for right in range(GRID)
    ]
    covers = np.unique(moved, axis=0)
    others = covers[(covers != shape.ravel()).any(axis=1)]
    return np.random.default_rng(seed).choice(others, count, replace=False)


def encode_covered(encoder: Encoder, image: Image.Image, cells: Sequence[int], seed: int) -> Tensor:
    """Return the cells (N, P, C) of a photo: whole, covered, and under the random covers."""
    random = random_covers(cells, NUM_RANDOM_COVERS, seed)
    is_covered = torch.zeros(2, GRID * GRID, dtype=torch.bool)
    is_covered[1, list(cells)] = True
    is_covered = torch.cat([is_covered, torch.from_numpy(random)])
    photos = cover(*sharp_and_blurred(image, encoder.transform), is_covered)
    parts = encoder.map(lambda batch: encoder(torch.stack(batch)), photos)
    return torch.cat(list(parts))
