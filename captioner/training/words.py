"""Which words a run knows: its vocabulary, those that get a detector, and names to point at."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from captioner.config import UNK
from captioner.model import vocabulary as vocabularies
from captioner.model.vocabulary import SPECIALS, Vocabulary

_NAMES_FILE = Path(vocabularies.__file__).with_name("imagenet_names.txt")
# fmt: off
# They say nothing that a photo could show.
FUNCTION_WORDS = frozenset((
    "a", "an", "the", "and", "or", "but", "of", "in", "on", "at", "by", "to", "from", "with",
    "without", "into", "onto", "over", "under", "up", "down", "off", "out", "through", "near",
    "next", "behind", "above", "below", "between", "around", "across", "along", "for", "as", "is",
    "are", "was", "were", "be", "being", "been", "has", "have", "having", "had", "do", "does",
    "it", "its", "he", "him", "his", "she", "her", "they", "them", "their", "who", "which", "what",
    "that", "this", "these", "those", "there", "while", "where", "when", "not", "no", "one", "two",
    "three", "some", "several", "other", "another", "each", "all", "both", "very", "so", "than",
    "then", "too",
))
# fmt: on


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a run.

    Attributes:
        vocabulary: the specials, the words with a detector, the other words of the captions, and
            names that no caption holds.
        num_detectors: the number of words with a detector.
        class_names: the ids of each class's name, one or two; empty without a pointer.
        kinds: for each name that no caption holds, the id of a word for something that looks alike,
            or ``<unk>`` if the captions name no class.
    """

    vocabulary: Vocabulary
    num_detectors: int = 0
    class_names: list[list[int]] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)


def imagenet_names() -> list[list[str]]:
    """Return the everyday name of each of ImageNet's 1,000 classes, as one or two words."""
    return [line.split() for line in _NAMES_FILE.read_text(encoding="utf-8").splitlines()]


def choose_words(
    captions: Sequence[Sequence[str]],
    min_count: int,
    *,
    detector_photos: int = 0,
    class_weights: Tensor | None = None,
) -> Words:
    """Choose the words of a run.

    Args:
        captions: the cleaned captions of each training photo.
        min_count: words that occur fewer times are left out, unless they name a class.
        detector_photos: words in the captions of fewer photos get no detector; 0 means none do.
        class_weights: (1000, C) of the backbone's classifier, to point at its classes' names.

    Raises:
        DataError: the vocabulary would be empty.
    """
    counts = Counter(word for texts in captions for text in texts for word in text.split())
    words = Vocabulary.build([text for texts in captions for text in texts], min_count).idx2word
    names = [] if class_weights is None else imagenet_names()
    named = {word for name in names for word in name}
    written = sorted({*words[len(SPECIALS) :], *(named & counts.keys())})
    detected: list[str] = []
    if detector_photos:
        photos = Counter(word for texts in captions for word in set(" ".join(texts).split()))
        detected = [
            word
            for word in written
            if photos[word] >= detector_photos and word not in FUNCTION_WORDS
        ]
    with_detector = set(detected)
    unwritten = sorted(named - counts.keys())
    vocabulary = Vocabulary(
        [
            *SPECIALS,
            *detected,
            *(word for word in written if word not in with_detector),
            *unwritten,
        ]
    )
    ids = [[vocabulary.word2idx[word] for word in name] for name in names]
    kinds = [] if class_weights is None else _kinds(vocabulary, ids, len(unwritten), class_weights)
    return Words(vocabulary, len(detected), ids, kinds)


def _kinds(
    vocabulary: Vocabulary, names: list[list[int]], num_unwritten: int, class_weights: Tensor
) -> list[int]:
    """Return the id of a written word for each unwritten one: the name of the most similar class.

    Two classes are similar if the classifier's weights for them are.
    """
    first = len(vocabulary) - num_unwritten
    weights = normalize(class_weights.float(), dim=1)
    is_written = [max(name) < first for name in names]
    kinds = []
    for word_id in range(first, len(vocabulary)):
        own_class = next(i for i, name in enumerate(names) if word_id in name)
        order = (weights @ weights[own_class]).argsort(descending=True).tolist()
        kinds.append(next((names[i][-1] for i in order if is_written[i]), UNK))
    return kinds
