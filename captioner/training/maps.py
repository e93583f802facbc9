"""Tests of a checkpoint's maps on photos: do they point at what the words name?

Three tests, each of the four maps of ``model/maps.py``: pointing at boxes, focus on mosaics of four
photos, and blurring the photo where a map is hottest. Figures are ``map_scores``'s.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from captioner.config import BOS, EOS, UNK
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
    WordValues,
    effective_cells,
    hottest,
    likeness,
    point,
    shares,
    summarize,
)
from captioner.training.word_kinds import WordKind, category_words, kind_of

# Enough for intervals of a few points; each reading is 50 readings, one without each cell.
_MAX_READ, _MAX_MOSAICS, _MAX_BLURRED = 200, 100, 100
# How many of the 49 cells are blurred, hottest first.
_STEPS = (0, 3, 6, 12, 24, 49)
# The blur's standard deviation, as a share of the photo's side: two thirds of a cell's width.
_BLUR = 0.1


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

    def words(self, cells: Tensor, text: str) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
        """Yield place, word and maps of each known word of a caption, given cells (P, C)."""
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
            maps = {name: arrays[name][place] for name in MAPS if name not in lacking}
            yield place, word, maps

    @torch.inference_mode()
    def probabilities(self, cells: Tensor, text: str, place: int) -> np.ndarray:
        """Return the probability (N,) of one word of a caption, given cells (N, P, C)."""
        model, ids = self.checkpoint.model, self.ids(text)
        state, memory = model.start(cells)
        logits = cells.new_zeros(())
        for previous in [BOS, *ids[:place]]:
            token_ids = torch.full((len(cells), 1), previous, device=cells.device)
            logits, _, state = model.step(token_ids, state, memory)
        values: np.ndarray = logits[:, 0].float().softmax(dim=-1)[:, ids[place]].cpu().numpy()
        return values


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
    scores += _blur(reader, encoder, photos, features, own, seed)
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
        cells = _cells(reader, features, row)
        targets = {} if boxes is None else _targets(boxes[row])
        for text in texts:
            number = next(numbers)
            words += [
                WordMaps(row, number, _kind(word, targets), maps, targets.get(word))
                for _, word, maps in reader.words(cells, text)
            ]
    return words


def _kind(word: str, targets: Container[str]) -> WordKind:
    """Return the kind of a word; one that names a box is for a thing or a person, as "skis" is."""
    kind = kind_of(word)
    return "object" if word in targets and kind != "person" else kind


def _cells(reader: _Reader, features: Features, row: int) -> Tensor:
    """Return the cells (P, C) of a photo."""
    array = torch.from_numpy(np.array(features.array[row], dtype=np.float32))
    return array.to(reader.mean_cell.device)


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
                for _, word, maps in reader.words(cells, photos.captions[row][0])
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """A word whose photo is blurred: its place in the caption of a row, and its maps."""

    row: int
    text: str
    place: int
    maps: dict[str, np.ndarray]
    kind: WordKind


def _blur(
    reader: _Reader,
    encoder: Encoder,
    photos: CaptionedPhotos,
    features: Features,
    captions: dict[int, list[str]],
    seed: int,
) -> Iterator[MapScore]:
    """Yield deletion and insertion (Petsiuk et al. 2018, RISE), in the photo, not in its cells.

    One word of each photo's caption, of a kind drawn first, so that rare kinds count too. Its
    "chance" is a random order of the cells, "centre" the order of their distance from the middle,
    and "shuffled" that of a map of another photo's word.
    """
    rng = np.random.default_rng(seed)
    chosen = [
        choice
        for row, (text,) in itertools.islice(captions.items(), _MAX_BLURRED)
        if (choice := _choose_word(reader, _cells(reader, features, row), row, text, rng))
    ]
    y, x = np.divmod(np.arange(GRID * GRID), GRID)
    middle = GRID // 2
    found: list[dict[str, tuple[float, float]]] = []  # deletion and insertion by each order
    for number, choice in enumerate(tqdm(chosen, desc="blurring", unit="photo", leave=False)):
        other = chosen[(number + 1) % len(chosen)].maps
        maps = choice.maps | {
            "centre": -((y - middle) ** 2 + (x - middle) ** 2),
            "chance": rng.random(GRID * GRID),
            "shuffled": other[str(rng.choice(list(other)))],
        }
        sharp, blurred = _sharp_and_blurred(photos.photo(choice.row), encoder)
        orders = [np.argsort(-values, kind="stable") for values in maps.values()]
        images = [sharp[None], blurred[None], *(blurrings(sharp, blurred, o) for o in orders)]
        cells = torch.cat(
            [encoder(part).float() for part in torch.split(torch.cat(images), encoder.batch_size)]
        )
        whole, nothing, *rest = reader.probabilities(cells, choice.text, choice.place)
        between = np.array(rest).reshape(len(orders), 2, -1)
        found.append(
            {
                name: (
                    mean_between(np.array([whole, *deletion, nothing])),
                    mean_between(np.array([nothing, *insertion, whole])),
                )
                for name, (deletion, insertion) in zip(maps, between, strict=True)
            }
        )
    for test, name in itertools.product((0, 1), MAPS):
        rows = [number for number, choice in enumerate(chosen) if name in choice.maps]
        if rows:
            values = {
                each: 100 * np.array([found[row][each][test] for row in rows])
                for each in (name, "centre", "chance", "shuffled")
            }
            yield from summarize(
                ("deletion", "insertion")[test],
                "model",
                name,
                WordValues(
                    np.array([chosen[row].row for row in rows]),
                    [chosen[row].kind for row in rows],
                    values.pop(name),
                    **values,
                ),
                seed=seed,
            )


def _choose_word(
    reader: _Reader, cells: Tensor, row: int, text: str, rng: np.random.Generator
) -> _Choice | None:
    """Return a word of a caption: a kind at random, then one of its words at random."""
    choices = [
        _Choice(row, text, place, maps, kind_of(word))
        for place, word, maps in reader.words(cells, text)
    ]
    if not choices:
        return None
    kind = rng.choice(sorted({choice.kind for choice in choices}))
    of_kind = [choice for choice in choices if choice.kind == kind]
    return of_kind[rng.integers(len(of_kind))]


def _sharp_and_blurred(image: Image.Image, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Return the encoder's input of a photo, (3, S, S), and that of the photo blurred."""
    size = encoder.transform.size
    blur = ImageFilter.GaussianBlur(_BLUR * size)
    blurred = image.resize((size, size), reducing_gap=3.0).filter(blur)
    return torch.from_numpy(encoder.transform(image)), torch.from_numpy(encoder.transform(blurred))


def blurrings(sharp: Tensor, blurred: Tensor, order: np.ndarray) -> Tensor:
    """Return a photo with its first cells blurred, then with all others blurred, step by step.

    Args:
        sharp: (3, S, S).
        blurred: (3, S, S).
        order: (P,), the cells, hottest first.

    Returns:
        (2 N, 3, S, S) for the N steps between none and all.
    """
    is_first = torch.zeros(len(_STEPS) - 2, GRID * GRID)
    for step, count in enumerate(_STEPS[1:-1]):
        is_first[step, order[:count].copy()] = 1
    mask = interpolate(is_first.view(-1, 1, GRID, GRID), size=sharp.shape[1:]) > 0
    return torch.cat([torch.where(mask, blurred, sharp), torch.where(mask, sharp, blurred)])


def mean_between(probabilities: np.ndarray) -> float:
    """Return the area under the probabilities at each step over the share of cells, 0 to 1."""
    widths = np.diff(_STEPS) / _STEPS[-1]
    return float(((probabilities[1:] + probabilities[:-1]) / 2 * widths).sum())
