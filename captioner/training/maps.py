"""Tests of a checkpoint's maps on photos: do they point at what the words name?

Two tests, each of the four maps of ``model/maps.py``: pointing at boxes, and focus on mosaics of
four photos. Figures are ``map_scores``'s.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from captioner.config import EOS, UNK
from captioner.data.features import Features
from captioner.data.sources import Box, CaptionedPhotos
from captioner.model.checkpoint import Checkpoint
from captioner.model.encoder import GRID, Encoder
from captioner.model.maps import caption_maps, mattered
from captioner.training.confidence import with_plurals
from captioner.training.map_scores import (
    MAPS,
    MapScore,
    Pattern,
    WordMaps,
    effective_cells,
    hottest,
    likeness,
    point,
    shares,
    summarize,
)
from captioner.training.word_kinds import category_words, kind_of

# Enough for intervals of a few points; each reading is 50 readings, one without each cell.
_MAX_READ, _MAX_MOSAICS = 200, 100


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """Reads captions, and returns the maps of their words.

    Attributes:
        checkpoint: on the device to compute on, in ``eval()``.
        mean_cell: (C,), which replaces a cell to see whether it mattered.
    """

    checkpoint: Checkpoint
    mean_cell: Tensor

    def ids(self, text: str) -> list[int]:
        """Return the ids of a cleaned caption, cut to the model's length, with ``<eos>``."""
        ids = self.checkpoint.vocabulary.encode(text)
        return [*ids[: self.checkpoint.max_length - 2], EOS]

    def words(self, cells: Tensor, text: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Yield word and maps of each known word of a caption, given cells (P, C)."""
        model, ids = self.checkpoint.model, self.ids(text)
        read = caption_maps(model, cells, ids)
        values = {
            "attended": read.attended,
            "evidence": read.evidence,
            "mattered": mattered(model, cells, ids, self.mean_cell),
            "shown": read.shown,
        }
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        for place, (word, index) in enumerate(zip(text.split(), ids[:-1], strict=False)):
            if index == UNK:
                continue
            lacking = {
                name
                for name, has in (("evidence", read.has_evidence), ("shown", read.has_detector))
                if not has[place]
            }
            yield word, {name: arrays[name][place] for name in MAPS if name not in lacking}


def score_maps(
    checkpoint: Checkpoint,
    encoder: Encoder,
    photos: CaptionedPhotos,
    features: Features,
    captions: Sequence[str],
    *,
    seed: int = 0,
) -> list[MapScore]:
    """Test the maps of a checkpoint; on many photos, on a sample of them.

    The mean cell, which replaces a cell to see whether it mattered, is that of all ``photos``.

    Args:
        checkpoint: on the encoder's device.
        encoder: which the checkpoint was trained on.
        photos: with captions by people; if they have boxes, the maps must point at those.
        features: of the photos.
        captions: that the model wrote, cleaned, for each readable photo.
        seed: of the sample, the mosaics, and the resampling.
    """
    checkpoint.model.eval()
    mean = features.array[features.readable].mean(axis=(0, 1), dtype=np.float32)
    reader = _Reader(checkpoint, torch.from_numpy(mean).to(encoder.device))
    order = np.random.default_rng(seed).permutation(features.readable).tolist()
    written = dict(zip(features.readable, captions, strict=True))
    own = {row: [written[row]] for row in order[:_MAX_READ]}
    boxes = photos.boxes()
    scores: list[MapScore] = []
    if boxes is not None:
        people = {
            row: _naming(photos.captions[row], _targets(boxes[row])) for row in order[:_MAX_READ]
        }
        words = _read(reader, features, people, boxes, "people's captions")
        scores += _point(words, "pointing", "people", hottest, seed)
    words = _read(reader, features, own, boxes, "the model's captions")
    scores += _point(words, "pointing", "model", hottest, seed)
    mosaics = _read_mosaics(reader, encoder, photos, order)
    scores += _point(mosaics, "focus", "people", shares, seed)
    scores += _point(mosaics, "hottest", "people", hottest, seed)
    scores += _describe(words, seed)
    return scores


def _naming(captions: Sequence[str], targets: dict[str, np.ndarray]) -> list[str]:
    """Return the captions with a word that has a target; the others would be read in vain."""
    return [text for text in captions if not targets.keys().isdisjoint(text.split())]


def _read(
    reader: _Reader,
    features: Features,
    captions: dict[int, list[str]],
    boxes: list[list[Box]] | None,
    name: str,
) -> list[WordMaps]:
    """Return the maps of all words of the captions of each row, their targets being its boxes."""
    words = []
    numbers = itertools.count()
    for row, texts in tqdm(captions.items(), desc=f"maps of {name}", unit="photo", leave=False):
        array = torch.from_numpy(np.array(features.array[row], dtype=np.float32))
        cells = array.to(reader.mean_cell.device)
        targets = {} if boxes is None else _targets(boxes[row])
        for text in texts:
            number = next(numbers)
            words += [
                WordMaps(row, number, kind_of(word), maps, targets.get(word))
                for word, maps in reader.words(cells, text)
            ]
    return words


def _targets(boxes: Sequence[Box]) -> dict[str, np.ndarray]:
    """Return for each word that names a box's category the cells (P,) with their middle in one."""
    middles = (np.arange(GRID) + 0.5) / GRID
    targets: dict[str, np.ndarray] = {}
    for box in boxes:
        rows = (box.top <= middles) & (middles <= box.bottom)
        columns = (box.left <= middles) & (middles <= box.right)
        inside = np.outer(rows, columns).ravel().astype(float)
        for word in category_words(box.category):
            targets[word] = np.maximum(targets.get(word, inside), inside)
    return targets


def _read_mosaics(
    reader: _Reader, encoder: Encoder, photos: CaptionedPhotos, rows: Sequence[int]
) -> list[WordMaps]:
    """Return the maps of captions read over mosaics of four photos, targets being the quarters.

    Each mosaic is read four times, with the first caption of each of its photos. Words that people
    use for another of its photos too have no right quarter and are left out, function words aside:
    all captions have those.
    """
    words = []
    numbers = itertools.count()
    groups = [rows[at : at + 4] for at in range(0, len(rows) - 3, 4)][:_MAX_MOSAICS]
    for number, group in enumerate(tqdm(groups, desc="mosaics", unit="mosaic", leave=False)):
        image = mosaic([photos.photo(row) for row in group], encoder.transform.size)
        pixels = torch.from_numpy(encoder.transform(image))
        cells = encoder(pixels[None])[0].float()
        used = [set(" ".join(photos.captions[row]).split()) for row in group]
        for place, row in enumerate(group):
            others = set().union(*(each for at, each in enumerate(used) if at != place))
            shared = with_plurals(others)
            caption = next(numbers)
            words += [
                WordMaps(number, caption, kind, maps, quarter(place))
                for word, maps in reader.words(cells, photos.captions[row][0])
                if (kind := kind_of(word)) == "function" or shared.isdisjoint(with_plurals([word]))
            ]
    return words


def mosaic(images: Sequence[Image.Image], size: int) -> Image.Image:
    """Return four photos in a square of 2 x 2, each ``size`` pixels wide and high."""
    result = Image.new("RGB", (2 * size, 2 * size))
    for place, image in enumerate(images):
        corner = (place % 2 * size, place // 2 * size)
        result.paste(image.resize((size, size), reducing_gap=3.0), corner)
    return result


def quarter(place: int) -> np.ndarray:
    """Return how much of each cell (P,) lies in a quarter: top left, top right, bottom left, right.

    The middle row and column of an odd grid belong to both sides by half.
    """
    first = np.clip(GRID / 2 - np.arange(GRID), 0, 1)
    rows, columns = (first[::-1] if second else first for second in divmod(place, 2))
    return np.outer(rows, columns).ravel()


def _point(
    words: Sequence[WordMaps], test: str, captions: str, pattern: Pattern, seed: int
) -> Iterator[MapScore]:
    """Yield the scores of the words that have a target."""
    for name in MAPS:
        with_map = [word for word in words if name in word.maps and word.target is not None]
        if with_map:
            values = point(with_map, name, pattern)
            yield from summarize(test, captions, name, values, seed=seed)


def _describe(words: Sequence[WordMaps], seed: int) -> Iterator[MapScore]:
    """Yield how alike the maps of a caption are, and over how many cells they spread."""
    for test, measure in (("likeness", likeness), ("cells", effective_cells)):
        for name in MAPS:
            with_map = [word for word in words if name in word.maps]
            values = measure(with_map, name) if with_map else None
            if values is not None:
                yield from summarize(test, "model", name, values, seed=seed)
