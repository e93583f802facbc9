"""Find photos, open any of them safely as upright RGB, and compress them for a browser.

Knows nothing of models; preprocessing travels with the encoder.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from PIL.TiffTags import RATIONAL, SIGNED_RATIONAL

from captioner.errors import ImageError, first_line

MAX_PIXELS = 60_000_000
MAX_SIDE = 65_535  # pixels, as in JPEG; every row takes memory
MAX_BYTES = 250_000_000  # of a file: 60 million pixels, uncompressed
DISPLAY_SIDE = 1024  # pixels of the longer side, for a browser
SUFFIXES = frozenset(  # of files that are opened
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .bmp .tif .tiff .avif".split()  # noqa: SIM905
)
_HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# Other image files in a folder: opening one reports the problem, so that none is skipped silently.
# Pillow opens the preview inside some raw photos.
_OTHER_SUFFIXES = frozenset(
    """.3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw
    .rw2 .rwl .sr2 .srf .srw .x3f .jxl .jp2 .j2k .jpf .jpx .jxr .wdp .dib .exr .hdr .heics .heifs
    .avifs .pbm .pgm .ppm .pnm .psb .psd .svg .svgz .tga .xcf""".split()  # noqa: SIM905
)

# Formats to try, whatever the file's name: Pillow would run Ghostscript for EPS, for example.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
with contextlib.suppress(ImportError):  # iPhone photos, if pillow-heif is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
    _FORMATS.append("HEIF")
    SUFFIXES |= _HEIF_SUFFIXES

# Lower limits for formats and modes that Pillow copies several times while decoding, and for
# progressive JPEG, where libjpeg holds all coefficients.
_MAX_PIXELS_BY_KIND: dict[str | None, int] = {
    "WEBP": 20_000_000,
    "AVIF": 25_000_000,
    "TIFF": 45_000_000,
    "CMYK": 50_000_000,
    "progressive RGB": 52_000_000,
    "progressive CMYK": 40_000_000,
}
# Larger photos are reduced while they are converted: nothing here needs more pixels, and full-size
# copies take memory.
_MAX_OUTPUT_PIXELS = 16_000_000
# With an ICC profile to convert, which takes longer than decoding a JPEG.
_MAX_OUTPUT_PIXELS_ICC = 4_000_000
_MAX_PROFILE_BYTES = 8_000_000
_MAX_TAG_BYTES = 8_000  # of a tag of fractions, which take six microseconds each
_MAX_HEADER_READS, _MAX_PIXEL_READS = 10_000, 50_000
_MAX_JPEG_SCANS = 50  # encoders write about ten

Photo: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
# The color space of an ICC profile -> the mode of the pixels that it describes.
_MODE_OF_COLOR_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_ORIENTATION = 0x0112  # EXIF's tag
_FULL_SIZE = "full_size"  # an attribute: unlike Image.info, cropping does not copy it
_TRANSPOSES = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = [_TRANSPOSES[orientation] for orientation in (5, 6, 7, 8)]


class _BoundedReader(io.BufferedReader):
    """A file that raises ``OSError`` after too many reads or JPEG scans.

    Pillow copies a GIF's comment once per sub-block, and libjpeg goes over the whole photo for each
    scan, however short: small files took minutes.
    """

    reads_left = _MAX_HEADER_READS
    scans_left: float = math.inf

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.reads_left -= 1
        self.scans_left -= data.count(b"\xff\xda")
        if self.reads_left < 0 or self.scans_left < 0:
            raise OSError("the file is in too many parts")
        return data


class _BoundedTagReader:
    """A file that yields at most twice its size: tags may share their data."""

    def __init__(self, file: IO[bytes]) -> None:
        position = file.tell()
        self._bytes_left = 2 * file.seek(0, io.SEEK_END)
        file.seek(position)
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise OSError("the tags hold more than the file")
        return self._file.read(size)


_unbounded_load = ImageFileDirectory_v2.load


def _bounded_load(directory: ImageFileDirectory_v2, fp: IO[bytes]) -> None:
    """Load TIFF or EXIF tags, except those that would take gigabytes or many seconds."""
    # Each tag keeps a copy of its data, and thousands may share the same ten megabytes.
    _unbounded_load(directory, _BoundedTagReader(fp))  # type: ignore[arg-type]
    for tag, data in list(directory._tagdata.items()):
        if directory.tagtype[tag] in (RATIONAL, SIGNED_RATIONAL) and len(data) > _MAX_TAG_BYTES:
            del directory[tag]


@functools.cache
def _set_pillow_limits() -> None:
    """Adjust Pillow's limits for the whole process, when the first photo is opened.

    Pillow has no option for the tags, and reads EXIF in many places.
    """
    ImageFileDirectory_v2.load = _bounded_load  # type: ignore[assignment]
    # Photoshop's history in a good PNG takes more than Pillow's limit of one megabyte.
    PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20
    # The C library returns blocks above 32 MB to the system at once. With Pillow's blocks of 16 MB
    # it kept half a gigabyte per thread that had opened large photos.
    Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]


def _scale_to_uint8(values: np.ndarray, full_scale: float) -> Image.Image:
    """Map 0..full_scale to 0..255, or the values' own range if they exceed it."""
    values = values.astype(np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > full_scale:
        values -= low
        full_scale = max(high - low, 1e-12)
    values *= 255.0 / full_scale
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Convert to mode L, CMYK, LAB, RGB or RGBA, without converting colors to sRGB."""
    if image.mode in _WIDE_MODES:
        values = np.asarray(image)
        if image.mode == "F":
            full_scale = 1 if values.size and np.nanmax(values) <= 1 else 255
        else:
            full_scale = 65535 if values.size and values.max() > 255 else 255
        image = _scale_to_uint8(values, full_scale)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")


def _flatten(image: Image.Image, to_srgb: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """Convert to eight-bit sRGB, alpha on white."""
    if to_srgb is None:
        rgb = image.convert("RGB")
    else:
        rgb = to_srgb.apply(image.convert(to_srgb.input_mode))
    if image.mode != "RGBA":
        return rgb
    white = Image.new("RGB", image.size, "white")
    white.paste(rgb, mask=image.getchannel("A"))
    return white


def _profile_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from the image's ICC profile to sRGB, None if none is needed.

    Ignores PNG's gAMA and cHRM chunks and EXIF's color space: most that differ from sRGB are wrong,
    and browsers ignore the latter too.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    is_gray = image.mode in ("1", "L", "LA", "La", *_WIDE_MODES)
    mode = "L" if is_gray else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    return _transform_to_srgb(profile, mode)


@functools.lru_cache(maxsize=4)  # a profile may have megabytes; an album has one or two
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return None if the profile is broken, describes another mode than the pixels, or is sRGB."""
    if b"mpet" in profile:  # any number of steps per color: small files could take minutes
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODE_OF_COLOR_SPACE.get(
            source.profile.xcolor_space.strip()
        ) != mode or source.profile.device_class not in ("scnr", "mntr", "prtr", "spac"):
            return None
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
        # The profile's name proves nothing: compare what it makes of 9 x 9 x 9 colors.
        colors = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), axis=-1).astype(np.uint8)
        probe = Image.fromarray(colors.reshape(9, 81, 3)).convert(mode)
        before, after = (
            np.asarray(each, int) for each in (probe.convert("RGB"), transform.apply(probe))
        )
    except Exception:  # a broken profile must not hide a good picture
        return None
    return transform if np.abs(after - before).max() > 2 else None


def _reduction_factor(image: Image.Image) -> int:
    """Return the whole number that both sides are divided by."""
    limit = _MAX_OUTPUT_PIXELS if _profile_transform(image) is None else _MAX_OUTPUT_PIXELS_ICC
    return math.ceil(math.sqrt(math.prod(image.size) / limit)) or 1


def _convert(image: Image.Image, factor: int) -> Image.Image:
    """Convert to eight-bit sRGB, both sides divided by ``factor``."""
    to_srgb = _profile_transform(image)
    if factor == 1:
        return _flatten(_to_eight_bit(image), to_srgb)
    width, height = (math.ceil(length / factor) for length in image.size)
    if image.mode in (*_WIDE_MODES, "LAB"):  # slow to convert; LAB's signed bytes have no mean
        small = image.resize((width, height), Image.Resampling.NEAREST)
        return _flatten(_to_eight_bit(small), to_srgb)
    # In bands: converting the whole image at once would take as much memory again.
    rgb = Image.new("RGB", (width, height))
    rows = max(2_000_000 // image.width, factor) // factor * factor
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_flatten(_to_eight_bit(band).reduce(factor), to_srgb), (0, top // factor))
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright eight-bit sRGB: first frame, EXIF rotation, alpha on white.

    An image of more than 16 million pixels (4 million, if an ICC profile other than sRGB has to be
    converted) is reduced below that by a whole factor; ``full_size`` remembers its size. The result
    carries no metadata.
    """
    _set_pillow_limits()
    rgb = _convert(image, _reduction_factor(image))
    width, height = full_size(image)
    transpose = None
    with contextlib.suppress(Exception):  # a broken EXIF block must not hide a good picture
        transpose = _TRANSPOSES.get(image.getexif()[_ORIENTATION])
    if transpose is not None:
        rgb = rgb.transpose(transpose)
        if transpose in _QUARTER_TURNS:
            width, height = height, width
    rgb.info = {}
    setattr(rgb, _FULL_SIZE, (width, height))
    return rgb


def full_size(photo: Image.Image) -> tuple[int, int]:
    """Return an upright photo's (width, height) before ``to_rgb`` reduced it."""
    return getattr(photo, _FULL_SIZE, photo.size)


def _from_array(array: np.ndarray) -> Image.Image:
    """Convert (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); bool, uint8, uint16 or floats 0..1."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"an array of shape {array.shape} isn't a photo: use (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.dtype.newbyteorder("=") == np.uint16:
        array = array / 65535.0
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError("an array of floats must lie between 0 and 1: scale it, or use uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} isn't a photo: use uint8, uint16 or floats 0..1"
        )
    return Image.fromarray(array)


def open_photo(photo: Photo, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a path, bytes, binary file, PIL image or array as an upright eight-bit RGB picture.

    Handles EXIF rotation, alpha (on white), CMYK, 16-bit, palette and the first frame of an
    animation. The size is read from the header before anything is decoded; a photo of more than 16
    million pixels is reduced, see ``to_rgb``. The picture's ``format`` is the file's, None for
    pixels in memory. A file object is read from its start, if it can go there. The first call
    adjusts Pillow's limits for the whole process.

    Raises:
        ImageError: the file is missing, not an image, broken, empty, larger than ``MAX_BYTES``, or
            larger than ``max_pixels`` or the limit of its format.
    """
    _set_pillow_limits()
    if isinstance(photo, np.ndarray):
        if photo.size == 0:
            raise ImageError(f"an array of shape {photo.shape} is empty")
        photo = _from_array(photo)
    if isinstance(photo, Image.Image):
        _check_size(photo, "the photo", max_pixels)
        return _decode(photo, "the photo")
    if not isinstance(photo, bytes | str | os.PathLike):
        photo = _read_file(photo)
    name = "the photo" if isinstance(photo, bytes) else str(photo)
    with _open_file(photo) as file:
        if (length := file.seek(0, io.SEEK_END)) > MAX_BYTES:
            raise ImageError(
                f"{name} has {length / 1e6:,.0f} megabytes, more than {MAX_BYTES / 1e6:.0f}: "
                "scale it down"
            )
        file.seek(0)
        source = _read_header(file, name)
        _check_size(source, name, max_pixels)
        return _decode_file(source, file, name)


def _read_file(file: IO[bytes]) -> bytes:
    """Read a file object, from its start as Pillow does, but at most one byte above the limit."""
    if not hasattr(file, "read"):
        raise ImageError(
            f"a {type(file).__name__} isn't a photo: use a path, bytes, a file opened in binary "
            "mode, a PIL image or an array"
        )
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    except (AttributeError, OSError, ValueError) as error:  # closed, say
        raise ImageError(f"cannot read the photo: {first_line(error)}") from error
    if not isinstance(data, bytes):
        raise ImageError('the file was opened as text: open it in binary mode, "rb"')
    return data


def _read_header(file: _BoundedReader, name: str) -> Image.Image:
    """Identify the format and read everything but the pixels."""
    head = file.read(12)
    try:
        return _identify(file)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels: scale it down") from error
    except Exception as error:
        is_named_heif = Path(name).suffix.lower() in _HEIF_SUFFIXES
        if "HEIF" not in _FORMATS and (is_named_heif or _is_heif(head)):
            raise _heif_error(name) from error
        raise ImageError(
            f"{name} isn't an image we can read. Use JPEG, PNG, WebP, GIF, BMP or TIFF"
        ) from error


def _decode_file(source: Image.Image, file: _BoundedReader, name: str) -> Image.Image:
    """Decode, at a reduced size where the format can."""
    (width, height), factor = source.size, _reduction_factor(source)
    # JPEG decodes at a fraction of its size; HEIC from its preview, if that is large enough.
    if factor > 1 and source.draft(None, (width // factor or 1, height // factor or 1)):
        setattr(source, _FULL_SIZE, (width, height))
    file.reads_left = _MAX_PIXEL_READS
    if isinstance(source, JpegImageFile):
        file.scans_left = _MAX_JPEG_SCANS
    return _decode(source, name)


def _is_heif(head: bytes) -> bool:
    """Return whether a file is HEIC, by its first 12 bytes."""
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands


def _heif_error(name: str | Path) -> ImageError:
    return ImageError(f"{name} is a HEIC photo: pip install pillow-heif, or convert it to JPEG")


def _open_file(photo: bytes | str | os.PathLike[str]) -> _BoundedReader:
    """Open bytes or a regular file: a FIFO would block."""
    if isinstance(photo, bytes):
        return _BoundedReader(io.BytesIO(photo))
    if re.match(r"[a-z][a-z0-9+.-]+://", str(photo), re.IGNORECASE):
        raise ImageError(
            f"{photo} is an address, not a file: download it first, or pipe it with "
            "`curl -L ADDRESS | captioner caption -`"
        )
    path = Path(photo)
    try:
        if not path.exists():
            broken = ": it is a broken link" if path.is_symlink() else ""
            raise ImageError(f"there is no file {path}{broken}")
        if not path.is_file():
            raise ImageError(f"{path} is not a file")
        return _BoundedReader(io.FileIO(path))
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        raise ImageError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def find_photos(folder: Path) -> Iterator[tuple[Path, ImageError | None]]:
    """Yield the photos in a folder and its subfolders, sorted by name within each folder.

    Links to folders are followed last; no folder is read twice. Files that look like photos by
    their name are yielded even if ``open_photo`` will refuse them. Unreadable folders, and HEIC
    photos if pillow-heif is missing, are yielded with an error.
    """
    suffixes = SUFFIXES | _HEIF_SUFFIXES | _OTHER_SUFFIXES
    folders, links, visited = [folder], list[Path](), set[tuple[int, int]]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = current.stat()
            if (key := (status.st_dev, status.st_ino)) in visited:
                continue
            visited.add(key)
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield current, ImageError(f"cannot read the folder {current}: {error.strerror}")
            continue
        subfolders = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(path)
            elif entry.is_symlink() and os.path.isdir(path):  # noqa: PTH112 -- Path may raise
                links.append(path)
            elif path.suffix.lower() in suffixes:
                yield path, _heif_error(path) if _is_unsupported_heif(path) else None
            elif not path.suffix and _may_be_photo(path):
                yield path, None
        folders += reversed(subfolders)


def _first_bytes(path: Path) -> bytes:
    """Return the first 16 bytes of a regular file, b"" if it cannot be read."""
    with contextlib.suppress(ImageError, OSError), _open_file(path) as file:
        return file.read(16)
    return b""


def _is_unsupported_heif(path: Path) -> bool:
    suffix = path.suffix.lower()
    return "HEIF" not in _FORMATS and suffix in _HEIF_SUFFIXES and _is_heif(_first_bytes(path))


def _may_be_photo(path: Path) -> bool:
    """Check a file whose name has no suffix; a broken link may have led to a folder of photos."""
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110 -- Path may raise
        return True
    if _is_heif(_first_bytes(path)):
        return True
    with contextlib.suppress(Exception), _open_file(path) as file:
        _set_pillow_limits()
        _identify(file)
        return True
    return False


def _identify(file: IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow only warns up to twice its own limit; ours is checked later.
        warnings.simplefilter("ignore")
        file.seek(0)
        return Image.open(file, formats=_FORMATS)


def _check_size(source: Image.Image, name: str, max_pixels: int) -> None:
    width, height = source.size
    kinds = {source.format, source.mode}
    if source.info.get("progressive"):
        kinds.add(f"progressive {source.mode}")
    max_pixels = min(max_pixels, *(_MAX_PIXELS_BY_KIND.get(kind, max_pixels) for kind in kinds))
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {MAX_SIDE} per side: scale it down"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {max_pixels / 1e6:.0f} million: "
            "scale it down"
        )
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")


def _decode(source: Image.Image, name: str) -> Image.Image:
    """Decode to upright eight-bit RGB with the file's ``format``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source.load()
            upright = to_rgb(source)
            upright.format = source.format
            return upright
    except Exception as error:
        raise ImageError(
            f"{name} is broken: it starts like a {source.format or 'photo'} but cannot be decoded"
        ) from error


def display_jpeg(
    photo: Image.Image, *, max_side: int = DISPLAY_SIDE, max_bytes: int = 250_000
) -> bytes:
    """Return a JPEG for a browser, without metadata.

    Args:
        photo: upright RGB, from ``open_photo``.
        max_side: pixels of the longer side.
        max_bytes: a noisy photo is compressed harder to stay below, as far as quality 10 goes.
    """
    # A new picture: Pillow would copy the old one's comment into the file.
    scale = min(max_side / max(photo.size), 1)
    width, height = (max(round(length * scale), 1) for length in photo.size)
    small = Image.new("RGB", (width, height))
    small.paste(photo.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))
    for quality in (85, 70, 50, 30, 10):
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= max_bytes:
            break
    return file.getvalue()
