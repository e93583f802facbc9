"""Word2Vec (gensim) trained on the captions, as the start of the embedding matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from gensim.models import Word2Vec
from torch import Tensor

from captioner.config import PAD
from captioner.model.vocabulary import SPECIALS, Vocabulary, clean


def word2vec_matrix(
    captions: Iterable[str],
    vocabulary: Vocabulary,
    *,
    size: int = 256,
    epochs: int = 10,
    seed: int = 0,
) -> Tensor:
    """Return an embedding matrix (V, size) that starts from skip-gram vectors of ``captions``.

    The vectors are centred and scaled to a spread of 1 / sqrt(size), so that a row's norm is
    about 1 and an output layer tied to the matrix starts with small logits; raw vectors share a
    large common part, which makes such a model start at a loss of 10. Words that Word2Vec lacks,
    and the specials, are drawn with the same spread; ``<pad>`` is zero.

    One worker and a fixed ``seed`` make it reproducible on a machine.
    """
    sentences = [clean(caption).split() for caption in captions]
    model = Word2Vec(
        sentences,
        vector_size=size,
        window=5,
        min_count=1,
        sg=1,
        workers=1,
        seed=seed,
        epochs=epochs,
        # Python's own hash of text differs from process to process.
        hashfxn=_stable_hash,
    )
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(len(vocabulary), size, generator=generator)
    known = [
        (index, model.wv.key_to_index[word])
        for index, word in enumerate(vocabulary.idx2word)
        if word not in SPECIALS and word in model.wv.key_to_index
    ]
    if known:
        rows, places = (list(column) for column in zip(*known, strict=True))
        vectors = torch.from_numpy(model.wv.vectors[places].copy())
        vectors -= vectors.mean(dim=0)
        matrix[rows] = vectors / vectors.std().clamp(min=1e-8)
    matrix *= size**-0.5
    matrix[PAD] = 0
    return matrix


def _stable_hash(text: str) -> int:
    """FNV-1a, 32 bits."""
    value = 2166136261
    for byte in str(text).encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value
