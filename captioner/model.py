"""The decoder: additive attention over a grid of features, and an LSTM that writes.

Ids and vectors only: knows no words, no photos and no search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.config import PAD, ModelConfig


class Memory(NamedTuple):
    """What stays the same for a photo at every step: features (B, P, C) and keys (B, P, A)."""

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
        asked = self.Wh(query)[:, :, None]  # (B, W, 1, A)
        scores = self.v(torch.tanh(memory.keys[:, None] + asked)).squeeze(-1)  # (B, W, P)
        attention = scores.float().softmax(dim=-1)
        return attention.to(memory.features.dtype) @ memory.features, attention


class CaptionModel(nn.Module):
    """Attention, LSTMCell and output layer; see ``ModelConfig`` for the options."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the layers, randomly started."""
        super().__init__()
        self.config = config
        C, E, H = config.encoder_channels, config.embedding_size, config.hidden_size
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
            features = nn.functional.layer_norm(features, features.shape[-1:])
        # Dropout1d drops dim 1 of (B, C, P).
        features = self.feature_dropout(features.transpose(1, 2)).transpose(1, 2)
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
        if self.config.context_gate:
            context = torch.sigmoid(self.gate(hidden)) * context
        return context, attention

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

        Args:
            features: (B, P, C).
            captions: ids (B, K, T), padded with 0 at the end; K captions of each photo.

        Returns:
            logits (N, V) of the N ids that follow another one and are no padding, in the order
            of ``captions[:, :, 1:][captions[:, :, 1:] != 0]``; and attention (B, K, T - 1, P).
        """
        _, K, T = captions.shape
        words = self.dropout(self.embedding(captions[:, :, :-1]))
        is_target = captions[:, :, 1:] != PAD
        (hidden, cell), memory = self.start(features, K)
        hiddens, contexts, attentions = [], [], []
        for step in range(T - 1):
            context, attention = self._look(words[:, :, step], hidden, memory)
            # Captions that have ended are left out of the large products.
            running = is_target[:, :, step]
            inputs = torch.cat([words[:, :, step], context], dim=-1)[running]
            new_hidden, new_cell = self.lstm(inputs, (hidden[running], cell[running]))
            hidden = hidden.to(new_hidden.dtype).index_put((running,), new_hidden)
            cell = cell.to(new_cell.dtype).index_put((running,), new_cell)
            hiddens.append(hidden)
            contexts.append(context)
            attentions.append(attention)
        hidden, context = torch.stack(hiddens, dim=2), torch.stack(contexts, dim=2)
        logits = self._output(words[is_target], hidden[is_target], context[is_target])
        return logits, torch.stack(attentions, dim=2)
