"""The packed decoder writes what the plain one writes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from captioner.config import DecodingOptions, ModelConfig
from captioner.model.decoder import CaptionModel, State
from captioner.model.fast import pack
from captioner.model.search import decode

_ALL = {
    "feature_size": 12,
    "feature_norm": True,
    "word_query": True,
    "mean_start": True,
    "context_gate": True,
    "deep_output": True,
    "tied_embedding": True,
}


def _model(**options: Any) -> CaptionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary_size=23,
        encoder_channels=20,
        embedding_size=10,
        hidden_size=14,
        attention_size=8,
        **options,
    )
    return CaptionModel(config).eval()


@pytest.mark.parametrize("options", [{}, _ALL], ids=["report", "all options"])
@pytest.mark.parametrize(("photos", "captions"), [(1, 1), (1, 3), (2, 8), (3, 6), (40, 5)])
@torch.inference_mode()
def test_a_step_comes_to_the_same(options: dict[str, Any], photos: int, captions: int) -> None:
    model = _model(**options)
    packed = pack(model)
    assert packed is not model
    features = torch.randn(photos, 49, 20)
    states = [each.start(features, captions) for each in (model, packed)]
    for _ in range(3):
        words = torch.randint(0, 23, (photos, captions))
        steps = [
            each.step(words, state, memory)
            for each, (state, memory) in zip((model, packed), states, strict=True)
        ]
        for plain, other in zip(steps[0][:2], steps[1][:2], strict=True):
            torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)
        assert steps[0][0].std() > 0.01
        states = [
            (State(*step[2]), memory) for step, (_, memory) in zip(steps, states, strict=True)
        ]


@torch.inference_mode()
def test_a_search_finds_the_same_captions() -> None:
    model = _model(**_ALL)
    features = 3 * torch.randn(4, 49, 20)
    found = []
    for each in (model, pack(model)):
        state, memory = each.start(features)
        found.append(decode(each.step, state, memory, DecodingOptions()))
    for plain, other in zip(*found, strict=True):
        assert [beam.ids for beam in plain] == [beam.ids for beam in other]


@torch.inference_mode()
def test_the_copy_is_a_copy() -> None:
    model = _model(**_ALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = pack(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state, memory = packed.start(torch.ones(1, 49, 20))
    word = torch.tensor([[4]])
    logits = packed.step(word, state, memory)[0]
    for value in model.parameters():
        value.zero_()
    assert torch.equal(packed.step(word, state, memory)[0], logits)


@torch.inference_mode()
def test_copies_and_pickles_come_to_the_same() -> None:
    packed = pack(_model(**_ALL))
    state, memory = packed.start(torch.ones(1, 49, 20))
    word = torch.tensor([[4]])
    logits = packed.step(word, state, memory)[0]
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied.step(word, state, memory)[0], logits)


def test_without_onednn_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = _model()
    assert pack(model) is model
