"""A tiny decoder with photos and captions, for the tests of decoder.py and fast.py."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import BOS, EOS, PAD, ModelConfig
from captioner.model.decoder import CaptionModel

VOCABULARY, CHANNELS, CELLS, HIDDEN, EMBEDDING = 23, 6, 9, 10, 7

Options = dict[str, Any]


def _every_combination() -> list[Options]:
    names = ("feature_norm", "word_query", "mean_start", "context_gate", "words", "deep_output")
    return [
        {
            "feature_size": feature_size,
            **dict(zip(names, flags, strict=True)),
            "tied_embedding": tied_embedding,
        }
        for feature_size in (0, 4)
        for *flags, tied_embedding in itertools.product([False, True], repeat=7)
        if flags[-1] or not tied_embedding
    ]


def _pairwise(combinations: list[Options]) -> list[Options]:
    """Return few combinations in which every pair of values of two options occurs."""

    def pairs(options: Options) -> set[Any]:
        return set(itertools.combinations(options.items(), 2))

    missing = set().union(*map(pairs, combinations))
    chosen = [combinations[0], combinations[-1]]
    missing -= pairs(chosen[0]) | pairs(chosen[1])
    while missing:
        chosen.append(max(combinations, key=lambda options: len(missing & pairs(options))))
        missing -= pairs(chosen[-1])
    return chosen


PAIRWISE = _pairwise(_every_combination())
REPORT, ALL_ON = PAIRWISE[:2]


def name_of(options: Options) -> str:
    return "+".join(name for name, on in options.items() if on) or "report"


# What ``words`` stands for: detectors of the words 4 to 8, and six classes. The last two words are
# names that no caption held.
WORDS: Options = {
    "evidence": True,
    "num_detectors": 5,
    "class_names": [[5], [12], [12, 13], [12, 14], [21], [22]],
    "classifier_channels": 4,
    "kinds": [5, 12],
}


def make_model(
    *, words: bool = False, encoder_channels: int = CHANNELS, **options: Any
) -> CaptionModel:
    torch.manual_seed(0)
    options = {**WORDS, **options} if words else options
    config = ModelConfig(
        vocabulary_size=VOCABULARY,
        encoder_channels=encoder_channels,
        embedding_size=EMBEDDING,
        hidden_size=HIDDEN,
        attention_size=5,
        **options,
    )
    model = CaptionModel(config)
    # New models attend almost evenly; sharper attention makes mistakes visible.
    for parameter in model.attn.parameters():
        parameter.data *= 4
    if words:
        # New detectors see nothing.
        nn.init.normal_(model.detectors.linear.weight)
        nn.init.normal_(model.detectors.mean_logits)
        nn.init.constant_(model.pointer.scale, 0.7)
    return model.eval()


def make_cells(num_photos: int = 2) -> Tensor:
    return torch.randn(num_photos, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1))


def _make_captions() -> Tensor:
    """Two photos with three captions each, of 0 to 5 words."""
    generator = torch.Generator().manual_seed(2)
    captions = torch.full((2, 3, 7), PAD)
    for index, num_words in enumerate([5, 2, 0, 1, 5, 3]):
        caption = captions[index // 3, index % 3]
        caption[0] = BOS
        caption[1 : num_words + 1] = torch.randint(3, VOCABULARY, (num_words,), generator=generator)
        caption[num_words + 1] = EOS
    return captions


CAPTIONS = _make_captions()
IS_TARGET = CAPTIONS[:, :, 1:] != PAD
