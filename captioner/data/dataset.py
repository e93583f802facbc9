"""Photos and tokenized captions as torch datasets, and the views of a photo."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from captioner.config import PAD
from captioner.data.sources import CaptionedPhotos
from captioner.errors import ConfigError, ImageError
from captioner.model.encoder import Transform
from captioner.model.vocabulary import Vocabulary, clean

# The words for left and right, in all forms that captions use, by language. French "droit" becomes
# "gauche", which becomes "droite".
_SIDES = {
    "en": "left=right",
    "fr": "droit=gauche droits=gauches gauche=droite gauches=droites",
    "de": "links=rechts linke=rechte linken=rechten linker=rechter linkes=rechtes linkem=rechtem",
    "ar": "يسار=يمين اليسار=اليمين لليسار=لليمين يسارا=يمينا يساره=يمينه يسارها=يمينها "
    "يسرى=يمنى اليسرى=اليمنى أيسر=أيمن "
    "الأيسر=الأيمن",
    "hi": "बाएं=दाएं बाएँ=दाएँ बायें=दायें बाईं=दाईं बायीं=दायीं बायां=दायां बायाँ=दायाँ",
    "zh": "左=右",
    "ja": "左=右",
}
# All threads share torch's random generator.
_RANDOM_LOCK = threading.Lock()


def swapped_words(language: str, pairs: Sequence[str] = ()) -> dict[str, str]:
    """Return the words that mirrored photos swap in their captions, each with the other one.

    Args:
        language: BCP 47 tag.
        pairs: such as "vasen=oikea"; by default, the words for left and right are those of the
            language.

    Raises:
        ConfigError: a pair is not two words, or there is none: captions would be wrong about sides.
    """
    pairs = pairs or _SIDES.get(language.lower().partition("-")[0], "").split()
    if not pairs:
        raise ConfigError(
            f"views of photos are mirrored, and the words for left and right are unknown in the "
            f"language {language}: add them with --mirror-words LEFT=RIGHT, or use --views 1"
        )
    swaps: dict[str, str] = {}
    for pair in pairs:
        words = [clean(word) for word in pair.split("=")]
        if len(words) != 2 or any(len(word.split()) != 1 for word in words):
            raise ConfigError(
                f"mirror_words has {reprlib.repr(pair)}; it must be two words, such as left=right"
            )
        swaps |= dict(zip(words, reversed(words), strict=True))
    return swaps


def mirror_text(text: str, swaps: Mapping[str, str]) -> str:
    """Return a cleaned caption with the words for sides swapped, for the mirrored photo."""
    return " ".join(swaps.get(word, word) for word in text.split())


def is_mirrored(view: int, row: int) -> bool:
    """Return whether ``augment`` mirrors the photo: always in view 1, half of them after that."""
    return view == 1 or (view > 1 and np.random.default_rng((view, row)).random() < 0.5)


def augment(image: Image.Image, view: int, row: int) -> Image.Image:
    """Return the photo unchanged (view 0), mirrored (view 1) or cropped at random (from view 2 on).

    A crop has 55 to 95 % of the area and 3/4 to 4/3 of the aspect ratio. It depends only on
    ``view`` and ``row``.
    """
    if view > 1:
        with _RANDOM_LOCK, torch.random.fork_rng(devices=[]):
            torch.manual_seed(view * 1_000_003 + row)
            top, left, height, width = RandomResizedCrop.get_params(
                image, scale=[0.55, 0.95], ratio=[3 / 4, 4 / 3]
            )
        image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if is_mirrored(view, row) else image


class PhotoDataset(torch.utils.data.Dataset[tuple[int, Tensor | None]]):
    """Photos as an encoder's input; an unreadable one is (row, None)."""

    def __init__(self, photos: CaptionedPhotos, transform: Transform, *, view: int = 0) -> None:
        """Serve the photos in one view (see ``augment``)."""
        self.photos = photos
        self.transform = transform
        self.view = view

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        try:
            photo = augment(self.photos.photo(row), self.view, row)
        except ImageError:
            return row, None
        return row, torch.from_numpy(self.transform(photo))


class CaptionDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The cells (P, C) of each photo with the ids (K, T) of its captions.

    Missing captions are rows of ``<pad>``, which no loss counts.
    """

    def __init__(
        self,
        features: np.ndarray,
        rows: Sequence[int],
        captions: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
        *,
        max_length: int,
        per_photo: int | None = None,
    ) -> None:
        """Pair ``features[rows[i]]`` with the cleaned captions ``captions[i]``.

        ``per_photo`` is K; None is the largest number of captions per photo.
        """
        self.features = features
        self.rows = np.asarray(rows)
        per_photo = per_photo or max((len(texts) for texts in captions), default=1)
        # One array for all captions: lists of ids would take kilobytes per photo.
        self.tokens = np.full((len(captions), per_photo, max_length), PAD, dtype=np.int32)
        for photo_index, texts in enumerate(captions):
            for caption_index, text in enumerate(texts):
                self.tokens[photo_index, caption_index] = vocabulary.encode_padded(text, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features = torch.from_numpy(np.array(self.features[self.rows[index]]))
        return features, torch.from_numpy(self.tokens[index]).long()
