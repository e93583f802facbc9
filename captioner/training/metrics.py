"""Scores of captions against references: BLEU, CIDEr-D, ROUGE-L, and how much they repeat.

Everything is in the usual scale of papers: BLEU, CIDEr and ROUGE x 100. Texts are cleaned by
``vocab.clean``, which makes each Chinese or Japanese character a word, and split at spaces;
nothing is cut. The numbers equal coco-caption's on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from captioner.errors import DataError
from captioner.model.vocabulary import clean

_ORDERS = 4
_SIGMA = 6.0  # of CIDEr-D's length penalty
# Odd and random, for hashes: two of ten million n-grams share one once in 400,000 data sets.
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9], np.uint64)
_NONE = np.uint64(2**64 - 1)
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


def _grams(tokens: np.ndarray) -> np.ndarray:
    """Return the n-grams for n = 1..4 of texts, (N, G), as 64-bit hashes that end in n - 1.

    Args:
        tokens: ids (N, L), -1 behind the end. What is no n-gram is ``_NONE``.
    """
    there, words = tokens >= 0, tokens.astype(np.uint64) + np.uint64(1)
    found = []
    for order in range(_ORDERS):
        if order == 0:
            grams, whole = words * _MULTIPLIERS[0], there
        else:  # those of one less, each with the word behind it
            grams = grams[:, :-1] * _MULTIPLIERS[0] + words[:, order:] * _MULTIPLIERS[1]
            whole = whole[:, :-1] & there[:, order:]
        mixed = (grams ^ (grams >> np.uint64(29))) * _MULTIPLIERS[2]
        mixed = mixed & ~np.uint64(3) | np.uint64(order)
        found.append(np.where(whole, mixed, _NONE))
    return np.concatenate(found, axis=1)


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with document frequencies from a set of references.

    Clipped counts, a Gaussian penalty on the difference in length (sigma 6), n = 1..4, x 10; as
    coco-caption's "CIDEr". All texts are arrays of ids, so that those of a large training set fit
    into memory, and many captions are scored at once.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """Count in how many photos each n-gram occurs; ``references[i]`` are photo i's texts."""
        self._ids: dict[str, int] = {}
        for texts in references:
            for text in texts:
                for word in text.split():
                    self._ids.setdefault(word, len(self._ids))
        counts = np.array([len(texts) for texts in references], np.int64)
        self._first = np.concatenate([[0], counts.cumsum()])  # each photo's first reference
        texts = [text for some in references for text in some]
        # An empty one behind the last.
        self._lengths = np.array([*(len(text.split()) for text in texts), 0])
        self._starts = self._lengths.cumsum() - self._lengths
        # All words of all references; -1 so that there is one.
        words = (self._ids[word] for text in texts for word in text.split())
        self._words = np.append(np.fromiter(words, np.int32), np.int32(-1))
        self._log_photos = math.log(max(len(references), 1))
        seen = [np.empty(0, np.uint64)]
        for photos in np.array_split(np.arange(len(references)), len(references) // 1000 + 1):
            # Each n-gram once a photo, however many of its texts have it.
            if not len(photos):
                continue
            rows = np.arange(self._first[photos[0]], self._first[photos[-1] + 1])
            grams = _grams(self._references(rows))
            owners = np.repeat(photos.astype(np.uint64), counts[photos])
            pairs = np.stack([np.broadcast_to(owners[:, None], grams.shape), grams], axis=-1)
            pairs = pairs[grams != _NONE]
            order = np.lexsort(pairs.T)
            pairs = pairs[order]
            new = np.ones(len(pairs), bool)
            new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
            seen.append(pairs[new, 1])
        self._known, frequency = np.unique(np.concatenate(seen), return_counts=True)
        self._rarity = self._log_photos - np.log(frequency)

    def _references(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of references, (N, L), -1 behind the end."""
        lengths = self._lengths[rows]
        places = np.arange(max(1, int(lengths.max(initial=0))))
        there = places < lengths[:, None]
        index = np.where(there, self._starts[rows][:, None] + places, -1)
        return np.where(there, self._words[index], -1)

    def id_of(self, word: str) -> int:
        """Return a word's id; one that no reference has gets the next one."""
        return self._ids.get(word, len(self._ids))

    def _weigh(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return n-grams and TF-IDF weights (N, G), norms an order (N, 4) and lengths (N,)."""
        grams = np.sort(_grams(tokens), axis=1)
        new = np.ones(grams.shape, bool)
        new[:, 1:] = grams[:, 1:] != grams[:, :-1]
        starts = np.flatnonzero(new)
        counts = np.diff(np.append(starts, grams.size))
        found = grams.flat[starts]
        starts, counts, found = (each[found != _NONE] for each in (starts, counts, found))
        # Unknown ones come behind the last, and are as rare as can be.
        places = np.searchsorted(self._known, found)
        is_known = np.append(self._known, _NONE)[places] == found
        rarity = np.where(is_known, np.append(self._rarity, 0)[places], self._log_photos)
        weights = np.zeros(grams.shape)
        weights.flat[starts] = counts * rarity
        grams[~new] = _NONE
        orders = grams & np.uint64(3)
        norms = [((orders == order) * weights**2).sum(axis=1) for order in range(_ORDERS)]
        # coco-caption takes the number of bigrams for the length.
        lengths = ((tokens >= 0).sum(axis=1) - 1).clip(min=0)
        return grams, weights, np.sqrt(np.stack(norms, axis=1)), lengths

    def score_tokens(self, photos: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """Return CIDEr-D (0 to 10) of captions.

        Args:
            photos: the number of each of B photos.
            tokens: K captions of each, (B, K, L): ids by ``id_of``, -1 behind the end.

        Returns:
            float64 (B, K).
        """
        B, K, L = tokens.shape
        if not tokens.size:
            return np.zeros((B, K))
        grams, weights, norms, lengths = self._weigh(tokens.reshape(B * K, L))
        numbers = np.asarray(photos)
        counts = self._first[numbers + 1] - self._first[numbers]
        R = int(counts.max(initial=1))
        # A photo with fewer references than others is filled up with empty ones.
        rows = self._first[numbers][:, None] + np.arange(R)
        filled = np.arange(R) < counts[:, None]
        rows = np.where(filled, rows, len(self._lengths) - 1).flatten()
        wanted = self._references(rows)
        other_grams, other_weights, other_norms, other_lengths = self._weigh(wanted)
        other_grams = np.where(other_grams == _NONE, _NONE - np.uint64(1), other_grams)

        grams, other_grams = grams.reshape(B, K, -1), other_grams.reshape(B, R, -1)
        same = grams[:, :, :, None, None] == other_grams[:, None, None]  # (B, K, G, R, G)
        # Flat: numpy finds the places of a vector five times as fast.
        hits = np.unravel_index(np.flatnonzero(same), same.shape)
        photo, caption, gram, reference, other = hits
        weight = weights.reshape(B, K, -1)[photo, caption, gram]
        other_weight = other_weights.reshape(B, R, -1)[photo, reference, other]
        order = (grams[photo, caption, gram] & np.uint64(3)).astype(np.int64)
        shape = (B, K, R, _ORDERS)
        dots = np.bincount(
            np.ravel_multi_index((photo, caption, reference, order), shape),
            np.minimum(weight, other_weight) * other_weight,
            minlength=math.prod(shape),
        ).reshape(shape)
        scale = norms.reshape(B, K, 1, _ORDERS) * other_norms.reshape(B, 1, R, _ORDERS)
        similarity = np.divide(dots, scale, out=np.zeros(shape), where=scale > 0).sum(axis=-1)
        apart = lengths.reshape(B, K, 1) - other_lengths.reshape(B, 1, R)
        similarity *= np.exp(-(apart**2) / (2 * _SIGMA**2))
        result: np.ndarray = 10.0 / _ORDERS * similarity.sum(axis=-1) / counts.clip(min=1)[:, None]
        return result

    def _tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return ids (N, L); words that no reference has get ids of their own."""
        ids = dict(self._ids)
        rows = [[ids.setdefault(word, len(ids)) for word in text.split()] for text in texts]
        tokens = np.full((len(rows), max([1, *map(len, rows)])), -1, np.int32)
        for row, words in enumerate(rows):
            tokens[row, : len(words)] = words
        return tokens

    def scores(self, candidates: Sequence[str]) -> list[float]:
        """Return CIDEr-D (0 to 10) of candidate i against the references of photo i."""
        if len(candidates) != len(self._first) - 1:
            raise DataError(
                f"{len(candidates)} captions against references of {len(self._first) - 1} photos"
            )
        tokens = self._tokenize(candidates)[:, None]
        found = [
            self.score_tokens(range(at, min(at + 100, len(tokens))), tokens[at : at + 100])
            for at in range(0, len(tokens), 100)
        ]
        return np.concatenate(found)[:, 0].tolist() if found else []

    def score(self, photo: int, candidate: str) -> float:
        """Return CIDEr-D (0 to 10) of one caption of photo number ``photo``."""
        return float(self.score_tokens([photo], self._tokenize([candidate])[None])[0, 0])


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
    """Share of captions, 0 to 1, with a word twice in a row or three words that come twice."""
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
