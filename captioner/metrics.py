"""Scores of captions against references: BLEU, CIDEr-D, ROUGE-L, and how much they repeat.

Everything is in the usual scale of papers: BLEU, CIDEr and ROUGE x 100. Texts are cleaned as in
``vocab.clean`` and split at spaces; nothing is cut. The numbers equal coco-caption's on the same
tokens.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from sacrebleu.metrics.bleu import BLEU

from captioner.errors import DataError
from captioner.vocab import clean

# TF-IDF weights and norms of n = 1..4, and the length.
_Vector: TypeAlias = tuple[list[dict[tuple[str, ...], float]], list[float], int]

_ORDERS = 4
_SIGMA = 6.0  # of CIDEr-D's length penalty
_BETA = 1.2  # of ROUGE-L's F-measure: recall counts 1.44 times as much as precision


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 x 100 by sacrebleu, unsmoothed, closest reference length."""
    most = max(len(texts) for texts in references)
    # sacrebleu wants the first references of all, then the second ones; it skips None.
    columns = [
        [texts[number] if number < len(texts) else None for texts in references]
        for number in range(most)
    ]
    return [
        BLEU(max_ngram_order=order, tokenize="none", smooth_method="none", force=True)
        .corpus_score(list(candidates), columns)  # type: ignore[arg-type]
        .score
        for order in range(1, _ORDERS + 1)
    ]


def _ngrams(text: str) -> list[Counter[tuple[str, ...]]]:
    """Return the counts of n-grams for n = 1..4."""
    words = text.split()
    return [
        Counter(zip(*(words[start:] for start in range(order)), strict=False))
        for order in range(1, _ORDERS + 1)
    ]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with document frequencies from a set of references.

    Clipped counts, a Gaussian penalty on the difference in length (sigma 6), n = 1..4, x 10; as
    coco-caption's "CIDEr".
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """Count in how many photos each n-gram occurs; ``references[i]`` are photo i's texts."""
        self._frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            grams = [order for text in texts for order in _ngrams(text)]
            self._frequency.update({gram for order in grams for gram in order})
        self._log_photos = math.log(max(len(references), 1))
        self._references = references
        # Made when they are asked for: those of a large training set would fill the memory.
        self._vectors = functools.lru_cache(maxsize=256)(self._reference_vectors)

    def _vector(self, grams: list[Counter[tuple[str, ...]]]) -> _Vector:
        """Return TF-IDF weights and norms an order, and the length coco-caption goes by."""
        weights = [
            {
                gram: count * (self._log_photos - math.log(max(1, self._frequency[gram])))
                for gram, count in order.items()
            }
            for order in grams
        ]
        norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
        # coco-caption takes the number of bigrams for the length.
        return weights, norms, sum(grams[1].values())

    def _reference_vectors(self, photo: int) -> list[_Vector]:
        return [self._vector(_ngrams(text)) for text in self._references[photo]]

    def scores(self, candidates: Sequence[str]) -> list[float]:
        """Return CIDEr-D (0 to 10) of candidate i against the references of photo i."""
        if len(candidates) != len(self._references):
            raise DataError(
                f"{len(candidates)} captions against references of {len(self._references)} photos"
            )
        return [self.score(row, candidate) for row, candidate in enumerate(candidates)]

    def score(self, photo: int, candidate: str) -> float:
        """Return CIDEr-D (0 to 10) of one caption of photo number ``photo``."""
        weights, norms, length = self._vector(_ngrams(candidate))
        total = 0.0
        for other_weights, other_norms, other_length in self._vectors(photo):
            similarity = 0.0
            for order in range(_ORDERS):
                if norms[order] and other_norms[order]:
                    other = other_weights[order]
                    dot = sum(
                        min(weight, other[gram]) * other[gram]
                        for gram, weight in weights[order].items()
                        if gram in other
                    )
                    similarity += dot / (norms[order] * other_norms[order])
            total += similarity * math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        return 10.0 * total / _ORDERS / len(self._references[photo])


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            kept = row[place]
            row[place] = diagonal + 1 if word == other else max(row[place], row[place - 1])
            diagonal = kept
    return row[-1]


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004), 0 to 1: F-measure of the best precision and the best recall."""
    words = candidate.split()
    others = [reference.split() for reference in references]
    common = [_common_subsequence(words, other) for other in others]
    precision = max((hits / len(words) for hits in common), default=0.0) if words else 0.0
    recall = max(
        (hits / len(other) for hits, other in zip(common, others, strict=True) if other),
        default=0.0,
    )
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def repetition(texts: Sequence[str]) -> float:
    """Share of captions, 0 to 1, with a word twice running or three words that come twice."""
    stuttering = 0
    for text in texts:
        words = text.split()
        twice = any(first == second for first, second in pairwise(words))
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        stuttering += twice or len(set(trigrams)) < len(trigrams)
    return stuttering / max(len(texts), 1)


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score one caption a photo against all its references.

    Returns:
        BLEU-1..4, CIDEr (that is CIDEr-D) and ROUGE-L, x 100; repetition, 0 to 1; distinct words;
        distinct captions, 0 to 1; mean length in words.

    Raises:
        DataError: fewer than two photos (CIDEr weighs words by their rarity among photos), or a
            photo without a reference.
    """
    if len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions, but references of {len(references)} photos")
    if len(candidates) < 2:
        raise DataError("CIDEr weighs words by their rarity among photos: score at least two")
    texts = [clean(candidate) for candidate in candidates]
    wanted = [[clean(reference) for reference in some] for some in references]
    if not all(wanted):
        raise DataError(f"photo number {wanted.index([])} has no reference caption")
    scores = {f"BLEU-{order}": value for order, value in enumerate(bleu(texts, wanted), start=1)}
    cider = CiderD(wanted).scores(texts)
    scores["CIDEr"] = 100 * sum(cider) / len(cider)
    rouge = [rouge_l(text, some) for text, some in zip(texts, wanted, strict=True)]
    scores["ROUGE-L"] = 100 * sum(rouge) / len(rouge)
    scores["repetition"] = repetition(texts)
    scores["distinct_words"] = len({word for text in texts for word in text.split()})
    scores["distinct_captions"] = len(set(texts)) / len(texts)
    scores["mean_length"] = sum(len(text.split()) for text in texts) / len(texts)
    return scores
