"""What each cell shows, in words: detectors learned from captions, and the backbone's own classes.

Both reach the next word through the attention: a word gains by what its detector sees in the
attended cells (``WordDetectors``), and the name of a class can be pointed at that the backbone
recognizes there (``Pointer``). Knows nothing of photos or search.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, softplus

from captioner.config import ModelConfig

# A new detector's logit: a word is rare in captions, and rarer still in a single cell.
_START = -6.5
# The logit of a word that may not be written. Far below all others, yet near enough that label
# smoothing, which counts it, stays small.
UNWRITTEN = -25.0


class WordDetectors(nn.Module):
    """How clearly each cell shows each of D words: a linear map of its normalized vector.

    Learned from captions alone: a photo shows a word if at least one of its cells does (noisy-OR;
    Fang et al. 2015, "From Captions to Visual Concepts and Back", section 3).
    """

    mean_logits: Tensor

    def __init__(self, channels: int, num_words: int) -> None:
        """Create detectors (C -> D) that see nothing anywhere."""
        super().__init__()
        self.linear = nn.Linear(channels, num_words)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, _START)
        # The logits of the training photos' mean cell.
        self.register_buffer("mean_logits", torch.full((num_words,), _START))

    def forward(self, cells: Tensor) -> Tensor:
        """Return the logits (B, P, D) that the cells (B, P, C) show the words."""
        logits: Tensor = self.linear(layer_norm(cells, cells.shape[-1:]))
        return logits

    def evidence(self, cells: Tensor) -> Tensor:
        """Return the logits (B, P, D) above or below those of the mean cell."""
        return self(cells) - self.mean_logits


def photo_probability(logits: Tensor) -> Tensor:
    """Return the probability (B, D) that any cell shows a word, from logits (B, P, D)."""
    return -torch.expm1(-softplus(logits).sum(dim=1))


def detection_loss(logits: Tensor, is_shown: Tensor) -> Tensor:
    """Return the binary cross-entropy of the photos' words, summed over words, mean over photos.

    Args:
        logits: (B, P, D).
        is_shown: (B, D), 1 where a caption of the photo holds the word, else 0.
    """
    absent = softplus(logits.float()).sum(dim=1)  # -log(1 - photo_probability), precisely
    shown = -torch.log(-torch.expm1(-absent.clamp(min=1e-6)))
    return torch.where(is_shown > 0, shown, absent).sum(dim=1).mean()


class Pointer(nn.Module):
    """Lets a caption name what the backbone's classifier recognizes in the attended cells.

    Each class has an everyday name of one or two words. Names compete with the words of the output
    layer in one softmax (Gu et al. 2016, CopyNet; Li et al. 2019, LSTM-P), so that a name that
    training saw once or never can still be written.

    A name's words are its E entries: a second word is an entry of its own, valid only after its
    first word, which is valid anywhere else.
    """

    words: Tensor
    places: Tensor
    firsts: Tensor
    is_second: Tensor
    classes: Tensor
    entries: Tensor
    is_unwritten: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Create the layers for ``config.class_names``, with random weights.

        Those of the classifier are to be the backbone's.
        """
        super().__init__()
        self.classifier = nn.Linear(config.classifier_channels, len(config.class_names))
        self.gate = nn.Linear(config.hidden_size, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.name_dropout = config.name_dropout
        # Entries as (first word of two, or -1; whether it is the second; the word itself).
        of_class = [
            [(-1, False, ids[0])]
            if len(ids) == 1
            else [(ids[0], False, ids[0]), (ids[0], True, ids[1])]
            for ids in config.class_names
        ]
        entries = sorted({entry for both in of_class for entry in both})
        words = sorted({word for _, _, word in entries})
        first_unwritten = config.vocabulary_size - len(config.kinds)
        pairs = [
            (number, entries.index(entry)) for number, both in enumerate(of_class) for entry in both
        ]
        constants = {
            "words": words,  # the M different ids
            "places": [words.index(word) for _, _, word in entries],  # of the entries, among them
            "firsts": [first for first, _, _ in entries],
            "is_second": [is_second for _, is_second, _ in entries],
            "classes": [number for number, _ in pairs],
            "entries": [entry for _, entry in pairs],
            "is_unwritten": [word >= first_unwritten for word in words],
        }
        for name, values in constants.items():
            # On the CPU even where the weights are on "meta": these are not in the checkpoint.
            self.register_buffer(name, torch.tensor(values, device="cpu"), persistent=False)

    def recognize(self, cells: Tensor) -> Tensor:
        """Return each cell's probability (B, P, E) of each entry, from cells (B, P, C)."""
        logits = self.classifier(cells[..., : self.classifier.in_features])
        probabilities = logits.float().softmax(dim=-1).index_select(-1, self.classes)
        nothing = probabilities.new_zeros(*probabilities.shape[:-1], len(self.firsts))
        return nothing.index_add(-1, self.entries, probabilities)

    def is_valid(self, token_ids: Tensor) -> Tensor:
        """Return which entries (..., E) may follow the previous words (...)."""
        return (token_ids[..., None] == self.firsts) == self.is_second

    def by_word(self, names: Tensor, token_ids: Tensor) -> Tensor:
        """Return the probabilities (..., M) of the words, each the sum of its valid entries.

        Args:
            names: (..., E).
            token_ids: (...), the previous words, which decide what is valid.
        """
        names = names.float() * self.is_valid(token_ids)
        nothing = names.new_zeros(*names.shape[:-1], len(self.words))
        return nothing.scatter_add(-1, self.places.expand_as(names), names)

    def forward(self, logits: Tensor, hidden: Tensor, names: Tensor, token_ids: Tensor) -> Tensor:
        """Return logits (..., V) with the names added.

        Args:
            logits: (..., V), float32, of the output layer.
            hidden: (..., H), the LSTM's state; from it a gate tells how well a name fits here.
            names: (..., E), the attention's mean of the cells' probabilities.
            token_ids: (...), the previous words.
        """
        names = self.by_word(names, token_ids)
        written = logits.index_select(-1, self.words)
        is_hidden = self.is_unwritten
        if self.training and self.name_dropout:
            # Only where the pointer can help; else the word could not be learned at all.
            is_hidden = is_hidden | ((torch.rand_like(names) < self.name_dropout) & (names > 0.05))
        written = torch.where(is_hidden, UNWRITTEN, written)
        pointed = self.scale * names.clamp(min=1e-20).log() + self.gate(hidden).float()
        return logits.index_copy(-1, self.words, torch.logaddexp(written, pointed))
