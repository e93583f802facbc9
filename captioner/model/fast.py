"""The numbers of the plain code, computed faster: nothing here is needed to understand the model.

``FusedForward`` is ``CaptionModel.forward`` for training, ``pack`` a decoder for captioning on a
CPU, and ``fuse_for_inference`` rewrites encoders. The tests compare each with the plain code, the
benchmarks show what it gains.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.config import PAD
from captioner.model.decoder import CaptionModel, Memory, State

# Training: all steps' input products at once, finished captions skipped, one product per gradient.


class FusedForward(nn.Module):
    """``model(cells, captions)``, forward and backward about 1.5 times as fast.

    Holds the model itself: same parameters, same gradients. A module, so that
    DistributedDataParallel can wrap it. With dropout the results are equal in distribution only.
    """

    def __init__(self, model: CaptionModel) -> None:
        """Compute with the parameters and the training mode of ``model``."""
        super().__init__()
        self.model = model

    def forward(self, cells: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each word of given captions; arguments and results as ``CaptionModel.forward``.

        The captions are read longest first, so that those still running are always the first rows.
        """
        model = self.model
        B, K, T = captions.shape
        lengths = (captions[:, :, 1:] != PAD).sum(dim=-1).flatten()
        order = lengths.argsort(descending=True, stable=True)
        steps = torch.arange(T - 1, device=lengths.device)
        # How many captions still run at each step.
        running = [count for count in (lengths[:, None] > steps).sum(dim=0).tolist() if count]
        # The position of each word in captions (B * K, T - 1), step by step.
        positions = torch.cat([order[:count] * (T - 1) + t for t, count in enumerate(running)])
        words = model.embed(captions[:, :, :-1].flatten()[positions])
        state, memory = model.start(cells)
        hidden, context, attention = self._unroll(
            words, running, *self._caption_rows(state, memory, order // K)
        )
        original = positions.argsort()
        hidden, positions = hidden[original], positions[original]
        logits = model.predict(words[original], hidden, context[original])
        maps = attention.new_zeros(B * K * (T - 1), attention.shape[-1])
        maps = maps.index_copy(0, positions, attention[original])

        def attended(values: Tensor) -> Tensor:
            """Return the attention's means (N, D) of values (B, P, D), for each target."""
            means = maps.view(B, K * (T - 1), -1).to(values.dtype) @ values
            return means.flatten(0, 1).index_select(0, positions)

        if memory.evidence.shape[-1] or memory.names.shape[-1]:
            previous = captions[:, :, :-1].flatten()[positions]
            logits = model.add_recognized(
                logits, hidden, attended(memory.evidence), attended(memory.names), previous
            )
        return logits, maps.view(B, K, T - 1, -1)

    def _caption_rows(
        self, state: State, memory: Memory, photo_index: Tensor
    ) -> tuple[Tensor, Tensor, Memory]:
        """Return hidden, cell and memory with a row per caption, of the photo it describes."""

        def gather_rows(x: Tensor) -> Tensor:
            # Not x[photo_index], whose gradient is summed in another order each time.
            return x.index_select(0, photo_index)

        hidden, cell = gather_rows(state.hidden[:, 0]), gather_rows(state.cell[:, 0].float())
        # Under autocast the keys are bfloat16 already; the rest would be cast at each step.
        features = gather_rows(memory.features.to(memory.keys.dtype))
        # Evidence and names are added once, after the last step.
        return hidden, cell, memory._replace(features=features, keys=gather_rows(memory.keys))

    def _unroll(
        self, words: Tensor, running: list[int], hidden: Tensor, cell: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the LSTM over words (N, E); return hidden (N, H), context (N, C), attention (N, P).

        Args:
            words: step by step, ``running[t]`` of them at step t.
            running: how many captions still run, in descending order.
            hidden: (B * K, H).
            cell: (B * K, H).
            memory: features and keys, a row per caption.
        """
        model, dtype = self.model, memory.keys.dtype
        H, E = model.config.hidden_size, model.config.embedding_size
        lstm, Wh = model.lstm, model.attn.Wh
        # Products with words are computed for all steps at once, those with the state at each step.
        recurrent = _DeferredWeightGrad(
            torch.cat([lstm.weight_ih[:, E:], lstm.weight_hh], dim=1).to(dtype)
        )
        from_words = linear(words, lstm.weight_ih[:, :E], lstm.bias_ih + lstm.bias_hh)
        gates = torch.split(recurrent.attach(from_words), running)
        hidden_query = _DeferredWeightGrad(Wh.weight[:, :H].to(dtype))
        query_words = words if model.config.word_query else words[:, :0]
        from_words = linear(query_words, Wh.weight[:, H:], Wh.bias)
        queries = torch.split(hidden_query.attach(from_words), running)
        hiddens, contexts, attentions = [], [], []
        for count, gate, query in zip(running, gates, queries, strict=True):
            if count < len(hidden):
                hidden, cell = hidden[:count], cell[:count]
                memory = memory._replace(features=memory.features[:count], keys=memory.keys[:count])
            context, attention = model.attn.attend(memory, (hidden_query(hidden) + query)[:, None])
            context = model.gate_context(context.squeeze(1), hidden)
            next_hidden, cell = _lstm(recurrent(torch.cat([context, hidden], dim=1)) + gate, cell)
            hidden = next_hidden.to(hidden.dtype)
            hiddens.append(hidden)
            contexts.append(context)
            attentions.append(attention.squeeze(1))
        return torch.cat(hiddens), torch.cat(contexts), torch.cat(attentions)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell (N, H) from the four gates (N, 4 H), as ``nn.LSTMCell``."""
    i, f, g, o = gates.chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


class _DeferredWeightGrad:
    """A weight that is used at every step, with its gradient computed once, over all steps.

    Autograd would compute and add one gradient per step. Every product must be added to a slice
    of what ``attach`` returns: its gradient, complete once all steps have theirs, is the products'.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._detached = weight, weight.detach()
        self._inputs: list[Tensor] = []

    def attach(self, summand: Tensor) -> Tensor:
        """Return ``summand`` (N, out), unchanged, its rows ordered step by step."""
        result: Tensor = _AttachWeight.apply(summand, self._weight, self._inputs)
        return result

    def __call__(self, inputs: Tensor) -> Tensor:
        """Multiply the ``inputs`` (n, in) of one step."""
        self._inputs.append(inputs.detach())
        return linear(inputs, self._detached)


class _AttachWeight(torch.autograd.Function):
    """Identity in the forward pass; computes the weight's gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return summand.view_as(summand)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs = torch.cat(ctx.inputs)
        ctx.inputs.clear()
        return gradient, (gradient.to(inputs.dtype).T @ inputs).to(ctx.dtype), None


# Captioning on a CPU. A step multiplies few rows with each weight, so most time goes into reading
# the weights. torch's ``linear`` reads them once per row; oneDNN reads its own layout only once.

# With more rows, arithmetic dominates, and oneDNN compiles a kernel for each number of rows.
_MAX_PACKED_ROWS = 16
# Run once per photo, on all its cells.
_NOT_PACKED = ("projection", "attn.Wf", "detectors.linear", "pointer.classifier")


class _PackedLinear(nn.Module):
    """``nn.Linear`` for inference."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.plain, self.bias = weight.detach(), bias.detach()
        # As torch.compile lowers a linear layer on a CPU, without its compiler.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain)

    def __reduce__(self) -> tuple[type[_PackedLinear], tuple[Tensor, Tensor]]:
        """Copy and pickle the plain weights: packed ones allow neither, and are packed again."""
        return _PackedLinear, (self.plain, self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if inputs.numel() > _MAX_PACKED_ROWS * inputs.shape[-1]:
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
        return _lstm(self.gates(torch.cat([inputs, hidden], dim=1)), cell)


def pack(model: CaptionModel) -> CaptionModel:
    """Return a copy of ``model`` whose ``start`` and ``step`` are fast on a CPU.

    The logits are the same up to rounding. Later changes of ``model`` do not reach the copy. If
    torch was built without oneDNN, or the model is on another device, returns ``model`` itself.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or model.embedding.weight.device.type != "cpu":
        return model
    packed = copy.deepcopy(model).eval()
    for name, module in list(packed.named_modules()):
        parent, _, child = name.rpartition(".")
        if name in _NOT_PACKED:
            continue
        # Reading a single row of weights takes no time.
        if isinstance(module, nn.Linear) and module.out_features > 1:
            setattr(packed.get_submodule(parent), child, _PackedLinear(module.weight, module.bias))
        elif isinstance(module, nn.LSTMCell):
            setattr(packed.get_submodule(parent), child, _PackedLSTMCell(module))
    return packed


# Encoders.


def fold_batchnorms(module: nn.Module) -> None:
    """Fold each batch-norm into the convolution right before it; timm's activation stays."""
    children = list(module.named_children())
    for (name, conv), (next_name, norm) in pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, next_name, getattr(norm, "act", nn.Identity()))
    for _, child in children:
        fold_batchnorms(child)


def fuse_for_inference(module: nn.Module) -> None:
    """Fold the batch-norms, and let convolutions of stride 2 pad their own input.

    TensorFlow pads an even side by one more after it than before it, for which timm copies the
    input. Kernels that begin with a zero, padded equally on both sides, give the same result. All
    sides are even here: 288, 144, 72, 36 and 18.
    """
    from timm.layers.conv2d_same import Conv2dSame

    fold_batchnorms(module)
    for name, conv in list(module.named_modules()):
        if isinstance(conv, Conv2dSame):
            side = conv.kernel_size[0]
            padded = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                side + 1,
                stride=2,
                padding=(side - 1) // 2,
                groups=conv.groups,
            )
            weight = pad(conv.weight.detach(), (1, 0, 1, 0))
            padded.weight = nn.Parameter(weight, requires_grad=False)
            padded.bias = conv.bias
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, padded)
