"""How one word was chosen: the numbers of a single step of the decoder, for teaching.

Calls the layers of ``decoder.py`` one after another, as ``CaptionModel.step`` does, and writes down
what each returns, beside its lines in the source. Ids and vectors in, numbers out: knows nothing of
photos or search.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from captioner.config import BOS, UNK
from captioner.model import decoder, search
from captioner.model.decoder import CaptionModel, Memory
from captioner.model.words import UNWRITTEN

_NUM_CANDIDATES = 5

# The code of each step: the module that holds it, how its first line begins, how many lines.
_CODE: dict[str, list[tuple[ModuleType, str, int]]] = {
    "query": [(decoder, "query = torch.cat([state.hidden, word]", 1)],
    "scores": [
        (decoder, "summed = memory.keys[:, None] + projected_query", 1),
        (decoder, "return self.v(torch.tanh(summed))", 1),
    ],
    "attention": [(decoder, "attention = self.score(", 1)],
    "context": [(decoder, "return attention.to(memory.features.dtype) @", 1)],
    "gate": [(decoder, "context = torch.sigmoid(self.gate(hidden))", 1)],
    "lstm": [(decoder, "hidden, cell = self.lstm(", 4)],
    "deep": [(decoder, "hidden = self.hidden_output(hidden)", 1)],
    "output": [(decoder, "return self.fc(self.dropout(hidden))", 1)],
    "evidence": [
        (decoder, "gain = softplus(self.evidence_gain(hidden)", 1),
        (decoder, "logits = logits.float() + pad(gain * evidence", 1),
    ],
    "pointer": [(decoder, "logits = self.pointer(", 1)],
    "softmax": [(search, "log_probabilities = logits.float().log_softmax(", 1)],
}


@dataclasses.dataclass(frozen=True)
class CodeLines:
    """A statement of the source.

    Attributes:
        file: the name of its file.
        line: number of its first line, from 1.
        text: its lines without their common indentation.
    """

    file: str
    line: int
    text: str


@functools.cache
def code_of(step: str) -> tuple[CodeLines, ...]:
    """Return the code of a step, found in the source itself.

    Raises:
        LookupError: the code has changed, and ``_CODE`` has not.
    """
    found = []
    for module, beginning, length in _CODE[step]:
        lines, _ = inspect.getsourcelines(module)
        at = [index for index, line in enumerate(lines) if line.lstrip().startswith(beginning)]
        if len(at) != 1:
            raise LookupError(f"{module.__name__} has {len(at)} lines that begin {beginning!r}")
        text = textwrap.dedent("".join(lines[at[0] : at[0] + length])).rstrip()
        found.append(CodeLines(Path(inspect.getfile(module)).name, at[0] + 1, text))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A word that could stand here; ``output + evidence + pointer`` is its logit.

    Attributes:
        text: the word.
        output: logit of the output layer; ``UNWRITTEN`` for a name that no caption held.
        evidence: what the detectors' evidence adds, ``evidence_gain * seen``; 0 without a detector.
        pointer: what the pointer adds; 0 if the word is no name that fits here.
        logit: the sum, from which the softmax computes the probability.
        probability: 0 to 1.
        seen: the attention's mean of the cells' evidence for the word, or None without a detector.
        named: the attention's mean of the cells' probability of the name, or None if it is none.
        is_unwritten: whether no caption held it, so that only the pointer can write it.
    """

    text: str
    output: float
    evidence: float
    pointer: float
    logit: float
    probability: float
    seen: float | None
    named: float | None
    is_unwritten: bool


@dataclasses.dataclass(frozen=True)
class WordSteps:
    """The numbers of one step. What the model does not have is None.

    Attributes:
        word: the word that was chosen.
        previous: the word before it; "<bos>" before the first.
        sizes: numbers per vector: "hidden", "word", "query", "attention", "context",
            "vocabulary".
        hidden_before: norm of the hidden state before the step.
        word_norm: norm of the previous word's vector.
        query: norm of the query.
        projected_query: norm of the same after ``Wh``.
        scores: (P,), of each cell, before the softmax.
        attention: (P,), sums to 1.
        context: norm of the cells' mean, weighted by the attention.
        gate: 0 to 1, multiplies that mean.
        input_gate: mean over the LSTM's units, 0 to 1.
        forget_gate: the same.
        output_gate: the same.
        cell_before: norm of the LSTM's cell before the step.
        cell: the same after it.
        cell_change: norm of the difference.
        hidden: norm of the hidden state after the step.
        evidence_gain: multiplies the evidence.
        pointer_gate: is added to each name's log-probability.
        pointer_scale: multiplies each name's log-probability.
        log_sum_exp: of all logits; a word's logit minus this is its log-probability.
        candidates: the likeliest words, best first, and the chosen one.
        code: the steps that the model has, in order, with their code.
    """

    word: str
    previous: str
    sizes: dict[str, int]
    hidden_before: float
    word_norm: float
    query: float
    projected_query: float
    scores: list[float]
    attention: list[float]
    context: float
    gate: float | None
    input_gate: float
    forget_gate: float
    output_gate: float
    cell_before: float
    cell: float
    cell_change: float
    hidden: float
    evidence_gain: float | None
    pointer_gate: float | None
    pointer_scale: float | None
    log_sum_exp: float
    candidates: tuple[Candidate, ...]
    code: dict[str, tuple[CodeLines, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@torch.inference_mode()
def word_steps(
    model: CaptionModel, cells: Tensor, ids: Sequence[int], idx2word: Sequence[str]
) -> WordSteps:
    """Return how the last of ``ids`` was chosen after the ones before it.

    Args:
        model: in ``eval()``, not packed.
        cells: (P, C), from the encoder.
        ids: the caption up to the word in question, at least one, without ``<bos>``.
        idx2word: the vocabulary.
    """
    state, memory = model.start(cells[None])
    *before, chosen = [BOS, *ids]
    for token in before[:-1]:
        _, _, state = model.step_unaided(_token(token, cells), state, memory)
    token_ids = _token(before[-1], cells)

    # From here on as in ``CaptionModel.step``.
    config = model.config
    word = model.embed(token_ids)  # (1, 1, E)
    query = torch.cat([state.hidden, word], dim=-1) if config.word_query else state.hidden
    projected_query = model.attn.Wh(query)  # (1, 1, A)
    scores = model.attn.score(memory, projected_query)  # (1, 1, P)
    context, attention = model.attn.attend(memory, projected_query)
    gate = float(torch.sigmoid(model.gate(state.hidden))) if config.context_gate else None
    gated = model.gate_context(context, state.hidden)
    inputs = torch.cat([word, gated], dim=-1)[0]  # (1, E + C)
    hidden, cell = model.lstm(inputs, (state.hidden[0], state.cell[0]))
    input_gate, forget_gate, output_gate = _lstm_gates(model, inputs, state.hidden[0])
    logits = model.predict(word, hidden[None], gated)
    candidates, log_sum_exp = _candidates(
        model, memory, attention, hidden[None], logits, token_ids, chosen, idx2word
    )
    has_pointer = bool(config.class_names)
    has = {
        "gate": config.context_gate,
        "deep": config.deep_output,
        "evidence": model.has_evidence,
        "pointer": has_pointer,
    }
    return WordSteps(
        word=idx2word[chosen],
        previous=idx2word[before[-1]],
        sizes={
            "hidden": config.hidden_size,
            "word": config.embedding_size,
            "query": query.shape[-1],
            "attention": config.attention_size,
            "context": context.shape[-1],
            "vocabulary": config.vocabulary_size,
        },
        hidden_before=_norm(state.hidden),
        word_norm=_norm(word),
        query=_norm(query),
        projected_query=_norm(projected_query),
        scores=scores.flatten().tolist(),
        attention=attention.flatten().tolist(),
        context=_norm(context),
        gate=gate,
        input_gate=float(input_gate.mean()),
        forget_gate=float(forget_gate.mean()),
        output_gate=float(output_gate.mean()),
        cell_before=_norm(state.cell),
        cell=_norm(cell),
        cell_change=_norm(cell - state.cell[0]),
        hidden=_norm(hidden),
        evidence_gain=_evidence_gain(model, hidden) if model.has_evidence else None,
        pointer_gate=float(model.pointer.gate(hidden)) if has_pointer else None,
        pointer_scale=float(model.pointer.scale) if has_pointer else None,
        log_sum_exp=log_sum_exp,
        candidates=candidates,
        code={step: code_of(step) for step in _CODE if has.get(step, True)},
    )


def _token(token_id: int, cells: Tensor) -> Tensor:
    return torch.tensor([[token_id]], device=cells.device)


def _norm(vector: Tensor) -> float:
    return float(vector.norm())


def _evidence_gain(model: CaptionModel, hidden: Tensor) -> float:
    return float(softplus(model.evidence_gain(hidden).float()))


def _lstm_gates(model: CaptionModel, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Return the input, forget and output gate (1, H), which ``nn.LSTMCell`` keeps to itself."""
    lstm = model.lstm
    gates = inputs @ lstm.weight_ih.T + lstm.bias_ih + hidden @ lstm.weight_hh.T + lstm.bias_hh
    i, f, _, o = gates.chunk(4, dim=-1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)


def _candidates(
    model: CaptionModel,
    memory: Memory,
    attention: Tensor,
    hidden: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    chosen: int,
    idx2word: Sequence[str],
) -> tuple[tuple[Candidate, ...], float]:
    """Return the likeliest words and the chosen one, and the log-sum-exp of all logits.

    Args:
        model: the decoder.
        memory: of one photo.
        attention: (1, 1, P).
        hidden: (1, 1, H), after the step.
        logits: (1, 1, V), of the output layer.
        token_ids: (1, 1), the previous word.
        chosen: id of the word in question.
        idx2word: the vocabulary.
    """
    output = logits[0, 0].float()
    evidence, pointer = torch.zeros_like(output), torch.zeros_like(output)
    seen: dict[int, float] = {}
    named: dict[int, float] = {}
    is_unwritten = torch.zeros_like(output, dtype=torch.bool)
    if model.has_evidence:
        means = (attention @ memory.evidence)[0, 0].float()  # (D,)
        seen = dict(enumerate(means.tolist(), UNK + 1))  # words with a detector follow the specials
        evidence[UNK + 1 : UNK + 1 + len(means)] = _evidence_gain(model, hidden) * means
    if model.config.class_names:
        names = attention @ memory.names
        written = output + evidence
        pointed = model.pointer(written[None, None], hidden, names, token_ids)[0, 0]
        is_unwritten[model.pointer.words[model.pointer.is_unwritten]] = True
        output = torch.where(is_unwritten, UNWRITTEN, output)
        pointer = pointed - (output + evidence)
        shares = model.pointer.by_word(names, token_ids)[0, 0].tolist()
        named = {
            int(word): share
            for word, share in zip(model.pointer.words, shares, strict=True)
            if share > 0
        }
    total = output + evidence + pointer
    probabilities = total.softmax(dim=-1)
    best = probabilities.topk(min(_NUM_CANDIDATES, len(total))).indices.tolist()
    candidates = [
        Candidate(
            text=idx2word[index],
            output=float(output[index]),
            evidence=float(evidence[index]),
            pointer=float(pointer[index]),
            logit=float(total[index]),
            probability=float(probabilities[index]),
            seen=seen.get(index),
            named=named.get(index),
            is_unwritten=bool(is_unwritten[index]),
        )
        for index in (best if chosen in best else [*best, chosen])
    ]
    return tuple(candidates), float(total.logsumexp(dim=-1))
