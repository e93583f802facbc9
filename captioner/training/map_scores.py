"""Figures of many words' maps: how well they point, how alike they are, with intervals.

Knows nothing of models and photos: maps in, figures, table and plot out.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from captioner.config import MAPS, VERDICTS
from captioner.training.word_kinds import KINDS, WordKind

_RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)
Pattern: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class WordMaps:
    """The maps of one word of one caption.

    Attributes:
        photo: number of the photo, or of the mosaic; intervals are over photos.
        caption: number of the caption.
        kind: of the word.
        maps: (P,) by name; those that the word has.
        target: (P,), how much of each cell, 0 to 1, belongs to what the word names; None if that
            is unknown.
    """

    photo: int
    caption: int
    kind: WordKind
    maps: dict[str, np.ndarray]
    target: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class MapScore:
    """One figure: the mean over words of a kind, in one test of one of the maps.

    Attributes:
        test: its name, see ``TESTS``.
        captions: who wrote them: "people" or "model".
        map: one of ``MAPS``, or one of ``VERDICTS``.
        kind: of the words, or "all".
        words: how many.
        photos: how many photos, or mosaics.
        value: the mean.
        interval: of 95 %, by bootstrap over photos.
        center: the same of a map with only the middle cell; None if the test has no such figure.
        chance: the same of a cell at random, or of an even map.
        shuffled: the same of the maps of other photos' words.
    """

    test: str
    captions: str
    map: str
    kind: str
    words: int
    photos: int
    value: float
    interval: tuple[float, float]
    center: float | None = None
    chance: float | None = None
    shuffled: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class WordValues:
    """The values of one map's words in one test, (N,) each; see ``MapScore`` for the last four."""

    photos: np.ndarray
    kinds: Sequence[WordKind]
    values: np.ndarray
    center: np.ndarray | None = None
    chance: np.ndarray | None = None
    shuffled: np.ndarray | None = None


# What each test measures, and its scale.
TESTS = {
    "pointing": "share of words whose hottest cell is in a box of what they name, %",
    "focus": "share of the map in the quarter of its photo of a mosaic of four, %",
    "hottest": "share of words whose hottest cell is in that quarter, %",
    "seen there": "share of words with this verdict whose evidence is hottest where a box of what "
    "they name is, %",
    "verdicts": "share of the words with each verdict, %",
    "likeness": "cosine between the maps of one caption, x 100",
    "cells": "effective number of cells (perplexity), 1 to 49",
    "deletion": "probability of the word while the hottest cells are blurred first, %; low is good",
    "insertion": "the same while they are restored first in a blurred photo, %; high is good",
}


def bootstrap(
    values: np.ndarray, photos: np.ndarray, *, seed: int, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values (N,), photos (N,) resampled as wholes.

    Words of one photo are alike, so resampling words would make the interval too narrow.
    """
    _, index = np.unique(photos, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    num_photos = len(counts)
    draws = np.random.default_rng(seed).multinomial(
        num_photos, np.full(num_photos, 1 / num_photos), size=resamples
    )
    low, high = np.percentile((draws @ sums) / (draws @ counts), _PERCENTILES)
    return float(low), float(high)


def summarize(
    test: str, captions: str, name: str, values: WordValues, *, seed: int
) -> Iterator[MapScore]:
    """Yield the score of all words, and that of each kind among them."""
    kinds = np.array(values.kinds)
    for kind in ("all", *KINDS):
        inside = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        if not inside.any():
            continue
        baselines = {
            baseline: None if (all_ := getattr(values, baseline)) is None else all_[inside].mean()
            for baseline in ("center", "chance", "shuffled")
        }
        yield MapScore(
            test,
            captions,
            name,
            kind,
            words=int(inside.sum()),
            photos=len(np.unique(values.photos[inside])),
            value=float(values.values[inside].mean()),
            interval=bootstrap(values.values[inside], values.photos[inside], seed=seed),
            **{key: None if value is None else float(value) for key, value in baselines.items()},
        )


# Each map as a pattern, (N, P) to (N, P).


def hottest(maps: np.ndarray) -> np.ndarray:
    """Return 1 in the hottest cell, the first of equals, and 0 elsewhere."""
    return np.eye(maps.shape[1])[maps.argmax(axis=1)]


def shares(maps: np.ndarray) -> np.ndarray:
    """Return each cell's share of the positive part; even where no cell is positive."""
    positive = maps.clip(min=0)
    total = positive.sum(axis=1, keepdims=True)
    even = np.full_like(positive, 1 / maps.shape[1])
    return np.where(total > 0, positive / np.where(total > 0, total, 1), even)


def _directions(maps: np.ndarray) -> np.ndarray:
    return maps / np.maximum(np.linalg.norm(maps, axis=1, keepdims=True), 1e-12)


# Values of words


def point(words: Sequence[WordMaps], name: str, pattern: Pattern) -> WordValues:
    """Return how much of each pattern lies in the word's target, 0 to 100.

    Args:
        words: all with this map, and a target.
        name: of the map.
        pattern: ``hottest`` (pointing game, Zhang et al. 2016) or ``shares`` (Focus, Arias-Duart
            et al. 2022).
    """
    photos, patterns = _photos(words), pattern(_stack(words, name))
    targets = 100 * np.stack([word.target for word in words if word.target is not None])
    return WordValues(
        photos,
        [word.kind for word in words],
        (patterns * targets).sum(axis=1),
        center=targets[:, targets.shape[1] // 2],
        chance=targets.mean(axis=1),
        shuffled=_of_others(patterns, photos, targets),
    )


def likeness(words: Sequence[WordMaps], name: str) -> WordValues | None:
    """Return the mean cosine, x 100, between each word's map and its caption's other ones.

    Words without another in their caption are left out; None if all are. ``shuffled`` has the
    cosine with the maps of other photos.
    """
    captions = np.array([word.caption for word in words])
    directions, photos = _directions(_stack(words, name)), _photos(words)
    _, index = np.unique(captions, return_inverse=True)
    sums = np.zeros((index.max() + 1, directions.shape[1]))
    np.add.at(sums, index, directions)
    others = np.bincount(index)[index] - 1
    kept = others > 0
    if not kept.any():
        return None
    mean = (sums[index] - directions)[kept] / others[kept, None]
    shuffled = _of_others(directions, photos, directions)
    return WordValues(
        photos[kept],
        [word.kind for word, has_others in zip(words, kept, strict=True) if has_others],
        100 * (directions[kept] * mean).sum(axis=1),
        shuffled=None if shuffled is None else 100 * shuffled[kept],
    )


def effective_cells(words: Sequence[WordMaps], name: str) -> WordValues:
    """Return exp(entropy) of the positive part of each word's map, 1 to P."""
    parts = shares(_stack(words, name))
    entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum(axis=1)
    return WordValues(_photos(words), [word.kind for word in words], np.exp(entropy))


def _stack(words: Sequence[WordMaps], name: str) -> np.ndarray:
    return np.stack([word.maps[name] for word in words]).astype(np.float64)


def _photos(words: Sequence[WordMaps]) -> np.ndarray:
    return np.array([word.photo for word in words])


def _of_others(patterns: np.ndarray, photos: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """Return the mean of pattern * target, (N,), over the patterns of all other photos.

    The expectation of shuffling, without its noise; None if there is one photo only.
    """
    _, index = np.unique(photos, return_inverse=True)
    if not index.any():
        return None
    sums = np.zeros((index.max() + 1, patterns.shape[1]))
    np.add.at(sums, index, patterns)
    counts = len(patterns) - np.bincount(index)
    means = (patterns.sum(axis=0) - sums) / counts[:, None]
    return (means[index] * targets).sum(axis=1)


# Output


def table(scores: Sequence[MapScore]) -> str:
    """Return the scores as text, a part per test; intervals are of 95 %."""
    lines = []
    for test, captions in dict.fromkeys((score.test, score.captions) for score in scores):
        lines += [
            "",
            f"{test}, {captions}'s captions: {TESTS[test]}",
            f"{'map':18}{'words':10}{'n':>6}{'photos':>8}{'mean':>8}{'95 %':>14}"
            f"{'center':>8}{'chance':>8}{'shuffled':>10}",
        ]
        lines += [
            f"{score.map:18}{score.kind:10}{score.words:6}{score.photos:8}{score.value:8.1f}"
            f"{'{:.1f} - {:.1f}'.format(*score.interval):>14}"
            f"{_figure(score.center):>8}{_figure(score.chance):>8}{_figure(score.shuffled):>10}"
            for score in scores
            if (score.test, score.captions) == (test, captions)
        ]
    return "\n".join(lines[1:])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def plot(scores: Sequence[MapScore]) -> bytes:
    """Return a PNG with a panel per test: each map's means by kind of word, with intervals."""
    panels = list(dict.fromkeys((score.test, score.captions) for score in scores))
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    all_axes: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        rows = [score for score in scores if (score.test, score.captions) == panel]
        kinds = [kind for kind in ("all", *KINDS) if any(row.kind == kind for row in rows)]
        names = MAPS if rows[0].map in MAPS else VERDICTS
        for offset, name in enumerate(names):
            own = [row for row in rows if row.map == name]
            if not own:
                continue
            places = np.array([kinds.index(row.kind) for row in own]) + 0.15 * (offset - 1.5)
            means = np.array([row.value for row in own])
            errors = np.abs(np.array([row.interval for row in own]).T - means)
            axes.errorbar(places, means, errors, fmt="o", capsize=2, color=f"C{offset}", label=name)
            for baseline, mark in (("center", "+"), ("chance", "_"), ("shuffled", "x")):
                values = [getattr(row, baseline) for row in own]
                if None not in values:
                    label = baseline if own[0] is rows[0] else None  # once in the legend
                    axes.plot(places, values, mark, color="gray", label=label)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_title(f"{panel[0]} ({panel[1]}): {TESTS[panel[0]]}", fontsize=8, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()
