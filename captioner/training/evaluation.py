"""Scoring a decoder on photos that it was not trained on: the captions it writes by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioner.config import BAD_ENDINGS, FEATURES_FOLDER, INNER_SPACE, PAD, DecodingOptions
from captioner.data.dataset import CaptionDataset
from captioner.data.features import cache_features
from captioner.data.sources import CaptionedPhotos, load_captions
from captioner.environment import torch_defaults
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import choose_device, load_encoder
from captioner.model.fast import FusedForward
from captioner.model.search import decode
from captioner.model.vocabulary import Vocabulary
from captioner.training.metrics import score_captions


@torch.inference_mode()
def cross_entropy_of(
    model: CaptionModel, dataset: CaptionDataset, *, batch_size: int = 64
) -> float:
    """Return the unsmoothed cross-entropy a word, in nats, of the dataset's captions."""
    model.eval()
    device = model.embedding.weight.device
    forward = FusedForward(model)
    total, words = 0.0, 0
    for features, captions in DataLoader(dataset, batch_size=batch_size):
        captions = captions.to(device)
        targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
        logits, _ = forward(features.to(device).float(), captions)
        total += cross_entropy(logits, targets, reduction="sum").item()
        words += len(targets)
    return total / words


@torch.inference_mode()
def write_captions(
    model: CaptionModel,
    dataset: CaptionDataset,
    vocabulary: Vocabulary,
    options: DecodingOptions,
    *,
    batch_size: int = 64,
) -> list[str]:
    """Return the caption that the model writes of each photo of the dataset."""
    model.eval()
    device = model.embedding.weight.device
    bad_endings = vocabulary.known_ids(BAD_ENDINGS)
    texts = []
    for features, _ in tqdm(
        DataLoader(dataset, batch_size=batch_size), desc="captions", unit="batch", leave=False
    ):
        state, memory = model.start(features.to(device).float())
        found = decode(model.step, state, memory, options, bad_endings=bad_endings)
        texts += [INNER_SPACE.sub("", vocabulary.decode(beams[0].ids)) for beams in found]
    return texts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint, and the captions behind them.

    Attributes:
        conditions: data, split, photos, references a photo, tokenization and decoding.
        cross_entropy: unsmoothed, in nats a word, over all references.
        scores: of ``captions``, by the names of ``metrics.score_captions``.
        report_scores: of ``report_captions``: greedy, without bans, as the original report decodes.
        photos: the split.
        rows: of those photos that could be opened.
        names: of the photos.
        captions: one a photo, by the decoding of ``conditions``.
        report_captions: one a photo.
        references: all of each photo.
    """

    conditions: dict[str, Any]
    cross_entropy: float
    scores: dict[str, float]
    report_scores: dict[str, float]
    photos: CaptionedPhotos
    rows: list[int]
    names: list[str]
    captions: list[str]
    report_captions: list[str]
    references: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the captions a photo at a time."""
        photos = [
            {"name": name, "caption": caption, "report_caption": report, "references": references}
            for name, caption, report, references in zip(
                self.names, self.captions, self.report_captions, self.references, strict=True
            )
        ]
        fields = ("conditions", "cross_entropy", "scores", "report_scores")
        return {**{name: getattr(self, name) for name in fields}, "photos": photos}


@torch_defaults()
def evaluate_checkpoint(
    checkpoint: Checkpoint,
    source: str,
    split: str,
    options: DecodingOptions,
    *,
    encoder_weights: str | None = None,
    limit: int = 0,
    cache: Path = FEATURES_FOLDER,
    device: str = "cpu",
) -> Evaluation:
    """Score a checkpoint on one split, every photo against all of its references.

    Raises:
        CaptionerError: the data, the encoder's weights or the checkpoint do not allow it.
    """
    photos = load_captions(source, split, limit=limit)
    encoder = load_encoder(str(checkpoint.encoder["name"]), encoder_weights)
    checkpoint.check_encoder(encoder.spec())
    checkpoint.model.to(encoder.to(choose_device(device)).device)
    features = cache_features(encoder, photos, cache)
    all_references, all_names = list(photos.captions()), photos.names()
    references = [all_references[row] for row in features.readable]
    # The loss goes as far as the model was trained to write; the references stay whole.
    dataset = CaptionDataset(
        features.array,
        features.readable,
        references,
        checkpoint.vocabulary,
        max_length=checkpoint.max_length,
    )
    report = dataclasses.replace(DecodingOptions.plain_greedy(), max_length=checkpoint.max_length)
    model, vocabulary = checkpoint.model, checkpoint.vocabulary
    captions = write_captions(model, dataset, vocabulary, options)
    report_captions = write_captions(model, dataset, vocabulary, report)
    counts = sorted({len(some) for some in references})
    return Evaluation(
        conditions={
            "data": source,
            "split": photos.split,
            "photos": len(references),
            "references_a_photo": counts[0] if len(counts) == 1 else [counts[0], counts[-1]],
            "tokenization": "lower case, punctuation removed, split at spaces; references not cut",
            "decoding": options.to_dict(),
            "report_decoding": report.to_dict(),
        },
        cross_entropy=cross_entropy_of(model, dataset),
        scores=score_captions(captions, references),
        report_scores=score_captions(report_captions, references),
        photos=photos,
        rows=features.readable,
        names=[all_names[row] for row in features.readable],
        captions=captions,
        report_captions=report_captions,
        references=references,
    )
