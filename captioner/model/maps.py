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
from torch.nn.functional import softplus

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
    """

    log_probabilities: Tensor
    attended: Tensor
    evidence: Tensor
    shown: Tensor
    has_evidence: Tensor
    has_detector: Tensor


@torch.inference_mode()
def caption_maps(model: CaptionModel, cells: Tensor, ids: Sequence[int]) -> CaptionMaps:
    """Read a caption and return the maps that need no second reading.

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
        cells: (P, C), from the encoder.
        ids: T words, at least one, without ``<bos>``.
    """
    memory = model.remember(cells[None])
    state = model.first_state(memory.features)
    steps = []
    for previous in [BOS, *ids][:-1]:
        token_ids = torch.tensor([[previous]], device=cells.device)
        logits, attention, state = model.step_unaided(token_ids, state, memory)
        steps.append((logits[0, 0], attention[0, 0], state.hidden[0, 0]))
    unaided, attended, hidden = (torch.stack(each) for each in zip(*steps, strict=True))
    words = torch.tensor(ids, device=cells.device)
    previous_ids = torch.tensor([BOS, *ids][:-1], device=cells.device)
    logits = model.add_recognized(
        unaided, hidden, attended @ memory.evidence[0], attended @ memory.names[0], previous_ids
    ).float()
    column, has_detector = _detector_of(words, model.config.num_detectors)
    evidence, shown = torch.zeros_like(attended), torch.zeros_like(attended)
    has_evidence = torch.zeros_like(has_detector)
    if model.config.num_detectors:
        seen = model.detectors(cells)[:, column].T.float()  # (T, P)
        shown = seen.sigmoid() * has_detector[:, None]
    if model.has_evidence:
        gain = softplus(model.evidence_gain(hidden).float())  # (T, 1)
        evidence = gain * attended * memory.evidence[0][:, column].T * has_detector[:, None]
        has_evidence = has_detector
    if model.config.class_names:
        written = _of_words(unaided.float(), words) + evidence.sum(dim=1)
        pointed, is_named = _pointed(
            model, memory, attended, written, _of_words(logits, words), words, previous_ids
        )
        evidence, has_evidence = evidence + pointed, has_evidence | is_named
    return CaptionMaps(
        _of_words(logits.log_softmax(dim=-1), words),
        attended,
        evidence,
        shown,
        has_evidence,
        has_detector,
    )


@torch.inference_mode()
def mattered(model: CaptionModel, cells: Tensor, ids: Sequence[int], replacement: Tensor) -> Tensor:
    """Return (T, P), how far each word's log-probability falls, in nats, without each cell.

    Occlusion (Zeiler and Fergus 2014) on the grid: the whole caption is read again with the cell
    replaced, so this counts every way from the cell to the word, the LSTM's memory of the earlier
    words' readings included. Negative where the cell spoke against the word. The backbone has seen
    the whole photo: neighbors still hold part of what the cell showed.

    Args:
        model: in ``eval()``.
        cells: (P, C), from the encoder.
        ids: T words, without ``<bos>``; each is read after the same words as in the caption.
        replacement: (C,), a cell that shows nothing in particular, such as the mean of many photos.
    """
    num_cells = len(cells)
    # Cells are remembered one by one, so replacing them afterwards gives the same as before.
    whole = model.remember(torch.cat([cells, replacement[None].to(cells)])[None])
    rows = torch.arange(num_cells, device=cells.device).repeat(num_cells + 1, 1)
    rows[:-1].fill_diagonal_(num_cells)  # the last photo is left whole
    memory = Memory(*(part[0, rows] for part in whole))
    state = model.first_state(memory.features)
    log_probabilities = []
    for previous, word in pairwise([BOS, *ids]):
        token_ids = torch.full((num_cells + 1, 1), previous, device=cells.device)
        logits, _, state = model.step(token_ids, state, memory)
        log_probabilities.append(logits[:, 0].float().log_softmax(dim=-1)[:, word])
    readings = torch.stack(log_probabilities)  # (T, P + 1)
    return readings[:, -1:] - readings[:, :-1]


def _of_words(values: Tensor, words: Tensor) -> Tensor:
    """Return the entry of each word (T,) in values (T, V)."""
    return values.gather(1, words[:, None]).squeeze(1)


def _detector_of(words: Tensor, num_detectors: int) -> tuple[Tensor, Tensor]:
    """Return each word's detector, and whether it has one; words without get any."""
    column = words - UNK - 1  # words with a detector follow the specials
    has_detector = (column >= 0) & (column < num_detectors)
    return torch.where(has_detector, column, 0), has_detector


def _pointed(
    model: CaptionModel,
    memory: Memory,
    attended: Tensor,
    written: Tensor,
    logits: Tensor,
    words: Tensor,
    previous_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return each cell's part (T, P) of what the pointer added, and which words are names (T,).

    Args:
        model: with a pointer.
        memory: of one photo.
        attended: (T, P).
        written: (T,), the words' logits before the pointer.
        logits: (T,), the same after it.
        words: (T,).
        previous_ids: (T,).
    """
    pointer = model.pointer
    is_word = words[:, None] == pointer.words  # (T, M)
    place = is_word.int().argmax(dim=1)
    names = torch.stack(
        [
            pointer.by_word(memory.names[0], previous.expand(attended.shape[1]))[:, index]
            for previous, index in zip(previous_ids, place, strict=True)
        ]
    )  # (T, P)
    parts = attended * names * is_word.any(dim=1, keepdim=True)
    total = parts.sum(dim=1)
    written = torch.where(pointer.is_unwritten[place], UNWRITTEN, written)
    added = torch.where(total > 0, logits - written, 0)
    return parts * (added / total.clamp(min=1e-20))[:, None], total > 0
