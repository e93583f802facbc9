"""Checkpoints: saved and loaded, written whole or not at all, rejected with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils._http import hf_raise_for_status
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, WriteError
from captioner.model.checkpoint import Checkpoint, load, save
from captioner.model.confidence import num_features
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import Encoder
from captioner.model.vocabulary import SPECIALS, Vocabulary
from tests.mutation import mutated_bytes, mutated_values

WORDS = [*SPECIALS, "a", "ball", "dog", "häuser", "red", "the"]
REPORT: dict[str, Any] = {}
BEST: dict[str, Any] = {
    "mean_start": True,
    "context_gate": True,
    "deep_output": True,
    "tied_embedding": True,
    "dropout": 0.4,
    "feature_dropout": 0.2,
}
RECOGNIZING: dict[str, Any] = {
    "evidence": True,
    "num_detectors": 3,
    "class_names": [[5], [6, 7], [9]],
    "classifier_channels": 4,
    "kinds": [6],
}


def _make(encoder: Encoder, options: dict[str, Any], seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocabulary_size=len(WORDS),
        encoder_channels=encoder.channels,
        embedding_size=12,
        hidden_size=16,
        attention_size=10,
        **options,
    )
    return Checkpoint(
        CaptionModel(config).eval(),
        Vocabulary(WORDS),
        20,
        encoder.spec(),
        {"recipe": "best", "data": ["photos/flickr8k"], "learning_rate": 1e-3},
        {"epoch": 3, "val_loss": 2.718281, "CIDEr": 55.512},
        [0.5] * (1 + num_features(config)),
    )


@pytest.fixture
def encoder(tiny_encoder: Callable[..., Encoder]) -> Encoder:
    return tiny_encoder()


@pytest.fixture
def folder(tmp_path: Path, encoder: Encoder) -> Path:
    """A good checkpoint, for the tests to damage."""
    save(tmp_path / "checkpoint", _make(encoder, BEST))
    return tmp_path / "checkpoint"


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json in place."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _seal(folder: Path) -> None:
    """Write the digest of the weights as they are into config.json, as a forger would."""
    weights = (folder / "model.safetensors").read_bytes()
    _edit(folder, lambda config: config.update(weights_sha256=hashlib.sha256(weights).hexdigest()))


# Saved and loaded


@pytest.mark.parametrize("options", [REPORT, BEST, RECOGNIZING], ids=["report", "best", "words"])
def test_saved_checkpoint_loads_unchanged(
    tmp_path: Path, encoder: Encoder, options: dict[str, Any]
) -> None:
    saved = _make(encoder, options)
    save(tmp_path / "run" / "checkpoint", saved)
    loaded = load(tmp_path / "run" / "checkpoint")
    assert loaded.model.config == saved.model.config
    assert not loaded.model.training
    assert loaded.vocabulary == saved.vocabulary
    assert loaded.max_length == 20
    assert loaded.recipe == saved.recipe
    assert loaded.metrics == saved.metrics
    assert loaded.confidence == saved.confidence
    loaded.check_encoder(encoder.spec())
    state, expected = loaded.model.state_dict(), saved.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        # float16 keeps 11 bits.
        torch.testing.assert_close(tensor, expected[name], rtol=2**-11, atol=1e-7)
    features, captions = torch.randn(2, 49, 8), torch.tensor([[[1, 4, 8, 6, 2]], [[1, 9, 5, 2, 0]]])
    torch.testing.assert_close(
        loaded.model(features, captions)[0],
        saved.model(features, captions)[0],
        rtol=1e-2,
        atol=1e-2,
    )


def test_saving_a_loaded_checkpoint_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    save(tmp_path / "again", load(folder))
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_tied_matrix_is_stored_once_and_stays_tied(folder: Path) -> None:
    model = load(folder).model
    assert model.fc.weight is model.embedding.weight
    stored = load_file(folder / "model.safetensors")
    assert "fc.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_folder_holds_three_plain_files_and_no_pickle(folder: Path) -> None:
    names = {path.name for path in folder.rglob("*")}
    assert names == {"model.safetensors", "config.json", "README.md"}
    for path in folder.iterdir():
        assert not path.read_bytes().startswith((b"PK", b"\x80"))
    json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_card_names_data_recipe_scores_and_limits(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for text in (
        "flickr8k",
        "best",
        "tiny",
        "CIDEr | 55.51",
        "cross-entropy | 2.718",
        "Limits",
        "Terms",
    ):
        assert text in card


def test_card_names_the_language(folder: Path) -> None:
    checkpoint = load(folder)
    assert "writes an English caption" in checkpoint.card
    recipe = {**checkpoint.recipe, "language": "de"}
    german = dataclasses.replace(checkpoint, recipe=recipe)
    assert "writes a caption (language: de)" in german.card


def test_card_names_all_sources(folder: Path) -> None:
    checkpoint = load(folder)
    data = ["flickr8k", "my_photos=0.3"]
    several = dataclasses.replace(
        checkpoint,
        recipe={**checkpoint.recipe, "data": data},
        metrics={**checkpoint.metrics, "CIDEr my_photos": 12.3, "val_loss my_photos": 3.5},
    )
    for text in (
        "Trained on: `flickr8k`, `my_photos` (0.3 of each epoch).",
        "means over the sources",
        "| CIDEr my_photos | 12.3 |",
        "| cross-entropy my_photos | 3.5 |",
        "Flickr8k and Flickr30k belong",
        "The terms of the photos",
    ):
        assert text in several.card
    assert "people and dogs" not in several.card
    assert "means over the sources" not in checkpoint.card
    assert "The terms of the photos" not in checkpoint.card


def _front_matter(checkpoint: Checkpoint) -> ModelCardData:
    data = ModelCard(checkpoint.card).data
    assert isinstance(data, ModelCardData)
    return data


def test_front_matter_lists_the_model_on_the_hub(folder: Path) -> None:
    checkpoint = load(folder)
    metrics = {"epoch": 3, "CIDEr": 55.512, "ROUGE-L": 40.0}
    one = dataclasses.replace(
        checkpoint,
        recipe={
            **checkpoint.recipe,
            "data": ["owner/name:de@v2"],
            "text": "more",
            "language": "de",
        },
        metrics=metrics,
    )
    data = _front_matter(one)
    assert (data.pipeline_tag, data.library_name) == ("image-to-text", "captioner")
    assert (data.license, data.language) == ("other", "de")
    assert data.datasets == ["owner/name", "more"]
    assert [
        (result.dataset_type, result.metric_type, result.metric_value, result.dataset_split)
        for result in data.eval_results or ()
    ] == [
        ("owner/name", "cider", 55.51, "validation"),
        ("owner/name", "rouge", 40.0, "validation"),
    ]
    several = dataclasses.replace(
        one,
        recipe={**checkpoint.recipe, "data": ["owner/name", "photos=0.3"]},
        metrics={**metrics, "CIDEr name": 1.0, "BLEU-4 photos": 2.0, "val_loss photos": 3.0},
    )
    data = _front_matter(several)
    assert data.datasets == ["owner/name", "photos"]
    # Not the means over both.
    assert [
        (result.dataset_type, result.metric_name, result.metric_value)
        for result in data.eval_results or ()
    ] == [("owner/name", "CIDEr", 1.0), ("photos", "BLEU-4", 2.0)]


def test_front_matter_needs_no_scores(folder: Path) -> None:
    checkpoint = dataclasses.replace(load(folder), metrics={"val_loss": 2.0})
    assert _front_matter(checkpoint).eval_results is None


def test_card_says_what_the_checkpoint_knows(folder: Path, encoder: Encoder) -> None:
    checkpoint = dataclasses.replace(load(folder), confidence=None)
    assert "people and dogs" in checkpoint.card
    for text in ("language model", "ImageNet's 1,000 classes", "Its confidence"):
        assert text not in checkpoint.card
    both = dataclasses.replace(
        _make(encoder, RECOGNIZING),
        recipe={**checkpoint.recipe, "data": ["flickr8k", "everyday=0.3"]},
        confidence=[0.0] * 5,
    )
    for text in (
        "people and dogs outdoors, and on photos of rooms",
        "language model",
        "ImageNet's 1,000 classes",
        "Its confidence",
    ):
        assert text in both.card


# Written whole, or not at all


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
@pytest.mark.parametrize(
    ("method", "call"),
    [("replace", 1), ("replace", 2), ("write_bytes", 1), ("write_text", 1), ("write_text", 2)],
)
def test_interrupted_save_keeps_the_old_checkpoint(
    folder: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    method: str,
    call: int,
) -> None:
    before = load(folder).model.state_dict()
    really, calls = getattr(Path, method), iter(range(1, 100))

    def break_off(path: Path, *arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return really(path, *arguments, **options)

    completed = False
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, break_off)
        try:
            save(folder, _make(encoder, BEST, seed=1))
            completed = True  # it does not call the method so often
        except WriteError as caught:
            assert "No space left" in str(caught)  # noqa: PT017 - one of two ends
        except Killed:
            pass
    after = load(folder).model.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same is not completed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
def test_unwritable_weights_keep_the_old_checkpoint(
    folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def half(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:100])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises((WriteError, Killed)):
            save(folder, _make(encoder, BEST, seed=1))
    assert (folder / "model.safetensors").read_bytes() == before
    load(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_save_replaces_the_old_checkpoint_whole(folder: Path, encoder: Encoder) -> None:
    (folder / "leftover.txt").write_text("of the old one")
    new = _make(encoder, REPORT, seed=1)
    save(folder, new)
    assert load(folder).model.config == new.model.config
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_save_reports_an_unwritable_folder(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="cannot write the checkpoint"):
        save(tmp_path / "file" / "checkpoint", _make(encoder, REPORT))


# Damaged, foreign, newer


@pytest.mark.parametrize("kept", [0, 8, 0.9, -1])
def test_truncated_weights_are_rejected(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated.*download"):
        load(folder)
    _seal(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load(folder)


def test_flipped_bit_anywhere_in_the_weights_is_rejected(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for place in [*range(8), *range(8, len(content), 397), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged.*copy or download"):
            load(folder)


def test_weights_of_another_checkpoint_are_rejected(
    tmp_path: Path, folder: Path, encoder: Encoder
) -> None:
    save(tmp_path / "other", _make(encoder, BEST, seed=1))
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="from another checkpoint"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_of_gigabytes_is_rejected_unread(folder: Path, name: str) -> None:
    os.truncate(folder / name, 10 * 2**30)  # a hole: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: 10737418240 bytes"):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_header_of_ten_gigabytes_is_rejected(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((10 * 2**30).to_bytes(8, "little") + path.read_bytes()[8:])
    _seal(folder)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_named_pipe_is_rejected_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"[" * 100_000, b"9" * 5_000],
)
def test_config_that_is_not_a_json_object_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BlipForConditionalGeneration"], "model_type": "blip"},
        {"format": "1", "model": {}},
        {"format": True},
    ],
)
def test_foreign_config_is_rejected(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not a captioner checkpoint"):
        load(folder)


def test_folder_of_a_run_names_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    shutil.copytree(folder, run / "checkpoint")
    with pytest.raises(CheckpointError, match=r"has no config.json; give .*a run/checkpoint"):
        load(run)


def test_newer_format_asks_for_an_update(folder: Path) -> None:
    _edit(folder, lambda config: config.update(format=3))
    with pytest.raises(CheckpointError, match=r"format 3, newer than the 2 .*update captioner"):
        load(folder)


def test_unknown_format_is_rejected(folder: Path) -> None:
    _edit(folder, lambda config: config.update(format=0))
    with pytest.raises(CheckpointError, match="has format 0, not the 2"):
        load(folder)


def test_duplicate_field_is_rejected(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace("{", '{"max_length": 3, ', 1))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: it has a field twice"):
        load(folder)


def test_missing_field_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field in config.keys() - {"format", "confidence"}:
        damaged = {name: value for name, value in config.items() if name != field}
        (folder / "config.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"lacks '{field}'"):
            load(folder)


def test_checkpoint_without_confidence_loads(folder: Path) -> None:
    _edit(folder, lambda config: config.pop("confidence"))
    assert load(folder).confidence is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", []),
        ("vocabulary", {"a": 4}),
        ("vocabulary", [*SPECIALS, "a", "a", "b", "c", "d", "e"]),
        ("vocabulary", [*SPECIALS, ["a"], "b", "c", "d", "e", "f"]),
        ("vocabulary", [*SPECIALS, "a", "\ud800", "b", "c", "d", "e"]),
        ("max_length", True),
        ("max_length", 10**9),
        ("encoder", {}),
        ("recipe", {}),
        ("recipe", {"recipe": "best", "data": ["photos"], "language": "<b>"}),
        ("recipe", {"recipe": "best", "data": "photos"}),
        ("recipe", {"recipe": "best", "data": []}),
        ("recipe", {"recipe": "best", "data": ["photos", 5]}),
        ("metrics", {"CIDEr": float("nan")}),
        ("metrics", {"CIDEr": 10**400}),
        ("weights_sha256", 7),
        ("confidence", 0.5),
        ("confidence", [0.5]),
        ("confidence", [0.5, 1, 2]),
        ("confidence", [0.5, "1"]),
        ("confidence", [0.5, True]),
        ("confidence", [0.5, float("nan")]),
        ("confidence", [0.5, 10**400]),
    ],
)
def test_invalid_field_is_rejected(folder: Path, field: str, value: object) -> None:
    _edit(folder, lambda config: config.update({field: value}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 10**9),
        ("mean_start", "no"),
        ("dropout", 2),
        ("colour", "red"),
        ("deep_output", False),
        ("class_names", [[]]),
        ("class_names", [[4, 5, 6]]),
        ("class_names", [[10]]),
        ("class_names", [[4]]),  # without channels that its classifier reads
        ("kinds", [-1]),
        ("kinds", [4] * 7),
        ("num_detectors", 7),
    ],
)
def test_impossible_model_config_is_rejected(folder: Path, name: str, value: object) -> None:
    _edit(folder, lambda config: config["model"].update({name: value}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(folder)


def test_other_vocabulary_size_is_rejected(folder: Path) -> None:
    _edit(folder, lambda config: config["vocabulary"].append("zebra"))
    with pytest.raises(CheckpointError, match="11 words for a model of 10"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hidden_size", 17, r"is \(.*\), not \(.*\)"),
        ("mean_start", False, r"holds an unknown 'start_cell\.bias'"),
        ("tied_embedding", False, r"lacks fc\.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_rejected(
    folder: Path, name: str, value: object, says: str
) -> None:
    _edit(folder, lambda config: config["model"].update({name: value}))
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_other_encoder_channels_are_rejected(folder: Path) -> None:
    _edit(folder, lambda config: config["encoder"].update(channels=9))
    with pytest.raises(CheckpointError, match="an encoder of 9 channels for a model of 8"):
        load(folder)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Keep a test that would take all memory from taking the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("little_memory")
def test_config_with_huge_layers_is_rejected(folder: Path) -> None:
    _edit(folder, lambda config: config["model"].update(hidden_size=100_000))
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(folder: Path, value: float) -> None:
    state = load_file(folder / "model.safetensors")
    state["attn.v.weight"][0, 3] = value
    save_file(state, folder / "model.safetensors")
    _seal(folder)
    with pytest.raises(CheckpointError, match=r"attn\.v\.weight holds values that are not finite"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_weights_of_another_dtype_are_rejected(folder: Path, dtype: torch.dtype) -> None:
    state = load_file(folder / "model.safetensors")
    state["attn.v.bias"] = state["attn.v.bias"].to(dtype)
    save_file(state, folder / "model.safetensors")
    _seal(folder)
    with pytest.raises(CheckpointError, match=r"attn\.v\.bias is torch.*, not torch\.float16"):
        load(folder)


class Disguise:
    """An object that runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_disguised_pickle_is_rejected_and_not_executed(tmp_path: Path, folder: Path) -> None:
    marker = tmp_path / "executed"
    zipped = io.BytesIO()
    torch.save({"embedding.weight": Disguise(marker)}, zipped)
    for weights in (zipped.getvalue(), pickle.dumps(Disguise(marker))):
        (folder / "model.safetensors").write_bytes(weights)
        with pytest.raises(CheckpointError, match="from another checkpoint"):
            load(folder)
        _seal(folder)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            load(folder)
    (folder / "config.json").write_bytes(pickle.dumps(Disguise(marker)))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(folder)
    assert not marker.exists()


# Any damage gives a CheckpointError or a good model

FUZZ = settings(derandomize=True, deadline=None, max_examples=300)


def _load_or_none(folder: Path, encoder: Encoder) -> Checkpoint | None:
    """Load and use a checkpoint; None where that is refused, in one line."""
    try:
        loaded = load(folder)
    except CheckpointError as error:
        if len(str(error).splitlines()) == 1:
            return None
        raise
    with contextlib.suppress(CheckpointError):
        loaded.check_encoder(encoder.spec())
    assert "# Image captions" in loaded.card
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["values", "bytes"])
def test_damaged_config_is_rejected_or_gives_the_same_model(
    folder: Path, encoder: Encoder, kind: str
) -> None:
    path = folder / "config.json"
    text = path.read_bytes()
    expected = load(folder).model.state_dict()
    damages: Any = mutated_bytes(text)
    if kind == "values":
        damages = mutated_values(json.loads(text)).map(lambda values: json.dumps(values).encode())
    ends = Counter[bool]()

    @FUZZ
    @given(damages)
    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        loaded = _load_or_none(folder, encoder)
        ends[loaded is None] += 1
        if loaded is not None:
            state = loaded.model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    check()
    # Hypothesis draws other damages where other modules are loaded.
    assert min(ends[True], ends[False]) > 4


@pytest.mark.slow
def test_damaged_weights_are_rejected_or_finite(folder: Path, encoder: Encoder) -> None:
    path = folder / "model.safetensors"
    weights, config = path.read_bytes(), (folder / "config.json").read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    expected = load(folder).model.state_dict()

    def with_header(values: Any) -> bytes:
        header = json.dumps(values).encode()
        return len(header).to_bytes(8, "little") + header + weights[end:]

    header_damages = mutated_values(json.loads(weights[8:end])).map(with_header)

    @FUZZ
    @given(mutated_bytes(weights, end + 40) | header_damages)
    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        (folder / "config.json").write_bytes(config)
        assert damaged == weights or _load_or_none(folder, encoder) is None
        _seal(folder)
        loaded = _load_or_none(folder, encoder)
        if loaded is not None:
            state = loaded.model.state_dict()
            assert {name: tensor.shape for name, tensor in state.items()} == {
                name: tensor.shape for name, tensor in expected.items()
            }
            assert all(torch.isfinite(tensor).all() for tensor in state.values())

    check()


# Missing


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"no checkpoint: it has no {name}"):
        load(folder)


def test_missing_card_is_ignored(folder: Path) -> None:
    (folder / "README.md").unlink()
    assert load(folder).max_length == 20


def test_missing_folder_and_file_are_rejected(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        load(tmp_path / "nothing")
    for name in ("a" * 5_000, "~no-such-user/checkpoint", "a\0b"):
        with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
            load(name)
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        load(folder / "config.json")


def test_hub_id_is_rejected_offline() -> None:
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(
        CheckpointError, match=r"somebody/captioner.*Hub.*HF_HUB_OFFLINE.*internet connection"
    ):
        load("somebody/captioner")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"gated.*terms on .*/somebody/captioner.*hf auth login"),
        (401, "RepoNotFound", r"no repository of this name, or a private one.*hf auth login"),
        (404, "RevisionNotFound", r"captioner@old.*no such revision"),
        (401, "", r"hf auth login"),
        (403, "", r"refuses access \(403\).*hf auth login"),
        (503, "", r"returned 503.*later"),
    ],
)
def test_hub_error_names_the_cause(
    status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repo_info(*_: Any, repo_id: str, revision: str, **__: Any) -> None:
        assert (repo_id, revision) == ("somebody/captioner", "old")
        request = httpx2.Request("GET", f"https://huggingface.co/api/models/{repo_id}")
        headers = {"X-Error-Code": code} if code else {}
        hf_raise_for_status(httpx2.Response(status, headers=headers, request=request))

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    with pytest.raises(CheckpointError, match=message):
        load("somebody/captioner@old")


@pytest.mark.parametrize("error", [httpx2.ConnectError("refused"), httpx2.ReadTimeout("late")])
def test_unreachable_hub_is_rejected(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def repo_info(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    with pytest.raises(CheckpointError, match=rf"cannot be reached \({error}\).*connection"):
        load("somebody/captioner")


def test_hub_repository_without_config_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"somebody/cats of the Hub.*no config\.json"):
        load("somebody/cats")


# The encoder it was trained with


def test_own_encoder_is_accepted_before_and_after_saving(folder: Path, encoder: Encoder) -> None:
    _make(encoder, REPORT).check_encoder(encoder.spec())
    load(folder).check_encoder(encoder.spec())


def test_other_encoder_is_rejected_with_the_difference(
    folder: Path, tiny_encoder: Callable[..., Encoder]
) -> None:
    checkpoint = load(folder)
    with pytest.raises(CheckpointError, match=r"weights of tiny are not those .*--encoder"):
        checkpoint.check_encoder(tiny_encoder(seed=1).spec())
    with pytest.raises(CheckpointError, match=r"transform .*0\.5.*0\.4"):
        checkpoint.check_encoder(tiny_encoder(mean=0.4).spec())
    with pytest.raises(CheckpointError, match=r"transform .*bilinear.*bicubic"):
        checkpoint.check_encoder(tiny_encoder(interpolation="bicubic").spec())
    with pytest.raises(CheckpointError, match="name 'tiny', this one 'other'"):
        checkpoint.check_encoder(tiny_encoder(name="other").spec())
