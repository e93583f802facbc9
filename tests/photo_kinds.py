"""Photos of every kind that visitors upload, good and bad, and the expected outcome of each."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageCms

from captioner import web as viewer
from tests.test_images import (
    BROKEN_EXIF,
    ORIENTATION,
    STORED,
    WIDE_PROFILE,
    encoded,
    endless_profile,
    png_header,
    with_orientation,
)

CAT = viewer.example_photos()["cat"].path
SCENE = Image.open(CAT).convert("RGB").resize((320, 240))
JPEG = encoded(SCENE, "JPEG", quality=95)
PNG = encoded(SCENE, "PNG")
GREY = np.asarray(SCENE.convert("L"))

# Outcomes: any caption, the caption of SCENE, or an error that matches the pattern.
CAPTION, SAME = "a caption", "the caption of SCENE"
NOT_AN_IMAGE = "an image .*read.* JPEG, PNG, WebP, GIF, BMP or TIFF"
BROKEN = "broken: it starts like a"
TOO_LARGE = "pixels, more than|too many pixels"
UNREADABLE = f"{NOT_AN_IMAGE}|{BROKEN}"


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_with(*chunks: bytes) -> bytes:
    """Return the scene with chunks after its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def segments(marker: bytes, *contents: bytes) -> bytes:
    """Return header segments of a JPEG."""
    return b"".join(marker + struct.pack(">H", len(content) + 2) + content for content in contents)


def jpeg_with(header: bytes) -> bytes:
    """Return the scene with ``header`` in place of its resolution, which Pillow reads from EXIF."""
    assert JPEG[2:4] == b"\xff\xe0"
    return JPEG[:2] + header + JPEG[20:]


def gif_with(extensions: bytes) -> bytes:
    """Return the scene with extensions before the picture."""
    gif = encoded(SCENE, "GIF")
    start = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:start] + extensions + gif[start:]


def directory(tags: Sequence[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """Return a TIFF of one directory, with ``data`` from its eighth byte on."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<L", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def small_tiff(*more: tuple[int, int, int, int], data: bytes = b"", strip: int = 3072) -> bytes:
    """Return a TIFF of 32 x 32 pixels with more tags, and ``data`` at byte 3080."""
    tags = [(256, 4, 1, 32), (257, 4, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 3), (278, 4, 1, 32), (279, 4, 1, strip)]
    return directory([*tags, *more], SCENE.resize((32, 32)).tobytes() + data)


def many_tags(number: int, size: int) -> bytes:
    """Return a TIFF whose tags all point to the same data."""
    return directory([(40_000 + index, 7, size, 8) for index in range(number)], bytes(size))


def animation(kind: str, number: int) -> bytes:
    """Return an animation whose frames all differ."""
    first, *frames = (
        Image.new("RGB", (32, 24), (index % 256, index // 256, 9)) for index in range(number)
    )
    return encoded(first, kind, save_all=True, append_images=frames)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.jpg", JPEG)
    return file.getvalue()


def large_canvas() -> bytes:
    """Return an animated WebP whose tiny frames lie on 16,383 x 16,383 pixels."""
    frame = Image.new("RGB", (16, 16))
    webp = bytearray(encoded(frame, "WEBP", save_all=True, append_images=[SCENE.resize((16, 16))]))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    return bytes(webp)


def large_screen(side: int) -> bytes:
    gif = encoded(SCENE, "GIF")
    return gif[:6] + struct.pack("<HH", side, side) + gif[10:]


def bomb_of_120_megapixels() -> bytes:
    head = struct.pack(">IIBBBBB", 12_000, 10_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1501 * 10_000), 9)
    return PNG[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def many_scans(number: int) -> bytes:
    """Return a large JPEG that repeats a scan of a few bytes."""
    jpeg = encoded(Image.new("L", (7680, 7680), 77), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * number + jpeg[-2:]


def many_strips(number: int) -> bytes:
    """Return a TIFF with one strip per row of one pixel."""
    tags = [(256, 4, 1, 1), (257, 4, 1, number), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, number, 8), (277, 3, 1, 1), (278, 4, 1, 1)]
    tags += [(279, 4, number, 8 + 4 * number)]
    return directory(tags, struct.pack("<L", 8) * number + struct.pack("<L", 1) * number)


def lab(image: Image.Image) -> Image.Image:
    rgb, other = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(rgb, other, "RGB", "LAB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def with_alpha() -> Image.Image:
    layered = SCENE.copy()
    layered.putalpha(SCENE.convert("L"))
    return layered


def turned(kind: str, number: int) -> bytes:
    stored = Image.fromarray(np.ascontiguousarray(STORED[number](np.asarray(SCENE))))
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return encoded(stored, kind, exif=with_orientation(number), **options)


def in_exif(data: bytes) -> bytes:
    """Return EXIF in as many segments as needed; Pillow joins them."""
    starts = range(0, len(data), 65_000)
    return segments(b"\xff\xe1", *(b"Exif\0\0" + data[at : at + 65_000] for at in starts))


def without_adobe(jpeg: bytes) -> bytes:
    """Remove the segment that marks the ink as inverted."""
    start = jpeg.index(b"\xff\xee\0\x0eAdobe")
    return jpeg[:start] + jpeg[start + 16 :]


EXIF_RATIONALS = directory(
    [(ORIENTATION, 3, 1, 1), (282, 5, 900_000, 8), (296, 3, 1, 2)], b"\1\0\0\0\3\0\0\0" * 900_000
)
_KINDS_BY_OUTCOME: dict[str, dict[str, Callable[[], bytes]]] = {
    NOT_AN_IMAGE: {
        "empty": lambda: b"",
        "one byte": lambda: b"\xff",
        "text": lambda: b"This is not a photo.\n" * 100,
        "web page": lambda: b"<!doctype html><title>404</title><h1>Not found</h1>",
        "SVG": lambda: (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
        ),
        "PDF": lambda: encoded(SCENE, "PDF"),
        "zip": zipped,
        "EPS": lambda: encoded(SCENE.resize((8, 8)), "EPS"),  # larger ones have too many parts
        "PSD": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HLLHH", 3, 9, 9, 8, 3),
        "WMF": lambda: struct.pack("<LHhhhhHLH", 0x9AC6CDD7, 0, 0, 0, 9, 9, 72, 0, 0),
        "ICO": lambda: encoded(SCENE, "ICO"),
        "TGA": lambda: encoded(SCENE, "TGA"),
        "PPM": lambda: encoded(SCENE, "PPM"),
        "JPEG 2000": lambda: encoded(SCENE, "JPEG2000"),
        "MP4": lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(1000),
        "PNG with 100 MB of text in zTXt": lambda: png_with(
            chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
        ),
        "PNG with 100 MB of text in iTXt": lambda: png_with(
            chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100_000_000)))
        ),
        "PNG with 800,000 chunks": lambda: png_with(chunk(b"teSt", b"") * 800_000),
        "TIFF whose tags share 9 MB": lambda: many_tags(9_000, 9_000_000),
        "JPEG with 700,000 EXIF segments": lambda: jpeg_with(
            segments(b"\xff\xe1", b"Exif\0\0x") * 700_000
        ),
        "JPEG with 9 MB of junk": lambda: JPEG[:20] + bytes(9_000_000) + JPEG[20:],
        "JPEG with 9 MB of padding": lambda: JPEG[:20] + b"\xff" * 9_000_000 + JPEG[20:],
        "GIF with a comment of 9 MB": lambda: gif_with(
            b"!\xfe" + (b"\xff" + b"a" * 255) * 35_000 + b"\0"
        ),
        "GIF with 1,800,000 comments": lambda: gif_with(b"!\xfe\1a\0" * 1_800_000),
    },
    UNREADABLE: {
        **{
            f"JPEG cut off at {percent} %": functools.partial(cut, JPEG, percent / 100)
            for percent in (10, 50, 90)
        },
        **{
            f"half of a {kind}": functools.partial(cut, encoded(SCENE, kind), 0.5)
            for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
        },
    },
    BROKEN: {
        "JPEG without its last two bytes": lambda: JPEG[:-2],
        "JPEG with 1,000 scans": lambda: many_scans(1_000),
    },
    TOO_LARGE: {
        "header that claims 60,000 x 60,000": lambda: png_header(60_000, 60_000),
        "bomb of 120 megapixels": bomb_of_120_megapixels,
        "60,000,000 x 1": lambda: png_header(60_000_000, 1),
        "WebP of 16,383 x 16,383": large_canvas,
        "GIF of 65,535 x 65,535 with a small frame": lambda: large_screen(65_535),
    },
    CAPTION: {
        "GIF of 7,000 x 7,000 with a small frame": lambda: large_screen(7_000),
        "JPEG whose tags share 8 MB": lambda: jpeg_with(in_exif(many_tags(9_000, 8_000_000))),
        "JPEG with a resolution of 900,000 fractions": lambda: jpeg_with(in_exif(EXIF_RATIONALS)),
        "TIFF with a resolution of 1,000,000 fractions": lambda: small_tiff(
            (282, 5, 1_000_000, 3080), data=b"\1\0\0\0\3\0\0\0" * 1_000_000
        ),
        "TIFF with a strip of 4 GB": lambda: small_tiff(strip=2**32 - 1),
        "TIFF of 200 pages": lambda: animation("TIFF", 200),
        "GIF of 1,000 frames": lambda: animation("GIF", 1_000),
        "WebP of 1,000 frames": lambda: animation("WEBP", 1_000),
        "APNG of 1,000 frames": lambda: animation("PNG", 1_000),
        "AVIF of 100 frames": lambda: animation("AVIF", 100),
        "MPO": lambda: encoded(SCENE, "MPO", save_all=True, append_images=[SCENE]),
        "polyglot of JPEG and zip": lambda: JPEG + zipped(),
        "1 x 1": lambda: encoded(SCENE.resize((1, 1)), "PNG"),
        "1 x 20,000": lambda: encoded(SCENE.resize((1, 20_000)), "PNG"),
        "65,535 x 1": lambda: encoded(SCENE.resize((65_535, 1)), "PNG"),
        **{kind: functools.partial(encoded, SCENE, kind) for kind in ("GIF", "WEBP", "AVIF")},
        "CMYK JPEG of Adobe": lambda: encoded(SCENE.convert("CMYK"), "JPEG"),
        "CMYK JPEG without the Adobe marker": lambda: without_adobe(
            encoded(SCENE.convert("CMYK"), "JPEG")
        ),
        "CMYK TIFF": lambda: encoded(SCENE.convert("CMYK"), "TIFF"),
        "palette": lambda: encoded(SCENE.quantize(64), "PNG"),
        "palette with transparency": lambda: encoded(
            SCENE.quantize(64), "PNG", transparency=bytes(range(64))
        ),
        "transparency": lambda: encoded(with_alpha(), "PNG"),
        "grey": lambda: encoded(SCENE.convert("L"), "JPEG"),
        "1-bit": lambda: encoded(SCENE.convert("1"), "PNG"),
        "1-bit TIFF of a fax": lambda: encoded(SCENE.convert("1"), "TIFF", compression="group4"),
        "16-bit grey": lambda: encoded(Image.fromarray(GREY.astype("u2") * 257), "PNG"),
        "32-bit grey": lambda: encoded(Image.fromarray(GREY.astype("i4") * 257), "TIFF"),
        "float TIFF": lambda: encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"),
        "float TIFF of NaN": lambda: encoded(
            Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"
        ),
        "LAB TIFF": lambda: encoded(lab(SCENE), "TIFF"),
        "interlaced JPEG": lambda: encoded(SCENE, "JPEG", progressive=True),
        "EXIF rotation 6 of JPEG": lambda: turned("JPEG", 6),
        "colour profile that is not sRGB": lambda: encoded(SCENE, "JPEG", icc_profile=WIDE_PROFILE),
        "broken colour profile in a JPEG": lambda: jpeg_with(
            segments(b"\xff\xe2", b"ICC_PROFILE\0\1\7nonsense")
        ),
    },
    SAME: {
        "PNG with 3 MB of Photoshop's history": lambda: png_with(
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 3_000_000))
        ),
        "PNG whose tags share 9 MB": lambda: png_with(chunk(b"eXIf", many_tags(9_000, 9_000_000))),
        "polyglot of PNG and a web page": lambda: PNG + b"<script>alert(1)</script>",
        **{kind: functools.partial(encoded, SCENE, kind) for kind in ("PNG", "BMP", "TIFF")},
        **{
            f"EXIF: {name}": functools.partial(encoded, SCENE, "PNG", exif=exif)
            for name, exif in BROKEN_EXIF.items()
        },
        **{
            f"EXIF rotation 6 of {kind}": functools.partial(turned, kind, 6)
            for kind in ("PNG", "TIFF")
        },
        "broken colour profile": lambda: encoded(SCENE, "PNG", icc_profile=b"nonsense"),
        "colour profile of 100,000 steps": lambda: encoded(
            SCENE, "PNG", icc_profile=endless_profile(100_000)
        ),
    },
}
# Kind -> outcome and contents.
KINDS = {
    kind: (outcome, make)
    for outcome, kinds in _KINDS_BY_OUTCOME.items()
    for kind, make in kinds.items()
}


# The largest photos allowed, in each mode that is decoded or converted in its own way. They are
# tiled, so that they are written fast and are small enough to upload.
W, H = 8_857, 6_661


def tiled(pixels: np.ndarray, width: int = W, height: int = H) -> np.ndarray:
    times = (-(-height // pixels.shape[0]), -(-width // pixels.shape[1]))
    return np.tile(pixels, (*times, 1)[: pixels.ndim])[:height, :width]


def large(image: Image.Image, width: int = W, height: int = H) -> Image.Image:
    pixels = tiled(np.asarray(image), width, height)
    picture = Image.frombytes(image.mode, (width, height), pixels.tobytes())
    if image.palette:
        picture.putpalette(image.getpalette() or [])
    return picture


def large_png(depth: int, colour: int, channels: int) -> bytes:
    """Return a PNG of a kind that Pillow does not write."""
    length = 1 + -(-W * channels * depth // 8)
    packer, row = zlib.compressobj(1), b"\0" + bytes(range(1, 65)) * (W // 8)
    row = row.ljust(length, b"\x55")[:length]
    pixels = b"".join([*(packer.compress(row) for _ in range(H)), packer.flush()])
    head = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0)
    return PNG[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


TILE = SCENE.resize((64, 48))
TURNED = {"exif": with_orientation(6)}
DEFLATE = {"compression": "tiff_adobe_deflate"}
LARGE_KINDS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded(large(TILE), "JPEG", quality=20, **TURNED),
    "progressive JPEG": lambda: encoded(
        large(TILE, 7_200, 7_200), "JPEG", quality=20, progressive=True, subsampling=0
    ),
    "progressive CMYK JPEG": lambda: encoded(
        large(TILE.convert("CMYK"), 6_300, 6_300), "JPEG", quality=10, progressive=True
    ),
    "CMYK JPEG": lambda: encoded(large(TILE.convert("CMYK"), 7_000, 7_000), "JPEG", quality=10),
    "PNG": lambda: encoded(large(TILE), "PNG", compress_level=1, **TURNED),
    "PNG with a colour profile": lambda: encoded(
        large(TILE), "PNG", compress_level=1, icc_profile=WIDE_PROFILE
    ),
    "PNG with 16-bit transparency": lambda: large_png(16, 6, 4),
    "grey PNG of 16 bits": lambda: large_png(16, 0, 1),
    "grey PNG with transparency": lambda: large_png(8, 4, 2),
    "1-bit PNG": lambda: large_png(1, 0, 1),
    "palette": lambda: encoded(large(TILE.quantize(16)), "GIF"),
    "float TIFF": lambda: encoded(
        Image.fromarray(tiled(GREY[:48, :64] / np.float32(255), 6_700, 6_700)),
        "TIFF",
        **DEFLATE,
        **TURNED,
    ),
    "LAB TIFF": lambda: encoded(large(lab(TILE), 6_700, 6_700), "TIFF", **DEFLATE),
    "WebP": lambda: encoded(large(TILE.convert("RGBA"), 4_400, 4_400), "WEBP", method=0),
    "AVIF": lambda: encoded(large(TILE, 5_000, 5_000), "AVIF", speed=10, quality=30),
}
