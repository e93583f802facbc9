"""The fast code gives the numbers of the plain code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captioner.config import PAD, DecodingOptions
from captioner.model.decoder import CaptionModel, State
from captioner.model.fast import FusedForward, fold_batchnorms, fuse_for_inference, pack
from captioner.model.search import decode
from tests.model.tiny import (
    ALL_ON,
    CAPTIONS,
    PAIRWISE,
    REPORT,
    Options,
    make_cells,
    make_model,
    name_of,
)

none_and_all = pytest.mark.parametrize("options", [REPORT, ALL_ON], ids=["report", "all"])

# The fused forward


def run(
    model: CaptionModel, forward: nn.Module, *, bfloat16: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits, attention and the gradients of a loss on both."""
    model.zero_grad()
    cells = make_cells().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits, attention = forward(cells, CAPTIONS)
    targets = CAPTIONS[:, :, 1:][CAPTIONS[:, :, 1:] != PAD]
    loss = cross_entropy(logits.float(), targets) + attention.float().square().sum()
    loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {"cells": cells.grad, **learning}
    assert all(gradient is not None for gradient in gradients.values())
    return logits, attention, {name: g.clone() for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("options", PAIRWISE, ids=name_of)
def test_fused_forward_matches_the_plain_one_with_its_gradients(options: Options) -> None:
    model = make_model(**options, dropout=0.5, feature_dropout=0.5)  # off: it is in eval()
    plain, fused = run(model, model), run(model, FusedForward(model))

    torch.testing.assert_close(fused[0], plain[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(fused[1], plain[1], atol=1e-6, rtol=1e-5)
    for name, gradient in plain[2].items():
        torch.testing.assert_close(fused[2][name], gradient, atol=2e-6, rtol=1e-4, msg=name)


@none_and_all
def test_fused_forward_matches_the_plain_one_under_bfloat16(options: Options) -> None:
    model = make_model(**options)
    exact = run(model, model)
    plain = run(model, model, bfloat16=True)
    fused = run(model, FusedForward(model), bfloat16=True)

    assert fused[0].dtype == plain[0].dtype
    assert fused[0].dtype == (torch.float32 if options["words"] else torch.bfloat16)
    torch.testing.assert_close(fused[0], plain[0], atol=0.03, rtol=0.03)
    torch.testing.assert_close(fused[1], plain[1], atol=0.03, rtol=0.03)
    for name, gradient in exact[2].items():
        assert fused[2][name].dtype == torch.float32
        if name != "attn.v.bias":  # its gradient is zero but for rounding
            error = (fused[2][name] - gradient).norm() / gradient.norm()
            plain_error = (plain[2][name] - gradient).norm() / gradient.norm()
            assert error < max(0.1 if options["words"] else 0.05, 2 * plain_error), name


def test_fused_forward_has_the_dropout_of_the_plain_one() -> None:
    """Equal in distribution: means and deviations over many copies of a photo."""
    model = make_model(**ALL_ON, dropout=0.3, feature_dropout=0.3).train()
    cells, captions = make_cells(1).expand(4000, -1, -1), CAPTIONS[:1, :1].expand(4000, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        plain, fused = (
            forward(cells, captions)[0].view(4000, -1) for forward in (model, FusedForward(model))
        )

    assert plain.std(dim=0).min() > 0.01
    tolerance = 5 * plain.std(dim=0) * (2 / 4000) ** 0.5
    assert ((fused.mean(dim=0) - plain.mean(dim=0)).abs() < tolerance).all()
    assert (fused.std(dim=0) / plain.std(dim=0) - 1).abs().max() < 0.15


def test_fused_forward_shares_the_parameters_of_the_model() -> None:
    model = make_model(**ALL_ON)
    names = list(model.state_dict())
    fused = FusedForward(model)

    for own, shared in zip(model.parameters(), fused.parameters(), strict=True):
        assert own is shared
    assert list(model.state_dict()) == names


def test_fused_gradients_are_the_same_to_the_bit_each_time() -> None:
    model = make_model(**ALL_ON)
    first, second = (run(model, FusedForward(model))[2] for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_fused_forwards_before_one_backward_add_their_gradients() -> None:
    model = make_model(**ALL_ON)
    fused = FusedForward(model)

    def gradients(*batches: Tensor) -> list[Any]:
        model.zero_grad()
        losses = [fused(make_cells(), captions)[0].square().sum() for captions in batches]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        return [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    short = CAPTIONS[:, 1:]
    separate = zip(gradients(CAPTIONS), gradients(short), strict=True)
    for both, (one, other) in zip(gradients(CAPTIONS, short), separate, strict=True):
        torch.testing.assert_close(both, one + other, atol=1e-5, rtol=1e-4)


# The packed decoder


@none_and_all
@pytest.mark.parametrize(("photos", "width"), [(1, 3), (2, 8), (40, 5)])
@torch.inference_mode()
def test_packed_step_matches_the_plain_one(options: Options, photos: int, width: int) -> None:
    model = make_model(**options)
    packed = pack(model)
    assert packed is not model
    states = [each.start(make_cells(photos), width) for each in (model, packed)]
    for _ in range(3):
        token_ids = torch.randint(0, 23, (photos, width))
        plain, fast = (
            each.step(token_ids, state, memory)
            for each, (state, memory) in zip((model, packed), states, strict=True)
        )
        assert plain[0].std() > 0.01
        for expected, found in zip(plain[:2], fast[:2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        memories = [memory for _, memory in states]
        states = list(zip((State(*plain[2]), State(*fast[2])), memories, strict=True))


@torch.inference_mode()
def test_search_with_the_packed_decoder_finds_the_same_captions() -> None:
    model = make_model(**ALL_ON)
    plain, fast = (
        decode(each.step, *each.start(3 * make_cells(4)), DecodingOptions())
        for each in (model, pack(model))
    )
    assert [[beam.ids for beam in beams] for beams in plain] == [
        [beam.ids for beam in beams] for beams in fast
    ]


@torch.inference_mode()
def test_packing_copies_the_weights_and_leaves_the_model_unchanged() -> None:
    model = make_model(**ALL_ON)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = pack(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state, memory = packed.start(make_cells(1))
    token_ids = torch.tensor([[4]])
    logits = packed.step(token_ids, state, memory)[0]
    for value in model.parameters():
        value.zero_()
    assert torch.equal(packed.step(token_ids, state, memory)[0], logits)


@torch.inference_mode()
def test_copies_and_pickles_of_the_packed_decoder_give_the_same_logits() -> None:
    packed = pack(make_model(**ALL_ON))
    state, memory = packed.start(make_cells(1))
    token_ids = torch.tensor([[4]])
    logits = packed.step(token_ids, state, memory)[0]
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied.step(token_ids, state, memory)[0], logits)


def test_pack_returns_the_model_itself_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = make_model()
    assert pack(model) is model


# Encoders


class _Activated(nn.BatchNorm2d):
    """A batch-norm with its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, images: Tensor) -> Tensor:
        """Normalize and activate."""
        return self.act(super().forward(images))


def test_fused_encoder_matches_the_plain_one() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        Conv2dSame(3, 8, 3, stride=2, bias=False),
        _Activated(8),
        nn.Sequential(Conv2dSame(8, 8, 5, stride=2, groups=8), nn.BatchNorm2d(8)),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4),
    ).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var, module.running_mean):
                assert tensor is not None
                tensor.uniform_(0.5, 2)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = encoder(images)
        assert expected.std() > 0.1
        for fuse in (fold_batchnorms, fuse_for_inference):
            fused = copy.deepcopy(encoder)
            fuse(fused)
            assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
            torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, Conv2dSame) for module in fused.modules())
