"""Scores of a checkpoint on photos that it was not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioner.config import (
    DEFAULT_LANGUAGE,
    FEATURES_FOLDER,
    INNER_SPACE,
    PAD,
    DecodingOptions,
    is_english,
)
from captioner.data.columns import Columns
from captioner.data.dataset import CaptionDataset
from captioner.data.features import cache_features
from captioner.data.sources import CaptionedPhotos, load_captions
from captioner.environment import torch_defaults
from captioner.model.checkpoint import Checkpoint
from captioner.model.confidence import confidence_features, confidence_of
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import choose_device, load_encoder
from captioner.model.fast import FusedForward
from captioner.model.search import decode
from captioner.model.vocabulary import Vocabulary
from captioner.training.confidence import Reliability, are_right, visual_words
from captioner.training.map_scores import MapScore
from captioner.training.maps import score_maps
from captioner.training.metrics import invented_people, score_cleaned_captions


@torch.inference_mode()
def cross_entropy_of(
    model: CaptionModel, dataset: CaptionDataset, *, batch_size: int = 64
) -> float:
    """Return the mean unsmoothed cross-entropy per token, in nats, of the dataset's captions."""
    model.eval()
    device = model.embedding.weight.device
    forward = FusedForward(model)
    loss_sum, num_tokens = 0.0, 0
    for features, captions in DataLoader(dataset, batch_size=batch_size):
        captions = captions.to(device)
        targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
        logits, _ = forward(features.to(device).float(), captions)
        loss_sum += cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(targets)
    return loss_sum / num_tokens


@torch.inference_mode()
def write_captions(
    model: CaptionModel,
    dataset: CaptionDataset,
    vocabulary: Vocabulary,
    options: DecodingOptions,
    language: str,
    *,
    batch_size: int = 64,
) -> tuple[list[str], Tensor]:
    """Return the caption that the model writes for each photo, as cleaned text.

    Also returns (N, F), the ``confidence_features`` of each.
    """
    model.eval()
    device = model.embedding.weight.device
    bad_endings, may_double = vocabulary.bad_endings(language), vocabulary.characters()
    texts, features_of_texts = [], []
    for features, _ in tqdm(
        DataLoader(dataset, batch_size=batch_size), desc="captions", unit="batch", leave=False
    ):
        state, memory = model.start(features.to(device).float())
        results = decode(
            model.step, state, memory, options, bad_endings=bad_endings, may_double=may_double
        )
        best = [beams[0] for beams in results]
        texts += [vocabulary.decode(each.ids) for each in best]
        features_of_texts.append(confidence_features(model, memory, best))
    return texts, torch.cat(features_of_texts)


def _display(texts: Sequence[str]) -> list[str]:
    """Return cleaned texts as people write them: no spaces between Chinese characters."""
    return [INNER_SPACE.sub("", text) for text in texts]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint, and its captions.

    Attributes:
        conditions: data, split, photos, references per photo, tokenization and decoding.
        cross_entropy: unsmoothed, in nats per token, over all references.
        scores: of ``captions``, by the names of ``metrics.score_captions``.
        report_scores: of ``report_captions``: plain greedy decoding, as in the original report.
        invented_people: how many of ``captions`` mention people where no reference does, and how
            many photos have no such reference; None if that is all of them, or not in English.
        reliability: of the confidence in ``captions``, None if the checkpoint has no confidence.
        maps: how well the maps of the words point, None if they were not tested.
        photos: the split.
        rows: of the readable photos in the split.
        names: of the readable photos.
        captions: one per photo, by the decoding of ``conditions``.
        report_captions: one per photo.
        references: of each photo, cleaned.
    """

    conditions: dict[str, Any]
    cross_entropy: float
    scores: dict[str, float]
    report_scores: dict[str, float]
    invented_people: tuple[int, int] | None
    reliability: Reliability | None
    maps: list[MapScore] | None
    photos: CaptionedPhotos
    rows: list[int]
    names: list[str]
    captions: list[str]
    report_captions: list[str]
    references: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the captions grouped by photo."""
        photos = [
            {"name": name, "caption": caption, "report_caption": report, "references": references}
            for name, caption, report, references in zip(
                self.names, self.captions, self.report_captions, self.references, strict=True
            )
        ]
        fields = ("conditions", "cross_entropy", "scores", "report_scores")
        reliability = self.reliability and dataclasses.asdict(self.reliability)
        people = self.invented_people
        return {
            **{name: getattr(self, name) for name in fields},
            "invented_people": people and {"captions": people[0], "photos": people[1]},
            "confidence": reliability,
            "maps": self.maps and [dataclasses.asdict(score) for score in self.maps],
            "photos": photos,
        }


@torch_defaults()
def evaluate_checkpoint(
    checkpoint: Checkpoint,
    source: str,
    split: str,
    options: DecodingOptions,
    *,
    encoder_weights: str | None = None,
    limit: int = 0,
    columns: Columns | None = None,
    cache: Path = FEATURES_FOLDER,
    device: str = "cpu",
    maps: bool = False,
) -> Evaluation:
    """Score a checkpoint on one split, every photo against all of its references.

    ``maps`` says whether to test the maps of its words too, which takes minutes.

    Raises:
        CaptionerError: the data, the encoder's weights or the checkpoint do not allow it.
    """
    photos = load_captions(source, split, limit=limit, columns=columns)
    encoder = load_encoder(str(checkpoint.encoder["name"]), encoder_weights)
    checkpoint.check_encoder(encoder.spec())
    checkpoint.model.to(encoder.to(choose_device(device)).device)
    features = cache_features(encoder, photos, cache)
    references = [photos.captions[row] for row in features.readable]
    names = photos.names()
    model, vocabulary, max_length = checkpoint.model, checkpoint.vocabulary, checkpoint.max_length
    # The cross-entropy is of captions cut to the model's length; the references stay whole.
    dataset = CaptionDataset(
        features.array, features.readable, references, vocabulary, max_length=max_length
    )
    language = checkpoint.recipe.get("language", DEFAULT_LANGUAGE)
    report = dataclasses.replace(DecodingOptions.plain_greedy(), max_length=max_length)
    captions, confidence_inputs = write_captions(model, dataset, vocabulary, options, language)
    report_captions, _ = write_captions(model, dataset, vocabulary, report, language)
    reliability = None
    if checkpoint.confidence is not None:
        reliability = Reliability.of(
            confidence_of(confidence_inputs, checkpoint.confidence),
            are_right(captions, references, visual_words(model.config, vocabulary)),
        )
    people = invented_people(captions, references)
    counts = sorted({len(texts) for texts in references})
    return Evaluation(
        conditions={
            "data": source,
            "split": photos.split,
            "photos": len(references),
            "references_per_photo": counts[0] if len(counts) == 1 else [counts[0], counts[-1]],
            "tokenization": "lower case, punctuation removed, split at spaces; references not cut",
            "decoding": options.to_dict(),
            "report_decoding": report.to_dict(),
        },
        cross_entropy=cross_entropy_of(model, dataset),
        scores=score_cleaned_captions(captions, references),
        report_scores=score_cleaned_captions(report_captions, references),
        invented_people=people if is_english(language) and people[1] < len(references) else None,
        reliability=reliability,
        maps=score_maps(checkpoint, encoder, photos, features, captions) if maps else None,
        photos=photos,
        rows=features.readable,
        names=[names[row] for row in features.readable],
        captions=_display(captions),
        report_captions=_display(report_captions),
        references=[_display(texts) for texts in references],
    )
