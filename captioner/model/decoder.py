"""The decoder: additive attention over a grid of cells, and an LSTM that writes word by word.

Ids and vectors only: knows nothing of photos or search. ``fast.py`` computes the same, faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, softplus

from captioner.config import PAD, UNK, ModelConfig
from captioner.model.words import Pointer, WordDetectors


class Memory(NamedTuple):
    """What stays the same at every step.

    Attributes:
        features: (B, P, C), the encoder's cells, normalized and projected if the config asks for
            it; after a projection C is ``feature_size``.
        keys: (B, P, A), ``Wf(features)``.
        evidence: (B, P, D) of each cell for each word with a detector; D is 0 without them.
        names: (B, P, E), the probability of each name that the backbone knows (see ``Pointer``);
            E is 0 without them.
    """

    features: Tensor
    keys: Tensor
    evidence: Tensor
    names: Tensor


class State(NamedTuple):
    """The LSTM's hidden and cell state, (B, W, H) each, for W captions of each of B photos."""

    hidden: Tensor
    cell: Tensor


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015; Xu et al. 2015, section 3.1.2).

    score = v(tanh(Wf(feature) + Wh(query))), softmax over the P cells.
    """

    def __init__(self, channels: int, query_size: int, attention_size: int) -> None:
        """Create ``Wf`` (C -> A), ``Wh`` (Q -> A) and ``v`` (A -> 1)."""
        super().__init__()
        self.Wf = nn.Linear(channels, attention_size)
        self.Wh = nn.Linear(query_size, attention_size)
        self.v = nn.Linear(attention_size, 1)

    def forward(self, memory: Memory, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to each photo once for each of its W queries.

        Args:
            memory: features (B, P, C) and keys (B, P, A).
            query: (B, W, Q), the hidden state; with ``word_query`` the previous word follows it.

        Returns:
            context (B, W, C), and attention (B, W, P) whose rows sum to 1.
        """
        return self.attend(memory, self.Wh(query))

    def attend(self, memory: Memory, projected_query: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with ``projected_query = Wh(query)``, (B, W, A)."""
        attention = self.score(memory, projected_query).float().softmax(dim=-1)
        return attention.to(memory.features.dtype) @ memory.features, attention

    def score(self, memory: Memory, projected_query: Tensor) -> Tensor:
        """Return the score (B, W, P) of each cell, before the softmax."""
        summed = memory.keys[:, None] + projected_query[:, :, None]  # (B, W, P, A)
        return self.v(torch.tanh(summed)).squeeze(-1)


class CaptionModel(nn.Module):
    """Attention, LSTMCell and output layer; see ``ModelConfig`` for the options."""

    kinds: Tensor
    mean_features: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Create the layers with random weights."""
        super().__init__()
        self.config = config
        C, E, H = config.encoder_channels, config.embedding_size, config.hidden_size
        if config.feature_size:
            self.projection = nn.Linear(C, config.feature_size)
            C = config.feature_size
        # Of ``Memory.features``, over training photos: a cell that shows nothing in particular.
        self.register_buffer("mean_features", torch.zeros(C))
        self.embedding = nn.Embedding(config.vocabulary_size, E, padding_idx=PAD)
        self.first_unwritten = config.vocabulary_size - len(config.kinds)
        # On the CPU even where the weights are on "meta": it is not in the checkpoint.
        kinds = torch.tensor(config.kinds, dtype=torch.long, device="cpu")
        self.register_buffer("kinds", kinds, persistent=False)
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
            # The output layer starts as small as the embedding that training puts here.
            nn.init.normal_(self.embedding.weight, std=E**-0.5)
            self.fc.weight = self.embedding.weight
        if config.num_detectors:
            self.detectors = WordDetectors(config.encoder_channels, config.num_detectors)
            self.detectors.requires_grad_(False)
        self.has_evidence = config.evidence and config.num_detectors > 0
        if self.has_evidence:
            self.evidence_gain = nn.Linear(H, 1)
        if config.class_names:
            self.pointer = Pointer(config)
            self.pointer.classifier.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        # Whole channels: if other cells kept a channel, they would give away what was dropped.
        self.feature_dropout = nn.Dropout1d(config.feature_dropout)

    def forward(self, cells: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each word of given captions from the words before it (teacher forcing).

        Args:
            cells: (B, P, C), from the encoder.
            captions: ids (B, K, T), K captions per photo, padded with 0 at the end.

        Returns:
            logits (N, V) for the N targets ``captions[:, :, 1:][captions[:, :, 1:] != 0]``, and
            attention (B, K, T - 1, P), zero at padding.
        """
        state, memory = self.start(cells, captions.shape[1])
        all_logits, all_attention = [], []
        for token_ids in captions[:, :, :-1].unbind(dim=-1):
            logits, attention, state = self.step(token_ids, state, memory)
            all_logits.append(logits)
            all_attention.append(attention)
        is_target = captions[:, :, 1:] != PAD  # (B, K, T - 1)
        logits = torch.stack(all_logits, dim=2)[is_target]
        return logits, torch.stack(all_attention, dim=2) * is_target[..., None]

    def start(self, cells: Tensor, width: int = 1) -> tuple[State, Memory]:
        """Return the state and memory before the first word.

        Args:
            cells: (B, P, C), from the encoder.
            width: W, captions per photo.
        """
        memory = self.remember(cells)
        return self.first_state(memory.features, width), memory

    def remember(self, cells: Tensor) -> Memory:
        """Return the memory of photos with cells (B, P, C); no cell's part depends on the others.

        Dropout aside.
        """
        features = cells
        if self.config.feature_norm:
            features = layer_norm(features, features.shape[-1:])
        # Dropout1d drops dim 1 of (B, C, P).
        features = self.feature_dropout(features.transpose(1, 2)).transpose(1, 2)
        if self.config.feature_size:
            features = torch.relu(self.projection(features))
        return Memory(features, self.attn.Wf(features), *self._recognize(cells))

    def first_state(self, features: Tensor, width: int = 1) -> State:
        """Return the state before the first word, from ``Memory.features``."""
        if self.config.mean_start:
            mean = features.mean(dim=1)
            hidden = torch.tanh(self.start_hidden(mean))
            cell = torch.tanh(self.start_cell(mean))
        else:
            hidden = cell = features.new_zeros(features.shape[0], self.config.hidden_size)
        shape = (-1, width, -1)
        return State(hidden[:, None].expand(shape), cell[:, None].expand(shape))

    def step(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor, State]:
        """Read one word of each caption and predict the next.

        Args:
            token_ids: (B, W), the previous word of each caption.
            state: hidden and cell (B, W, H).
            memory: features and keys of the photos.

        Returns:
            logits (B, W, V), attention (B, W, P) and the next state.
        """
        logits, attention, state = self.step_unaided(token_ids, state, memory)
        logits = self.add_recognized(
            logits,
            state.hidden,
            attention @ memory.evidence,
            attention @ memory.names,
            token_ids,
        )
        return logits, attention, state

    def step_unaided(
        self, token_ids: Tensor, state: State, memory: Memory
    ) -> tuple[Tensor, Tensor, State]:
        """Return the same as ``step``, but the logits of the output layer alone."""
        B, W = token_ids.shape
        word = self.embed(token_ids)  # (B, W, E)
        query = torch.cat([state.hidden, word], dim=-1) if self.config.word_query else state.hidden
        context, attention = self.attn(memory, query)
        context = self.gate_context(context, state.hidden)
        hidden, cell = self.lstm(
            torch.cat([word, context], dim=-1).flatten(0, 1),
            (state.hidden.flatten(0, 1), state.cell.flatten(0, 1)),
        )
        hidden, cell = hidden.view(B, W, -1), cell.view(B, W, -1)
        return self.predict(word, hidden, context), attention, State(hidden, cell)

    @torch.no_grad()
    def _recognize(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Memory.evidence`` and ``Memory.names`` of the cells."""
        nothing = cells[..., :0]
        return (
            self.detectors.evidence(cells) if self.has_evidence else nothing,
            self.pointer.recognize(cells) if self.config.class_names else nothing,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the vectors (..., E) of ids (...); names that no caption held borrow theirs."""
        if self.config.kinds:
            kinds = self.kinds[(token_ids - self.first_unwritten).clamp(min=0)]
            token_ids = torch.where(token_ids < self.first_unwritten, token_ids, kinds)
        vectors: Tensor = self.dropout(self.embedding(token_ids))
        return vectors

    def gate_context(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Return context (..., C), scaled by a gate on hidden (..., H) if the config has one."""
        if self.config.context_gate:
            context = torch.sigmoid(self.gate(hidden)) * context
        return context

    def predict(self, word: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Return logits (..., V) from word vectors (..., E), hidden (..., H), context (..., C)."""
        if self.config.deep_output:
            hidden = self.hidden_output(hidden) + self.context_output(context) + word
        return self.fc(self.dropout(hidden))

    def add_recognized(
        self, logits: Tensor, hidden: Tensor, evidence: Tensor, names: Tensor, token_ids: Tensor
    ) -> Tensor:
        """Add what the attended cells show to the logits (..., V) of the output layer.

        Both terms are linear in the cells, so a cell's share of them is its attention times its
        own evidence.

        Args:
            logits: (..., V).
            hidden: (..., H), which decides how much the evidence counts for this word.
            evidence: (..., D), the attention's mean of ``Memory.evidence``.
            names: (..., E), the same of ``Memory.names``.
            token_ids: (...), the previous words.
        """
        if self.has_evidence:
            gain = softplus(self.evidence_gain(hidden).float())
            # The words with a detector follow the specials.
            after = logits.shape[-1] - evidence.shape[-1] - UNK - 1
            logits = logits.float() + pad(gain * evidence.float(), (UNK + 1, after))
        if self.config.class_names:
            logits = self.pointer(logits.float(), hidden, names, token_ids)
        return logits
