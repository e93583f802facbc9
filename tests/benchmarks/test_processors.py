"""Code that is fast on one processor must not be slow on another: ours against plain code.

Each ratio is plain float32 code / ours, measured in a process of its own: once with all
instructions of the processor and once with those of an older one that has AVX2 only.
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
from captioner.model.fast import FusedForward
from captioner.training.setup import bfloat16_speedup

captioner = Captioner.from_pretrained()
photos = make_photos()
endings = captioner.checkpoint.vocabulary.known_ids(BAD_ENDINGS)
encoders.fuse_for_inference = lambda module: None
plain_encoder = load_encoder("efficientnet_lite2").backbone
plain_encoder = plain_encoder.to(memory_format=torch.contiguous_format)
plain_model = captioner.checkpoint.model
transform = captioner.encoder.transform


def to_pixels(batch):
    return torch.stack([torch.from_numpy(transform(open_photo(photo))) for photo in batch])


def to_cells(batch):
    return plain_encoder(to_pixels(batch)).flatten(2).transpose(1, 2)


@torch.inference_mode()
def plain(photos, batch_size=32):
    for at in range(0, len(photos), batch_size):
        state, memory = plain_model.start(to_cells(photos[at : at + batch_size]))
        decode(plain_model.step, state, memory, DecodingOptions(), bad_endings=endings)


@torch.inference_mode()
def plain_extraction():
    for at in range(0, len(photos), 32):
        to_cells(photos[at : at + 32])


def extraction():
    for _ in captioner.encoder.map(lambda batch: captioner.encoder(to_pixels(batch)), photos):
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
targets = captions[..., 1:][captions[..., 1:] != PAD]
bfloat16 = bfloat16_speedup(torch.device("cpu")) >= 1.2
fused = FusedForward(model)


def train(forward, bfloat16=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits, _ = forward(features, captions)
    loss = cross_entropy(logits.float(), targets)
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


one = to_cells(photos[:1])
print(json.dumps({
    "training step, float32": ratio(
        lambda: train(model), lambda: train(fused), 3),
    "training step, precision auto": ratio(
        lambda: train(model), lambda: train(fused, bfloat16), 3),
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
