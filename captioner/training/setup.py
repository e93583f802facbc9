"""From a source and an encoder to the data and the precision that a run trains with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from captioner.config import FEATURES_FOLDER, TrainConfig
from captioner.data.dataset import CaptionDataset, is_mirrored, mirror_text
from captioner.data.features import Features, cache_features
from captioner.data.sources import CaptionedPhotos, load_captions, load_texts
from captioner.distributed import DistributedContext
from captioner.errors import DataError
from captioner.model.encoder import check_encoder_name, choose_device, load_encoder
from captioner.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Rows: TypeAlias = tuple[CaptionedPhotos, list[int]]

# Below this, bfloat16 is not worth its rounding.
_MIN_SPEEDUP = 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that a run trains and validates on.

    Attributes:
        vocabulary: of the training captions.
        train: the training photos, view after view.
        num_photos: the number of training photos.
        text: captions with the mean cell in place of their photo, or None.
        train_references: the captions of each item of ``train``.
        validation: the validation photos with the captions of the validation loss.
        references: all captions of each validation photo.
        embedding: initial values of the embedding (V, E), or None.
        encoder: the encoder's ``spec()``.
        sources: names that change with the photos, the encoder and the text.
    """

    vocabulary: Vocabulary
    train: Dataset[tuple[Tensor, Tensor]]
    num_photos: int
    text: CaptionDataset | None
    train_references: list[list[str]]
    validation: CaptionDataset
    references: list[list[str]]
    embedding: Tensor | None
    encoder: dict[str, Any]
    sources: list[str]


def prepare(
    config: TrainConfig,
    cache: Path = FEATURES_FOLDER,
    processes: DistributedContext | None = None,
) -> TrainingData:
    """Load the photos, build the vocabulary, and extract the features that are not cached.

    All ``processes`` of a run call this; each extracts its share of the features.
    """
    check_encoder_name(config.encoder)
    (photos, train_rows), (validation_photos, validation_rows) = _load_splits(config)
    texts = [] if config.text is None else load_texts(config.text)
    per_photo = 1 if config.captions == "first" else None
    # Before the features, which can take hours: captions without a vocabulary fail here.
    training_texts = [text for row in train_rows for text in photos.captions[row][:per_photo]]
    vocabulary = Vocabulary.build(training_texts, config.min_count)
    check_lengths(training_texts, vocabulary, config.max_length)
    encoder = load_encoder(config.encoder, config.encoder_weights)
    encoder.to(choose_device(config.device))
    extract = functools.partial(cache_features, encoder, folder=cache, processes=processes)
    views = [extract(photos)]
    validation = views[0] if validation_photos is photos else extract(validation_photos)
    views += [extract(photos, view=view) for view in range(1, config.views)]
    train_rows = _readable_rows(train_rows, views[0], "train", at_least=1)
    validation_rows = _readable_rows(validation_rows, validation, "validate", at_least=2)
    captions = [photos.captions[row][:per_photo] for row in train_rows]
    references = [validation_photos.captions[row] for row in validation_rows]
    captions_by_view = [_captions_of_view(view, train_rows, captions) for view in range(len(views))]
    pair = functools.partial(CaptionDataset, vocabulary=vocabulary, max_length=config.max_length)
    text = None
    if texts and config.text_epochs:
        all_texts = texts + captions
        text = pair(_mean_cell(views[0], train_rows), [0] * len(all_texts), all_texts)
    return TrainingData(
        vocabulary=vocabulary,
        train=ConcatDataset(
            pair(features.array, train_rows, captions)
            for features, captions in zip(views, captions_by_view, strict=True)
        ),
        num_photos=len(train_rows),
        text=text,
        train_references=[texts for captions in captions_by_view for texts in captions],
        validation=pair(validation.array, validation_rows, [r[:per_photo] for r in references]),
        references=references,
        embedding=_embedding(config, captions + texts, vocabulary),
        encoder=encoder.spec(),
        sources=[features.folder.name for features in (validation, *views)] + _digest(texts),
    )


def describe(data: TrainingData, config: TrainConfig) -> str:
    """Return the facts to check before training: sizes, shapes, one caption there and back."""
    features, captions = next(iter(DataLoader(data.train, batch_size=config.batch_size)))
    token_ids = captions[0, 0].tolist()
    size = data.encoder["transform"]["size"]
    return "\n".join(
        [
            f"photos       train {data.num_photos:,}, validation {len(data.validation):,}",
            f"vocabulary   {len(data.vocabulary):,} entries, 4 specials included",
            f"a batch      photos {(len(features), 3, size, size)} -> features "
            f"{tuple(features.shape)}, captions {tuple(captions.shape)}",
            f"a caption    {data.train_references[0][0]!r}",
            f"its ids      {token_ids}",
            f"decoded      {data.vocabulary.decode(token_ids)!r}",
        ]
    )


def _load_splits(config: TrainConfig) -> tuple[Rows, Rows]:
    """Return the training and the validation photos, each with the rows to use."""
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


def _readable_rows(
    rows: Sequence[int], features: Features, purpose: str, *, at_least: int
) -> list[int]:
    """Return the rows whose photo is readable, ``DataError`` if they are too few."""
    readable = set(features.readable)
    rows = [row for row in rows if row in readable]
    if len(rows) < at_least:
        raise DataError(
            f"{len(rows)} photos are too few to {purpose} on, at least {at_least} are needed: "
            "use more photos"
        )
    return rows


def _captions_of_view(
    view: int, rows: Sequence[int], captions: Sequence[list[str]]
) -> list[list[str]]:
    """Return the captions of the photos in one view: mirrored where the photo is."""
    return [
        [mirror_text(text) for text in texts] if is_mirrored(view, row) else texts
        for row, texts in zip(rows, captions, strict=True)
    ]


def _mean_cell(features: Features, rows: Sequence[int]) -> np.ndarray:
    """Return features (1, 1, C) without content: the mean cell of up to a thousand photos.

    One cell is enough: attention over P equal ones gives the same, at P times the work.
    """
    sample = features.array[rows[:: max(1, len(rows) // 1000)]]
    return sample.mean(axis=(0, 1), keepdims=True, dtype=np.float32).astype(np.float16)


def _embedding(
    config: TrainConfig, captions: Sequence[Sequence[str]], vocabulary: Vocabulary
) -> Tensor | None:
    """Return the initial embedding by Word2Vec, if the settings ask for it."""
    if not config.word2vec:
        return None
    from captioner.training.word2vec import word2vec_matrix  # gensim takes a second to import

    size = config.model_config(vocabulary_size=5, encoder_channels=1).embedding_size
    texts = [text for texts in captions for text in texts]
    return word2vec_matrix(texts, vocabulary, size=size, seed=config.seed)


def _digest(texts: list[list[str]]) -> list[str]:
    """Return the SHA-256 of captions without photos, in a list; an empty list without any."""
    return [hashlib.sha256(json.dumps(texts).encode()).hexdigest()] if texts else []


def check_lengths(texts: Sequence[str], vocabulary: Vocabulary, max_length: int) -> None:
    """Warn if more than a third of the captions are longer than ``max_length`` ids."""
    max_words = max_length - 2  # without <bos> and <eos>
    num_cut = sum(len(vocabulary.encode(text)) > max_words for text in texts)
    if num_cut > len(texts) / 3:
        log.warning(
            "%d of %d captions are cut after %d words: raise the limit with --max-length N",
            num_cut,
            len(texts),
            max_words,
        )


@functools.cache
def bfloat16_speedup(device: torch.device) -> float:
    """Return how many times faster this machine multiplies matrices in bfloat16 than in float32.

    Processors without bfloat16 instructions emulate them, up to 200 times slower, and torch has no
    flag that says so for all of them, so one small product is timed. A GPU is queried instead: a
    product this small would only measure the launch. Its answer is 0 or infinity.
    """
    if device.type == "cuda":
        return math.inf if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    if device.type != "cpu":
        return 0.0
    inputs = torch.rand(256, 512, generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    end = time.perf_counter() + 0.2
    for turn in range(20):
        if turn > 1 and time.perf_counter() > end:
            break
        for dtype in best:  # in turns: a busy moment slows both
            x = inputs.to(dtype)
            started = time.perf_counter()
            linear(x, x)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def choose_precision(config: TrainConfig, processes: DistributedContext) -> tuple[bool, str]:
    """Return whether to train in bfloat16, and the reason in a few words.

    All processes use the same precision: bfloat16 only if it is faster for each of them.
    """
    speedup = bfloat16_speedup(choose_device(config.device))
    (num_slower,) = processes.all_reduce_sum(speedup < _MIN_SPEEDUP)
    if config.bfloat16 == "auto":
        reason = "bfloat16 is no faster here" if num_slower else "faster than float32 here"
        return not num_slower, reason
    if config.bfloat16 and num_slower:
        log.warning("bfloat16 is slow on this machine: leave bfloat16 at auto")
    return bool(config.bfloat16), "as set"
