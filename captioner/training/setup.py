"""From sources and an encoder to the data and the precision that a run trains with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from captioner.config import FEATURES_FOLDER, TrainConfig, is_english
from captioner.data.columns import Columns
from captioner.data.dataset import CaptionDataset, is_mirrored, mirror_text, swapped_words
from captioner.data.features import Features, cache_features
from captioner.data.shares import DataSource, parse_sources
from captioner.data.sources import CaptionedPhotos, SplitError, load_captions, load_texts
from captioner.distributed import DistributedContext
from captioner.errors import ConfigError, DataError
from captioner.model.encoder import check_encoder_name, choose_device, load_encoder
from captioner.model.vocabulary import Vocabulary
from captioner.training.words import choose_words

log = logging.getLogger(__name__)

Rows: TypeAlias = tuple[CaptionedPhotos, list[int]]

# Below this, bfloat16 is not worth its rounding.
_MIN_SPEEDUP = 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One of the sources that a run trains and validates on.

    Attributes:
        name: short and unique in the run.
        num_photos: the number of its training photos.
        per_epoch: the number of training photos that each epoch takes from it.
        validation: its validation photos with the captions of the validation loss.
        references: all captions of each validation photo.
    """

    name: str
    num_photos: int
    per_epoch: int
    validation: CaptionDataset
    references: list[list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that a run trains and validates on.

    Attributes:
        vocabulary: of the training captions.
        train: the training photos, view after view; in a view source after source.
        sources: what differs between the sources.
        text: captions with the mean cell in place of their photo, or None.
        train_references: the captions of each item of ``train``.
        embedding: initial values of the embedding (V, E), or None.
        model: the fields of ``ModelConfig`` that follow from the data and the encoder.
        classifier: the backbone's own, for the pointer, or None.
        encoder: the encoder's ``spec()``.
        fingerprint: names that change with the photos, their shares, the encoder and the text.
    """

    vocabulary: Vocabulary
    train: Dataset[tuple[Tensor, Tensor]]
    sources: list[Source]
    text: CaptionDataset | None
    train_references: list[list[str]]
    embedding: Tensor | None
    model: dict[str, Any]
    classifier: nn.Linear | None
    encoder: dict[str, Any]
    fingerprint: list[str]


class _Photos(NamedTuple):
    """The readable photos of one source, with their features.

    Attributes:
        views: the features of the training photos in each view.
        rows: of the training photos.
        captions: of the training photos, those to train on.
        validation: the features of the validation photos.
        validation_rows: of the validation photos.
        references: all captions of each validation photo.
    """

    views: list[Features]
    rows: list[int]
    captions: list[list[str]]
    validation: Features
    validation_rows: list[int]
    references: list[list[str]]


def prepare(
    config: TrainConfig,
    cache: Path = FEATURES_FOLDER,
    processes: DistributedContext | None = None,
) -> TrainingData:
    """Load the photos, build the vocabulary, and extract the features that are not cached.

    All ``processes`` of a run call this; each extracts its share of the features.
    """
    check_encoder_name(config.encoder)
    swaps = swapped_words(config.language, config.mirror_words) if config.views > 1 else {}
    sources = parse_sources(config.data)
    splits = [_load_splits(config, source.source) for source in sources]
    texts = [] if config.text is None else load_texts(config.text, _columns(config))
    per_photo = 1 if config.captions == "first" else None
    # Before the features, which can take hours: captions without a vocabulary fail here.
    training_captions = [
        photos.captions[row][:per_photo] for (photos, rows), _ in splits for row in rows
    ]
    encoder = load_encoder(config.encoder, config.encoder_weights)
    in_english = is_english(config.language)
    classifier = encoder.classifier if config.pointer and in_english else None
    if config.pointer and classifier is None:
        log.warning(
            "training without a pointer: %s",
            f"{encoder.name} has no classifier of single cells"
            if in_english
            else "the names of the classes are English",
        )
    words = choose_words(
        training_captions,
        config.min_count,
        detector_photos=config.detector_photos if config.detector_epochs else 0,
        class_weights=None if classifier is None else classifier.weight,
    )
    if config.detector_epochs and not words.num_detectors:
        log.warning(
            "no word is in the captions of %d photos: training without word detectors",
            config.detector_photos,
        )
    vocabulary = words.vocabulary
    if swaps and not vocabulary.known_ids(swaps):
        log.warning(
            "no caption names a side (%s), so mirrored photos keep their captions: if they are "
            "not in the language %s, add --language or --mirror-words",
            " ".join(list(swaps)[:2]),
            config.language,
        )
    training_texts = [text for texts in training_captions for text in texts]
    check_lengths(training_texts, vocabulary, config.max_length)
    encoder.to(choose_device(config.device))
    extract = functools.partial(cache_features, encoder, folder=cache, processes=processes)
    parts = [_extract(train, validation, extract, config) for train, validation in splits]
    captions = [texts for part in parts for texts in part.captions]
    train = [
        (
            part.views[view].array,
            part.rows,
            _captions_of_view(view, part.rows, part.captions, swaps),
        )
        for view in range(config.views)
        for part in parts
    ]
    most = max(map(len, captions))
    pair = functools.partial(CaptionDataset, vocabulary=vocabulary, max_length=config.max_length)
    text = None
    if texts and config.text_epochs:
        all_texts = texts + captions
        # One cell is enough: attention over P equal ones gives the same, at P times the work.
        text = pair(_mean_cell(parts), [0] * len(all_texts), all_texts)
    counts = photos_per_epoch(sources, [len(part.rows) for part in parts])
    return TrainingData(
        vocabulary=vocabulary,
        train=ConcatDataset(pair(*view, per_photo=most) for view in train),
        sources=[
            Source(
                name=source.name,
                num_photos=len(part.rows),
                per_epoch=count,
                validation=pair(
                    part.validation.array,
                    part.validation_rows,
                    [references[:per_photo] for references in part.references],
                ),
                references=part.references,
            )
            for source, part, count in zip(sources, parts, counts, strict=True)
        ],
        text=text,
        train_references=[texts for _, _, captions in train for texts in captions],
        embedding=_embedding(config, captions + texts, vocabulary),
        model={
            "vocabulary_size": len(vocabulary),
            "encoder_channels": encoder.channels,
            "num_detectors": words.num_detectors,
            "class_names": words.class_names,
            "classifier_channels": 0 if classifier is None else classifier.in_features,
            "kinds": words.kinds,
        },
        classifier=classifier,
        encoder=encoder.spec(),
        fingerprint=_fingerprint(parts, counts, texts),
    )


def photos_per_epoch(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[int]:
    """Return how many photos an epoch takes from each source; their sum is that of ``sizes``.

    Args:
        sources: those without a share divide the rest of the epoch in proportion to their sizes.
        sizes: the number of training photos of each source.

    Raises:
        ConfigError: a source would get no photo.
    """
    rest = 1 - sum(source.share or 0.0 for source in sources)
    rest_size = sum(
        size for source, size in zip(sources, sizes, strict=True) if source.share is None
    )
    shares = [
        rest * size / rest_size if source.share is None else source.share
        for source, size in zip(sources, sizes, strict=True)
    ]
    # Rounding the bounds between the sources keeps the sum.
    bounds = np.rint(np.cumsum([0.0, *shares]) * sum(sizes)).astype(int)
    counts = np.diff(bounds).tolist()
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise ConfigError(
                f"the share of {source.source} is less than one of the {sum(sizes)} photos of an "
                "epoch: raise it, or leave the source out"
            )
    return counts


def describe(data: TrainingData, config: TrainConfig) -> str:
    """Return the facts to check before training: sizes, shapes, one caption there and back."""
    features, captions = next(iter(DataLoader(data.train, batch_size=config.batch_size)))
    token_ids = captions[0, 0].tolist()
    size = data.encoder["transform"]["size"]
    num_train = sum(source.num_photos for source in data.sources)
    num_validation = sum(len(source.validation) for source in data.sources)
    return "\n".join(
        [
            f"photos       train {num_train:,}, validation {num_validation:,}",
            *_describe_sources(data.sources),
            f"vocabulary   {len(data.vocabulary):,} entries, 4 specials included",
            f"a batch      photos {(len(features), 3, size, size)} -> features "
            f"{tuple(features.shape)}, captions {tuple(captions.shape)}",
            f"a caption    {data.train_references[0][0]!r}",
            f"its ids      {token_ids}",
            f"decoded      {data.vocabulary.decode(token_ids)!r}",
        ]
    )


def _describe_sources(sources: Sequence[Source]) -> list[str]:
    """Return a line for each source, if there are several."""
    if len(sources) == 1:
        return []
    return [
        f"  {source.name}: train {source.num_photos:,}, {source.per_epoch:,} per epoch, "
        f"validation {len(source.validation):,}"
        for source in sources
    ]


def _columns(config: TrainConfig) -> Columns:
    """Return the columns that the settings name."""
    return Columns(config.image_column, config.caption_column)


def _load_splits(config: TrainConfig, source: str) -> tuple[Rows, Rows]:
    """Return the training and the validation photos of a source, each with the rows to use."""
    photos = load_captions(source, "train", limit=config.limit, columns=_columns(config))
    if config.validation == "split":
        try:
            validation = load_captions(
                source, "validation", limit=config.limit, columns=_columns(config)
            )
        except SplitError as error:
            log.warning("%s; holding 10 %% of the training photos back instead", error)
        else:
            return (photos, list(range(len(photos)))), (validation, list(range(len(validation))))
    if len(photos) < 10:
        raise DataError(
            f"{source}: {len(photos)} photos are too few to hold 10 % back: use at least 10"
        )
    order = np.random.default_rng(config.seed).permutation(len(photos)).tolist()
    held_back = max(2, round(0.1 * len(photos)))
    return (photos, sorted(order[held_back:])), (photos, sorted(order[:held_back]))


def _extract(
    train: Rows, validation: Rows, extract: Callable[..., Features], config: TrainConfig
) -> _Photos:
    """Extract the features of one source and leave out its unreadable photos."""
    (photos, rows), (validation_photos, validation_rows) = train, validation
    views = [extract(photos)]
    validation_features = views[0] if validation_photos is photos else extract(validation_photos)
    views += [extract(photos, view=view) for view in range(1, config.views)]
    rows = _readable_rows(photos, rows, views[0], "train", at_least=1)
    validation_rows = _readable_rows(
        validation_photos, validation_rows, validation_features, "validate", at_least=2
    )
    per_photo = 1 if config.captions == "first" else None
    return _Photos(
        views,
        rows,
        [photos.captions[row][:per_photo] for row in rows],
        validation_features,
        validation_rows,
        [validation_photos.captions[row] for row in validation_rows],
    )


def _readable_rows(
    photos: CaptionedPhotos, rows: Sequence[int], features: Features, purpose: str, *, at_least: int
) -> list[int]:
    """Return the rows whose photo is readable, ``DataError`` if they are too few."""
    readable = set(features.readable)
    rows = [row for row in rows if row in readable]
    if len(rows) < at_least:
        raise DataError(
            f"{photos.source}: {len(rows)} photos are too few to {purpose} on, at least "
            f"{at_least} are needed: use more photos"
        )
    return rows


def _captions_of_view(
    view: int, rows: Sequence[int], captions: Sequence[list[str]], swaps: Mapping[str, str]
) -> list[list[str]]:
    """Return the captions of the photos in one view: mirrored where the photo is."""
    return [
        [mirror_text(text, swaps) for text in texts] if is_mirrored(view, row) else texts
        for row, texts in zip(rows, captions, strict=True)
    ]


def _mean_cell(parts: Sequence[_Photos]) -> np.ndarray:
    """Return features (1, 1, C) without content: the mean cell of about a thousand photos."""
    step = max(1, sum(len(part.rows) for part in parts) // 1000)
    sample = np.concatenate([part.views[0].array[part.rows[::step]] for part in parts])
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


def _fingerprint(
    parts: Sequence[_Photos], counts: Sequence[int], texts: list[list[str]]
) -> list[str]:
    """Return names that change with the photos, their shares, the encoder and the text."""
    names = []
    for part, count in zip(parts, counts, strict=True):
        names += [features.folder.name for features in (part.validation, *part.views)]
        if count != len(part.rows):
            names.append(f"{count} per epoch")
    if texts:
        names.append(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    return names


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
