"""What was made fast on one processor must not be slow on another: ours against plain code.

Each ratio is plain float32 code / ours, measured in a process of its own: once with all that the
processor has and once with what an older one, with AVX2 alone, would have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Ratios

ROOT = Path(__file__).resolve().parent.parent.parent
OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

pytestmark = pytest.mark.benchmark

_MEASURE = """
import itertools, json, statistics, sys, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tests.benchmarks.conftest import make_photos
from captioner import Captioner, DecodingOptions, TrainConfig
from captioner.model import encoder as encoders
from captioner.config import BAD_ENDINGS, BOS, EOS, PAD
from captioner.model.search import decode
from captioner.model.encoder import load_encoder
from captioner.images import open_photo
from captioner.model.decoder import CaptionModel
from captioner.training.setup import bfloat16_speedup

captioner = Captioner.load()
photos = make_photos()
endings = captioner.checkpoint.vocabulary.ids(BAD_ENDINGS)
encoders._hasten_lite = lambda module: None
backbone = load_encoder("efficientnet_lite2").backbone.to(memory_format=torch.contiguous_format)
plain_model = captioner.checkpoint.model
transform = captioner.encoder.transform


def see(some):
    pixels = torch.stack([torch.from_numpy(transform(open_photo(each))) for each in some])
    return backbone(pixels).flatten(2).transpose(1, 2)


@torch.inference_mode()
def plain(some, at_once=32):
    for at in range(0, len(some), at_once):
        state, memory = plain_model.start(see(some[at : at + at_once]))
        decode(plain_model.step, state, memory, DecodingOptions(), bad_endings=endings)


@torch.inference_mode()
def plain_extraction():
    for at in range(0, len(photos), 32):
        see(photos[at : at + 32])


def extraction():
    def see(some):
        pixels = [torch.from_numpy(transform(open_photo(each))) for each in some]
        return captioner.encoder(torch.stack(pixels))
    for _ in captioner.encoder.map(see, photos):
        pass


@torch.inference_mode()
def search(model, features):
    state, memory = model.start(features)
    decode(model.step, state, memory, DecodingOptions(), bad_endings=endings)


config = TrainConfig.from_recipe("best")
torch.manual_seed(0)
model = CaptionModel(config.model_config(vocabulary_size=2541, encoder_channels=1504))
optimizer = torch.optim.AdamW(model.parameters())
features = torch.randn(32, 49, 1504)
captions = torch.randint(4, 2541, (32, 5, 20))
captions[..., 0] = BOS
# As long as those of Flickr8k: 12.8 ids on average, 20 at most.
lengths = torch.normal(12.8, 3.5, (32, 5, 1)).round().clamp(6, 20).long()
places = torch.arange(20)
captions = captions.where(places != lengths - 1, EOS).where(places < lengths, PAD)
captions = captions[..., : int(lengths.max())]
wanted = captions[..., 1:] != PAD
bfloat16 = bfloat16_speedup(torch.device("cpu"))


def plain_forward():
    B, K, T = captions.shape
    state, memory = model.start(features, K)
    steps = []
    for t in range(T - 1):
        logits, _, state = model.step(captions[:, :, t], state, memory)
        steps.append(logits)
    return torch.stack(steps, dim=2)[wanted]


def learn(forward, low):
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits = forward()
    loss = cross_entropy(logits.float(), captions[..., 1:][wanted])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


def ratio(reference, ours, times):
    pairs = []
    for turn in range(times + 1):
        pair = []
        for each in (reference, ours):
            started = time.perf_counter()
            each()
            pair.append(time.perf_counter() - started)
        if turn:
            pairs.append(pair)
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "milliseconds": 1000 * statistics.median(b for _, b in pairs),
        "reference_milliseconds": 1000 * statistics.median(a for a, _ in pairs),
    }


one = see(photos[:1])
fused = lambda: model(features, captions)[0]
print(json.dumps({
    "training step, float32": ratio(
        lambda: learn(plain_forward, False), lambda: learn(fused, False), 3),
    "training step, precision auto": ratio(
        lambda: learn(plain_forward, False), lambda: learn(fused, bfloat16 >= 1.2), 3),
    "extraction": ratio(plain_extraction, extraction, 3),
    "decoder, one photo": ratio(
        lambda: search(plain_model, one), lambda: search(captioner._decoder, one), 40),
    "one photo -> caption": ratio(
        lambda: plain(photos[:1]), lambda: captioner.caption(photos[0]), 20),
    "64 photos -> captions": ratio(
        lambda: plain(photos), lambda: captioner.caption_batch(photos), 3),
}))
"""


@pytest.mark.parametrize("instructions", ["all", "AVX2"])
def test_plain_code_is_not_faster(ratios: Ratios, instructions: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        cwd=ROOT,
        env=os.environ | (OLDER if instructions == "AVX2" else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    for name, values in json.loads(done.stdout).items():
        ratios.add(
            f"plain / ours, {name}, {instructions} instructions",
            values.pop("ratio"),
            ">= 1",
            **values,
        )
