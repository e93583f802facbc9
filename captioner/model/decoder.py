"""The decoder: additive attention over a grid of features, and an LSTM that writes.

Ids and vectors only: knows no words, no photos and no search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from captioner.config import PAD, ModelConfig


class Memory(NamedTuple):
    """What stays the same for a photo at every step: features (B, P, C) and keys (B, P, A).

    With ``feature_size`` the features are the projected ones, and C here and below is their size.
    """

    features: Tensor
    keys: Tensor


class State(NamedTuple):
    """The LSTM's hidden and cell state, (B, W, H) each, W captions of each photo side by side."""

    hidden: Tensor
    cell: Tensor


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015; Xu et al. 2015, section 3.1.2).

    score = v(tanh(Wf(feature) + Wh(query))), softmax over the P cells.
    """

    def __init__(self, channels: int, query_size: int, attention_size: int) -> None:
        """Make ``Wf`` (C -> A), ``Wh`` (Q -> A) and ``v`` (A -> 1)."""
        super().__init__()
        self.Wf = nn.Linear(channels, attention_size)
        self.Wh = nn.Linear(query_size, attention_size)
        self.v = nn.Linear(attention_size, 1)

    def forward(self, memory: Memory, query: Tensor) -> tuple[Tensor, Tensor]:
        """Look at each photo once for each of its W queries.

        Args:
            memory: features (B, P, C) and keys ``Wf(features)`` (B, P, A).
            query: the hidden state, with ``word_query`` the word before behind it: (B, W, Q).

        Returns:
            context (B, W, C), and attention (B, W, P) whose rows sum to 1.
        """
        return self.look(memory, self.Wh(query))

    def look(self, memory: Memory, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``forward`` does, from ``asked = Wh(query)``, (B, W, A), on."""
        keys = memory.keys[:, None] + asked[:, :, None]  # (B, W, P, A)
        scores = self.v(torch.tanh(keys)).squeeze(-1)  # (B, W, P)
        attention = scores.float().softmax(dim=-1)
        return attention.to(memory.features.dtype) @ memory.features, attention


class CaptionModel(nn.Module):
    """Attention, LSTMCell and output layer; see ``ModelConfig`` for the options."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the layers, randomly started."""
        super().__init__()
        self.config = config
        C, E, H = config.encoder_channels, config.embedding_size, config.hidden_size
        if config.feature_size:
            self.projection = nn.Linear(C, config.feature_size)
            C = config.feature_size
        self.embedding = nn.Embedding(config.vocabulary_size, E, padding_idx=PAD)
        query_size = H + E if config.word_query else H
        self.attn = Attention(C, query_size, config.attention_size)
        self.lstm = nn.LSTMCell(C + E, H)
        if config.mean_start:
            self.start_hidden = nn.Linear(C, H)
            self.start_cell = nn.Linear(C, H)
        if config.context_gate:
            self.gate = nn.Linear(H, 1)
        if config.deep_output:
            self.hidden_output = nn.Linear(H, E)
            self.context_output = nn.Linear(C, E)
        self.fc = nn.Linear(E if config.deep_output else H, config.vocabulary_size)
        if config.tied_embedding:
            # The output layer starts as small as the embedding that training hands in.
            nn.init.normal_(self.embedding.weight, std=E**-0.5)
            self.fc.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        # Whole channels: the same ones in all cells, or the neighbours would give them away.
        self.feature_dropout = nn.Dropout1d(config.feature_dropout)

    def start(self, features: Tensor, captions: int = 1) -> tuple[State, Memory]:
        """Prepare for W = ``captions`` captions of each photo.

        Args:
            features: (B, P, C).
            captions: W.
        """
        if self.config.feature_norm:
            features = layer_norm(features, features.shape[-1:])
        # Dropout1d drops dim 1 of (B, C, P).
        features = self.feature_dropout(features.transpose(1, 2)).transpose(1, 2)
        if self.config.feature_size:
            features = torch.relu(self.projection(features))
        memory = Memory(features, self.attn.Wf(features))
        if self.config.mean_start:
            mean = features.mean(dim=1)
            hidden = torch.tanh(self.start_hidden(mean))
            cell = torch.tanh(self.start_cell(mean))
        else:
            hidden = cell = features.new_zeros(len(features), self.config.hidden_size)
        shape = (-1, captions, -1)
        return State(hidden[:, None].expand(shape), cell[:, None].expand(shape)), memory

    def _look(self, word: Tensor, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return the (gated) context (B, W, C) and the attention (B, W, P)."""
        query = torch.cat([hidden, word], dim=-1) if self.config.word_query else hidden
        context, attention = self.attn(memory, query)
        return self._gate(context, hidden), attention

    def _gate(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Return the context (..., C), gated by the hidden state if the config says so."""
        if self.config.context_gate:
            context = torch.sigmoid(self.gate(hidden)) * context
        return context

    def _output(self, word: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Return logits (..., V) from word vectors (..., E), hidden (..., H), context (..., C)."""
        if self.config.deep_output:
            hidden = self.hidden_output(hidden) + self.context_output(context) + word
        return self.fc(self.dropout(hidden))

    def step(self, words: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """Write one word of each caption.

        Args:
            words: ids (B, W) of the words before.
            state: hidden and cell (B, W, H).
            memory: of the photos.

        Returns:
            logits (B, W, V), attention (B, W, P) and the next state.
        """
        B, W = words.shape
        word = self.dropout(self.embedding(words))
        context, attention = self._look(word, state.hidden, memory)
        hidden, cell = self.lstm(
            torch.cat([word, context], dim=-1).flatten(0, 1),
            (state.hidden.flatten(0, 1), state.cell.flatten(0, 1)),
        )
        hidden, cell = hidden.view(B, W, -1), cell.view(B, W, -1)
        return self._output(word, hidden, context), attention, State(hidden, cell)

    def forward(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Read given captions (teacher forcing).

        What does not depend on the step before is computed for all steps at once; captions that
        have ended are left out of the rest.

        Args:
            features: (B, P, C).
            captions: ids (B, K, T), padded with 0 at the end; K captions of each photo.

        Returns:
            logits (N, V) of the N ids that follow another one and are no padding, in the order
            of ``captions[:, :, 1:][captions[:, :, 1:] != 0]``; and attention (B, K, T - 1, P),
            zero at padding.
        """
        B, K, T = captions.shape
        lengths = (captions[:, :, 1:] != PAD).sum(dim=-1).flatten()
        order = lengths.argsort(descending=True, stable=True)
        # How many captions still run at each step; sorted, they are the first ones.
        steps = torch.arange(T - 1, device=lengths.device)
        running = [count for count in (lengths[:, None] > steps).sum(dim=0).tolist() if count]
        # Where each word stands in captions (B * K, T - 1), step by step.
        places = torch.cat([order[:count] * (T - 1) + t for t, count in enumerate(running)])
        words = self.dropout(self.embedding(captions[:, :, :-1].flatten()[places]))
        state, memory = self.start(features)
        photos = order // K

        def of_each(x: Tensor) -> Tensor:
            # Not x[photos], whose gradient is added up in another order each time.
            return x.index_select(0, photos)

        hidden, cell = of_each(state.hidden[:, 0]), of_each(state.cell[:, 0].float())
        # Under autocast the keys are bfloat16 already; the rest would be cast at each step.
        dtype = memory.keys.dtype
        memory = Memory(of_each(memory.features.to(dtype)), of_each(memory.keys))

        H, E = self.config.hidden_size, self.config.embedding_size
        lstm, Wh = self.lstm, self.attn.Wh
        recurrent = _Deferred(torch.cat([lstm.weight_ih[:, E:], lstm.weight_hh], dim=1).to(dtype))
        summand = linear(words, lstm.weight_ih[:, :E], lstm.bias_ih + lstm.bias_hh)
        gates = torch.split(recurrent.collect(summand), running)
        asking = _Deferred(Wh.weight[:, :H].to(dtype))
        seen = words if self.config.word_query else words[:, :0]
        queries = torch.split(asking.collect(linear(seen, Wh.weight[:, H:], Wh.bias)), running)
        hiddens, contexts, attentions = [], [], []
        for count, gate, query in zip(running, gates, queries, strict=True):
            if count < len(hidden):
                hidden, cell = hidden[:count], cell[:count]
                memory = Memory(memory.features[:count], memory.keys[:count])
            context, attention = self.attn.look(memory, (asking(hidden) + query)[:, None])
            context = self._gate(context.squeeze(1), hidden)
            # As nn.LSTMCell.
            i, f, g, o = (recurrent(torch.cat([context, hidden], dim=1)) + gate).chunk(4, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = (torch.sigmoid(o) * torch.tanh(cell)).to(hidden.dtype)
            hiddens.append(hidden)
            contexts.append(context)
            attentions.append(attention.squeeze(1))
        back = places.argsort()
        logits = self._output(words[back], torch.cat(hiddens)[back], torch.cat(contexts)[back])
        maps = attentions[0].new_zeros(B * K * (T - 1), attentions[0].shape[-1])
        maps = maps.index_copy(0, places, torch.cat(attentions))
        return logits, maps.view(B, K, T - 1, -1)


class _Deferred:
    """A weight that is used at every step, and whose gradient is one product over all of them.

    Autograd would make and add one at each step. ``collect`` must be given what the results are
    added to: the gradients of that are theirs, and it gets them when all steps have theirs.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._detached = weight, weight.detach()
        self._inputs: list[Tensor] = []

    def collect(self, summand: Tensor) -> Tensor:
        """Return ``summand`` (N, out), all steps after each other."""
        result: Tensor = _Collect.apply(summand, self._weight, self._inputs)
        return result

    def __call__(self, inputs: Tensor) -> Tensor:
        """Multiply one step's ``inputs`` (n, in)."""
        self._inputs.append(inputs.detach())
        return linear(inputs, self._detached)


class _Collect(torch.autograd.Function):
    """Nothing forward; backward the gradient of a ``_Deferred`` weight."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return summand.view_as(summand)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs = torch.cat(ctx.inputs)
        ctx.inputs.clear()
        return gradient, (gradient.to(inputs.dtype).T @ inputs).to(ctx.dtype), None
