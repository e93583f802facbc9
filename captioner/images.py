"""Finding photos, opening any of them safely, and the preprocessing of training and serving.

Knows nothing of models: an encoder hands in its own size, mean and deviation.
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

from captioner.errors import ImageError

MAX_PIXELS = 60_000_000
MAX_SIDE = 65_535  # pixels, as in JPEG; every row takes memory
MAX_BYTES = 250_000_000  # of a file: that many pixels, uncompressed
DISPLAY_SIDE = 1024  # pixels of the longer side, for a browser
SUFFIXES = frozenset(  # of files that are opened
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .bmp .tif .tiff .avif".split()  # noqa: SIM905
)
_HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# Other pictures, which a folder may hold. Opening one names the problem, so that none is left out
# silently. Of some raw photos Pillow opens the preview.
_OTHER_SUFFIXES = frozenset(
    """.3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw
    .rw2 .rwl .sr2 .srf .srw .x3f .jxl .jp2 .j2k .jpf .jpx .jxr .wdp .dib .exr .hdr .heics .heifs
    .avifs .pbm .pgm .ppm .pnm .psb .psd .svg .svgz .tga .xcf""".split()  # noqa: SIM905
)

# What is opened, whatever the file is called: Pillow reads EPS by running Ghostscript, and more.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
with contextlib.suppress(ImportError):  # the photos of iPhones, where pillow-heif is there
    from pillow_heif import register_heif_opener

    register_heif_opener()
    _FORMATS.append("HEIF")
    SUFFIXES |= _HEIF_SUFFIXES

# Of formats and modes of which Pillow holds several copies, or libjpeg whole progressive scans.
_MAX_PIXELS_OF: dict[str | None, int] = {
    "WEBP": 20_000_000,
    "AVIF": 25_000_000,
    "TIFF": 45_000_000,
    "CMYK": 50_000_000,
    "progressive RGB": 52_000_000,
    "progressive CMYK": 40_000_000,
}
# Larger ones are reduced as they are converted: nothing here looks closer, and copies take memory.
_KEPT_PIXELS = 16_000_000
# The same where colours are converted to sRGB, which takes longer than decoding a JPEG.
_KEPT_PIXELS_OF_PROFILE = 4_000_000
_MAX_PROFILE_BYTES = 8_000_000
# Photoshop's history in a good PNG takes more than the megabyte that Pillow allows.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20
# The C library gives memory back at once that came in pieces of more than 32 MB. Of Pillow's own 16
# MB it kept half a gigabyte, for every thread that had opened large photos.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]

Photo: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# The colour space of an ICC profile -> the mode of the pixels that it describes.
_MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_ORIENTATION = 0x0112  # EXIF's tag
_FULL_SIZE = "full_size"  # an attribute: unlike Image.info it is lost where somebody crops
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[number] for number in (5, 6, 7, 8)]


class _Reader(io.BufferedReader):
    """A file that ends a decoding for which it is in too many parts.

    Pillow copies a GIF's comments as often as they have parts, and libjpeg goes over all of a photo
    for each of its scans, which may be a few bytes long: small files took them minutes.
    """

    reads = 10_000  # of a header
    scans: float = math.inf

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.reads -= 1
        self.scans -= data.count(b"\xff\xda")
        if self.reads < 0 or self.scans < 0:
            raise OSError("the file is in too many parts")
        return data


class _TagData:
    """A file of which no more than it holds is read, or a little: tags may share their data."""

    def __init__(self, file: IO[bytes]) -> None:
        here = file.tell()
        self._left = 2 * file.seek(0, io.SEEK_END)
        file.seek(here)
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise OSError("the tags hold more than the file")
        return self._file.read(size)


_pillows_load = ImageFileDirectory_v2.load


def _load_tags(directory: ImageFileDirectory_v2, fp: IO[bytes]) -> None:
    """Load the tags of TIFF or EXIF, but not what would take gigabytes or many seconds."""
    # Each tag keeps a copy of its data: thousands may share ten megabytes.
    _pillows_load(directory, _TagData(fp))  # type: ignore[arg-type]
    # Six microseconds a fraction; no photo has many in one tag.
    for tag, data in list(directory._tagdata.items()):
        if directory.tagtype[tag] in (RATIONAL, SIGNED_RATIONAL) and len(data) > 8_000:
            del directory[tag]


ImageFileDirectory_v2.load = _load_tags  # type: ignore[assignment]


def _to_eight_bit(values: np.ndarray, full_scale: float) -> Image.Image:
    """Map 0..full_scale to 0..255; where that would lose the picture, its own range."""
    values = values.astype(np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > full_scale:
        values -= low
        full_scale = max(high - low, 1e-12)
    values *= 255.0 / full_scale
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the picture in mode L, CMYK, LAB, RGB or RGBA, its colours as they are."""
    if image.mode in _WIDE:
        values = np.asarray(image)
        if image.mode == "F":
            full_scale = 1 if values.size and np.nanmax(values) <= 1 else 255
        else:
            full_scale = 65535 if values.size and values.max() > 255 else 255
        image = _to_eight_bit(values, full_scale)
    if image.mode in _ALPHA or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")


def _flat(image: Image.Image, to_srgb: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """Return eight-bit sRGB, alpha on white."""
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
    """Return the way from the image's ICC profile to sRGB, None where its colours can stay.

    PNG's gAMA and cHRM chunks and EXIF's colour space are ignored: most that differ from sRGB are
    wrong, and browsers ignore the latter too.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    grey = image.mode in ("1", "L", "LA", "La", *_WIDE)
    mode = "L" if grey else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    return _transform_to_srgb(profile, mode)


@functools.lru_cache(maxsize=4)  # a profile may have megabytes; an album has one or two
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return None if the profile is broken, of another mode than the pixels, or sRGB itself."""
    if b"mpet" in profile:  # any number of steps for each colour: small files could take minutes
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODE_OF_SPACE.get(
            source.profile.xcolor_space.strip()
        ) != mode or source.profile.device_class not in ("scnr", "mntr", "prtr", "spac"):
            return None
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
        # The profile's name proves nothing, so compare what becomes of 9 x 9 x 9 colours.
        colours = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), axis=-1).astype(np.uint8)
        probe = Image.fromarray(colours.reshape(9, 81, 3)).convert(mode)
        before, after = (
            np.asarray(each, int) for each in (probe.convert("RGB"), transform.apply(probe))
        )
    except Exception:  # a broken profile must not hide a good picture
        return None
    return transform if np.abs(after - before).max() > 2 else None


def _factor(image: Image.Image) -> int:
    """Return by how much both sides are divided."""
    kept = _KEPT_PIXELS if _profile_transform(image) is None else _KEPT_PIXELS_OF_PROFILE
    return math.ceil(math.sqrt(math.prod(image.size) / kept)) or 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the upright picture in eight-bit sRGB: first frame, EXIF rotation, alpha on white.

    A picture of more than 16 million pixels (4 million, if an ICC profile other than sRGB has to
    be converted) is reduced below that by a whole factor; ``full_size`` remembers its size. The
    result carries no metadata.
    """
    size = full_size(image)
    factor, to_srgb = _factor(image), _profile_transform(image)
    width, height = (math.ceil(length / factor) for length in image.size)
    if factor == 1:
        rgb = _flat(_eight_bit(image), to_srgb)
    elif image.mode in (*_WIDE, "LAB"):  # slow to convert; LAB's signed bytes have no mean
        small = image.resize((width, height), Image.Resampling.NEAREST)
        rgb = _flat(_eight_bit(small), to_srgb)
    else:
        # In bands: a copy of the whole in another mode would take as much memory again.
        rgb = Image.new("RGB", (width, height))
        rows = max(2_000_000 // image.width, factor) // factor * factor
        for top in range(0, image.height, rows):
            band = image.crop((0, top, image.width, min(top + rows, image.height)))
            rgb.paste(_flat(_eight_bit(band).reduce(factor), to_srgb), (0, top // factor))
    turn = None
    with contextlib.suppress(Exception):  # a broken EXIF block must not hide a good picture
        turn = _TURNS.get(image.getexif()[_ORIENTATION])
    if turn is not None:
        rgb = rgb.transpose(turn)
        if turn in _SIDEWAYS:
            size = size[::-1]
    rgb.info = {}
    setattr(rgb, _FULL_SIZE, size)
    return rgb


def full_size(photo: Image.Image) -> tuple[int, int]:
    """Return (width, height) that an upright photo had before ``to_rgb`` reduced it."""
    return getattr(photo, _FULL_SIZE, photo.size)


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
    animation. The size is read from the header before anything is decoded; a photo of more than 16
    million pixels is reduced, see ``to_rgb``. The picture's ``format`` is the file's, None where
    there was none.

    Raises:
        ImageError: the file is missing, no picture, broken, empty, larger than ``MAX_BYTES``, or
            larger than ``max_pixels`` or what its format's decoder takes.
    """
    if isinstance(photo, np.ndarray):
        if photo.size == 0:
            raise ImageError(f"an array of shape {photo.shape} is empty")
        photo = _from_array(photo)
    if isinstance(photo, Image.Image):
        _check_size(photo, "the photo", max_pixels)
        return _decode(photo, "the photo")
    if not isinstance(photo, bytes | str | os.PathLike):
        raise ImageError(
            f"a {type(photo).__name__} is no photo; give a path, bytes, a PIL image or an array"
        )
    name = "the photo" if isinstance(photo, bytes) else str(photo)
    with _file(photo) as file:
        if (length := file.seek(0, io.SEEK_END)) > MAX_BYTES:
            raise ImageError(
                f"{name} has {length / 1e6:,.0f} megabytes, more than {MAX_BYTES / 1e6:.0f}: "
                "scale it down"
            )
        file.seek(0)
        head = file.read(12)
        try:
            source = _open(file)
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name} has too many pixels: scale it down") from error
        except Exception as error:
            if "HEIF" not in _FORMATS and (
                _is_heif(head) or Path(name).suffix.lower() in _HEIF_SUFFIXES
            ):
                raise _heif_error(name) from error
            raise ImageError(
                f"{name} is not an image that can be read: use JPEG, PNG, WebP, GIF, BMP or TIFF"
            ) from error
        _check_size(source, name, max_pixels)
        size, factor = source.size, _factor(source)
        # A JPEG is decoded smaller at once, a HEIC from its preview if that is large enough.
        if factor > 1 and source.draft(None, (size[0] // factor or 1, size[1] // factor or 1)):
            setattr(source, _FULL_SIZE, size)
        file.reads = 50_000  # of its pixels
        if isinstance(source, JpegImageFile):
            file.scans = 50  # encoders write about ten
        return _decode(source, name)


def _is_heif(head: bytes) -> bool:
    """Tell from the first 12 bytes of a file."""
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands


def _heif_error(name: str | Path) -> ImageError:
    return ImageError(f"{name} is a HEIC photo: pip install pillow-heif, or convert it to JPEG")


def _file(photo: bytes | str | os.PathLike[str]) -> _Reader:
    """Open bytes or a regular file: a FIFO would block."""
    if isinstance(photo, bytes):
        return _Reader(io.BytesIO(photo))
    if re.match(r"[a-z][a-z0-9+.-]+://", str(photo), re.IGNORECASE):
        raise ImageError(
            f"{photo} is an address, not a file: download it first, or pipe it, as in "
            "`curl -L ADDRESS | captioner caption -`"
        )
    path = Path(photo)
    try:
        if not path.exists():
            broken = ": it is a broken link" if path.is_symlink() else ""
            raise ImageError(f"there is no file {path}{broken}")
        if not path.is_file():
            raise ImageError(f"{path} is not a file")
        return _Reader(io.FileIO(path))
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        raise ImageError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def find_photos(folder: Path) -> Iterator[tuple[Path, ImageError | None]]:
    """Yield the photos of a folder and of all folders in it, in the order of their names.

    Links to folders are followed, after all others; no folder is read twice. What looks like a
    photo by its name is yielded even if ``open_photo`` will refuse it. Folders that cannot be read,
    and HEIC photos where pillow-heif is missing, come with the error.
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
        inside = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                inside.append(path)
            elif entry.is_symlink() and os.path.isdir(path):  # noqa: PTH112 -- Path may raise
                links.append(path)
            elif path.suffix.lower() in suffixes:
                yield path, _heif_error(path) if _lacks_heif(path) else None
            elif not path.suffix and _may_be_photo(path):
                yield path, None
        folders += reversed(inside)


def _head(path: Path) -> bytes:
    """Return the first bytes of a regular file, none if it cannot be read."""
    with contextlib.suppress(ImageError, OSError), _file(path) as file:
        return file.read(16)
    return b""


def _lacks_heif(path: Path) -> bool:
    suffix = path.suffix.lower()
    return "HEIF" not in _FORMATS and suffix in _HEIF_SUFFIXES and _is_heif(_head(path))


def _may_be_photo(path: Path) -> bool:
    """Look into a file whose name has no suffix; a broken link may be one to a folder of photos."""
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110 -- Path may raise
        return True
    if _is_heif(_head(path)):
        return True
    with contextlib.suppress(Exception), _file(path) as file:
        _open(file)
        return True
    return False


def _open(file: IO[bytes]) -> Image.Image:
    """Read the header of a picture."""
    with warnings.catch_warnings():
        # Pillow only warns up to twice its own limit; ours is checked later.
        warnings.simplefilter("ignore")
        return Image.open(file, formats=_FORMATS)


def _check_size(source: Image.Image, name: str, max_pixels: int) -> None:
    width, height = source.size
    kinds = {source.format, source.mode}
    if source.info.get("progressive"):
        kinds.add(f"progressive {source.mode}")
    most = min(max_pixels, *(_MAX_PIXELS_OF.get(kind, max_pixels) for kind in kinds))
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {MAX_SIDE} a side: scale it down"
        )
    if width * height > most:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {most / 1e6:.0f} million: "
            "scale it down"
        )
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")


def _decode(source: Image.Image, name: str) -> Image.Image:
    """Return upright eight-bit RGB with the file's ``format``."""
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
