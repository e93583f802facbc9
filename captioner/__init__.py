"""Captions for photos, and where the model looked for each word.

    >>> from captioner import Captioner
    >>> caption = Captioner.load().caption("photo.jpg")
    >>> caption.text, caption.attention.shape

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioner.caches import use_writable_caches

if TYPE_CHECKING:
    from captioner.caption import Beam, Caption, Word
    from captioner.config import DecodingOptions, ModelConfig, TrainConfig
    from captioner.encoders import load_encoder
    from captioner.errors import (
        CaptionerError,
        CheckpointError,
        ConfigError,
        DataError,
        EncoderError,
        ImageError,
        TrainingError,
        WriteError,
    )
    from captioner.predictor import Captioner
    from captioner.vocab import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "Beam",
    "Caption",
    "Captioner",
    "CaptionerError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecodingOptions",
    "EncoderError",
    "ImageError",
    "ModelConfig",
    "TrainConfig",
    "TrainingError",
    "Vocabulary",
    "Word",
    "WriteError",
    "load_encoder",
]

# Before any library is imported that looks for its cache.
use_writable_caches()

_ROOMS = {
    "caption": ("Beam", "Caption", "Word"),
    "config": ("DecodingOptions", "ModelConfig", "TrainConfig"),
    "encoders": ("load_encoder",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "predictor": ("Captioner",),
    "vocab": ("Vocabulary",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first used."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
