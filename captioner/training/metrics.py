"""Scores of captions against references: BLEU, CIDEr-D, ROUGE-L, repetition, invented people.

Everything is in the usual scale of papers: BLEU, CIDEr and ROUGE x 100. The numbers equal
coco-caption's on the same words. Texts are cleaned (see ``vocabulary.clean``) and not truncated;
``score_captions`` alone takes any text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from sacrebleu.metrics.bleu import BLEU

from captioner.errors import DataError
from captioner.model.vocabulary import clean, is_character

Ngram: TypeAlias = tuple[str, ...]

_MAX_ORDER = 4
_SIGMA = 6.0  # of CIDEr-D's length penalty
_BETA = 1.2  # of ROUGE-L's F-measure: recall counts 1.44 times as much as precision
# fmt: off
_PEOPLE = frozenset((
    "man", "men", "woman", "women", "boy", "boys", "girl", "girls", "child", "children", "kid",
    "kids", "person", "persons", "people", "baby", "babies", "toddler", "lady", "ladies", "guy",
    "guys", "player", "players", "crowd", "someone",
))
# fmt: on


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 x 100 by sacrebleu, unsmoothed, closest reference length."""
    # sacrebleu takes the first reference of each photo, then the second ones; it skips None.
    columns = [
        [texts[column] if column < len(texts) else None for texts in references]
        for column in range(max(map(len, references)))
    ]
    return [
        BLEU(max_ngram_order=order, tokenize="none", smooth_method="none", force=True)
        .corpus_score(list(candidates), columns)  # type: ignore[arg-type]
        .score
        for order in range(1, _MAX_ORDER + 1)
    ]


def _ngrams(text: str) -> Iterator[Ngram]:
    """Yield the n-grams of a text, n = 1..4."""
    words = text.split()
    for order in range(1, _MAX_ORDER + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with document frequencies from a set of references.

    Clipped counts, a Gaussian penalty on the difference in length (sigma 6), n = 1..4, x 10; as
    coco-caption's "CIDEr".
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """Count the photos in which each n-gram occurs; ``references[i]`` describe photo i."""
        self._references = references
        self._max_rarity = math.log(max(len(references), 1))
        num_photos = Counter(
            ngram
            for texts in references
            for ngram in {ngram for text in texts for ngram in _ngrams(text)}
        )
        # An n-gram of one photo is as rare as an unknown one; most are, so they are not kept.
        self._rarity = {
            ngram: self._max_rarity - math.log(count)
            for ngram, count in num_photos.items()
            if count > 1
        }

    def _weigh(self, text: str) -> tuple[dict[Ngram, float], list[float], int]:
        """Return a text's TF-IDF weights, their norm for each order, and its length."""
        counts = Counter(_ngrams(text))
        weights = {
            ngram: count * self._rarity.get(ngram, self._max_rarity)
            for ngram, count in counts.items()
        }
        squares = [0.0] * _MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        # coco-caption takes the number of bigrams for the length.
        return weights, list(map(math.sqrt, squares)), max(len(text.split()) - 1, 0)

    def score(self, photo_index: int, candidates: Sequence[str]) -> list[float]:
        """Return CIDEr-D (0 to 10) of captions of one photo."""
        references = [self._weigh(text) for text in self._references[photo_index]]
        scores = []
        for candidate in candidates:
            weights, norms, length = self._weigh(candidate)
            total = 0.0
            for other_weights, other_norms, other_length in references:
                products = [0.0] * _MAX_ORDER
                for ngram in weights.keys() & other_weights.keys():
                    other = other_weights[ngram]
                    products[len(ngram) - 1] += min(weights[ngram], other) * other
                similarity = sum(
                    product / (norm * other_norm)
                    for product, norm, other_norm in zip(products, norms, other_norms, strict=True)
                    if product
                )
                total += similarity * math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            scores.append(10 / _MAX_ORDER * total / max(len(references), 1))
        return scores

    def scores(self, candidates: Sequence[str]) -> list[float]:
        """Return CIDEr-D (0 to 10) of candidate i against the references of photo i."""
        if len(candidates) != len(self._references):
            raise DataError(
                f"{len(candidates)} captions against references of {len(self._references)} photos"
            )
        return [self.score(index, [text])[0] for index, text in enumerate(candidates)]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004), 0 to 1: F-measure of the best precision and the best recall."""
    words = candidate.split()
    others = [reference.split() for reference in references]
    lengths = [_common_subsequence(words, other) for other in others]
    precision = max((length / len(words) for length in lengths), default=0.0) if words else 0.0
    recall = max(
        (length / len(other) for length, other in zip(lengths, others, strict=True) if other),
        default=0.0,
    )
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def repetition(texts: Sequence[str]) -> float:
    """Return the share of captions, 0 to 1, that repeat a word in a row or a trigram.

    Chinese and Japanese characters may be doubled.
    """
    num_repetitive = 0
    for text in texts:
        words = text.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        # Chinese and Japanese double characters.
        repeats_word = any(
            first == second and not is_character(first) for first, second in pairwise(words)
        ) or any(len(set(trigram)) == 1 for trigram in trigrams)
        num_repetitive += repeats_word or len(set(trigrams)) < len(trigrams)
    return num_repetitive / max(len(texts), 1)


def invented_people(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[int, int]:
    """Count cleaned English captions that mention people where no reference does.

    Object hallucination (Rohrbach et al. 2018, CHAIR), of what captioners invent most.

    Returns:
        the number of such captions, and of photos whose references mention nobody.
    """
    without = [
        candidate
        for candidate, texts in zip(candidates, references, strict=True)
        if _PEOPLE.isdisjoint(word for text in texts for word in text.split())
    ]
    return sum(not _PEOPLE.isdisjoint(text.split()) for text in without), len(without)


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score one caption per photo against all its references; any text, which is cleaned first.

    Returns and raises as ``score_cleaned_captions``.
    """
    return score_cleaned_captions(
        [clean(candidate) for candidate in candidates],
        [[clean(reference) for reference in texts] for texts in references],
    )


def score_cleaned_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score one cleaned caption per photo against all its cleaned references.

    Returns:
        BLEU-1..4, CIDEr (CIDEr-D) and ROUGE-L, x 100; repetition, 0 to 1; distinct words; distinct
        captions, 0 to 1; mean length in words.

    Raises:
        DataError: there are fewer than two photos, or a photo has no reference.
    """
    if len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions, but references of {len(references)} photos")
    if len(candidates) < 2:
        raise DataError("CIDEr weighs words by their rarity among photos: score at least two")
    for number, texts in enumerate(references):
        if not texts:
            raise DataError(f"photo number {number} has no reference caption")
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu(candidates, references), start=1)}
    cider = CiderD(references).scores(candidates)
    scores["CIDEr"] = 100 * sum(cider) / len(cider)
    rouge = [rouge_l(text, texts) for text, texts in zip(candidates, references, strict=True)]
    scores["ROUGE-L"] = 100 * sum(rouge) / len(rouge)
    words = [word for text in candidates for word in text.split()]
    scores["repetition"] = repetition(candidates)
    scores["distinct_words"] = len(set(words))
    scores["distinct_captions"] = len(set(candidates)) / len(candidates)
    scores["mean_length"] = len(words) / len(candidates)
    return scores
