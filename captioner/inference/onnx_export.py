"""Export a checkpoint as ONNX: three models, their settings, and a script that needs no PyTorch."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from captioner.config import BOS, EOS, PAD, UNK
from captioner.environment import torch_defaults
from captioner.errors import ConfigError
from captioner.files import atomic_dir
from captioner.inference.captioner import Captioner
from captioner.model import checkpoint as checkpoints
from captioner.model.decoder import CaptionModel, Memory, State
from captioner.model.encoder import GRID, Encoder

EXAMPLE = "caption.py"
_SCRIPT = Path(__file__).with_name("onnx_example.py")


class _Encoder(nn.Module):
    """Images (B, 3, S, S) -> cells (B, P, C)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.to_cells(images)


class _Start(nn.Module):
    """Cells (B, P, C) -> the state before the first word, (B, 1, H) each, and the memory."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, cells: Tensor) -> tuple[Tensor, ...]:
        state, memory = self.model.start(cells)
        return *state, *memory


class _Step(nn.Module):
    """The previous words (B, W), state and memory -> log-probabilities, attention, next state."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_ids: Tensor, hidden: Tensor, cell: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        logits, attention, state = self.model.step(token_ids, State(hidden, cell), Memory(*memory))
        return logits.log_softmax(dim=-1), attention, *state


@torch_defaults()
@torch.no_grad()
def write_onnx(folder: Path, captioner: Captioner) -> None:
    """Write a captioner as ONNX. ``folder`` appears whole or not at all.

    ``encoder.onnx`` maps images to cells, ``start.onnx`` cells to the state before the first word,
    and ``step.onnx`` the previous words to the probabilities of the next. The number of photos (B)
    and of captions side by side (W) is free. ``config.json`` holds the vocabulary and the
    preprocessing, and ``caption.py`` shows how to use them.

    Args:
        folder: must be empty or missing.
        captioner: on the CPU.

    Raises:
        ConfigError: ``folder`` is not empty, or a package is missing.
        WriteError: ``folder`` cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: choose another --onnx")
    try:
        import onnxscript  # noqa: F401 -- what torch.onnx exports with
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, which writes ONNX: pip install onnxscript, or the "
            "package with its extra: pip install '.[onnx]'"
        ) from error
    checkpoint, transform = captioner.checkpoint, captioner.encoder.transform
    model, vocabulary = checkpoint.model, checkpoint.vocabulary
    config = {
        "vocabulary": vocabulary.idx2word,
        "language": captioner.language,
        "max_length": checkpoint.max_length,  # <bos> and <eos> included
        "bos": BOS,
        "eos": EOS,
        "never_written": [PAD, BOS, UNK],
        "bad_endings": vocabulary.bad_endings(captioner.language),
        "may_double": vocabulary.characters(),
        "grid": checkpoint.encoder["grid"],
        "transform": checkpoint.encoder["transform"],
    }
    photos, captions = Dim("photos"), Dim("captions")
    # Sizes other than 0 and 1, which torch would take for constants.
    images = torch.zeros(2, 3, transform.size, transform.size)
    cells = torch.zeros(2, GRID**2, captioner.encoder.channels)
    state, memory = model.start(cells, 3)
    state_names = ("hidden", "cell")
    with atomic_dir(folder) as partial:
        _export(
            _Encoder(captioner.encoder),
            (images,),
            partial / "encoder.onnx",
            inputs=["images"],
            outputs=["cells"],
            dynamic_shapes={"images": {0: photos}},
        )
        _export(
            _Start(model),
            (cells,),
            partial / "start.onnx",
            inputs=["cells"],
            outputs=[*state_names, *Memory._fields],
            dynamic_shapes={"cells": {0: photos}},
        )
        of_captions = {0: photos, 1: captions}
        _export(
            _Step(model),
            (torch.full((2, 3), BOS), *state, *memory),
            partial / "step.onnx",
            inputs=["token_ids", *state_names, *Memory._fields],
            outputs=["log_probabilities", "attention", *(f"next_{name}" for name in state_names)],
            dynamic_shapes={
                **dict.fromkeys(("token_ids", *state_names), of_captions),
                "memory": ({0: photos},) * len(memory),
            },
        )
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (partial / checkpoints.CONFIG).write_text(text, encoding="utf-8")
        (partial / checkpoints.CARD).write_text(checkpoint.card, encoding="utf-8")
        shutil.copy(_SCRIPT, partial / EXAMPLE)


def _export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    file: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: dict[str, Any],
) -> None:
    """Write one model; its weights are in the file itself."""
    with warnings.catch_warnings():
        # That inputs share the names of their sizes, as they should.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        torch.onnx.export(
            module.eval(),
            arguments,
            file,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
