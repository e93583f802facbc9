"""The result: a caption, its words, and where the model looked, in plain numbers.

Knows nothing of models. ``from_dict`` accepts untrusted JSON: sizes are bounded, NaN is refused.
"""

from __future__ import annotations

import dataclasses
import decimal
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from captioner.config import DEFAULT_LANGUAGE, INNER_SPACE, MAPS, VERDICTS, is_language
from captioner.errors import DataError, first_line

_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "center", "right")
# Limits of JSON, above any caption that the model can write or score.
_MAX_BEAMS, _MAX_WORDS, _MAX_ALTERNATIVES, _MAX_CHARACTERS = 100, 200, 100, 2000
# Ranges of the maps: shares and probabilities, or nats.
_SHARE, _NATS = (0.0, 1.0), (-1e3, 1e3)
_RANGES = {"attended": _SHARE, "evidence": _NATS, "mattered": _NATS, "shown": _SHARE}


def percent(share: float) -> str:
    """Return a share of 0 to 1 as "43%", or "4.3%" below 10%, rounded half up.

    ``percent`` in viewer.js does the same, so page and exports show the same figures.
    """
    step = "1" if share >= 0.0995 else "0.1"
    value = abs(decimal.Decimal(share * 100))  # no "-0.0%"
    return f"{value.quantize(decimal.Decimal(step), decimal.ROUND_HALF_UP)}%"


def _text(value: Any) -> str:
    """Validate a bounded string that can be encoded as UTF-8."""
    if not isinstance(value, str) or len(value) > _MAX_CHARACTERS:
        raise ValueError(f"expected a string of at most {_MAX_CHARACTERS} characters")
    value.encode()  # raises for lone surrogates
    return value


def _number(value: Any, low: float, high: float) -> float:
    """Validate a number in a closed range; NaN is in none."""
    number = float(value)
    if not low <= number <= high:
        raise ValueError(f"expected a number from {low:g} to {high:g}, not {number:g}")
    return number


def _bounded_list(values: Any, max_length: int) -> list[Any]:
    """Validate a list and its length."""
    if not isinstance(values, list) or len(values) > max_length:
        raise ValueError(f"expected a list of at most {max_length} items")
    return values


def _pairs(values: Any) -> tuple[tuple[str, float], ...]:
    """Validate words with their probabilities."""
    return tuple(
        (_text(each["text"]), _number(each["probability"], *_SHARE))
        for each in _bounded_list(values, _MAX_ALTERNATIVES)
    )


def _from_pairs(pairs: tuple[tuple[str, float], ...]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [{"text": text, "probability": probability} for text, probability in pairs]


def _map(name: str, value: Any) -> np.ndarray:
    """Validate a map of 7 x 7 cells."""
    low, high = _RANGES[name]
    cells = np.asarray(value, dtype=np.float64)
    if cells.shape != (7, 7) or not ((cells >= low) & (cells <= high)).all():
        raise ValueError(f"expected {name} as a grid of 7 x 7 numbers from {low:g} to {high:g}")
    return cells.astype(np.float32)


def _strongest(cells: np.ndarray) -> tuple[int, int]:
    """Return row and column of a map's hottest cell."""
    row, column = np.unravel_index(int(cells.argmax()), cells.shape)
    return int(row), int(column)


def region_of(cells: np.ndarray) -> str:
    """Return the region of a map's hottest cell, such as "top left" or "center"."""
    rows, columns = cells.shape
    row, column = _strongest(cells)
    # The middle third is the three cells 2, 3, 4 of seven.
    vertical = _ROWS[int(row > rows * 2 / 7 - 0.5) + int(row > rows * 5 / 7 - 0.5)]
    horizontal = _COLUMNS[int(column > columns * 2 / 7 - 0.5) + int(column > columns * 5 / 7 - 0.5)]
    if (vertical, horizontal) == ("middle", "center"):
        return "center"
    return f"{vertical} {horizontal}"


@dataclasses.dataclass(frozen=True, eq=False)
class Word:
    """One word of a caption.

    Attributes:
        text: the word; "<eos>" for the end.
        probability: the model's, 0 to 1, before any constraint of the decoding.
        alternatives: the most likely words at this step with their probabilities, best first.
        maps: float32 (7, 7) each; row 0 is the top of the photo. "attended" is the attention,
            which sums to 1. Words with a detector or a class's name have "evidence": what each
            cell added to the word's logit, in nats. Words with a detector have "shown": the
            probability that the cell shows the word. ``Captioner.explain`` adds "mattered": how
            far the word's log-probability falls, in nats, without the cell.
        known: whether it is in the model's vocabulary; if not, the probability is ``<unk>``'s.
        fall: how far the word's log-probability falls, in nats, without the photo; None before
            ``Captioner.explain``.
        verdict: where the word comes from, one of ``config.VERDICTS``; None before
            ``Captioner.explain``.
    """

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    maps: Mapping[str, np.ndarray]
    known: bool = True
    fall: float | None = None
    verdict: str | None = None

    @property
    def attention(self) -> np.ndarray:
        """Float32 (7, 7), sums to 1: the map "attended"."""
        return self.maps["attended"]

    @property
    def entropy(self) -> float:
        """Entropy of the attention in nats: 0 for one cell, log 49 = 3.89 for a uniform map."""
        weights = self.attention[self.attention > 0].astype(np.float64)
        return float(-(weights * np.log(weights)).sum())

    @property
    def cells(self) -> float:
        """Effective number of attended cells: exp(entropy), 1 to 49."""
        return math.exp(self.entropy)

    @property
    def strongest(self) -> tuple[int, int]:
        """Row and column of the cell with the most attention."""
        return _strongest(self.attention)

    @property
    def region(self) -> str:
        """The region of the strongest cell, such as "top left" or "center"."""
        return region_of(self.attention)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "text": self.text,
            "probability": self.probability,
            "known": self.known,
            "alternatives": _from_pairs(self.alternatives),
            "maps": {
                name: [[round(float(cell), 6) for cell in row] for row in cells]
                for name, cells in self.maps.items()
            },
            "fall": self.fall,
            "verdict": self.verdict,
            "entropy": self.entropy,
            "cells": self.cells,
            "region": self.region,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the output of ``to_dict``."""
        maps = {name: values["maps"][name] for name in MAPS if name in values["maps"]}
        if "attended" not in maps or len(maps) < len(values["maps"]):
            raise ValueError(f"expected maps of the names {', '.join(MAPS)}, attended among them")
        fall, verdict = values["fall"], values["verdict"]
        if verdict is not None and verdict not in VERDICTS:
            raise ValueError(f"expected a verdict among {', '.join(VERDICTS)}")
        return cls(
            _text(values["text"]),
            _number(values["probability"], *_SHARE),
            _pairs(values["alternatives"]),
            {name: _map(name, value) for name, value in maps.items()},
            bool(values["known"]),
            None if fall is None else _number(fall, *_NATS),
            verdict,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Beam:
    """One caption of the photo.

    Attributes:
        words: in order, without ``<bos>`` and ``<eos>``.
        end: ``<eos>``, with the model's probability that the caption ends here.
        log_probability: of the words and the end, in nats.
        score: beams are ranked by this, highest first: log_probability / length **
            length_penalty (``DecodingOptions``), where length is the number of words plus 1 for
            the end. Given words count like the others. Where every continuation was banned, each
            ban that was broken lowers the log-probability in the score by 10,000.
    """

    words: tuple[Word, ...]
    end: Word
    log_probability: float
    score: float

    @property
    def text(self) -> str:
        """The words with spaces between them, but none between Chinese or Japanese characters."""
        return INNER_SPACE.sub("", " ".join(word.text for word in self.words))

    @property
    def attention(self) -> np.ndarray:
        """Float32 (T, 7, 7), a map per word."""
        return (
            np.stack([word.attention for word in self.words])
            if self.words
            else np.zeros((0, 7, 7), np.float32)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "text": self.text,
            "log_probability": self.log_probability,
            "score": self.score,
            "words": [word.to_dict() for word in self.words],
            "end": self.end.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the output of ``to_dict``."""
        words = tuple(Word.from_dict(word) for word in _bounded_list(values["words"], _MAX_WORDS))
        _text(" ".join(word.text for word in words))
        return cls(
            words,
            Word.from_dict(values["end"]),
            _number(values["log_probability"], -1e300, 0),
            _number(values["score"], -1e300, 0),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Caption:
    """The result of ``Captioner.caption``: all beams, best first.

    Attributes:
        beams: highest score first, at least one.
        size: (width, height) of the upright photo in pixels.
        given: indices of the words that were given to the model, not chosen by it, in every beam;
            the number of words is the index of the end.
        language: BCP 47 tag of the words, such as "en" or "zh-Hant".
        sampled: whether the beams were sampled (``DecodingOptions.temperature`` above 0). Samples
            are independent, so two may be equal. They are sorted by score, like the beams of a
            search, and their probabilities and scores are those before the temperature.
        seen: the words that detectors see in each of the 49 cells, row by row, with their
            probabilities, best first; None before ``Captioner.explain`` and without detectors.
        confidence: the probability that the best caption is right: that people who described the
            photo used at least two thirds of the words that it names things with. None for
            sampled captions, for those with given words and for scored texts, and if the
            checkpoint has none. Calibrated for the default decoding.
    """

    beams: tuple[Beam, ...]
    size: tuple[int, int]
    given: tuple[int, ...] = ()
    language: str = DEFAULT_LANGUAGE
    sampled: bool = False
    confidence: float | None = None
    seen: tuple[tuple[tuple[str, float], ...], ...] | None = None

    @property
    def text(self) -> str:
        """The best caption."""
        return self.beams[0].text

    @property
    def words(self) -> tuple[Word, ...]:
        """The best caption's words."""
        return self.beams[0].words

    @property
    def log_probability(self) -> float:
        """The best caption's log-probability, in nats."""
        return self.beams[0].log_probability

    @property
    def attention(self) -> np.ndarray:
        """Float32 (T, 7, 7), a map per word of the best caption."""
        return self.beams[0].attention

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: text of the best beam, and all beams with every number."""
        return {
            "text": self.text,
            "language": self.language,
            "sampled": self.sampled,
            "confidence": self.confidence,
            "size": list(self.size),
            "given": list(self.given),
            "seen": None if self.seen is None else [_from_pairs(cell) for cell in self.seen],
            "beams": [beam.to_dict() for beam in self.beams],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the output of ``to_dict``, so that a caption can be drawn without its model.

        Raises:
            DataError: ``values`` are not the JSON of a caption.
        """
        try:
            width, height = (
                int(_number(side, 1, 1e9)) for side in _bounded_list(values["size"], 2)
            )
            # The index after the last word is the end.
            given = tuple(
                int(_number(index, 0, _MAX_WORDS))
                for index in _bounded_list(values["given"], _MAX_WORDS + 1)
            )
            beams = tuple(
                Beam.from_dict(beam) for beam in _bounded_list(values["beams"], _MAX_BEAMS)
            )
            if not beams:
                raise ValueError("expected at least one beam")
            language = values["language"]
            if not is_language(language):
                raise ValueError("expected a BCP 47 language tag")
            sampled = values["sampled"]
            if not isinstance(sampled, bool):
                raise ValueError("expected true or false for sampled")
            confidence, seen = values["confidence"], values["seen"]
            if confidence is not None:
                confidence = _number(confidence, *_SHARE)
            if seen is not None:
                seen = tuple(_pairs(cell) for cell in _bounded_list(seen, 49))
                if len(seen) != 49:
                    raise ValueError("expected 49 cells")
        except KeyError as error:
            raise DataError(f"this is not the JSON of a caption: it lacks {error}") from error
        except (OverflowError, TypeError, ValueError) as error:
            raise DataError(f"this is not the JSON of a caption: {first_line(error)}") from error
        return cls(beams, (width, height), given, language, sampled, confidence, seen)
