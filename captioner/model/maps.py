"""Four maps for each word of a caption: where the model read, and what that was worth.

*attended* is the attention. *evidence* is what each attended cell gave to the word by its detector
and by the pointer. *mattered* is how far the word's probability falls without the cell. *shown* is
where the word's detector sees it, whatever the decoder did. Ids and vectors only: knows nothing of
photos or search.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus
from torch.nn.utils.rnn import pad_sequence

from captioner.config import BOS, UNK
from captioner.model.decoder import CaptionModel, Memory
from captioner.model.words import UNWRITTEN


class CaptionMaps(NamedTuple):
    """What one reading of a caption gives: T words over P cells.

    Attributes:
        log_probabilities: (T,) of each word, in nats.
        attended: (T, P), the attention; rows sum to 1.
        evidence: (T, P), each cell's part, in nats, of what detector and pointer added to the
            word's logit; zero for words without either. Cells can speak against a word.
        shown: (T, P), the probability, by the word's detector, that the cell shows it; zero for
            words without one.
        has_evidence: (T,), whether the word has a detector or is a name valid at its place.
        has_detector: (T,), whether the word has a detector.
        recognized: (T,), the probability that the photo shows the word: by its detector, that any
            cell does; by the backbone's classes, that of the clearest cell; the larger of both.
    """

    log_probabilities: Tensor
    attended: Tensor
    evidence: Tensor
    shown: Tensor
    has_evidence: Tensor
    has_detector: Tensor
    recognized: Tensor


class Occlusion(NamedTuple):
    """How far the log-probability of each of T words falls, in nats, without what the photo shows.

    Negative where that spoke against the word.

    Attributes:
        cells: (T, P), without each cell.
        photo: (T,), without all of them.
    """

    cells: Tensor
    photo: Tensor


@torch.inference_mode()
def caption_maps(
    model: CaptionModel, memory: Memory, captions: Sequence[Sequence[int]]
) -> list[CaptionMaps]:
    """Read captions of one photo, and return the maps that need no second reading.

    The cells of ``evidence`` add up to exactly what ``CaptionModel.add_recognized`` added to the
    word's logit, given the attention (up to rounding; for a name that no caption held, to what it
    has above ``UNWRITTEN``). How the sum is divided is exact for the detector's part, which is
    linear in the cells: a cell's is gain * attention * evidence, and without it the logit before
    the pointer would be lower by just that. The pointer's part is not linear: it is divided in
    proportion to attention * probability of the name, which add up before the logarithm. All of it
    is about the logit of this word: neither about those of the others, which the same cells change
    too, nor about what reaches the word through the LSTM.

    Args:
        model: in ``eval()``.
        memory: of the photo.
        captions: each at least one id, without ``<bos>``.
    """
    device = memory.keys.device
    ids = pad_sequence([torch.tensor(caption, device=device) for caption in captions])
    previous = torch.cat([torch.full_like(ids[:1], BOS), ids[:-1]])  # (T, W)
    state = model.first_state(memory.features, len(captions))
    steps = []
    for token_ids in previous:
        logits, attention, state = model.step_unaided(token_ids[None], state, memory)
        steps.append((logits[0], attention[0], state.hidden[0]))
    unaided, attended, hidden = (torch.stack(each) for each in zip(*steps, strict=True))
    read = (unaided, attended, hidden, previous, ids)  # (T, W, ...) each
    return [
        _maps(model, memory, *(values[: len(caption), column] for values in read))
        for column, caption in enumerate(captions)
    ]


def _maps(
    model: CaptionModel,
    memory: Memory,
    unaided: Tensor,
    attended: Tensor,
    hidden: Tensor,
    previous: Tensor,
    words: Tensor,
) -> CaptionMaps:
    """Return the maps of a caption that was read.

    Args:
        model: which read it.
        memory: of its photo.
        unaided: (T, V), the logits of the output layer alone.
        attended: (T, P).
        hidden: (T, H).
        previous: (T,), the word before each word.
        words: (T,).
    """
    names, seen = memory.names[0], memory.evidence[0]
    logits = model.add_recognized(
        unaided, hidden, attended @ seen, attended @ names, previous
    ).float()
    evidence, shown = torch.zeros_like(attended), torch.zeros_like(attended)
    has_evidence = has_detector = torch.zeros_like(words, dtype=torch.bool)
    recognized = attended.new_zeros(len(words))
    if model.has_evidence:
        column = words - UNK - 1  # words with a detector follow the specials
        has_detector = (column >= 0) & (column < model.config.num_detectors)
        column = torch.where(has_detector, column, 0)
        own = seen[:, column].T.float()
        gain = softplus(model.evidence_gain(hidden).float())  # (T, 1)
        evidence = gain * attended * own * has_detector[:, None]
        mean_logits = model.detectors.mean_logits[column]
        shown = (own + mean_logits[:, None]).sigmoid() * has_detector[:, None]
        has_evidence = has_detector
        recognized = 1 - (1 - shown).prod(dim=1)
    if model.config.class_names:
        pointer = model.pointer
        is_own = pointer.words[pointer.places] == words[:, None]  # (T, E)
        named = (is_own & pointer.is_valid(previous)).float() @ names.T.float()  # (T, P)
        parts = attended * named
        total = parts.sum(dim=1, keepdim=True)
        is_unwritten = words >= model.first_unwritten
        before = torch.where(is_unwritten, UNWRITTEN, _of_words(unaided.float(), words))
        added = _of_words(logits, words) - before - evidence.sum(dim=1)
        evidence = evidence + parts / total.clamp(min=1e-20) * added[:, None] * (total > 0)
        has_evidence = has_evidence | (total > 0).squeeze(1)
        recognized = recognized.maximum(named.amax(dim=1))
    return CaptionMaps(
        _of_words(logits.log_softmax(dim=-1), words),
        attended,
        evidence,
        shown,
        has_evidence,
        has_detector,
        recognized,
    )


@torch.inference_mode()
def mattered(model: CaptionModel, cells: Tensor, ids: Sequence[int]) -> Occlusion:
    """Return how far each word's log-probability falls without each cell, and without the photo.

    Occlusion (Zeiler and Fergus 2014) on the grid: the whole caption is read again with
    ``model.mean_features`` in place of the cell, where neither detectors nor pointer recognize
    anything. So this counts every way from the cell to the word, the LSTM's memory of the earlier
    words' readings included. The backbone has seen the whole photo: neighbors still hold part of
    what the cell showed.

    Args:
        model: in ``eval()``.
        cells: (P, C), from the encoder.
        ids: T words, without ``<bos>``; each is read after the same words as in the caption.
    """
    num_cells = len(cells)
    # Cells are remembered one by one, so one can be replaced in memory. The mean is not one of
    # cells: normalized, their mean would speak against all words.
    whole = model.remember(cells[None])
    nothing = model.mean_features[None, None].to(cells)
    whole = Memory(
        torch.cat([whole.features, nothing], dim=1),
        torch.cat([whole.keys, model.attn.Wf(nothing)], dim=1),
        *(pad(part, (0, 0, 0, 1)) for part in (whole.evidence, whole.names)),
    )
    rows = torch.arange(num_cells, device=cells.device).repeat(num_cells + 2, 1)
    rows[:num_cells].fill_diagonal_(num_cells)
    rows[num_cells] = num_cells  # without the photo; the last row is left whole
    memory = Memory(*(part[0, rows] for part in whole))
    state = model.first_state(memory.features)
    log_probabilities = []
    for previous, word in pairwise([BOS, *ids]):
        token_ids = torch.full((num_cells + 2, 1), previous, device=cells.device)
        logits, _, state = model.step(token_ids, state, memory)
        log_probabilities.append(logits[:, 0].float().log_softmax(dim=-1)[:, word])
    readings = torch.stack(log_probabilities)  # (T, P + 2)
    falls = readings[:, -1:] - readings[:, :-1]
    return Occlusion(falls[:, :-1], falls[:, -1])


def _of_words(values: Tensor, words: Tensor) -> Tensor:
    """Return the entry of each word (T,) in values (T, V)."""
    return values.gather(1, words[:, None]).squeeze(1)
