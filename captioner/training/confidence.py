"""When a caption is right, and how well a confidence predicts it.

Knows nothing of models: captions, features and probabilities in, weights and figures out.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from captioner.config import ModelConfig
from captioner.model.confidence import confidence_of, visual_ids
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.training.words import FUNCTION_WORDS

# With fewer validation photos the weights would be chance.
MIN_PHOTOS = 50
_BINS = 10
_FOLDS = 5
# Keeps the weights finite where right and wrong captions can be told apart without an error.
_L2 = 1.0
# fmt: off
_IRREGULAR = {
    "child": "children", "person": "people", "foot": "feet", "tooth": "teeth", "goose": "geese",
    "mouse": "mice",
}
# fmt: on


def visual_words(config: ModelConfig, vocabulary: Vocabulary) -> set[str]:
    """Return the words that a photo can show: those with a detector or in a class's name.

    A model without either has all words but function words.
    """
    ids = visual_ids(config)
    if ids:
        return {vocabulary.idx2word[index] for index in ids}
    return {*vocabulary.idx2word} - {*SPECIALS} - FUNCTION_WORDS


def is_right(caption: str, references: Sequence[str], visual: Collection[str]) -> bool:
    """Return whether at least two thirds of the caption's visual words occur in a reference.

    A word may occur in any of the references; singular and plural count as the same. A caption
    without visual words names nothing and is wrong.

    Args:
        caption: cleaned.
        references: cleaned, people's captions of the same photo.
        visual: the words that count.
    """
    words = {word for word in caption.split() if word in visual}
    used = with_plurals(word for text in references for word in text.split())
    hits = sum(not used.isdisjoint(with_plurals([word])) for word in words)
    return bool(words) and 3 * hits >= 2 * len(words)


def are_right(
    captions: Sequence[str], references: Sequence[Sequence[str]], visual: Collection[str]
) -> Tensor:
    """Return (N,) bool: whether each caption is right, given the references of its photo."""
    return torch.tensor(
        [is_right(*pair, visual) for pair in zip(captions, references, strict=True)]
    )


def with_plurals(words: Iterable[str]) -> set[str]:
    """Return words with what their plurals may be."""
    words = set(words)
    return words.union(*map(_plurals, words))


def _plurals(word: str) -> Iterator[str]:
    """Yield what the plural of ``word`` may be."""
    yield from (f"{word}s", f"{word}es")
    if word.endswith("y"):
        yield f"{word[:-1]}ies"
    elif word.endswith("man"):
        yield f"{word[:-3]}men"
    elif word.endswith(("f", "fe")):
        yield f"{word.removesuffix('e')[:-1]}ves"
    elif word in _IRREGULAR:
        yield _IRREGULAR[word]


def fit_weights(features: Tensor, right: Tensor) -> list[float]:
    """Return the weights of a logistic regression for ``confidence_of``, by Newton's method.

    Args:
        features: (N, F).
        right: (N,), whether each caption is right.
    """
    right = right.double()
    # Standardized, so that the penalty is the same for each.
    means, scales = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    inputs = torch.cat([torch.ones_like(features[:, :1]), (features - means) / scales], dim=1)
    weights = torch.zeros_like(inputs[0])
    penalty = torch.full_like(weights, _L2)
    for _ in range(20):
        probabilities = torch.sigmoid(inputs @ weights)
        gradient = inputs.T @ (probabilities - right) + penalty * weights
        curvature = (inputs.T * (probabilities * (1 - probabilities))) @ inputs
        weights -= torch.linalg.solve(curvature + penalty.diag(), gradient)
    slopes = weights[1:] / scales
    values = [float(weights[0] - slopes @ means), *slopes.tolist()]
    # All digits would differ with the number of threads.
    return [float(f"{value:.6g}") for value in values]


def cross_fitted(features: Tensor, right: Tensor) -> Tensor:
    """Return a confidence (N,) for each caption, by weights fitted on the other four fifths."""
    folds = torch.arange(len(right)) % _FOLDS
    results = torch.zeros(len(right), dtype=torch.float64)
    for fold in range(_FOLDS):
        inside = folds == fold
        weights = fit_weights(features[~inside], right[~inside])
        results[inside] = confidence_of(features[inside], weights)
    return results


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How well confidences predict which captions are right.

    Attributes:
        base_rate: share of right captions.
        calibration_error: the mean distance between confidence and share of right captions over
            ten bins of equal width, weighted by their photos (expected calibration error).
        brier: mean squared error of the confidences (Brier score).
        base_brier: the same of the base rate as everyone's confidence.
        bins: per bin its lower end "from", "mean_confidence", "share_right" (None if empty) and
            "photos".
    """

    base_rate: float
    calibration_error: float
    brier: float
    base_brier: float
    bins: list[dict[str, Any]]

    @classmethod
    def of(cls, confidences: Tensor, right: Tensor) -> Reliability:
        """Compare confidences (N,) with whether each caption is right (N,)."""
        right = right.double()
        indices = (confidences * _BINS).long().clamp(max=_BINS - 1)
        bins, distance = [], 0.0
        for index in range(_BINS):
            inside = indices == index
            photos = int(inside.sum())
            mean, share = (
                (float(confidences[inside].mean()), float(right[inside].mean()))
                if photos
                else (None, None)
            )
            bins.append(
                {
                    "from": index / _BINS,
                    "mean_confidence": mean,
                    "share_right": share,
                    "photos": photos,
                }
            )
            distance += float((confidences[inside] - right[inside]).sum().abs())
        base_rate = float(right.mean())
        return cls(
            base_rate,
            distance / len(right),
            float(((confidences - right) ** 2).mean()),
            base_rate * (1 - base_rate),
            bins,
        )

    def __str__(self) -> str:
        return (
            f"confidence: {100 * self.base_rate:.0f}% of the captions are right; expected "
            f"calibration error {self.calibration_error:.3f}, Brier score {self.brier:.3f} "
            f"({self.base_brier:.3f} by that share alone)"
        )

    def plot(self) -> bytes:
        """Return a PNG: the share of right captions over the confidence, and the photos per bin."""
        figure = Figure(figsize=(4, 5), layout="constrained")
        shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        filled = [each for each in self.bins if each["photos"]]
        shares.plot([0, 1], [0, 1], "--", color="gray", label="perfectly calibrated")
        shares.plot(
            [each["mean_confidence"] for each in filled],
            [each["share_right"] for each in filled],
            marker="o",
            label="the captions",
        )
        shares.set(ylabel="Share of right captions", xlim=(0, 1), ylim=(0, 1))
        shares.legend(frameon=False)
        counts.bar(
            [each["from"] for each in self.bins],
            [each["photos"] for each in self.bins],
            width=1 / _BINS,
            align="edge",
            edgecolor="white",
        )
        counts.set(xlabel="Confidence", ylabel="Photos")
        for axes in (shares, counts):
            axes.grid(alpha=0.3)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        return image.getvalue()
