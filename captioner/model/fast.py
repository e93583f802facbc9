"""A decoder packed for writing on a CPU: the same numbers, its weights read once a step.

A step of one photo multiplies a few rows with each weight, and takes as long as reading the
weights does. torch's ``linear`` reads them once a row; oneDNN, given them in its own order, once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from captioner.model.decoder import CaptionModel

# With more rows arithmetic takes the time, and oneDNN compiles anew for each number of rows.
_FEW = 16
# These take all 49 cells of a photo, once.
_ONCE = ("projection", "attn.Wf")


class _PackedLinear(nn.Module):
    """``nn.Linear`` for inference."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.plain, self.bias = weight.detach(), bias.detach()
        # What torch.compile makes of a linear layer on a CPU, without its compiler.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain)

    def __reduce__(self) -> tuple[type[_PackedLinear], tuple[Tensor, Tensor]]:
        """Copy and pickle the plain weights, and pack them anew: packed ones can do neither."""
        return _PackedLinear, (self.plain, self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if inputs.numel() > _FEW * inputs.shape[-1]:
            return linear(inputs, self.plain, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.packed, self.bias, "none", [], ""
        )
        return result


class _PackedLSTMCell(nn.Module):
    """``nn.LSTMCell`` for inference, its two products in one."""

    def __init__(self, lstm: nn.LSTMCell) -> None:
        super().__init__()
        weight = torch.cat([lstm.weight_ih, lstm.weight_hh], dim=1)
        self.gates = _PackedLinear(weight, lstm.bias_ih + lstm.bias_hh)

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map inputs (N, in), hidden and cell (N, H) to the next hidden and cell."""
        hidden, cell = state
        i, f, g, o = self.gates(torch.cat([inputs, hidden], dim=1)).chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


def pack(model: CaptionModel) -> CaptionModel:
    """Return a copy of ``model`` for ``start`` and ``step`` alone, which are fast on a CPU.

    Logits are the same up to rounding. Where torch was built without oneDNN, or the model lies on
    another device, it is ``model`` itself. Later changes of ``model`` do not reach the copy.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or model.embedding.weight.device.type != "cpu":
        return model
    packed = copy.deepcopy(model).eval()
    for name, module in list(packed.named_modules()):
        parent, _, child = name.rpartition(".")
        if name in _ONCE:
            continue
        # A single row of weights is read in no time.
        if isinstance(module, nn.Linear) and module.out_features > 1:
            setattr(packed.get_submodule(parent), child, _PackedLinear(module.weight, module.bias))
        elif isinstance(module, nn.LSTMCell):
            setattr(packed.get_submodule(parent), child, _PackedLSTMCell(module))
    return packed
