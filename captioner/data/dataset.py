"""Photos and tokenized captions as torch datasets, and the views of a photo."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from captioner.config import PAD
from captioner.data.sources import CaptionedPhotos
from captioner.errors import ImageError
from captioner.model.encoder import Transform
from captioner.model.vocabulary import Vocabulary, clean

_SIDES = {"left": "right", "right": "left"}
# torch draws from one generator, whatever the thread.
_DRAWING = threading.Lock()


def mirror_text(text: str) -> str:
    """Swap "left" and "right", as in the caption of a mirrored photo."""
    return " ".join(_SIDES.get(word, word) for word in clean(text).split())


def is_mirrored(view: int, row: int) -> bool:
    """Say whether ``augment`` mirrors the photo in this row: view 1 all of them, crops half."""
    return view == 1 or (view > 1 and np.random.default_rng((view, row)).random() < 0.5)


def augment(image: Image.Image, view: int, row: int) -> Image.Image:
    """Return the photo as it is (view 0), mirrored (1), or a random part of it (2 and on).

    A part has 55 to 95 % of the area and three quarters to four thirds of the shape. The same view
    of the same row is always the same part.
    """
    if view > 1:
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(view * 1_000_003 + row)
            top, left, height, width = RandomResizedCrop.get_params(
                image, scale=[0.55, 0.95], ratio=[3 / 4, 4 / 3]
            )
        image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if is_mirrored(view, row) else image


class PhotoDataset(torch.utils.data.Dataset[tuple[int, Tensor | None]]):
    """Photos as an encoder's input; an unreadable one is (row, None)."""

    def __init__(self, photos: CaptionedPhotos, transform: Transform, *, view: int = 0) -> None:
        """Serve the photos as ``augment`` shows them."""
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
    """Features (P, C) of a photo with K tokenized captions (K, T), for training.

    A photo with fewer than K captions is filled up with rows of ``<pad>``, which no loss counts.
    """

    def __init__(
        self,
        features: np.ndarray,
        rows: Sequence[int],
        captions: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
        *,
        max_length: int,
    ) -> None:
        """Join ``features[rows[i]]`` with ``captions[i]``."""
        self.features = features
        self.rows = np.asarray(rows)
        per_photo = max((len(texts) for texts in captions), default=1)
        # One small array for all captions: a list of lists would grow by kilobytes a photo.
        self.tokens = np.full((len(captions), per_photo, max_length), PAD, dtype=np.int32)
        for photo, texts in enumerate(captions):
            for number, text in enumerate(texts):
                self.tokens[photo, number] = vocabulary.encode_padded(text, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features = torch.from_numpy(np.array(self.features[self.rows[index]]))
        return features, torch.from_numpy(self.tokens[index]).long()
