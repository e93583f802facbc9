"""Text to ids and back. Knows nothing of photos or models."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from captioner.config import BAD_ENDINGS, BOS, CHARACTER_WORDS, EOS, PAD, UNK, is_english
from captioner.errors import DataError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_NOT_WORD = re.compile(r"[^\w\s]|_")
# What French elides before a vowel, as in "l'herbe" and "d'un": a word of its own.
_ELISION = re.compile(r"(?<![\w'\u2019])((?:jus|lors|puis)?qu|[cdjlmnst])['\u2019]")
_CHARACTER_WORD = re.compile(rf"[{CHARACTER_WORDS}][^\w\s]*")  # the character and its marks
# Word separators that are not white space: zero-width space, Tibetan tsheg, Ethiopic word space.
_SEPARATORS = str.maketrans(dict.fromkeys("\u200b\u0f0b\u0f0c\u1361", " "))
# Thai, Lao, Burmese, Khmer, Tai, Balinese and Javanese have no spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"
    r"\ua980-\ua9ff\uaa60-\uaadf]+"
)
ONE_WORD = 1.5  # a mean of fewer words per caption means about one word each


def clean(text: str) -> str:
    """Lower the case, remove punctuation, keep digits, separate words by single spaces.

    Each Han, kana and Bopomofo character is a word, and so is what French elides: "l'homme" becomes
    "l' homme". Letters keep the vowel signs and tones of their script; accents without a
    precomposed letter in Unicode and vowel points (Arabic, Hebrew) go.

    "A dog's ball, no. 3!" becomes "a dogs ball no 3".
    """
    text = unicodedata.normalize("NFKC", text).lower()
    if "'" in text or "\u2019" in text:
        # Split first: only the elided words keep an apostrophe.
        parts = _ELISION.split(text)
        return " ".join(
            f"{part}'" if number % 2 else cleaned
            for number, part in enumerate(parts)
            if (cleaned := _clean_words(part))
        )
    return _clean_words(text)


def _clean_words(text: str) -> str:
    """Return lower-case text without punctuation, its words separated by single spaces."""
    if text.isascii():
        return " ".join(_NOT_WORD.sub("", text).split())
    text = unicodedata.normalize("NFKC", "".join(_word_characters(text.translate(_SEPARATORS))))
    return " ".join(_CHARACTER_WORD.sub(r" \g<0> ", text).split())


def _word_characters(text: str) -> Iterator[str]:
    """Yield letters with their marks, digits and white space."""
    after_letter = False
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "M":
            if after_letter and _is_spelling(character, category):
                yield character
        elif character.isalnum() or character.isspace():
            after_letter = category[0] == "L"
            yield character
        elif category != "Cf":  # joiners occur inside words
            after_letter = False


def _is_spelling(mark: str, category: str) -> bool:
    """Return whether a mark is part of a word's spelling.

    Canonical combining classes 6 to 9 are nuktas, viramas and kana voicing marks, 84 to 199 the
    vowels and tones of Telugu, Thai, Lao and Tibetan, and 0 the other vowel signs. Class 1 strikes
    letters through, 10 to 36 are Hebrew and Arabic points, 200 and above are accents.
    """
    combining = unicodedata.combining(mark)
    if combining == 0:
        return category != "Me" and not _IGNORABLE.match(mark)
    return 6 <= combining <= 9 or 84 <= combining <= 199


# Invisible marks: grapheme joiner, Khmer inherent vowels, variation selectors.
_IGNORABLE = re.compile("[\u034f\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def is_character(word: str) -> bool:
    """Return whether a cleaned word is a single Han, kana or Bopomofo character."""
    return _CHARACTER_WORD.fullmatch(word) is not None


def mean_words(captions: Iterable[str]) -> float:
    """Return the mean number of words of clean captions, 0 if there are none.

    Raises:
        DataError: the script has no spaces, as Thai, and the words are not segmented.
    """
    num_captions = num_words = 0
    unspaced_captions = unspaced_words = unspaced_letters = 0
    example = ""
    for text in captions:
        num_captions += 1
        num_words += len(text.split())
        unspaced = [] if text.isascii() else _UNSPACED.findall(text)
        if unspaced:
            example = example or unspaced[0]
            unspaced_captions += 1
            unspaced_words += len(unspaced)
            unspaced_letters += sum(letter.isalpha() for word in unspaced for letter in word)
    # Segmented words have 3 to 4 letters on average. A few captions in another language are fine.
    longest = 3 if unspaced_words < ONE_WORD * unspaced_captions else 6
    if unspaced_captions > num_captions / 10 and unspaced_letters > longest * unspaced_words:
        raise DataError(
            f"the captions have no spaces between words ({reprlib.repr(example)}), so a sentence "
            "would count as one word: segment them first (with PyThaiNLP for Thai, or ICU for "
            "Thai, Lao, Khmer and Burmese) and join the words with spaces"
        )
    return num_words / max(num_captions, 1)


class Vocabulary:
    """The words that a model knows, with their ids.

    ``encode_padded`` and ``decode`` are ``tokenize`` and ``untokenize`` of the original report.

    Attributes:
        idx2word: the words by id, the specials ``<pad> <bos> <eos> <unk>`` first.
        word2idx: its inverse.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Number ``words``, which must start with the four specials.

        Raises:
            DataError: the specials are missing, a word occurs twice, or a word is empty or contains
                white space or unprintable characters.
        """
        if tuple(words[: len(SPECIALS)]) != SPECIALS:
            raise DataError(
                f"a vocabulary starts with {' '.join(SPECIALS)}; got {reprlib.repr(words[:4])}"
            )
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}
        if len(self.word2idx) != len(self.idx2word):
            duplicate = next(word for word, count in Counter(words).items() if count > 1)
            raise DataError(f"the vocabulary holds {reprlib.repr(duplicate)} twice; build it again")
        for word in self.idx2word:
            if not word or " " in word or not word.isprintable():
                raise DataError(f"the vocabulary holds {reprlib.repr(word)}, which is not a word")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> Vocabulary:
        """Collect every word that occurs at least ``min_count`` times, in alphabetical order.

        Raises:
            DataError: there is no such word, or the captions have no spaces between words.
        """
        texts = [clean(caption) for caption in captions]
        words_per_caption = mean_words(texts)
        counts = Counter(word for text in texts for word in text.split())
        words = sorted(word for word, count in counts.items() if count >= min_count)
        if not words:
            hint = "use more captions or a lower --min-count"
            if texts and words_per_caption < ONE_WORD:
                hint = "the captions have about one word each: put spaces between their words"
            raise DataError(f"no word of the captions is seen {min_count} times: {hint}")
        return cls([*SPECIALS, *words])

    def __len__(self) -> int:
        return len(self.idx2word)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.idx2word == other.idx2word

    __hash__ = None  # type: ignore[assignment]

    def known_ids(self, words: Iterable[str]) -> list[int]:
        """Return the ids of ``words``, without those that are not in the vocabulary."""
        return [self.word2idx[word] for word in words if word in self.word2idx]

    def bad_endings(self, language: str) -> list[int]:
        """Return the ids of the words on which no caption ends; only English has a list of them."""
        return self.known_ids(BAD_ENDINGS) if is_english(language) else []

    def characters(self) -> list[int]:
        """Return the ids of the single characters that are words in Chinese and Japanese."""
        return self.known_ids(word for word in self.idx2word if is_character(word))

    def encode(self, text: str) -> list[int]:
        """Return an id per word of the cleaned text, ``<unk>`` for unknown words."""
        return [self.word2idx.get(word, UNK) for word in clean(text).split()]

    def encode_padded(self, text: str, max_length: int = 20) -> list[int]:
        """Return ``max_length`` ids: ``<bos>``, the words, ``<eos>``, padding.

        A longer text is truncated, so that ``<eos>`` still comes last.
        """
        ids = [BOS, *self.encode(text)[: max_length - 2], EOS]
        return ids + [PAD] * (max_length - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words up to the first ``<eos>``, without ``<pad>`` and ``<bos>``."""
        words = []
        for index in ids:
            if index == EOS:
                break
            if index not in (PAD, BOS):
                words.append(self.idx2word[index])
        return " ".join(words)
