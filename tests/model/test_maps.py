"""The four maps of a word, against slow and plain computations on a tiny model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from captioner.config import BOS, EOS, UNK
from captioner.model.decoder import CaptionModel
from captioner.model.maps import CaptionMaps, caption_maps, mattered
from captioner.model.words import UNWRITTEN
from tests.model.tiny import (
    ALL_ON,
    CELLS,
    REPORT,
    WORDS,
    Options,
    make_cells,
    make_model,
    name_of,
)

# 4 to 8 have a detector; 5, 12 and the unwritten 21 and 22 are names; 13 is one after 12.
IDS = [5, 9, 12, 13, 21, 8, UNK, 13, 22, EOS]
NAMES_ONLY: Options = {**WORDS, "evidence": False}
DETECTORS_ONLY: Options = {"evidence": True, "num_detectors": 5}


def photo() -> Tensor:
    return make_cells(1)[0]


def maps_of(model: CaptionModel, cells: Tensor, ids: list[int]) -> CaptionMaps:
    """Return the maps of a caption that is read between two others."""
    with torch.no_grad():
        memory = model.remember(cells[None])
    return caption_maps(model, memory, [[7, EOS], ids, [*ids, 9, 5]])[1]


def plain_log_probabilities(model: CaptionModel, cells: Tensor, ids: list[int]) -> Tensor:
    logits, _ = model(cells[None], torch.tensor([[[BOS, *ids]]]))
    return logits.log_softmax(dim=-1)[range(len(ids)), ids]


def without(model: CaptionModel, covered: list[int], ids: list[int]) -> Tensor:
    """Return the log-probability of each word where the photo shows nothing in some cells."""
    memory = model.remember(photo()[None])
    memory.features[:, covered] = model.mean_features
    memory.keys[:, covered] = model.attn.Wf(model.mean_features)
    memory.evidence[:, covered] = 0
    memory.names[:, covered] = 0
    state = model.first_state(memory.features)
    results = []
    for previous, word in zip([BOS, *ids], ids, strict=False):
        logits, _, state = model.step(torch.tensor([[previous]]), state, memory)
        results.append(logits[0, 0].log_softmax(dim=-1)[word])
    return torch.stack(results)


def pointing_model(**options: object) -> CaptionModel:
    """Return a model whose pointer matters for every name."""
    model = make_model(**{**WORDS, **ALL_ON, "words": False, **options})
    torch.nn.init.normal_(model.detectors.linear.weight)
    torch.nn.init.normal_(model.detectors.mean_logits)
    torch.nn.init.constant_(model.pointer.scale, 0.7)
    torch.nn.init.constant_(model.pointer.gate.bias, 3.0)
    return model


def added_by_recognition(model: CaptionModel, cells: Tensor, ids: list[int]) -> list[float]:
    """Return what ``add_recognized`` changes of each word's logit, step by step."""
    state, memory = model.start(cells[None])
    results = []
    for previous, word in zip([BOS, *ids], ids, strict=False):
        token_ids = torch.tensor([[previous]])
        unaided, _, _ = model.step_unaided(token_ids, state, memory)
        logits, _, state = model.step(token_ids, state, memory)
        before = UNWRITTEN if word >= model.first_unwritten else float(unaided[0, 0, word])
        results.append(float(logits[0, 0, word]) - before)
    return results


# Reading


@pytest.mark.parametrize("options", [REPORT, ALL_ON], ids=name_of)
@torch.no_grad()
def test_reading_has_the_attention_and_probabilities_of_the_model(options: Options) -> None:
    model = make_model(**options)
    maps = maps_of(model, photo(), IDS)
    _, attention = model(photo()[None], torch.tensor([[[BOS, *IDS]]]))
    torch.testing.assert_close(maps.attended, attention[0, 0])
    expected = plain_log_probabilities(model, photo(), IDS)
    torch.testing.assert_close(maps.log_probabilities, expected)


def test_model_without_detectors_has_neither_evidence_nor_shown() -> None:
    maps = maps_of(make_model(), photo(), IDS)
    assert not maps.evidence.any()
    assert not maps.shown.any()
    assert not maps.has_evidence.any()
    assert not maps.has_detector.any()


# Evidence


@torch.no_grad()
def test_cells_of_the_evidence_add_up_to_what_recognition_added() -> None:
    model = pointing_model()
    maps = maps_of(model, photo(), IDS)
    expected = torch.tensor(added_by_recognition(model, photo(), IDS))
    torch.testing.assert_close(maps.evidence.sum(dim=1), expected, atol=1e-5, rtol=1e-5)
    assert expected[[0, 2, 3, 4, 5, 8]].abs().min() > 0.01  # recognition did matter


def test_words_have_evidence_if_a_detector_or_a_name_fits() -> None:
    maps = maps_of(pointing_model(), photo(), IDS)
    # The second 13 follows no 12, so it is no name there.
    expected = [True, False, True, True, True, True, False, False, True, False]
    assert maps.has_evidence.tolist() == expected
    assert maps.evidence.any(dim=1).tolist() == expected
    assert maps.has_detector.tolist() == [True, *[False] * 4, True, *[False] * 4]
    assert maps.shown.any(dim=1).tolist() == maps.has_detector.tolist()


@torch.no_grad()
def test_detector_gives_each_cell_gain_times_attention_times_its_own_evidence() -> None:
    model = make_model(**DETECTORS_ONLY)
    torch.nn.init.normal_(model.detectors.linear.weight)
    maps = maps_of(model, photo(), [9, 5, 8])
    state, memory = model.start(photo()[None])
    for t, (previous, word) in enumerate(((BOS, 9), (9, 5), (5, 8))):
        _, attention, state = model.step(torch.tensor([[previous]]), state, memory)
        gain = float(softplus(model.evidence_gain(state.hidden[0, 0])))
        for p in range(CELLS):
            logits = model.detectors(photo())[p] - model.detectors.mean_logits
            expected = 0.0
            if UNK < word <= UNK + 5:
                expected = gain * float(attention[0, 0, p]) * float(logits[word - UNK - 1])
            assert float(maps.evidence[t, p]) == pytest.approx(expected, abs=1e-6)
    assert maps.evidence.min() < 0 < maps.evidence.max()


@torch.no_grad()
def test_pointer_gives_each_cell_in_proportion_to_attention_times_the_names_probability() -> None:
    model = pointing_model(**NAMES_ONLY)
    maps = maps_of(model, photo(), IDS)
    classes = model.pointer.classifier(photo()[:, :4]).softmax(dim=-1)
    # The classes whose name's first word is 12, and that of the name "12 13".
    for t, its_classes in ((2, [1, 2, 3]), (3, [2]), (4, [4])):
        parts = maps.attended[t] * classes[:, its_classes].sum(dim=-1)
        expected = maps.evidence[t].sum() * parts / parts.sum()
        torch.testing.assert_close(maps.evidence[t], expected)
        assert maps.evidence[t].sum() > 0.01


def test_shown_is_the_probability_by_the_words_detector() -> None:
    model = make_model(words=True)
    maps = maps_of(model, photo(), IDS)
    probabilities = model.detectors(photo()).sigmoid()
    torch.testing.assert_close(maps.shown[0], probabilities[:, 1])
    torch.testing.assert_close(maps.shown[5], probabilities[:, 4])


# Occlusion


@pytest.mark.parametrize(
    "options", [REPORT, ALL_ON, {**ALL_ON, "mean_start": False}], ids=["report", "all", "no mean"]
)
@torch.no_grad()
def test_mattered_is_the_fall_of_the_log_probability_without_the_cell(options: Options) -> None:
    model = make_model(**options)
    model.mean_features.copy_(torch.linspace(-1, 1, len(model.mean_features)))
    maps, without_photo = mattered(model, photo(), IDS)
    whole = plain_log_probabilities(model, photo(), IDS)
    for p in range(CELLS):
        expected = whole - without(model, [p], IDS)
        torch.testing.assert_close(maps[:, p], expected, atol=1e-5, rtol=1e-4)
    assert maps.min() < 0 < maps.max()
    expected = whole - without(model, list(range(CELLS)), IDS)
    torch.testing.assert_close(without_photo, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cell_that_is_remembered_as_the_mean_does_not_matter() -> None:
    model = make_model(**{**ALL_ON, "words": False})
    model.mean_features.copy_(model.remember(photo()[None]).features[0, 3])
    maps = mattered(model, photo(), IDS).cells
    assert maps[:, 3].abs().max() < 1e-5
    assert maps.abs().max() > 0.01


def test_maps_leave_the_model_and_the_cells_alone() -> None:
    model, cells = make_model(words=True), photo()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = maps_of(model, cells, IDS)
    mattered(model, cells, IDS)
    second: CaptionMaps = maps_of(model, cells, IDS)
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))
    assert torch.equal(cells, photo())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
