"""Self-critical training (Rennie et al. 2017): draw captions, and make the better ones likelier.

The reward is CIDEr-D against the photo's own captions. Knows nothing of runs or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from captioner.config import BOS, EOS, PAD, UNK
from captioner.model.decoder import CaptionModel, Memory, State
from captioner.model.vocabulary import Vocabulary, clean
from captioner.training.metrics import CiderD

_END = "<eos>"
# Nobody wants to read these. They are taken out before the softmax: taken out after it, their
# share of the probability would be pushed up unseen.
_NEVER = (PAD, BOS, UNK)


def _policy(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (..., V) of what may be drawn."""
    logits = logits.float().clone()
    logits[..., list(_NEVER)] = -torch.inf
    return (logits / temperature).log_softmax(dim=-1)


class Reward:
    """CIDEr-D of drawn captions, 0 to 10, with the end as a word: breaking off costs."""

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        """Weigh n-grams by their rarity among ``references``, which photos have in their order."""
        ended = [[f"{clean(text)} {_END}" for text in texts] for texts in references]
        self._cider = CiderD(ended)
        # The id in CIDEr's own count of each id of the vocabulary.
        words = [*vocabulary.idx2word]
        words[EOS] = _END
        self._ids = np.array([self._cider.id_of(word) for word in words])
        self._ids[PAD] = -1

    def __call__(self, photos: Sequence[int], captions: Tensor) -> Tensor:
        """Return (B, K) rewards of captions (B, K, T), as ``draw`` makes them, of these photos."""
        tokens = self._ids[captions[:, :, 1:].cpu().numpy()]
        return torch.from_numpy(self._cider.score_tokens(photos, tokens)).float()


def _draw_one(chances: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an id (N, 1) from each row of probabilities (N, V).

    As ``torch.multinomial``, which draws V random numbers a row where one does.
    """
    sums = chances.double().cumsum(dim=-1)
    point = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)
    return torch.searchsorted(sums, point * sums[:, -1:], right=True)


@torch.no_grad()
def draw(
    model: CaptionModel,
    features: Tensor,
    *,
    samples: int,
    temperature: float,
    max_length: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw captions from the policy, without gradients.

    Args:
        model: as it is; dropout belongs off.
        features: (B, P, C).
        samples: K, captions a photo.
        temperature: below 1 the likelier words are drawn still more often.
        max_length: T at most; a caption that has not ended by then has no ``<eos>``.
        generator: of the random numbers.

    Returns:
        ids (B, K, T): ``<bos>``, words, ``<eos>``, padding.
    """
    state, memory = model.start(features)
    # A row for each caption, so that those that have ended can be left out.
    photos = torch.arange(len(features), device=features.device).repeat_interleave(samples)
    dtype = memory.keys.dtype  # under autocast bfloat16; the rest would be cast at each step
    memory = Memory(memory.features.to(dtype)[photos], memory.keys[photos])
    state = State(state.hidden[photos], state.cell[photos])
    words = torch.full((len(photos), 1), BOS, device=features.device)
    ids = torch.full((len(photos), max_length), PAD, device=features.device)
    ids[:, 0] = BOS
    running = torch.arange(len(photos), device=features.device)
    for length in range(1, max_length):
        logits, _, state = model.step(words, state, memory)
        words = _draw_one(_policy(logits.squeeze(1), temperature).exp(), generator)
        ids[running, length] = words.squeeze(1)
        left = (words.squeeze(1) != EOS).nonzero().squeeze(1)
        if not len(left):
            break
        if len(left) < len(running):
            running, words = running[left], words[left]
            state = State(*(part[left] for part in state))
            memory = Memory(*(part[left] for part in memory))
    return ids[:, : length + 1].view(len(features), samples, -1)


def loss(
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    features: Tensor,
    captions: Tensor,
    rewards: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Return a scalar whose gradient is the policy's (REINFORCE), negative.

    Each caption's baseline is the mean reward of the photo's other captions (Luo 2020), so that
    what all captions of a photo have in common moves nothing.

    Args:
        model: the one that drew; its ``forward``.
        features: (B, P, C).
        captions: ids (B, K, T) from ``draw``, K of at least 2.
        rewards: (B, K).
        temperature: the one of the drawing.
    """
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    advantage = (rewards - others).to(features.device)
    logits, _ = model(features, captions)
    is_target = captions[:, :, 1:] != PAD
    targets = captions[:, :, 1:][is_target]
    chosen = _policy(logits, temperature).gather(1, targets[:, None]).squeeze(1)
    weights = advantage[..., None].expand(is_target.shape)[is_target]
    return -(weights * chosen).sum() / advantage.numel()
