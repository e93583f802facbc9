"""Covering cells of a photo, and the probability of a word then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.config import BOS
from captioner.model.cover import cover, sharp_and_blurred, word_probabilities
from captioner.model.encoder import Transform
from tests.model.tiny import make_model

TRANSFORM = Transform(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", size=70)


def noise(size: tuple[int, int] = (140, 90)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_covering_nothing_or_everything_gives_the_sharp_or_the_blurred_photo() -> None:
    sharp, blurred = sharp_and_blurred(noise(), TRANSFORM)
    assert torch.equal(sharp, torch.from_numpy(TRANSFORM(noise())))
    nothing, everything = cover(sharp, blurred, torch.tensor([[False], [True]]).expand(2, 49))
    assert torch.equal(nothing, sharp)
    assert torch.equal(everything, blurred)


def test_only_the_covered_cells_are_blurred() -> None:
    sharp, blurred = torch.zeros(3, 70, 70), torch.ones(3, 70, 70)
    is_covered = torch.zeros(1, 49, dtype=torch.bool)
    is_covered[0, [0, 3 * 7 + 5]] = True
    expected = torch.zeros(70, 70)
    expected[:10, :10] = expected[30:40, 50:60] = 1
    assert torch.equal(cover(sharp, blurred, is_covered), expected.expand(1, 3, 70, 70))


def test_blur_keeps_the_colour_of_a_region_and_hides_what_is_in_a_cell() -> None:
    image = Image.new("RGB", (140, 70), "black")
    image.paste("white", (70, 0, 140, 70))
    _, blurred = sharp_and_blurred(image, TRANSFORM)
    black, white = blurred[:, 35, 3], blurred[:, 35, 67]
    assert torch.allclose(black, torch.tensor(-2.0), atol=0.05)
    assert torch.allclose(white, torch.tensor(2.0), atol=0.05)
    sharp, blurred = sharp_and_blurred(noise(), TRANSFORM)
    assert blurred.std() < 0.1 * sharp.std()


@torch.inference_mode()
def test_word_probabilities_are_those_of_the_forward_pass() -> None:
    model = make_model(words=True).eval()
    cells = torch.randn(3, 49, model.config.encoder_channels)
    ids = [7, 5, 9, 6]
    captions = torch.tensor([BOS, *ids]).expand(3, 1, -1)
    logits, _ = model(cells, captions)
    expected = logits.view(3, len(ids), -1).softmax(dim=-1)
    for place, word in enumerate(ids):
        found = word_probabilities(model, cells, ids, place)
        assert found.tolist() == pytest.approx(expected[:, place, word].tolist(), rel=1e-4)
