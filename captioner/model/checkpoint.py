"""Checkpoints: a folder with model.safetensors, config.json and a model card. No pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from captioner.config import DEFAULT_LANGUAGE, DecodingOptions, ModelConfig, is_language
from captioner.environment import cache_access, torch_defaults
from captioner.errors import CaptionerError, CheckpointError, first_line, hub_reason
from captioner.files import atomic_dir
from captioner.model.card import model_card
from captioner.model.confidence import num_features
from captioner.model.decoder import CaptionModel
from captioner.model.vocabulary import Vocabulary

FORMAT = 2
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_FIELDS: dict[str, type] = {
    "format": int,
    "weights_sha256": str,
    "model": dict,
    "vocabulary": list,
    "max_length": int,
    "encoder": dict,
    "recipe": dict,
    "metrics": dict,
}
_ENCODER_FIELDS: dict[str, type] = {
    "name": str,
    "channels": int,
    "grid": list,
    "transform": dict,
    "sha256": str,
}
_RECIPE_FIELDS: dict[str, type] = {"recipe": str, "data": list}
# Limits in bytes that no real file reaches: config.json with a million words, weights' header.
_MAX_CONFIG, _MAX_HEADER = 32_000_000, 1_000_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained decoder with everything needed to use it.

    Attributes:
        model: the decoder, in ``eval()``.
        vocabulary: its words.
        max_length: ids per caption in training, ``<bos>`` and ``<eos>`` included.
        encoder: the encoder's ``spec()``: name, transform, channels, grid, SHA-256 of its weights.
        recipe: the settings it was trained with.
        metrics: validation scores.
        confidence: the weights for ``confidence_of``, or None.
    """

    model: CaptionModel
    vocabulary: Vocabulary
    max_length: int
    encoder: dict[str, Any]
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    confidence: list[float] | None = None

    @property
    def card(self) -> str:
        """The model card: Markdown with front matter."""
        return model_card(
            encoder_name=self.encoder["name"],
            hidden_size=self.model.config.hidden_size,
            vocabulary_size=len(self.vocabulary),
            max_length=self.max_length,
            recipe=self.recipe,
            metrics=self.metrics,
            has_names=bool(self.model.config.class_names),
            has_confidence=self.confidence is not None,
        )

    def check_encoder(self, spec: dict[str, Any]) -> None:
        """Raise ``CheckpointError`` if ``spec`` is not that of the encoder used in training."""
        # JSON has no tuples: compare both sides after a round trip.
        own, spec = json.loads(json.dumps([self.encoder, spec]))
        for field in _ENCODER_FIELDS:
            if own.get(field) == spec[field]:
                continue
            if field == "sha256":
                raise CheckpointError(
                    f"the weights of {spec['name']} are not those that this checkpoint was trained "
                    f"with (SHA-256 {reprlib.repr(spec[field])}, not "
                    f"{reprlib.repr(own.get(field))}): pass the right file with --encoder-weights"
                )
            raise CheckpointError(
                f"the checkpoint's encoder has {field} {reprlib.repr(own.get(field))}, this "
                f"one {spec[field]!r}: train again, or install the version it was made with"
            )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``, weights in float16, whole or not at all.

    Raises:
        WriteError: the folder cannot be written; an earlier checkpoint there stays.
    """
    state = checkpoint.model.state_dict()
    if checkpoint.model.config.tied_embedding:
        del state["fc.weight"]  # safetensors stores no tensor twice
    half = {name: tensor.cpu().half().contiguous() for name, tensor in state.items()}
    weights = safetensors.torch.save(half)
    config = {
        "format": FORMAT,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": checkpoint.model.config.to_dict(),
        "vocabulary": checkpoint.vocabulary.idx2word,
        "max_length": checkpoint.max_length,
        "encoder": checkpoint.encoder,
        "recipe": checkpoint.recipe,
        "metrics": checkpoint.metrics,
        "confidence": checkpoint.confidence,
    }
    with atomic_dir(folder, f"the checkpoint {folder}") as partial:
        (partial / WEIGHTS).write_bytes(weights)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (partial / CONFIG).write_text(text, encoding="utf-8")
        (partial / CARD).write_text(checkpoint.card, encoding="utf-8")


def find(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a checkpoint, local or downloaded from the Hugging Face Hub.

    Args:
        path_or_hub_id: a folder, or the Hub's "user/name" or "user/name@revision".
    """
    name = str(path_or_hub_id)
    try:
        path = Path(path_or_hub_id).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, RuntimeError):  # not a possible folder name, or an unknown ~user
        is_file = False
    if is_file:
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with {CONFIG}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        raise CheckpointError(f"there is no checkpoint folder {name}")
    return _download(name)


@cache_access()
def _download(name: str) -> Path:
    """Fetch a checkpoint, "user/name" or "user/name@revision", unless the cache has it."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG, CARD]
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"there is no folder {name}, and it cannot be downloaded from the Hugging Face Hub: "
            f"{hub_reason(error, repository)}"
        ) from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name} of the Hub is no captioner checkpoint: it has no {CONFIG}")
    return folder


@torch_defaults()
def load(path_or_hub_id: str | Path) -> Checkpoint:
    """Load a checkpoint from a folder or the Hub, validating all of it.

    Raises:
        CheckpointError: it is missing, truncated, damaged, foreign or newer than this version.
    """
    folder = find(path_or_hub_id)
    path = folder / CONFIG
    config = _read_config(path)
    try:
        model_config = ModelConfig.from_dict(config["model"])
        vocabulary = Vocabulary(config["vocabulary"])
        DecodingOptions(max_length=config["max_length"])
    except CaptionerError as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)[:160]}") from error
    if len(vocabulary) != model_config.vocabulary_size:
        raise CheckpointError(
            f"{path} is damaged: {len(vocabulary)} words for a model of "
            f"{model_config.vocabulary_size}"
        )
    if config["encoder"]["channels"] != model_config.encoder_channels:
        raise CheckpointError(
            f"{path} is damaged: an encoder of {config['encoder']['channels']} channels for a "
            f"model of {model_config.encoder_channels}"
        )
    confidence = config.get("confidence")
    if confidence is not None:
        _check_confidence(confidence, 1 + num_features(model_config), path)
    # On "meta" it takes no memory; the weights' shapes are checked before any is allocated.
    with torch.device("meta"):
        model = CaptionModel(model_config)
    _load_weights(model, folder / WEIGHTS, config["weights_sha256"])
    return Checkpoint(
        model.eval(),
        vocabulary,
        config["max_length"],
        config["encoder"],
        config["recipe"],
        config["metrics"],
        confidence,
    )


def _read(path: Path, max_bytes: int) -> bytes:
    """Read a file of at most ``max_bytes``; a larger one is not even opened."""
    if not path.is_file():
        inner = path.parent / "checkpoint"
        hint = f"; give {inner}" if (inner / path.name).is_file() else ""
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}{hint}")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(
                f"{path} is damaged: {size} bytes, expected at most {max_bytes}: copy or download "
                "it again"
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; of two fields with the same name Python would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it has a field twice")
    return values


def _read_config(path: Path) -> dict[str, Any]:
    """Read and validate config.json."""
    try:
        text = _read(path, _MAX_CONFIG).decode()
        config = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)[:160]}") from error
    if not isinstance(config, dict) or type(config.get("format")) is not int:
        raise CheckpointError(f"{path} is not a captioner checkpoint: it has no format number")
    if config["format"] != FORMAT:
        newer = config["format"] > FORMAT
        raise CheckpointError(
            f"{path.parent} has format {reprlib.repr(config['format'])}, "
            f"{'newer than' if newer else 'not'} the {FORMAT} that this version reads: "
            + ("update captioner" if newer else "copy or download it again")
        )
    _check_fields(config, _FIELDS, path)
    _check_fields(config["encoder"], _ENCODER_FIELDS, path)
    _check_fields(config["recipe"], _RECIPE_FIELDS, path)
    data = config["recipe"]["data"]
    if not data or not all(isinstance(source, str) for source in data):
        raise CheckpointError(f"{path} is damaged: 'data' of 'recipe' is not a list of sources")
    if not is_language(config["recipe"].get("language", DEFAULT_LANGUAGE)):
        raise CheckpointError(f"{path} is damaged: 'language' of 'recipe' is not a language tag")
    if not all(isinstance(word, str) for word in config["vocabulary"]):
        raise CheckpointError(f"{path} is damaged: 'vocabulary' holds values that are not text")
    for name, value in config["metrics"].items():
        # Not math.isfinite, which raises for an integer too large for a float.
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise CheckpointError(
                f"{path} is damaged: {reprlib.repr(name)} of 'metrics' is not a number"
            )
    return config


def _check_fields(values: dict[str, Any], kinds: dict[str, type], path: Path) -> None:
    """Raise for a missing field or one of the wrong type; a bool is not an int here."""
    for field, kind in kinds.items():
        if field not in values:
            raise CheckpointError(f"{path} is damaged: it lacks {field!r}")
        if type(values[field]) is not kind:
            raise CheckpointError(f"{path} is damaged: {field!r} is of the wrong type")


def _check_confidence(values: Any, length: int, path: Path) -> None:
    """Raise unless ``values`` are as many numbers as the model's confidence has weights."""
    if type(values) is not list or len(values) != length:
        raise CheckpointError(f"{path} is damaged: 'confidence' is not a list of {length} numbers")
    for value in values:
        # Within the limits no sum of products overflows.
        if type(value) not in (int, float) or not -1e6 < value < 1e6:
            raise CheckpointError(
                f"{path} is damaged: {reprlib.repr(value)} in 'confidence' is out of range"
            )


def _load_weights(model: CaptionModel, path: Path, sha256: str) -> None:
    """Load a safetensors file into ``model``; an error names the first wrong tensor."""
    expected = model.state_dict()
    if model.config.tied_embedding:
        del expected["fc.weight"]
    bytes_expected = sum(2 * tensor.numel() for tensor in expected.values())
    data = _read(path, bytes_expected + _MAX_HEADER)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} is truncated, damaged or from another checkpoint: its SHA-256 differs from "
            f"the one in {CONFIG}; copy or download the checkpoint again"
        )
    try:
        state = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({first_line(error)[:160]}): copy or download it "
            "again"
        ) from error
    _check_tensors(state, expected, path)
    weights = {name: tensor.float() for name, tensor in state.items()}
    if model.config.tied_embedding:
        weights["fc.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    if model.config.tied_embedding:
        model.fc.weight = model.embedding.weight


def _check_tensors(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise for the first missing, unknown, misshapen, mistyped or non-finite tensor."""
    for name in sorted(set(expected) | set(state)):
        if name not in state:
            raise CheckpointError(f"{path} does not fit its {CONFIG}: it lacks {name}")
        if name not in expected:
            raise CheckpointError(
                f"{path} does not fit its {CONFIG}: it holds an unknown {reprlib.repr(name)}"
            )
        if state[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path} does not fit its {CONFIG}: {name} is {tuple(state[name].shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
        if state[name].dtype != torch.float16:
            raise CheckpointError(
                f"{path} is damaged: {name} is {state[name].dtype}, not torch.float16"
            )
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{path} is damaged: {name} holds values that are not finite")
