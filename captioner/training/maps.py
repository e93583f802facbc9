"""Tests of a checkpoint's maps on photos: do they point at what the words name?

Three tests, each of the four maps of ``model/maps.py``: pointing at boxes, focus on mosaics of four
photos, and blurring the photo where a map is hottest. And a test of the verdicts: are words that
are "seen there" in the boxes, and do they stay if the photos are swapped? Figures are
``map_scores``'s.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from captioner.config import EOS, MAPS, UNK, VERDICTS
from captioner.data.features import Features
from captioner.data.sources import Box, CaptionedPhotos
from captioner.model.checkpoint import Checkpoint
from captioner.model.cover import cover, sharp_and_blurred, word_probabilities
from captioner.model.encoder import GRID, Encoder
from captioner.model.maps import CaptionMaps, Occlusion, caption_maps, mattered
from captioner.model.verdicts import hottest_places, verdicts
from captioner.training.confidence import with_plurals
from captioner.training.map_scores import (
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


class _Reading(NamedTuple):
    """A caption of a photo that was read: T tokens, ``<eos>`` the last.

    Attributes:
        row: of the photo.
        words: without ``<eos>``, perhaps more than were read.
        ids: (T,).
        maps: of the tokens.
        occlusion: of the tokens.
    """

    row: int
    words: list[str]
    ids: list[int]
    maps: CaptionMaps
    occlusion: Occlusion

    def known_words(self) -> Iterator[tuple[int, str]]:
        """Yield place and text of each known word."""
        for place, (word, index) in enumerate(zip(self.words, self.ids[:-1], strict=False)):
            if index != UNK:
                yield place, word

    def maps_of(self, place: int) -> dict[str, np.ndarray]:
        """Return the maps (P,) that a word has, by name."""
        maps = self.maps
        found = {"attended": maps.attended}
        if maps.has_evidence[place]:
            found["evidence"] = maps.evidence
        found["mattered"] = self.occlusion.cells
        if maps.has_detector[place]:
            found["shown"] = maps.shown
        return {name: values[place].cpu().numpy() for name, values in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """Reads captions, and returns the maps of their words.

    Attributes:
        checkpoint: on the device to compute on, in ``eval()``.
    """

    checkpoint: Checkpoint

    def ids(self, text: str) -> list[int]:
        """Return the ids of a cleaned caption, cut to the model's length, with ``<eos>``."""
        ids = self.checkpoint.vocabulary.encode(text)
        return [*ids[: self.checkpoint.max_length - 2], EOS]

    @torch.inference_mode()
    def read(self, row: int, cells: Tensor, text: str) -> _Reading:
        """Read a caption of a photo with cells (P, C)."""
        model, ids = self.checkpoint.model, self.ids(text)
        (maps,) = caption_maps(model, model.remember(cells[None]), [ids])
        return _Reading(row, text.split(), ids, maps, mattered(model, cells, ids))

    def probabilities(self, cells: Tensor, text: str, place: int) -> np.ndarray:
        """Return the probability (N,) of one word of a caption, given cells (N, P, C)."""
        found = word_probabilities(self.checkpoint.model, cells, self.ids(text), place)
        values: np.ndarray = found.cpu().numpy()
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

    Args:
        checkpoint: on the encoder's device.
        encoder: which the checkpoint was trained on.
        photos: with captions by people; if they have boxes, the maps must point at those.
        features: of the photos.
        captions: that the model wrote, cleaned, for each readable photo.
        seed: of the sample, the mosaics, and the resampling.
    """
    checkpoint.model.eval()
    reader = _Reader(checkpoint)
    order = np.random.default_rng(seed).permutation(features.readable).tolist()
    written = dict(zip(features.readable, captions, strict=True))
    own = {row: [written[row]] for row in order[:_MAX_READ]}
    boxes = photos.boxes()
    scores: list[MapScore] = []
    if boxes is not None:
        people = {
            row: _naming(photos.captions[row], _targets(boxes[row])) for row in order[:_MAX_READ]
        }
        readings = _read(reader, features, people, "people's captions")
        scores += _point(_words(readings, boxes), "pointing", "people", hottest, seed)
        scores += _seen_there(readings, boxes, "people", seed)
    readings = _read(reader, features, own, "the model's captions")
    words = _words(readings, boxes)
    scores += _point(words, "pointing", "model", hottest, seed)
    if boxes is not None:
        scores += _seen_there(readings, boxes, "model", seed)
    scores += _verdicts(readings, seed)
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
    reader: _Reader, features: Features, captions: dict[int, list[str]], name: str
) -> list[_Reading]:
    """Read the captions of each row."""
    return [
        reader.read(row, _cells(reader, features, row), text)
        for row, texts in tqdm(captions.items(), desc=f"maps of {name}", unit="photo", leave=False)
        for text in texts
    ]


def _words(readings: Sequence[_Reading], boxes: list[list[Box]] | None) -> list[WordMaps]:
    """Return the maps of all known words, their targets being the boxes of their photos."""
    words = []
    for number, reading in enumerate(readings):
        targets = {} if boxes is None else _targets(boxes[reading.row])
        words += [
            WordMaps(
                reading.row,
                number,
                _kind(word, targets),
                reading.maps_of(place),
                targets.get(word),
            )
            for place, word in reading.known_words()
        ]
    return words


def _kind(word: str, targets: Container[str]) -> WordKind:
    """Return the kind of a word; one that names a box is for a thing or a person, as "skis" is."""
    kind = kind_of(word)
    return "object" if word in targets and kind != "person" else kind


def _cells(reader: _Reader, features: Features, row: int) -> Tensor:
    """Return the cells (P, C) of a photo."""
    array = torch.from_numpy(np.array(features.array[row], dtype=np.float32))
    return array.to(reader.checkpoint.model.mean_features.device)


def _targets(boxes: Sequence[Box], margin: float = 0.0) -> dict[str, np.ndarray]:
    """Return for each word that names a box's category the cells (P,) with their middle in one.

    ``margin`` widens the boxes, in cells; with half of one, every cell that a box touches counts.
    """
    middles = (np.arange(GRID) + 0.5) / GRID
    targets: dict[str, np.ndarray] = {}
    for box in boxes:
        rows = np.abs(middles - (box.top + box.bottom) / 2) * 2 <= (
            box.bottom - box.top + 2 * margin / GRID
        )
        columns = np.abs(middles - (box.left + box.right) / 2) * 2 <= (
            box.right - box.left + 2 * margin / GRID
        )
        inside = np.outer(rows, columns).ravel().astype(float)
        for word in category_words(box.category):
            targets[word] = np.maximum(targets.get(word, inside), inside)
    return targets


def _seen_there(
    readings: Sequence[_Reading], boxes: list[list[Box]], captions: str, seed: int
) -> Iterator[MapScore]:
    """Yield how often words that the verdict says are seen there are: in a box of what they name.

    Words that name a category of any photo's boxes count; where their own photo has no such box,
    they are wrong.
    """
    everywhere = {word for of_photo in boxes for word in _targets(of_photo)}
    nowhere = np.zeros(GRID * GRID)
    photos, kinds, values, targets = [], [], [], []
    for reading in readings:
        judged = verdicts(reading.maps, reading.occlusion)
        places = hottest_places(reading.maps.evidence).tolist()
        touched = _targets(boxes[reading.row], margin=0.5)
        for at, word in reading.known_words():
            if word in everywhere and judged[at] == VERDICTS[0]:
                target = touched.get(word, nowhere)
                row, column = places[at]
                photos.append(reading.row)
                kinds.append(_kind(word, everywhere))
                values.append(100 * target[row * GRID + column])
                targets.append(100 * target)
    if values:
        stacked = np.stack(targets)
        found = WordValues(
            np.array(photos),
            kinds,
            np.array(values),
            center=stacked[:, GRID * GRID // 2],
            chance=stacked.mean(axis=1),
        )
        yield from summarize("seen there", captions, "evidence", found, seed=seed)


def _verdicts(readings: Sequence[_Reading], seed: int) -> Iterator[MapScore]:
    """Yield the share of each verdict; "shuffled" judges by what mattered for other photos' words.

    Each word gets the occlusion of one in the next photo, the last those of the first.
    """
    known = [[place for place, _ in reading.known_words()] for reading in readings]
    parts = list(zip(readings, known, strict=True))
    kinds = [kind_of(reading.words[at]) for reading, places in parts for at in places]
    photos = np.array([reading.row for reading, places in parts for _ in places])
    if len(np.unique(photos)) < 2:
        return
    maps = CaptionMaps(
        *(
            torch.cat(each)
            for each in zip(
                *([part[places] for part in reading.maps] for reading, places in parts), strict=True
            )
        )
    )
    occlusion = Occlusion(
        torch.cat([reading.occlusion.cells[places] for reading, places in parts]),
        torch.cat([reading.occlusion.photo[places] for reading, places in parts]),
    )
    longest = max(map(len, known))  # rolled this far, no word meets one of its own photo
    swapped = Occlusion(*(part.roll(longest, dims=0) for part in occlusion))
    judged, shuffled = (np.array(verdicts(maps, each)) for each in (occlusion, swapped))
    for verdict in VERDICTS:
        values = WordValues(
            photos, kinds, 100.0 * (judged == verdict), shuffled=100.0 * (shuffled == verdict)
        )
        yield from summarize("verdicts", "model", verdict, values, seed=seed)


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
            reading = reader.read(row, cells, photos.captions[row][0])
            words += [
                WordMaps(number, caption, kind, reading.maps_of(at), quarter(place))
                for at, word in reading.known_words()
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
    "chance" is a random order of the cells, "center" the order of their distance from the middle,
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
            "center": -((y - middle) ** 2 + (x - middle) ** 2),
            "chance": rng.random(GRID * GRID),
            "shuffled": other[str(rng.choice(list(other)))],
        }
        sharp, blurred = sharp_and_blurred(photos.photo(choice.row), encoder.transform)
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
                for each in (name, "center", "chance", "shuffled")
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
    reading = reader.read(row, cells, text)
    choices = [
        _Choice(row, text, place, reading.maps_of(place), kind_of(word))
        for place, word in reading.known_words()
    ]
    if not choices:
        return None
    kind = rng.choice(sorted({choice.kind for choice in choices}))
    of_kind = [choice for choice in choices if choice.kind == kind]
    return of_kind[rng.integers(len(of_kind))]


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
    return torch.cat([cover(sharp, blurred, is_first), cover(sharp, blurred, 1 - is_first)])


def mean_between(probabilities: np.ndarray) -> float:
    """Return the area under the probabilities at each step over the share of cells, 0 to 1."""
    widths = np.diff(_STEPS) / _STEPS[-1]
    return float(((probabilities[1:] + probabilities[:-1]) / 2 * widths).sum())
