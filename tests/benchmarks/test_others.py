"""The cost of one photo through other designs, with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captioner import Captioner, DecodingOptions, ModelConfig
from captioner.images import open_photo
from captioner.model.decoder import CaptionModel
from captioner.model.search import decode
from tests.benchmarks.conftest import Ratios

pytestmark = pytest.mark.benchmark

_MAX_TOKENS = 12  # of a caption, with its end token


def _sgrvinod() -> Any:
    """Return the tutorial's model (ResNet101, 14 x 14 cells, 9,490 words), and a photo's side."""
    from torchvision.models import resnet101

    backbone = nn.Sequential(*list(resnet101().children())[:-2], nn.AdaptiveAvgPool2d(14)).eval()
    decoder = CaptionModel(
        ModelConfig(
            vocabulary_size=9490,
            encoder_channels=2048,
            embedding_size=512,
            attention_size=512,
            mean_start=True,
            context_gate=True,
        )
    ).eval()
    options = DecodingOptions(beam_size=5, max_length=_MAX_TOKENS + 1)

    def caption(pixels: Tensor) -> object:
        state, memory = decoder.start(backbone(pixels).flatten(2).transpose(1, 2))
        return decode(decoder.step, state, memory, options)

    return caption, 256


def _transformer(name: str) -> Any:
    """Return a base-sized model of ``transformers``, without attention maps, and a photo's side."""
    import transformers as t

    model: Any
    options = {"max_new_tokens": _MAX_TOKENS, "min_new_tokens": _MAX_TOKENS, "do_sample": False}
    if name == "ViT-GPT2, beam 3":
        config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            t.ViTConfig(), t.GPT2Config()
        )
        config.decoder_start_token_id = config.bos_token_id = 50256
        config.pad_token_id = config.eos_token_id = 50256
        model, size = t.VisionEncoderDecoderModel(config), 224
    elif name == "GIT-base, beam 3":
        model, size = t.GitForCausalLM(t.GitConfig()), 224
    else:
        model, size = t.BlipForConditionalGeneration(t.BlipConfig()), 384
    model.eval()
    return lambda pixels: model.generate(pixel_values=pixels, num_beams=3, **options), size


@pytest.mark.parametrize(
    "name",
    ["sgrvinod's shape, beam 5", "ViT-GPT2, beam 3", "GIT-base, beam 3", "BLIP-base, beam 3"],
)
@torch.inference_mode()
def test_cost_of_another_design(
    ratios: Ratios, captioner: Captioner, photos: list[bytes], name: str
) -> None:
    if not name.startswith("sgrvinod"):
        pytest.importorskip(
            "transformers", reason="pip install -r tests/benchmarks/requirements.txt"
        )
    torch.manual_seed(0)
    caption, size = _sgrvinod() if name.startswith("sgrvinod") else _transformer(name)

    def other() -> None:
        # Opened and resized like ours, so that only the designs differ.
        image = open_photo(photos[0]).resize((size, size))
        pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
        caption(pixels[None])

    ratios.time(
        f"{name} / one photo -> caption",
        other,
        lambda: captioner.caption(photos[0]),
        aim="-",
        times=8,
    )
