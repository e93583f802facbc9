"""About how long a training run will take on this machine, timed on a step of each kind."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from captioner import self_critical
from captioner.config import BOS, EOS, DecodingOptions, TrainConfig
from captioner.decoding import decode
from captioner.encoders import GRID, Encoder
from captioner.model import CaptionModel

_LENGTH = 13  # ids of a usual caption, <bos> and <eos> included
_PHOTOS = 8  # enough to time the encoder
_SCORED = 64  # photos that are captioned at once when an epoch is scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done.

    Attributes:
        passes: photos that the encoder has to see.
        photos: of an epoch.
        captions: of a photo.
        texts: rows of captions without photos.
        validation: photos scored after each epoch.
        words: V.
    """

    passes: int
    photos: int
    captions: int
    texts: int
    validation: int
    words: int


def _seconds(do: Callable[[], object]) -> float:
    """Time the second of two calls; the first one warms up."""
    do()
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def forecast(config: TrainConfig, encoder: Encoder, work: Work, processes: int = 1) -> str:
    """Return a line on the time that is left, features first. Draws random numbers.

    All processes are taken to be as fast as this one is now, beside the others.
    """
    device = encoder.device
    size, length = encoder.transform.size, min(_LENGTH, config.max_length)
    model = CaptionModel(
        config.model_config(vocabulary_size=work.words, encoder_channels=encoder.channels)
    ).to(device)

    def features(photos: int, cells: int = GRID * GRID) -> torch.Tensor:
        return torch.randn(photos, cells, encoder.channels, device=device)

    def learn(loss: torch.Tensor) -> None:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def see() -> None:
        encoder(torch.randn(_PHOTOS, 3, size, size))

    def read(cells: int = GRID * GRID) -> None:
        captions = torch.randint(
            4, work.words, (config.batch_size, work.captions, length), device=device
        )
        captions[..., 0] = BOS
        captions[..., -1] = EOS
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            logits, _ = model(features(config.batch_size, cells), captions)
        learn(cross_entropy(logits.float(), captions[..., 1:].flatten()))

    def write() -> None:
        given, temperature = features(config.reward_batch_size), config.reward_temperature
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            captions = self_critical.draw(
                model,
                given,
                samples=config.reward_samples,
                temperature=temperature,
                max_length=length,
            )
            rewards = torch.rand(captions.shape[:2])
            loss = self_critical.loss(model, given, captions, rewards, temperature=temperature)
        learn(loss)

    @torch.inference_mode()
    def score() -> None:
        options = DecodingOptions() if config.select_by == "cider" else DecodingOptions.report()
        state, memory = model.start(features(_SCORED))
        decode(model.step, state, memory, dataclasses.replace(options, max_length=length))

    photos = work.photos / processes
    step = _seconds(read) / config.batch_size
    text_step = _seconds(lambda: read(cells=1)) / config.batch_size if work.texts else 0.0
    scoring = _seconds(score) / _SCORED * work.validation
    parts = {
        f"the features of {work.passes:,} photos": _seconds(see)
        / _PHOTOS
        * work.passes
        / processes,
        f"{_epochs(config.text_epochs)} of text": bool(work.texts)
        * config.text_epochs
        * (text_step * (work.texts / processes + photos) + scoring),
        _epochs(config.epochs): config.epochs * (step * photos + scoring),
    }
    if config.reward_epochs:
        reward = _seconds(write) / config.reward_batch_size
        parts[f"{_epochs(config.reward_epochs)} of rewards"] = config.reward_epochs * (
            reward * photos + scoring
        )
    named = ", ".join(f"{_minutes(part)} for {name}" for name, part in parts.items() if part)
    return f"the whole run takes about {_minutes(sum(parts.values()))}: {named}"


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count != 1 else ''}"


def _minutes(seconds: float) -> str:
    """Return a duration in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
