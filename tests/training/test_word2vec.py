"""Initial embeddings by Word2Vec."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from captioner.config import PAD, ModelConfig
from captioner.model.decoder import CaptionModel
from captioner.model.vocabulary import SPECIALS, Vocabulary, clean
from captioner.training.word2vec import word2vec_matrix


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Captions of two topics with separate words: animals outdoors, and traffic."""
    topics = (
        (("dog", "cat", "horse"), ("runs", "sleeps", "jumps"), ("grass", "snow", "mud")),
        (("car", "bus", "truck"), ("drives", "parks", "turns"), ("street", "road", "tunnel")),
    )
    return [
        f"the {subject} {verb} in the {place}"
        for subjects, verbs, places in topics
        for subject in subjects
        for verb in verbs
        for place in places
    ] * 40


@pytest.fixture(scope="module")
def vocabulary(corpus: list[str]) -> Vocabulary:
    return Vocabulary([*SPECIALS, *sorted({w for c in corpus for w in c.split()})])


@pytest.fixture(scope="module")
def matrix(corpus: list[str], vocabulary: Vocabulary) -> Tensor:
    return word2vec_matrix(corpus, vocabulary, size=64)


def test_matrix_has_shape_and_deviation(
    corpus: list[str], vocabulary: Vocabulary, matrix: Tensor
) -> None:
    assert matrix.shape == (len(vocabulary), 64)
    assert matrix.dtype == torch.float32
    assert torch.isfinite(matrix).all()
    assert matrix[1:].std() == pytest.approx(64**-0.5, rel=0.1)
    assert matrix[len(SPECIALS) :].std() == pytest.approx(64**-0.5, rel=0.05)
    wide = word2vec_matrix(corpus, vocabulary, size=256, epochs=2)
    assert wide[1:].std() == pytest.approx(256**-0.5, rel=0.1)


def test_only_padding_row_is_zero(matrix: Tensor) -> None:
    assert not matrix[PAD].any()
    assert (matrix[1:].norm(dim=1) > 0.1).all()


def test_unknown_words_have_the_same_deviation(corpus: list[str]) -> None:
    unknown = [f"unknown{number:02}" for number in range(40)]
    vocabulary = Vocabulary([*SPECIALS, "cat", "dog", "grass", "runs", *unknown])
    matrix = word2vec_matrix(corpus, vocabulary, size=64)
    assert matrix[8:].std() == pytest.approx(64**-0.5, rel=0.1)
    assert len({tuple(row.tolist()) for row in matrix[1:]}) == len(vocabulary) - 1


def test_similar_words_are_closer(vocabulary: Vocabulary, matrix: Tensor) -> None:
    def near(first: str, second: str) -> float:
        left, right = (matrix[vocabulary.word2idx[word]] for word in (first, second))
        return float(cosine_similarity(left, right, dim=0))

    for first, second, other in (
        ("dog", "cat", "truck"),
        ("horse", "grass", "street"),
        ("car", "bus", "cat"),
        ("drives", "parks", "sleeps"),
    ):
        assert near(first, second) > near(first, other) + 0.2


def test_matrix_depends_on_seed(corpus: list[str], vocabulary: Vocabulary, matrix: Tensor) -> None:
    assert torch.equal(word2vec_matrix(iter(corpus), vocabulary, size=64), matrix)
    assert not torch.equal(word2vec_matrix(corpus, vocabulary, size=64, seed=1), matrix)


_HASH_SCRIPT = """
import hashlib, sys
from captioner.training.word2vec import word2vec_matrix
from captioner.model.vocabulary import Vocabulary
captions = sys.stdin.read().splitlines()
vocabulary = Vocabulary.build(captions, 1)
matrix = word2vec_matrix(captions, vocabulary, size=64)
print(hashlib.sha256(matrix.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_matrix_is_equal_in_another_process(
    corpus: list[str], vocabulary: Vocabulary, matrix: Tensor
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _HASH_SCRIPT],
        input="\n".join(corpus),
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
    assert Vocabulary.build(corpus, 1) == vocabulary


@pytest.mark.parametrize("start", [True, False], ids=["word2vec", "random"])
def test_tied_model_starts_at_uniform_loss(
    captions_of: Callable[[int], list[str]], start: bool
) -> None:
    captions = [clean(text) for number in range(32) for text in captions_of(number)]
    vocabulary = Vocabulary.build(captions, 1)
    config = ModelConfig(
        vocabulary_size=len(vocabulary),
        encoder_channels=32,
        mean_start=True,
        context_gate=True,
        deep_output=True,
        tied_embedding=True,
    )
    torch.manual_seed(0)
    model = CaptionModel(config).eval()
    if start:
        with torch.no_grad():
            model.embedding.weight.copy_(word2vec_matrix(captions, vocabulary))
    tokens = torch.tensor([[vocabulary.encode_padded(text)] for text in captions[::3]])
    logits, _ = model(torch.randn(len(tokens), 49, 32), tokens)
    targets = tokens[:, :, 1:][tokens[:, :, 1:] != PAD]
    loss = float(cross_entropy(logits, targets).detach())
    assert loss == pytest.approx(math.log(len(vocabulary)), rel=0.1)
