"""Word2Vec (gensim) trained on the captions, as initial values of the embedding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from gensim.models import Word2Vec
from torch import Tensor

from captioner.config import PAD
from captioner.model.vocabulary import SPECIALS, Vocabulary


def word2vec_matrix(
    captions: Iterable[str],
    vocabulary: Vocabulary,
    *,
    size: int = 256,
    epochs: int = 10,
    seed: int = 0,
) -> Tensor:
    """Return an embedding matrix (V, size) of skip-gram vectors of the cleaned ``captions``.

    The vectors are centered and scaled to a standard deviation of 1 / sqrt(size), so that a row's
    norm is about 1 and an output layer tied to the matrix starts with small logits; raw vectors
    share a large common part, which makes such a model start at a loss of 10. Words unknown to
    Word2Vec, and the specials, are random with the same deviation; ``<pad>`` is zero.

    One worker and a fixed ``seed`` make it reproducible on a machine.
    """
    sentences = [caption.split() for caption in captions]
    model = Word2Vec(
        sentences,
        vector_size=size,
        window=5,
        min_count=1,
        sg=1,
        workers=1,
        seed=seed,
        epochs=epochs,
        hashfxn=_stable_hash,  # Python's own differs between processes
    )
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(len(vocabulary), size, generator=generator)
    words = [word for word in vocabulary.idx2word[len(SPECIALS) :] if word in model.wv]
    if words:
        vectors = torch.from_numpy(model.wv[words])
        vectors -= vectors.mean(dim=0)
        matrix[vocabulary.known_ids(words)] = vectors / vectors.std().clamp(min=1e-8)
    matrix *= size**-0.5
    matrix[PAD] = 0
    return matrix


def _stable_hash(text: str) -> int:
    """Return the 32-bit FNV-1a hash."""
    value = 2166136261
    for byte in str(text).encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value
