"""How fast captions are written, and decoders trained."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from captioner import Captioner, DecodingOptions, TrainConfig
from captioner.config import BAD_ENDINGS, BOS, EOS
from captioner.data.dataset import CaptionDataset
from captioner.data.features import cache_features
from captioner.data.sources import load_captions
from captioner.images import open_photo
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import Encoder
from captioner.model.fast import FusedForward
from captioner.model.search import Hypothesis, decode
from captioner.model.vocabulary import Vocabulary
from captioner.training.self_critical import Reward
from tests.benchmarks.conftest import Ratios

pytestmark = pytest.mark.benchmark

_WORDS = [f"word{number}" for number in range(1000)]


def _pixels(encoder: Encoder, photos: list[bytes]) -> Tensor:
    return torch.stack([torch.from_numpy(encoder.transform(open_photo(each))) for each in photos])


def _in_fours(encoder: Encoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder(pixels[at : at + 4]) for at in range(0, len(pixels), 4)])


def test_one_photo(ratios: Ratios, captioner: Captioner, photos: list[bytes]) -> None:
    pixels = _pixels(captioner.encoder, photos[:1])
    ratios.time(
        "one photo -> caption with all maps, beam 3 / the encoder's forward",
        lambda: captioner.caption(photos[0]),
        lambda: captioner.encoder(pixels),
        aim="<= 1.3",
        times=40,
    )


def test_a_cover(ratios: Ratios, captioner: Captioner, photos: list[bytes]) -> None:
    text = captioner.caption(photos[0]).text
    cells = [16, 17, 23, 24, 30, 31]
    ratios.time(
        "one photo -> a map tested by covering it, with eight random covers / one photo -> caption",
        lambda: captioner.cover(photos[0], text, 1, cells),
        lambda: captioner.caption(photos[0]),
        aim="<= 1 s",
        times=15,
    )


def test_a_batch(ratios: Ratios, captioner: Captioner, photos: list[bytes]) -> None:
    pixels = _pixels(captioner.encoder, photos)
    for name, reference in (
        ("the encoder's forward on the same batch", lambda: captioner.encoder(pixels)),
        ("the encoder's forward, four at a time", lambda: _in_fours(captioner.encoder, pixels)),
    ):
        ratios.time(
            f"64 photos -> captions, beam 3 / {name}",
            lambda: captioner.caption_batch(photos),
            reference,
            aim="<= 1.15",
            times=5,
        )


@torch.inference_mode()
def test_batched_beam(ratios: Ratios, captioner: Captioner, photos: list[bytes]) -> None:
    cells = _in_fours(captioner.encoder, _pixels(captioner.encoder, photos))
    endings = captioner.checkpoint.vocabulary.known_ids(BAD_ENDINGS)
    packed = captioner._decoder

    def search(model: CaptionModel, at: int, count: int) -> list[list[Hypothesis]]:
        state, memory = model.start(cells[at : at + count])
        return decode(model.step, state, memory, DecodingOptions(), bad_endings=endings)

    def one_by_one(model: CaptionModel) -> list[list[Hypothesis]]:
        return [search(model, at, 1)[0] for at in range(len(cells))]

    plain = captioner.checkpoint.model
    both = list(zip(search(packed, 0, 64), one_by_one(packed), strict=True))
    for together, alone in both:
        assert [each.ids for each in together] == [each.ids for each in alone]
        for first, second in zip(together, alone, strict=True):
            assert abs(first.log_probability - second.log_probability) <= 1e-4
    for name, model in (("", packed), (", weights not packed", plain)):
        ratios.time(
            f"decoder, one photo at a time{name} / batched beam",
            functools.partial(one_by_one, model),
            lambda: search(packed, 0, 64),
            aim=">= 5",
            times=5,
        )
    ratios.time(
        "decoder, one photo, weights not packed / packed",
        lambda: search(plain, 0, 1),
        lambda: search(packed, 0, 1),
        aim="-",
        times=40,
    )


def captions_for(count: int, length: int = 11) -> list[list[str]]:
    """Return five random captions for each of ``count`` photos, words as frequent as in English."""
    draw = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(len(_WORDS))]
    return [
        [" ".join(draw.choices(_WORDS, weights, k=length)) for _ in range(5)] for _ in range(count)
    ]


def _learner(encoder: Encoder, words: int = 2541) -> tuple[CaptionModel, Any]:
    """Return a decoder of the shipped recipe, and its training step."""
    config = TrainConfig.from_recipe("best")
    model = CaptionModel(
        config.model_config(vocabulary_size=words, encoder_channels=encoder.channels)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    forward = FusedForward(model)

    def step(features: Tensor, captions: Tensor) -> None:
        logits, _ = forward(features, captions)
        loss = cross_entropy(logits, captions[..., 1:][captions[..., 1:] != 0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return model, step


def test_an_epoch(
    ratios: Ratios, captioner: Captioner, photos: list[bytes], tmp_path: Path
) -> None:
    encoder = captioner.encoder
    table = [{"image": {"bytes": each, "path": None}, "alt_text": ["a"]} for each in photos]
    features_of = datasets.Features(
        {"image": datasets.Image(), "alt_text": [datasets.Value("string")]}
    )
    datasets.Dataset.from_list(table, features=features_of).to_parquet(
        str(tmp_path / "data" / "train-0.parquet")
    )
    features = cache_features(encoder, load_captions(str(tmp_path / "data")), tmp_path / "cache")
    captions = captions_for(64)
    vocabulary = Vocabulary.build([each for some in captions for each in some], 1)
    dataset = CaptionDataset(features.array, range(64), captions, vocabulary, max_length=20)
    _, step = _learner(encoder, len(vocabulary))
    tokens = torch.stack([dataset[row][1] for row in range(64)])
    pixels = _pixels(encoder, photos)

    def cached() -> None:
        loader = torch.utils.data.DataLoader(dataset, batch_size=32)
        for cells, token_ids in loader:
            step(cells.float(), token_ids)

    def in_the_loop() -> None:
        # As the original report does: the backbone runs once per caption.
        for number in range(5):
            for at in range(0, 64, 32):
                cells = encoder(pixels[at : at + 32]).clone()  # for autograd
                step(cells, tokens[at : at + 32, number : number + 1])

    def backbone() -> None:
        for _ in range(5):
            for at in range(0, 64, 32):
                encoder(pixels[at : at + 32])

    held = torch.stack([dataset[row][0] for row in range(64)]).float()

    def decoder() -> None:
        for at in range(0, 64, 32):
            step(held[at : at + 32], tokens[at : at + 32])

    def decoder_a_caption() -> None:
        for number in range(5):
            for at in range(0, 64, 32):
                step(held[at : at + 32], tokens[at : at + 32, number : number + 1])

    def both() -> None:
        backbone()
        decoder_a_caption()

    ratios.time(
        "training epoch, backbone in the loop / from cached features",
        in_the_loop,
        cached,
        aim="90 % of what the parts allow",
        times=3,
    )
    ratios.time(
        "what the parts allow: backbone alone + decoder alone / decoder alone",
        both,
        decoder,
        aim="-",
        times=3,
    )


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, list[Any], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.calls.append((function, [_like(each) for each in args], kwargs or {}))
        return function(*args, **(kwargs or {}))


def _like(value: Any) -> Any:
    """Return a random tensor of the same shape and strides."""
    if not isinstance(value, Tensor):
        return value
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return torch.randn(size).as_strided(value.shape, value.stride())


def test_a_decoder_step(ratios: Ratios, captioner: Captioner) -> None:
    _, step = _learner(captioner.encoder)
    torch.manual_seed(0)
    features = torch.randn(32, 49, captioner.encoder.channels)
    captions = torch.randint(4, 2541, (32, 5, 13))
    captions[..., 0], captions[..., -1] = BOS, EOS
    with _Products() as products:
        step(features, captions)

    def replay() -> None:
        for function, args, kwargs in products.calls:
            function(*args, **kwargs)

    with torch.no_grad():
        replay()
    ratios.time(
        "decoder training step / its matrix products alone",
        lambda: step(features, captions),
        lambda: torch.no_grad()(replay)(),
        aim="<= 1.5",
        times=15,
        products=len(products.calls),
    )


def test_the_reward(ratios: Ratios) -> None:
    from pycocoevalcap.cider.cider import Cider

    references = captions_for(64)
    vocabulary = Vocabulary.build([each for some in references for each in some], 1)
    reward = Reward(references, vocabulary)
    # Captions as they are drawn: what somebody said of the photo, some words of it changed.
    captions = torch.tensor(
        [[vocabulary.encode_padded(text, 13) for text in some] for some in references]
    )
    draw = torch.Generator().manual_seed(0)
    others = torch.randint(4, len(vocabulary), captions.shape, generator=draw)
    changed = torch.rand(captions.shape, generator=draw) < 0.4
    captions = torch.where(changed & (captions != BOS) & (captions != EOS), others, captions)
    texts = [[vocabulary.decode(ids) for ids in some] for some in captions.tolist()]
    wanted = {(row, k): references[row] for row in range(64) for k in range(5)}
    given = {(row, k): [texts[row][k]] for row in range(64) for k in range(5)}
    ratios.time(
        "pycocoevalcap on 320 captions / CIDEr-D reward",
        lambda: Cider().compute_score(wanted, given),
        lambda: reward(range(64), captions),
        aim=">= 5",  # a step of rewards takes 500 ms or more
        times=10,
    )


def test_extraction(
    ratios: Ratios, captioner: Captioner, photos: list[bytes], tmp_path: Path
) -> None:
    encoder = captioner.encoder
    rows = [{"image": {"bytes": each, "path": None}, "alt_text": ["a"]} for each in photos * 4]
    features_of = datasets.Features(
        {"image": datasets.Image(), "alt_text": [datasets.Value("string")]}
    )
    datasets.Dataset.from_list(rows, features=features_of).to_parquet(
        str(tmp_path / "data" / "train-0.parquet")
    )
    data = load_captions(str(tmp_path / "data"))
    pixels = _pixels(encoder, photos)
    assert data.fingerprint
    turns = iter(range(100))
    ratios.time(
        "extraction of 256 photos / the encoder alone on tensors in memory",
        lambda: cache_features(encoder, data, tmp_path / f"cache{next(turns)}"),
        lambda: [_in_fours(encoder, pixels) for _ in range(4)],
        aim="<= 1.1",
        times=4,
    )
