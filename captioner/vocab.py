"""Text to ids and back. Knows nothing of photos or models."""

from __future__ import annotations

import json
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioner.config import BOS, EOS, PAD, UNK
from captioner.errors import DataError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_NOT_WORD = re.compile(r"[^\w\s]|_")


def clean(text: str) -> str:
    """Lower the case, remove punctuation, keep digits, squeeze white space.

    "A dog's ball, no. 3!" becomes "a dogs ball no 3".
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unicodedata.normalize("NFKC", _NOT_WORD.sub("", text)).split())


class Vocabulary:
    """The words that a model knows, with their ids.

    ``idx2word`` lists the words by id, the specials ``<pad> <bos> <eos> <unk>`` first;
    ``word2idx`` is its inverse.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Number ``words``, which must start with the four specials.

        Raises:
            DataError: the specials are not there, a word comes twice, or one is none: empty, or
                with white space or what cannot be printed in it.
        """
        if tuple(words[: len(SPECIALS)]) != SPECIALS:
            raise DataError(
                f"a vocabulary starts with {' '.join(SPECIALS)}; got {reprlib.repr(words[:4])}"
            )
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}
        if len(self.word2idx) != len(self.idx2word):
            twice = next(word for word, count in Counter(words).items() if count > 1)
            raise DataError(f"the vocabulary holds {reprlib.repr(twice)} twice; build it again")
        for word in self.idx2word:
            if not word or " " in word or not word.isprintable():
                raise DataError(f"the vocabulary holds {reprlib.repr(word)}, which is no word")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> Vocabulary:
        """Take every word seen at least ``min_count`` times, in alphabetical order."""
        counts = Counter(word for caption in captions for word in clean(caption).split())
        words = sorted(word for word, count in counts.items() if count >= min_count)
        if not words:
            raise DataError(
                f"no word of the captions is seen {min_count} times: use more captions or a lower "
                "--min-count"
            )
        return cls([*SPECIALS, *words])

    def __len__(self) -> int:
        return len(self.idx2word)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.idx2word == other.idx2word

    __hash__ = None  # type: ignore[assignment]

    def ids(self, words: Iterable[str]) -> list[int]:
        """Return the ids of those ``words`` that it knows."""
        return [self.word2idx[word] for word in words if word in self.word2idx]

    def encode(self, text: str) -> list[int]:
        """Return the ids of the cleaned words alone, without specials, padding or cut."""
        return [self.word2idx.get(word, UNK) for word in clean(text).split()]

    def tokenize(self, text: str, max_length: int = 20) -> list[int]:
        """Return ``max_length`` ids: ``<bos>``, the words, ``<eos>``, padding.

        A longer text is cut so that ``<eos>`` still comes last.
        """
        ids = [BOS, *self.encode(text)[: max_length - 2], EOS]
        return ids + [PAD] * (max_length - len(ids))

    def untokenize(self, ids: Iterable[int]) -> str:
        """Return the words up to the first ``<eos>``, without ``<pad>`` and ``<bos>``."""
        words = []
        for index in ids:
            if index == EOS:
                break
            if index not in (PAD, BOS):
                words.append(self.idx2word[index])
        return " ".join(words)

    def save(self, path: Path) -> None:
        """Write the words as a JSON list, in the order of their ids."""
        path.write_text(json.dumps(self.idx2word, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what ``save`` wrote; anything else raises ``DataError``."""
        try:
            words = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read a vocabulary from {path}: {error}") from error
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{path} does not hold a vocabulary: it must be a JSON list of words")
        return cls(words)
