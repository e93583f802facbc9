"""Self-critical training (Rennie et al. 2017): make captions that score well more likely.

Captions are sampled from the model and rewarded by CIDEr-D against the photo's own captions.
Knows nothing of runs or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captioner.config import BOS, EOS, PAD, UNK
from captioner.model.decoder import CaptionModel, Memory, State
from captioner.model.vocabulary import Vocabulary
from captioner.training.metrics import CiderD

# Never sampled. Masked before the softmax: masked after it, their probability would grow unseen.
_SUPPRESSED_IDS = [PAD, BOS, UNK]


def _log_policy(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (..., V) of the next id, suppressed ids at minus infinity."""
    logits = logits.float().clone()
    logits[..., _SUPPRESSED_IDS] = -torch.inf
    return (logits / temperature).log_softmax(dim=-1)


class Reward:
    """CIDEr-D of sampled captions, 0 to 10.

    ``<eos>`` counts as a word, so unfinished captions score less.
    """

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        """Take the cleaned ``references`` of each photo of the training set."""
        self._words = vocabulary.idx2word
        end = self._words[EOS]
        self._cider = CiderD([[f"{text} {end}" for text in texts] for texts in references])

    def __call__(self, photo_indices: Sequence[int], captions: Tensor) -> Tensor:
        """Return rewards (B, K) of the captions (B, K, T) of these photos."""
        scores = [
            self._cider.score(index, [self._text(token_ids) for token_ids in samples])
            for index, samples in zip(photo_indices, captions.tolist(), strict=True)
        ]
        return torch.tensor(scores)

    def _text(self, token_ids: Sequence[int]) -> str:
        """Return the words behind ``<bos>``, ``<eos>`` included."""
        return " ".join(self._words[token_id] for token_id in token_ids[1:] if token_id != PAD)


def _sample_ids(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample an id (N, 1) from each row of probabilities (N, V).

    ``torch.multinomial`` draws V random numbers per row; one is enough.
    """
    sums = probabilities.double().cumsum(dim=-1)
    point = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)
    return torch.searchsorted(sums, point * sums[:, -1:], right=True)


@torch.no_grad()
def sample_captions(
    model: CaptionModel,
    features: Tensor,
    *,
    samples: int,
    temperature: float,
    max_length: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample captions from the model, without gradients.

    Args:
        model: in evaluation mode, without dropout.
        features: (B, P, C).
        samples: K, the number of captions per photo.
        temperature: below 1 makes likely words more likely.
        max_length: the maximum of T; a caption that has not ended by then has no ``<eos>``.
        generator: random generator; None uses torch's default.

    Returns:
        ids (B, K, T): ``<bos>``, words, ``<eos>``, padding.
    """
    state, memory = model.start(features, samples)
    # Under autocast the keys are bfloat16; cast the rest once, not at each step.
    memory = Memory(*(part.to(memory.keys.dtype) for part in memory))
    shape = (len(features), samples)
    token_ids = torch.full(shape, BOS, device=features.device)
    captions = torch.full((*shape, max_length), PAD, device=features.device)
    captions[..., 0] = BOS
    photos = torch.arange(len(features), device=features.device)  # with unfinished captions
    for length in range(1, max_length):
        logits, _, state = model.step(token_ids, state, memory)
        is_finished = (token_ids == EOS) | (token_ids == PAD)
        probabilities = _log_policy(logits, temperature).exp().flatten(0, 1)
        token_ids = _sample_ids(probabilities, generator).view(token_ids.shape)
        token_ids = token_ids.masked_fill(is_finished, PAD)
        captions[photos, :, length] = token_ids
        unfinished = ((token_ids != EOS) & (token_ids != PAD)).any(dim=1).nonzero().squeeze(1)
        if not len(unfinished):
            break
        if len(unfinished) < len(photos):
            photos, token_ids = photos[unfinished], token_ids[unfinished]
            state = State(*(part[unfinished] for part in state))
            memory = Memory(*(part[unfinished] for part in memory))
    return captions[..., : length + 1]


def self_critical_loss(
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    features: Tensor,
    captions: Tensor,
    rewards: Tensor,
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the REINFORCE loss, a scalar, and the attention (B, K, T - 1, P).

    The baseline of each caption is the mean reward of the photo's other captions (Luo 2020).

    Args:
        model: the model that sampled the captions, or a wrapper of its ``forward``.
        features: (B, P, C).
        captions: ids (B, K, T) from ``sample_captions``, K >= 2.
        rewards: (B, K).
        temperature: the sampling temperature.
    """
    num_others = rewards.shape[1] - 1
    baseline = (rewards.sum(dim=1, keepdim=True) - rewards) / num_others
    advantage = (rewards - baseline).to(features.device)
    logits, attention = model(features, captions)  # (N, V), one row per target
    is_target = captions[:, :, 1:] != PAD
    targets = captions[:, :, 1:][is_target]
    log_probs = _log_policy(logits, temperature).gather(1, targets[:, None]).squeeze(1)
    weights = advantage[..., None].expand(is_target.shape)[is_target]
    return -(weights * log_probs).sum() / advantage.numel(), attention
