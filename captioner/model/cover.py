"""Photos with covered cells, blurred before the backbone sees them, and a word's probability then.

Unlike a cell that is replaced on the grid (``maps.mattered``), a covered one is not seen by its
neighbors either. Knows nothing of photo files or search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate

from captioner.config import BOS
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import GRID, Transform

# The blur's standard deviation, as a share of the photo's side: two thirds of a cell's width.
BLUR = 0.1


def sharp_and_blurred(image: Image.Image, transform: Transform) -> tuple[Tensor, Tensor]:
    """Return an encoder's input of a photo, (3, S, S), and that of the photo blurred."""
    size = transform.size
    blur = ImageFilter.GaussianBlur(BLUR * size)
    blurred = image.resize((size, size), reducing_gap=3.0).filter(blur)
    return torch.from_numpy(transform(image)), torch.from_numpy(transform(blurred))


def cover(sharp: Tensor, blurred: Tensor, is_covered: Tensor) -> Tensor:
    """Return a photo (N, 3, S, S) under N covers.

    Args:
        sharp: (3, S, S).
        blurred: (3, S, S).
        is_covered: (N, P), whether each cell is.
    """
    mask = interpolate(is_covered.view(-1, 1, GRID, GRID).float(), size=sharp.shape[1:]) > 0
    return torch.where(mask, blurred, sharp)


@torch.inference_mode()
def word_probabilities(
    model: CaptionModel, cells: Tensor, ids: Sequence[int], place: int
) -> Tensor:
    """Return the probability (N,) of one word of a caption in N photos, given the words before it.

    Args:
        model: in ``eval()``.
        cells: (N, P, C), from the encoder.
        ids: of the caption, without ``<bos>``.
        place: of the word in ``ids``.
    """
    state, memory = model.start(cells)
    logits = cells.new_zeros(())
    for previous in [BOS, *ids[:place]]:
        token_ids = torch.full((len(cells), 1), previous, device=cells.device)
        logits, _, state = model.step(token_ids, state, memory)
    return logits[:, 0].float().softmax(dim=-1)[:, ids[place]]
