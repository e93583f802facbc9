"""ONNX models: PyTorch's numbers, and our captions from the script beside them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner import Captioner, DecodingOptions, Vocabulary
from captioner.__main__ import main
from captioner.config import BOS
from captioner.inference.onnx_export import EXAMPLE, write_onnx
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import State
from captioner.model.encoder import Encoder
from captioner.model.vocabulary import SPECIALS
from tests.model.tiny import REPORT, VOCABULARY, make_model

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module", params=["report", "words"])
def tiny(request: pytest.FixtureRequest, tiny_encoder: Callable[..., Encoder]) -> Captioner:
    """A captioner of random weights that writes long captions, plain or with names and evidence."""
    encoder = tiny_encoder(interpolation="bicubic")
    options = REPORT if request.param == "report" else {"words": True, "deep_output": True}
    model = make_model(**{**options, "encoder_channels": encoder.channels}).eval()
    vocabulary = Vocabulary([*SPECIALS, "a", "of", *"bcdefghijklmnopqrs"][:VOCABULARY])
    recipe = {"recipe": "best", "data": ["photos"]}
    return Captioner(Checkpoint(model, vocabulary, 9, encoder.spec(), recipe, {}), encoder)


@pytest.fixture(scope="module")
def folder(tiny: Captioner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "models"
    write_onnx(folder, tiny)
    return folder


def import_example(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("onnx_caption", folder / EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_captions(folder: Path, captioner: Captioner, photos: list[Path]) -> None:
    example = import_example(folder)
    options = DecodingOptions(max_length=captioner.checkpoint.max_length)
    for photo in photos:
        expected = captioner.caption(photo, options)
        words, probabilities, maps = example.caption(photo)
        assert words == [word.text for word in expected.words]
        assert np.allclose(probabilities, [word.probability for word in expected.words], atol=1e-4)
        assert maps.shape == expected.attention.shape
        assert np.allclose(maps, expected.attention, atol=1e-4)


def test_example_writes_our_captions_and_maps(
    folder: Path, tiny: Captioner, example_photos: list[Path]
) -> None:
    assert_same_captions(folder, tiny, example_photos)


@pytest.mark.parametrize("photos", [1, 3])
@pytest.mark.parametrize("captions", [1, 4])
def test_models_give_our_numbers_for_any_batch(
    folder: Path, tiny: Captioner, photos: int, captions: int
) -> None:
    encode, start, step = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx")
        for name in ("encoder", "start", "step")
    )
    model, size = tiny.checkpoint.model, tiny.encoder.transform.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(photos, 3, size, size, generator=generator)
    with torch.inference_mode():
        cells = tiny.encoder(images)
        state, memory = model.start(cells)
        drawn = [
            torch.randn(photos, captions, model.config.hidden_size, generator=generator)
            for _ in range(2)
        ]
        ids = torch.randint(BOS, VOCABULARY, (photos, captions), generator=generator)
        logits, attention, following = model.step(ids, State(*drawn), memory)

    def check(session: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        names = [node.name for node in session.get_inputs()]
        values = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
        for found, expected in zip(session.run(None, values), outputs, strict=True):
            assert found.shape == expected.shape
            assert np.allclose(found, expected.numpy(), atol=1e-4)

    check(encode, [images], [cells])
    check(start, [cells], [*state, *memory])
    expected = [logits.log_softmax(dim=-1), attention, *following]
    check(step, [ids, *drawn, *memory], expected)


def test_settings_hold_vocabulary_and_preprocessing(folder: Path, tiny: Captioner) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["vocabulary"] == tiny.checkpoint.vocabulary.idx2word
    assert config["transform"]["interpolation"] == "bicubic"
    assert config["bad_endings"] == tiny.checkpoint.vocabulary.known_ids(["a", "of"])
    assert (folder / "README.md").read_text(encoding="utf-8") == tiny.checkpoint.card


def test_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "--onnx", str(tmp_path / "models")]) == 2
    assert "pip install onnxscript" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nonempty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["export", "--onnx", str(tmp_path)]) == 2
    assert "choose another --onnx" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_shipped_checkpoint_captions_without_torch(
    captioner: Captioner, example_photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    assert main(["export", "--onnx", str(folder)]) == 0
    assert_same_captions(folder, captioner, example_photos)
    photo = example_photos[0]
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
        "run_name='__main__'); assert not {'torch', 'captioner'} & set(sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, folder / EXAMPLE, photo],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=True,
    ).stdout
    caption = captioner.caption(photo)
    text, *maps = printed.split("\n\n")
    assert text == caption.text
    assert len(maps) == len(caption.words)
    # The title, and a line of two characters per cell for each row.
    assert all([len(line) for line in each.splitlines()[1:]] == [14] * 7 for each in maps)
