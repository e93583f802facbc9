"""What a training run trains and scores on: vocabulary, features with captions, references."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from captioner.config import FEATURES_FOLDER, TrainConfig
from captioner.data.dataset import CaptionDataset, PhotoDataset, is_mirrored, mirror_text
from captioner.data.features import Features, cache_features
from captioner.data.sources import CaptionedPhotos, load_captions, load_texts
from captioner.distributed import DistributedContext
from captioner.errors import DataError
from captioner.model.encoder import Encoder, check_encoder_name, choose_device, load_encoder
from captioner.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Batch: TypeAlias = tuple[Tensor, Tensor]
Part: TypeAlias = tuple[CaptionedPhotos, list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains and scores on.

    Attributes:
        vocabulary: of the training captions.
        train: the training photos, once for each of their views.
        photos: how many photos an epoch goes through.
        text: captions with the mean cell in place of their photo, or None.
        train_references: the captions of each photo of ``train``.
        example: the first photo's first caption.
        validation: the validation photos with the captions that the loss is taken on.
        references: all captions of each validation photo.
        matrix: start of the embedding, or None.
        encoder: the encoder's ``spec()``.
        sources: what was read, in names that change with the photos, the encoder and the text.
        pixels: shape of a batch of photos as the encoder takes them.
    """

    vocabulary: Vocabulary
    train: Dataset[Batch]
    photos: int
    text: CaptionDataset | None
    train_references: list[list[str]]
    example: str
    validation: CaptionDataset
    references: list[list[str]]
    matrix: Tensor | None
    encoder: dict[str, Any]
    sources: list[str]
    pixels: tuple[int, ...]


def _load_parts(config: TrainConfig) -> tuple[Part, Part]:
    """Return the training and the validation photos, each with the rows that count."""
    photos = load_captions(config.data, "train", limit=config.limit)
    if config.validation == "split":
        try:
            validation = load_captions(config.data, "validation", limit=config.limit)
        except DataError as error:
            log.warning("%s; holding 10 %% of the training photos back instead", error)
        else:
            return (photos, list(range(len(photos)))), (validation, list(range(len(validation))))
    if len(photos) < 10:
        raise DataError(f"{len(photos)} photos are too few to hold 10 % back: use at least 10")
    order = np.random.default_rng(config.seed).permutation(len(photos)).tolist()
    held_back = max(2, round(0.1 * len(photos)))
    return (photos, sorted(order[held_back:])), (photos, sorted(order[:held_back]))


def facts(prepared: TrainingData, config: TrainConfig) -> str:
    """Return what the report checks before it trains: sizes, shapes, one caption there and back."""
    loader = DataLoader(prepared.train, batch_size=config.batch_size)
    features, tokens = next(iter(loader))
    ids = tokens[0, 0].tolist()
    return "\n".join(
        [
            f"photos       train {prepared.photos:,}, validation {len(prepared.validation):,}",
            f"vocabulary   {len(prepared.vocabulary):,} entries, 4 specials included",
            f"a batch      photos {prepared.pixels} -> features "
            f"{tuple(features.shape)}, captions {tuple(tokens.shape)}",
            f"a caption    {prepared.example!r}",
            f"its ids      {ids}",
            f"decoded      {prepared.vocabulary.decode(ids)!r}",
        ]
    )


def _batch_of_photos(
    photos: CaptionedPhotos, rows: Sequence[int], encoder: Encoder, batch_size: int
) -> tuple[int, ...]:
    """Return the shape of the first batch of photos."""
    opened = PhotoDataset(photos, encoder.transform)
    pixels = [pixels for row in rows[:batch_size] if (pixels := opened[row][1]) is not None]
    return tuple(torch.stack(pixels).shape)


def _nothing(features: Features, rows: Sequence[int]) -> np.ndarray:
    """Return features (1, 1, C) that show nothing: the mean cell of a thousand photos.

    One cell does: attention over P alike ones comes to the same, at P times the work.
    """
    some = features.array[rows[:: max(1, len(rows) // 1000)]]
    return some.mean(axis=(0, 1), keepdims=True, dtype=np.float32).astype(np.float16)


def check_lengths(texts: Sequence[str], vocabulary: Vocabulary, max_length: int) -> None:
    """Warn if more than a third of the captions have to be cut to ``max_length`` ids."""
    room = max_length - 2  # without <bos> and <eos>
    num_cut = sum(len(vocabulary.encode(text)) > room for text in texts)
    if num_cut > len(texts) / 3:
        log.warning(
            "%d of %d captions are cut after %d words: raise the limit with --max-length N",
            num_cut,
            len(texts),
            room,
        )


def prepare(
    config: TrainConfig,
    cache: Path = FEATURES_FOLDER,
    processes: DistributedContext | None = None,
) -> TrainingData:
    """Load the photos, build the vocabulary, and extract what features are not cached yet.

    All ``processes`` of a run call this; each extracts a part of the features.
    """
    processes = processes or DistributedContext()
    check_encoder_name(config.encoder)
    (photos, train_rows), (validation_photos, validation_rows) = _load_parts(config)
    encoder = load_encoder(config.encoder, config.encoder_weights)
    encoder.to(choose_device(config.device))
    same = validation_photos is photos
    more = [] if config.text is None else load_texts(config.text)
    all_captions = list(photos.captions())
    count = 1 if config.captions == "first" else None
    # Captions of which no vocabulary can be made fail now, not after hours of extraction.
    Vocabulary.build(itertools.chain(*all_captions), config.min_count)

    def features_of(photos: CaptionedPhotos, view: int = 0) -> Features:
        return cache_features(encoder, photos, cache, view=view, processes=processes)

    features = features_of(photos)
    validation_features = features if same else features_of(validation_photos)
    sources = [features.folder.name, validation_features.folder.name]
    sources += [hashlib.sha256(json.dumps(more).encode()).hexdigest()] if more else []
    validation_captions = all_captions if same else list(validation_photos.captions())
    readable, validation_readable = set(features.readable), set(validation_features.readable)
    train_rows = [row for row in train_rows if row in readable]
    validation_rows = [row for row in validation_rows if row in validation_readable]
    if len(validation_rows) < 2:
        raise DataError(
            f"{len(validation_rows)} photos to validate on are too few, at least 2 are needed: "
            "use more photos"
        )
    captions = [all_captions[row][:count] for row in train_rows]
    references = [validation_captions[row] for row in validation_rows]
    texts = [text for some in captions for text in some]
    vocabulary = Vocabulary.build(texts, config.min_count)
    check_lengths(texts, vocabulary, config.max_length)
    matrix = None
    if config.word2vec:
        from captioner.training.word2vec import word2vec_matrix

        size = config.model_config(vocabulary_size=5, encoder_channels=1).embedding_size
        read = [*texts, *(text for some in more for text in some)]
        matrix = word2vec_matrix(read, vocabulary, size=size, seed=config.seed)

    def join(
        features: Features, rows: Sequence[int], captions: Sequence[Sequence[str]]
    ) -> CaptionDataset:
        return CaptionDataset(
            features.array, rows, captions, vocabulary, max_length=config.max_length
        )

    train, train_references = [join(features, train_rows, captions)], list(captions)
    for view in range(1, config.views):
        seen = features_of(photos, view)
        sources.append(seen.folder.name)
        told = [
            [mirror_text(text) for text in some] if is_mirrored(view, row) else some
            for row, some in zip(train_rows, captions, strict=True)
        ]
        train.append(join(seen, train_rows, told))
        train_references += told
    text = None
    if more and config.text_epochs:
        told = more + captions
        text = CaptionDataset(
            _nothing(features, train_rows),
            [0] * len(told),
            told,
            vocabulary,
            max_length=config.max_length,
        )
    validation = join(validation_features, validation_rows, [some[:count] for some in references])
    return TrainingData(
        vocabulary=vocabulary,
        train=ConcatDataset(train),
        photos=len(train_rows),
        text=text,
        train_references=train_references,
        example=captions[0][0],
        validation=validation,
        references=references,
        matrix=matrix,
        encoder=encoder.spec(),
        sources=sources,
        pixels=_batch_of_photos(photos, train_rows, encoder, config.batch_size),
    )
