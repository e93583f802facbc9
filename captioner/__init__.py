"""Caption photos and show where the model looked for each word.

    >>> from captioner import Captioner
    >>> caption = Captioner.from_pretrained().caption("photo.jpg")
    >>> caption.text, caption.attention.shape

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioner.environment import use_writable_caches

if TYPE_CHECKING:
    from captioner.config import DecodingOptions, ModelConfig, TrainConfig
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
    from captioner.inference.caption import Beam, Caption, Word
    from captioner.inference.captioner import Captioner
    from captioner.model.encoder import load_encoder
    from captioner.model.vocabulary import Vocabulary

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

_EXPORTS = {
    "inference.caption": ("Beam", "Caption", "Word"),
    "config": ("DecodingOptions", "ModelConfig", "TrainConfig"),
    "model.encoder": ("load_encoder",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "inference.captioner": ("Captioner",),
    "model.vocabulary": ("Vocabulary",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
