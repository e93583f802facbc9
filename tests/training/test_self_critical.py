"""Drawing captions and making the better ones likelier, on a decoder of a few units."""

from __future__ import annotations

import pytest
import torch

from captioner.config import BOS, EOS, PAD, UNK, ModelConfig
from captioner.model.decoder import CaptionModel
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.training.self_critical import Reward, draw, loss

WORDS = ["a", "black", "brown", "dog", "cat", "runs", "sits", "in", "the", "snow", "grass"]
VOCABULARY = Vocabulary([*SPECIALS, *WORDS])
REFERENCES = [
    ["a black dog runs in the snow", "the dog runs in the snow"],
    ["a brown cat sits in the grass", "the cat sits in the grass"],
]


def small_model(seed: int = 0) -> CaptionModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocabulary_size=len(VOCABULARY),
        encoder_channels=6,
        embedding_size=16,
        hidden_size=32,
        attention_size=8,
    )
    return CaptionModel(config).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 49, 6, generator=torch.Generator().manual_seed(1))


def ids_of(*texts: str) -> torch.Tensor:
    return torch.tensor([VOCABULARY.encode_padded(text, 12) for text in texts])[None]


def test_drawn_captions_begin_end_and_hold_only_words(features: torch.Tensor) -> None:
    captions = draw(small_model(), features, samples=50, temperature=1.0, max_length=9)
    assert captions.shape[:2] == (2, 50)
    assert captions.shape[2] <= 9
    assert (captions[..., 0] == BOS).all()
    assert not torch.isin(captions, torch.tensor([UNK])).any()
    assert not (captions[..., 1:] == BOS).any()
    for ids in captions.flatten(0, 1).tolist():
        written = ids[1 : ids.index(EOS)] if EOS in ids else ids[1:]
        assert PAD not in written
        if EOS in ids:
            assert set(ids[ids.index(EOS) + 1 :]) <= {PAD}


def test_the_same_generator_draws_the_same(features: torch.Tensor) -> None:
    drawn = [
        draw(
            small_model(),
            features,
            samples=5,
            temperature=0.5,
            max_length=12,
            generator=torch.Generator().manual_seed(seed),
        ).tolist()
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_words_are_drawn_as_often_as_the_policy_says(features: torch.Tensor) -> None:
    model = small_model()
    model.fc.weight.data *= 20  # so that there is something to tell apart
    captions = draw(model, features[:1], samples=20_000, temperature=0.5, max_length=3)
    with torch.no_grad():
        logits, _ = model(features[:1], torch.tensor([[[BOS, EOS]]]))
    allowed = torch.ones(len(VOCABULARY), dtype=torch.bool)
    allowed[[PAD, BOS, UNK]] = False
    chances = (logits[0].masked_fill(~allowed, -torch.inf) / 0.5).softmax(-1)
    share = captions[0, :, 1].bincount(minlength=len(VOCABULARY)) / 20_000
    assert chances.max() > 2 / len(VOCABULARY)
    torch.testing.assert_close(share, chances, rtol=0, atol=0.015)


def test_a_photos_own_caption_earns_more_than_anothers() -> None:
    reward = Reward(REFERENCES, VOCABULARY)
    own, other = reward([0], ids_of("a black dog runs in the snow", "a brown cat sits"))[0]
    assert own > 4
    assert own > 5 * other


def test_breaking_off_costs() -> None:
    reward = Reward(REFERENCES, VOCABULARY)
    ids = ids_of("a black dog runs in the snow", "a black dog runs in the snow")
    ids[0, 1][ids[0, 1] == EOS] = PAD
    whole, broken = reward([0], ids)[0]
    assert whole > broken


def test_captions_that_earn_the_same_move_nothing(features: torch.Tensor) -> None:
    model = small_model()
    captions = draw(model, features, samples=4, temperature=0.5, max_length=9)
    loss(model, features, captions, torch.full((2, 4), 7.0), temperature=0.5).backward()  # type: ignore[no-untyped-call]
    assert all(
        parameter.grad is None or parameter.grad.abs().max() < 1e-6
        for parameter in model.parameters()
    )


def test_a_step_makes_the_better_caption_likelier_and_the_worse_one_less(
    features: torch.Tensor,
) -> None:
    model = small_model()
    captions = ids_of("a black dog runs", "the cat sits")

    def chances() -> torch.Tensor:
        with torch.no_grad():
            logits, _ = model(features[:1], captions)
        targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
        each = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        return torch.stack([each[:5].sum(), each[5:].sum()])

    before = chances()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss(model, features[:1], captions, torch.tensor([[2.0, 0.0]]), temperature=0.5).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    better, worse = chances() - before
    assert better > 0 > worse


def test_the_reward_rises_on_one_fixed_batch_within_forty_steps(features: torch.Tensor) -> None:
    model = small_model()
    reward = Reward(REFERENCES, VOCABULARY)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    earned = []
    for _ in range(40):
        captions = draw(
            model, features, samples=20, temperature=0.5, max_length=12, generator=generator
        )
        rewards = reward([0, 1], captions)
        earned.append(rewards.mean().item())
        optimizer.zero_grad()
        loss(model, features, captions, rewards, temperature=0.5).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    first, last = sum(earned[:5]) / 5, sum(earned[-5:]) / 5
    assert last > 2 * first
    assert last > 1
