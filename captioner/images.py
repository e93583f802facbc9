"""Opening any photo safely, and the one preprocessing that training and serving share.

Knows nothing of models: an encoder hands in its own size, mean and deviation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from captioner.errors import ImageError

MAX_PIXELS = 60_000_000
DISPLAY_SIDE = 1024  # pixels of the longer side, for a browser
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .tif .tiff .avif".split())  # noqa: SIM905

with contextlib.suppress(ImportError):  # the photos of iPhones, where pillow-heif is there
    from pillow_heif import register_heif_opener

    register_heif_opener()
    SUFFIXES |= {".heic", ".heif"}

Photo: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def _to_eight_bit(values: np.ndarray, full_scale: float) -> Image.Image:
    """Map 0..full_scale to 0..255; where that would lose the picture, its own range."""
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > full_scale:
        values, full_scale = values - low, max(high - low, 1e-12)
    return Image.fromarray((values * (255.0 / full_scale)).round().astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    """Turn a copy as EXIF says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block must not hide a good picture
        return image.copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the upright picture in eight-bit RGB: first frame, EXIF rotation, alpha on white."""
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image)
        image = _to_eight_bit(values, 65535 if values.size and values.max() > 255 else 255)
    elif image.mode == "F":
        values = np.asarray(image)
        image = _to_eight_bit(values, 1 if values.size and np.nanmax(values) <= 1 else 255)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    """Take (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16 or floats 0..1."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"an array of shape {array.shape} is no photo; give (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.dtype.newbyteorder("=") == np.uint16:
        array = array / 65535.0
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError("a photo of floats must lie between 0 and 1; scale it or use uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is no photo; use uint8, uint16 or floats 0..1")
    return Image.fromarray(array)


def open_photo(photo: Photo, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a path, bytes, PIL image or array as an upright eight-bit RGB picture.

    Handles EXIF rotation, alpha (on white), CMYK, 16-bit, palette and the first frame of an
    animation. The size is read from the header before anything is decoded. The picture's ``format``
    is the file's, None where there was none.

    Raises:
        ImageError: the file is missing, no picture, broken, empty or larger than ``max_pixels``.
    """
    if isinstance(photo, Image.Image):
        name, source = "the photo", photo
    elif isinstance(photo, np.ndarray):
        if photo.size == 0:
            raise ImageError(f"an array of shape {photo.shape} is empty")
        name, source = "the photo", _from_array(photo)
    elif isinstance(photo, bytes | str | os.PathLike):
        name = "the photo" if isinstance(photo, bytes) else str(photo)
        try:
            data = photo if isinstance(photo, bytes) else _read_file(Path(photo))
            with warnings.catch_warnings():
                # Pillow only warns up to twice its own limit; ours is checked below.
                warnings.simplefilter("ignore")
                source = Image.open(io.BytesIO(data))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name} has too many pixels: scale it down") from error
        except Exception as error:
            raise ImageError(
                f"{name} is not a photo that can be read: use JPEG, PNG, WebP, GIF, BMP or TIFF"
            ) from error
    else:
        raise ImageError(
            f"a {type(photo).__name__} is no photo; give a path, bytes, a PIL image or an array"
        )
    width, height = source.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {max_pixels / 1e6:.0f} million: "
            "scale it down"
        )
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source.load()
            upright = to_rgb(source)
            upright.format = source.format
            return upright
    except Exception as error:
        raise ImageError(
            f"{name} is broken: it starts like a {source.format or 'picture'} but cannot be decoded"
        ) from error


def _read_file(path: Path) -> bytes:
    """Read a regular file whole, so that no handle stays open and no FIFO blocks."""
    if not path.exists():
        raise ImageError(f"there is no file {path}")
    if not path.is_file():
        raise ImageError(f"{path} is not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error


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


def display_jpeg(photo: Image.Image, *, side: int = DISPLAY_SIDE, most: int = 250_000) -> bytes:
    """Return a JPEG for a browser, without metadata.

    Args:
        photo: upright RGB, as ``open_photo`` gives it.
        side: pixels that its longer side has at most.
        most: bytes to stay under; a noisy photo is compressed harder.
    """
    # A new picture: Pillow would write the comment of the old one into the file.
    scale = min(side / max(photo.size), 1)
    width, height = (max(round(length * scale), 1) for length in photo.size)
    small = Image.new("RGB", (width, height))
    small.paste(photo.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))
    for quality in (85, 70, 50, 30, 10):
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= most:
            break
    return file.getvalue()
