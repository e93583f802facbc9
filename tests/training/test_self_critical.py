"""Sampled captions, their rewards and the self-critical loss, on a tiny decoder."""

from __future__ import annotations

import pytest
import torch

from captioner.config import BOS, EOS, PAD, UNK, ModelConfig
from captioner.model.decoder import CaptionModel
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.training.metrics import CiderD
from captioner.training.self_critical import Reward, sample_captions, self_critical_loss

WORDS = ["a", "black", "brown", "dog", "cat", "runs", "sits", "in", "the", "snow", "grass"]
VOCABULARY = Vocabulary([*SPECIALS, *WORDS])
REFERENCES = [
    ["a black dog runs in the snow", "the dog runs in the snow"],
    ["a brown cat sits in the grass", "the cat sits in the grass"],
]


def small_model() -> CaptionModel:
    torch.manual_seed(0)
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


def test_sampled_captions_hold_only_words_between_bos_and_eos(features: torch.Tensor) -> None:
    captions = sample_captions(small_model(), features, samples=50, temperature=1.0, max_length=9)
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


def test_equal_generators_sample_equal_captions(features: torch.Tensor) -> None:
    samples = [
        sample_captions(
            small_model(),
            features,
            samples=5,
            temperature=0.5,
            max_length=12,
            generator=torch.Generator().manual_seed(seed),
        ).tolist()
        for seed in (3, 3, 4)
    ]
    assert samples[0] == samples[1] != samples[2]


def test_sampling_frequencies_match_policy(features: torch.Tensor) -> None:
    model = small_model()
    model.fc.weight.data *= 20  # so that the words differ in probability
    captions = sample_captions(model, features[:1], samples=10_000, temperature=0.5, max_length=3)
    with torch.no_grad():
        logits, _ = model(features[:1], torch.tensor([[[BOS, EOS]]]))
    allowed = torch.ones(len(VOCABULARY), dtype=torch.bool)
    allowed[[PAD, BOS, UNK]] = False
    chances = (logits[0].masked_fill(~allowed, -torch.inf) / 0.5).softmax(-1)
    share = captions[0, :, 1].bincount(minlength=len(VOCABULARY)) / 10_000
    assert chances.max() > 2 / len(VOCABULARY)
    torch.testing.assert_close(share, chances, rtol=0, atol=0.02)


def test_own_caption_is_rewarded_more_than_foreign_caption() -> None:
    reward = Reward(REFERENCES, VOCABULARY)
    own, other = reward([0], ids_of("a black dog runs in the snow", "a brown cat sits"))[0]
    assert own > 4
    assert own > 5 * other


def test_unfinished_caption_is_rewarded_less() -> None:
    reward = Reward(REFERENCES, VOCABULARY)
    ids = ids_of("a black dog runs in the snow", "a black dog runs in the snow")
    ids[0, 1][ids[0, 1] == EOS] = PAD
    whole, broken = reward([0], ids)[0]
    assert whole > broken


def test_reward_is_cider_of_references_with_eos() -> None:
    references = [[f"{text} <eos>" for text in texts] for texts in REFERENCES]
    text = "a dog runs in the grass"
    expected = CiderD(references).score(1, [f"{text} <eos>"])
    rewards = Reward(REFERENCES, VOCABULARY)([1], ids_of(text))
    assert rewards[0].tolist() == pytest.approx(expected)
    assert rewards.dtype == torch.float32


def test_self_critical_loss_uses_mean_of_other_rewards_as_baseline() -> None:
    captions = ids_of("a dog", "the cat sits", "a")
    logits = torch.randn(9, len(VOCABULARY), generator=torch.Generator().manual_seed(0))
    logits[:, [PAD, BOS, UNK]] = -torch.inf
    log_probs = (logits / 0.5).log_softmax(-1)
    targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
    sums = torch.stack(
        [part.sum() for part in torch.split(log_probs[range(9), targets], [3, 4, 2])]
    )
    advantages = torch.tensor([3 - (1 + 0) / 2, 1 - (3 + 0) / 2, 0 - (3 + 1) / 2])
    loss, _ = self_critical_loss(
        lambda *_: (logits, logits),
        torch.zeros(1, 49, 6),
        captions,
        torch.tensor([[3.0, 1.0, 0.0]]),
        temperature=0.5,
    )
    assert loss.item() == pytest.approx(-(advantages * sums).sum().item() / 3, rel=1e-5)


def test_equal_rewards_give_zero_gradient(features: torch.Tensor) -> None:
    model = small_model()
    captions = sample_captions(model, features, samples=4, temperature=0.5, max_length=9)
    equal = torch.full((2, 4), 7.0)
    loss, _ = self_critical_loss(model, features, captions, equal, temperature=0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(
        parameter.grad is None or parameter.grad.abs().max() < 1e-6
        for parameter in model.parameters()
    )


def test_step_raises_probability_of_better_caption(
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
    rewards = torch.tensor([[2.0, 0.0]])
    loss, _ = self_critical_loss(model, features[:1], captions, rewards, temperature=0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    better, worse = chances() - before
    assert better > 0 > worse


def test_reward_rises_within_forty_steps(features: torch.Tensor) -> None:
    model = small_model()
    reward = Reward(REFERENCES, VOCABULARY)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    earned = []
    for _ in range(40):
        captions = sample_captions(
            model, features, samples=20, temperature=0.5, max_length=12, generator=generator
        )
        rewards = reward([0, 1], captions)
        earned.append(rewards.mean().item())
        optimizer.zero_grad()
        loss, _ = self_critical_loss(model, features, captions, rewards, temperature=0.5)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    first, last = sum(earned[:5]) / 5, sum(earned[-5:]) / 5
    assert last > 2 * first
    assert last > 1
