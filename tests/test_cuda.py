"""A GPU gives the same results as a CPU. Skipped without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from captioner import Captioner, DecodingOptions, load_encoder
from captioner.data.features import cache_features
from captioner.data.sources import load_captions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture(scope="module")
def on_gpu() -> Captioner:
    return Captioner.from_pretrained(device="cuda")


def test_captions_match_cpu(
    captioner: Captioner, on_gpu: Captioner, example_photos: list[Path]
) -> None:
    assert on_gpu.encoder.device.type == "cuda"
    for options in (DecodingOptions(), DecodingOptions(beam_size=1)):
        here = captioner.caption_batch(example_photos, options)
        there = on_gpu.caption_batch(example_photos, options)
        same = [one.text == other.text for one, other in zip(here, there, strict=True)]
        assert sum(same) >= len(same) - 1  # TF32 may change a close choice
        for one, other in zip(here, there, strict=True):
            if one.text == other.text:
                assert np.abs(one.attention - other.attention).max() < 0.02
                assert one.log_probability == pytest.approx(other.log_probability, abs=0.1)


def test_sampling_is_repeatable(on_gpu: Captioner, example_photos: list[Path]) -> None:
    options = DecodingOptions(temperature=1.0, samples=2, seed=3)
    first, second = (on_gpu.caption(example_photos[0], options) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_features_match_cpu(parquet_folder: Path, tmp_path: Path) -> None:
    photos = load_captions(str(parquet_folder), "train")
    features = [
        cache_features(load_encoder("efficientnet_lite2").to(device), photos, tmp_path / device)
        for device in ("cpu", "cuda")
    ]
    assert features[0].readable == features[1].readable
    assert np.abs(features[0].array - features[1].array).mean() < 0.01


@pytest.mark.parametrize("bfloat16", ["true", "false"])
def test_run_trains_and_resumes_on_cpu(
    parquet_folder: Path, timm_weights: Path, tmp_path: Path, bfloat16: str
) -> None:
    out = tmp_path / "run"
    options = f"""--data {parquet_folder} --encoder timm:test_resnet
        --encoder-weights {timm_weights} --recipe best --out {out} --cache {tmp_path / "cache"}
        --epochs 2 --reward-epochs 1
        --batch-size 4 --min-count 2 --bfloat16 {bfloat16}""".split()
    assert train.main([*options, "--device", "cuda"]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "run.json").read_text())["epochs"]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert 0 <= rows[2]["reward"] <= 10
    assert train.main([*options, "--device", "cpu", "--resume"]) == 0


def test_missing_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    load: Callable[..., Captioner] = Captioner.from_pretrained
    with pytest.raises(Exception, match="device"):
        load(device=missing)
    capsys.readouterr()
