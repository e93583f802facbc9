"""Checkpoints: a folder with model.safetensors, config.json and a model card. No pickle."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from captioner.config import ModelConfig
from captioner.errors import CaptionerError, CheckpointError
from captioner.model import CaptionModel
from captioner.vocab import Vocabulary

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_FIELDS = ("format", "model", "vocabulary", "max_length", "encoder", "recipe", "metrics")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained decoder with all that is needed to use it.

    Attributes:
        model: the decoder, in ``eval()``.
        vocabulary: its words.
        max_length: ids a caption had in training, ``<bos>`` and ``<eos>`` included.
        encoder: the encoder's ``spec()``: name, transform, channels, grid, SHA-256 of its weights.
        recipe: the settings it was trained with.
        metrics: validation scores.
    """

    model: CaptionModel
    vocabulary: Vocabulary
    max_length: int
    encoder: dict[str, Any]
    recipe: dict[str, Any]
    metrics: dict[str, Any]

    def check_encoder(self, spec: dict[str, Any]) -> None:
        """Refuse an encoder whose ``spec()`` is not the one of training."""
        # JSON has no tuples, so both sides are compared as JSON knows them.
        own, spec = json.loads(json.dumps([self.encoder, spec]))
        for field in ("name", "channels", "grid", "transform", "sha256"):
            if own.get(field) != spec.get(field):
                if field == "sha256":
                    raise CheckpointError(
                        f"the weights of {spec['name']} are not those that this checkpoint was "
                        f"trained with (SHA-256 {spec['sha256'][:12]}…, not "
                        f"{str(own.get(field))[:12]}…): give the right file with "
                        "--encoder-weights"
                    )
                raise CheckpointError(
                    f"the checkpoint's encoder has {field} {own.get(field)!r}, this one "
                    f"{spec.get(field)!r}: train again, or install the version it was made with"
                )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``, weights in float16; the folder appears whole or not."""
    config = {
        "format": FORMAT,
        "model": checkpoint.model.config.to_dict(),
        "vocabulary": checkpoint.vocabulary.idx2word,
        "max_length": checkpoint.max_length,
        "encoder": checkpoint.encoder,
        "recipe": checkpoint.recipe,
        "metrics": checkpoint.metrics,
    }
    state = checkpoint.model.state_dict()
    if checkpoint.model.config.tied_embedding:
        del state["fc.weight"]  # safetensors stores no tensor twice
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error.strerror}") from error
    try:
        half = {name: tensor.cpu().half().contiguous() for name, tensor in state.items()}
        save_file(half, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner alone
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (partial / CONFIG).write_text(text, encoding="utf-8")
        (partial / CARD).write_text(model_card(checkpoint), encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            # A folder cannot be replaced in one step; the old one stays until the new one stands.
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.replace(old)
            try:
                partial.replace(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            partial.replace(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find(path_or_hub_id: str | Path) -> Path:
    """Return a checkpoint's folder: a local one, or a download from the Hugging Face Hub."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with {CONFIG}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"there is no checkpoint folder {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except Exception as error:
        raise CheckpointError(
            f"there is no folder {name}, and it could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): check the name and your internet connection"
        ) from error


def load(path_or_hub_id: str | Path) -> Checkpoint:
    """Load a checkpoint, checked throughout.

    Raises:
        CheckpointError: it is missing, truncated, damaged, foreign or newer than this version.
    """
    folder = find(path_or_hub_id)
    config = _read_config(folder / CONFIG)
    try:
        model_config = ModelConfig.from_dict(config["model"])
        vocabulary = Vocabulary(config["vocabulary"])
    except (CaptionerError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: {error}") from error
    if len(vocabulary) != model_config.vocabulary_size:
        raise CheckpointError(
            f"{folder / CONFIG} is damaged: {len(vocabulary)} words for a model of "
            f"{model_config.vocabulary_size}"
        )
    # Without memory until the file has shown that it has the shapes that the config asks for.
    with torch.device("meta"):
        model = CaptionModel(model_config)
    _load_weights(model, folder / WEIGHTS)
    return Checkpoint(
        model.eval(),
        vocabulary,
        config["max_length"],
        config["encoder"],
        config["recipe"],
        config["metrics"],
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json, or say what is wrong with it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CheckpointError(f"{path} is not a captioner checkpoint: it names no format")
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{path.parent} has format {config['format']}, newer than the {FORMAT} that this "
            "version reads: update captioner"
        )
    kinds = {"model": dict, "vocabulary": list, "max_length": int, "encoder": dict}
    for field in _FIELDS:
        if field not in config:
            raise CheckpointError(f"{path} is damaged: it lacks {field!r}")
        if not isinstance(config[field], kinds.get(field, object)):
            raise CheckpointError(f"{path} is damaged: {field!r} is of the wrong type")
    if not all(isinstance(word, str) for word in config["vocabulary"]):
        raise CheckpointError(f"{path} is damaged: 'vocabulary' holds what is no word")
    if not isinstance(config["encoder"].get("name"), str):
        raise CheckpointError(f"{path} is damaged: 'encoder' has no name")
    return config


def _load_weights(model: CaptionModel, path: Path) -> None:
    """Fill ``model`` from a safetensors file, or name the first tensor that is wrong."""
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}): copy or download it again"
        ) from error
    expected = model.state_dict()
    if model.config.tied_embedding and "embedding.weight" in state:
        state["fc.weight"] = state["embedding.weight"]
    for name in sorted(set(expected) | set(state)):
        if name not in state or name not in expected:
            lack = "lacks" if name not in state else "holds an unknown"
            raise CheckpointError(f"{path} does not fit its {CONFIG}: it {lack} {name}")
        if state[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path} does not fit its {CONFIG}: {name} is {tuple(state[name].shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{path} is damaged: {name} holds values that are not finite")
    weights = {name: tensor.float() for name, tensor in state.items()}
    if model.config.tied_embedding:
        weights["fc.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    if model.config.tied_embedding:
        model.fc.weight = model.embedding.weight


_FLICKR = (
    "It knows the scenes of its training photos: everyday snapshots, many of people and dogs "
    "outdoors. ",
    "The photos of Flickr8k and Flickr30k belong to their owners on Flickr; the data sets are "
    "given out for research and education. Take this checkpoint under the same terms. ",
)
_OTHER = (
    "It knows the scenes of its training photos. ",
    "The terms of the photos and captions that it was trained on apply. ",
)


def model_card(checkpoint: Checkpoint) -> str:
    """Return the README.md that goes with a checkpoint."""
    recipe = checkpoint.recipe
    scene, terms = _FLICKR if "flickr" in recipe["data"].lower() else _OTHER
    names = {"epoch": "epoch chosen", "val_loss": "cross-entropy"}
    numbers = [
        f"| {names.get(name, name.replace('_', ' '))} | {value:.4g} |"
        for name, value in checkpoint.metrics.items()
    ]
    return "\n".join(
        [
            "---",
            "tags: [image-captioning, attention, pytorch]",
            "---",
            "",
            "# Image captions with attention",
            "",
            f"A frozen `{checkpoint.encoder['name']}` gives 7 x 7 vectors; an LSTM of "
            f"{checkpoint.model.config.hidden_size} units writes an English caption of at most "
            f"{checkpoint.max_length - 2} words, looking at the photo anew for each.",
            "",
            f"Vocabulary: {len(checkpoint.vocabulary):,} entries. Recipe: `{recipe['recipe']}`, "
            f"seed {recipe.get('seed', 'unknown')}. Trained on: `{recipe['data']}`"
            + (
                f", after reading the captions of `{recipe['text']}`."
                if recipe.get("text")
                else "."
            ),
            "",
            "## Scores on the validation photos",
            "",
            "BLEU, CIDEr (CIDEr-D) and ROUGE-L x 100 of free captions against all references; "
            "cross-entropy in nats a word, unsmoothed. The epoch was chosen on these photos.",
            "",
            "| score | value |",
            "| --- | ---: |",
            *numbers,
            "",
            "## Limits",
            "",
            f"{scene}Of anything else it makes the nearest thing it knows, and says so with "
            "confidence. It miscounts, mixes up colours, guesses people's sex and age from looks "
            "and repeats what its captions assumed about them. Don't use it to identify or judge "
            "people, or where a wrong caption does harm. A heat map shows where the decoder read "
            "for a word and is no proof of cause.",
            "",
            "## Terms",
            "",
            f"{terms}The encoder's weights come under their own licence and are not part of this "
            "folder.",
            "",
        ]
    )
