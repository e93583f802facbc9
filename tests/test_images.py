"""Any photo opens upright in eight-bit RGB, or is refused in one clear sentence."""

from __future__ import annotations

import io
import itertools
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from captioner import images
from captioner.errors import ImageError
from captioner.images import (
    MAX_BYTES,
    SUFFIXES,
    Photo,
    display_jpeg,
    find_photos,
    full_size,
    open_photo,
)
from captioner.model.encoder import Transform

ORIENTATION = 0x0112
HEIGHT, WIDTH = 32, 48
# Red, green; blue, yellow: no turn or mirror of it looks like another one.
SCENE = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
SCENE[:16, :24] = (220, 30, 30)
SCENE[:16, 24:] = (30, 200, 40)
SCENE[16:, :24] = (40, 50, 210)
SCENE[16:, 24:] = (230, 220, 40)
# The same for grey pictures: a ramp, brighter to the right and to the bottom.
RAMP = np.add.outer(np.arange(HEIGHT) * 2, np.arange(WIDTH) * 4)
RAMP = (RAMP * (255 / RAMP.max())).round().astype(np.uint8)

# What a camera that was held so has written, by the EXIF standard's own words: which side of the
# scene the file's first row and first column are.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda scene: scene,  # top, left
    2: lambda scene: scene[:, ::-1],  # top, right
    3: lambda scene: scene[::-1, ::-1],  # bottom, right
    4: lambda scene: scene[::-1],  # bottom, left
    5: lambda scene: scene.swapaxes(0, 1),  # left, top
    6: lambda scene: scene.swapaxes(0, 1)[::-1],  # right, top
    7: lambda scene: scene.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda scene: scene.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(photo: Photo) -> np.ndarray:
    """Return the pixels of an opened photo, after checking that they are eight-bit RGB."""
    image = open_photo(photo)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert pixels.dtype == np.uint8
    return pixels


def assert_close(pixels: np.ndarray, expected: np.ndarray, tolerance: int = 1) -> None:
    """Compare pixels; grey ones are expected in all three channels."""
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, axis=-1)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


# Where a photo may come from


def test_every_suffix_has_a_decoder() -> None:
    kinds = Image.registered_extensions() | {".mpo": "JPEG"}  # JPEG's opener takes it

    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".bmp"} <= SUFFIXES
    assert {suffix for suffix in SUFFIXES if kinds.get(suffix) not in Image.OPEN} == set()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "AVIF"])
def test_common_formats_open(kind: str) -> None:
    pixels = opened(encoded(Image.fromarray(SCENE), kind))

    inner = pixels[4:12, 4:20], pixels[4:12, 28:44], pixels[20:28, 4:20], pixels[20:28, 28:44]
    for part, (row, column) in zip(inner, [(0, 0), (0, 47), (31, 0), (31, 47)], strict=True):
        assert_close(part, np.broadcast_to(SCENE[row, column], part.shape), tolerance=8)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_heic_opens_upright(tmp_path: Path, number: int) -> None:
    pytest.importorskip("pillow_heif", reason="pip install pillow-heif to open HEIC")
    assert {".heic", ".heif"} <= SUFFIXES
    path = tmp_path / "IMG_0001.HEIC"
    # No side shorter than a block of the codec, so that the fields keep their colours.
    scene = SCENE.repeat(4, axis=0).repeat(4, axis=1)
    stored = Image.fromarray(np.ascontiguousarray(STORED[number](scene)))
    # Of EXIF as bytes, pillow-heif makes a turn of HEIF's own beside it, as iPhones write both.
    stored.save(path, "HEIF", quality=95, exif=with_orientation(number).tobytes())
    assert (b"irot" in path.read_bytes()) == (number != 1)

    pixels = opened(path)

    assert pixels.shape == scene.shape
    for row in (32, 96):
        for column in (48, 144):
            assert_close(pixels[row, column], scene[row, column], tolerance=12)


def test_broken_heic_is_refused() -> None:
    pytest.importorskip("pillow_heif", reason="pip install pillow-heif to open HEIC")
    whole = encoded(Image.fromarray(SCENE), "HEIF")

    with pytest.raises(ImageError, match=r"is(n't an image| broken)"):
        open_photo(whole[: len(whole) // 2])


def test_path_string_bytes_image_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "ein Hund \N{DOG FACE} ohne Endung"
    path.write_bytes(encoded(Image.fromarray(SCENE), "PNG"))

    class Somewhere:
        def __fspath__(self) -> str:
            return str(path)

    for photo in (path, str(path), Somewhere(), path.read_bytes(), Image.open(path), SCENE):
        assert_close(opened(photo), SCENE, tolerance=0)


def test_open_photo_does_not_change_its_argument() -> None:
    mine = Image.fromarray(SCENE).convert("RGBA")
    mine.getexif()[ORIENTATION] = 6
    before = mine.tobytes()

    given_back = open_photo(mine)
    given_back.paste((0, 0, 0), (0, 0, *given_back.size))

    assert (mine.mode, mine.size, mine.tobytes()) == ("RGBA", (WIDTH, HEIGHT), before)
    assert mine.getexif()[ORIENTATION] == 6
    plain = Image.fromarray(SCENE)
    open_photo(plain).paste((0, 0, 0), (0, 0, WIDTH, HEIGHT))
    assert_close(np.asarray(plain), SCENE, tolerance=0)


# Colour modes


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_converted(kind: str) -> None:
    # Real ink: some of the darkness is in the black plate.
    ink = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    ink[..., :3] = 255 - SCENE
    ink[..., 3] = 64
    photo = encoded(Image.fromarray(ink, mode="CMYK"), kind)
    assert Image.open(io.BytesIO(photo)).mode == "CMYK"

    pixels = opened(photo)

    expected = SCENE.astype(float) * (255 - 64) / 255
    assert_close(pixels, expected, tolerance=6 if kind == "JPEG" else 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled(kind: str) -> None:
    photo = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), kind)
    assert Image.open(io.BytesIO(photo)).mode == "I;16"

    assert_close(opened(photo), RAMP)
    # A dark one stays dark.
    dark = Image.fromarray(RAMP.astype(np.uint16) * 64)
    assert_close(opened(encoded(dark, kind)), RAMP * (64 / 257))


def test_big_endian_sixteen_bit_gray_is_scaled() -> None:
    big = RAMP.astype(">u2") * 257
    photo = Image.frombytes("I;16B", (WIDTH, HEIGHT), big.astype(">u2").tobytes())
    assert photo.mode == "I;16B"

    assert_close(opened(photo), RAMP)
    assert_close(opened(encoded(photo, "TIFF")), RAMP)


def test_thirty_two_bit_gray_is_scaled() -> None:
    photo = encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF")
    assert Image.open(io.BytesIO(photo)).mode == "I"

    assert_close(opened(photo), RAMP)
    # Eight-bit values in a wide box.
    assert_close(opened(Image.fromarray(RAMP.astype(np.int32))), RAMP)
    # Values outside of sixteen bits are mapped by their own range.
    assert_close(opened(Image.fromarray(RAMP.astype(np.int32) * 4_000_000 - 10)), RAMP)


@pytest.mark.parametrize("scale", [1 / 255, 1.0])
def test_float_tiff_is_scaled(scale: float) -> None:
    photo = encoded(Image.fromarray((RAMP * scale).astype(np.float32)), "TIFF")
    assert Image.open(io.BytesIO(photo)).mode == "F"

    assert_close(opened(photo), RAMP)


def test_float_tiff_with_nan_or_unusual_range_is_scaled() -> None:
    holes = (RAMP / 255).astype(np.float32)
    holes[0, 0], holes[0, 1] = np.nan, -np.inf
    pixels = opened(encoded(Image.fromarray(holes), "TIFF"))
    assert_close(pixels[1:], RAMP[1:])

    # Elevations, say: -500 to 4600 metres.
    pixels = opened(encoded(Image.fromarray(RAMP.astype(np.float32) * 20 - 500), "TIFF"))
    assert_close(pixels, RAMP)


def test_one_bit_image_opens() -> None:
    black_and_white = (RAMP > 127).astype(np.uint8) * 255

    photo = encoded(Image.fromarray(black_and_white).convert("1"), "PNG")
    assert Image.open(io.BytesIO(photo)).mode == "1"

    assert_close(opened(photo), black_and_white, tolerance=0)


def test_palette_image_opens() -> None:
    photo = encoded(Image.fromarray(SCENE).quantize(4), "PNG")
    assert Image.open(io.BytesIO(photo)).mode == "P"

    assert_close(opened(photo), SCENE, tolerance=2)


def test_transparent_palette_color_becomes_white() -> None:
    indexed = Image.new("P", (WIDTH, HEIGHT), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.paste(1, (0, 0, 24, HEIGHT))
    expected = np.empty_like(SCENE)
    expected[:, :24] = (200, 100, 50)
    expected[:, 24:] = 255

    for kind in ("PNG", "GIF"):
        assert_close(opened(encoded(indexed, kind, transparency=0)), expected, tolerance=0)


def test_translucent_palette_color_is_blended_with_white() -> None:
    indexed = Image.new("P", (4, 4), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50])

    pixels = opened(encoded(indexed, "PNG", transparency=bytes([51, 255])))

    assert_close(pixels, np.broadcast_to(np.array([206, 208, 210]), (4, 4, 3)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_blended_with_white(kind: str) -> None:
    alpha = np.broadcast_to(np.linspace(0, 255, WIDTH).round(), (HEIGHT, WIDTH))[..., None]
    layered = np.concatenate([SCENE, alpha], axis=-1).astype(np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}

    pixels = opened(encoded(Image.fromarray(layered), kind, **options))

    share = alpha / 255
    assert_close(pixels, (SCENE * share + 255 * (1 - share)).round())
    assert (pixels[:, 0] == 255).all()


def test_gray_with_alpha_is_blended_with_white() -> None:
    layered = Image.fromarray(RAMP).convert("LA")
    layered.putalpha(51)
    photo = encoded(layered, "PNG")
    assert Image.open(io.BytesIO(photo)).mode == "LA"

    assert_close(opened(photo), (RAMP * 0.2 + 255 * 0.8).round())


@pytest.mark.parametrize(
    ("mode", "clear", "kept"),
    [("L", 7, 90), ("RGB", (1, 2, 3), (90, 80, 70)), ("1", 0, 1)],
)
def test_transparent_color_key_becomes_white(mode: str, clear: Any, kept: Any) -> None:
    image = Image.new(mode, (8, 4), clear)
    image.paste(kept, (0, 0, 4, 4))

    pixels = opened(encoded(image, "PNG", transparency=clear))

    assert_close(pixels[:, :4], np.asarray(image.convert("RGB"))[:, :4], tolerance=0)
    assert (pixels[:, 4:] == 255).all()


def test_lab_is_converted() -> None:
    # Lightness 0..100 stands in a byte; a and b of a neutral grey are 0.
    lab = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    lab[..., 0] = 53 * 255 // 100
    lab[:, 24:, 1] = 80  # towards red
    photo = encoded(Image.frombytes("LAB", (WIDTH, HEIGHT), lab.tobytes()), "TIFF")
    assert Image.open(io.BytesIO(photo)).mode == "LAB"

    pixels = opened(photo)

    # L* = 53 is the sRGB grey 126; L* = 53, a* = 80 is a strong pink red.
    assert_close(pixels[:, :20], np.full((HEIGHT, 20, 3), 126), tolerance=4)
    red, green, blue = pixels[16, 40].astype(int)
    assert red > 200
    assert green < 60
    assert blue < 160


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBX"])
def test_other_color_spaces_are_converted(mode: str) -> None:
    assert_close(opened(Image.fromarray(SCENE).convert(mode)), SCENE, tolerance=4)


# Colour profiles


def profile(space: str, pcs: str, tags: dict[str, bytes]) -> bytes:
    """Return an ICC profile of version 2 for a screen whose pixels are in ``space``."""
    start, table, body = 132 + 12 * len(tags), struct.pack(">L", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sLL", name.encode(), start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    fields = b"mntr", space.encode(), pcs.encode(), b"acsp"
    header = struct.pack(">LxxxxL4s4s4s12x4s", start + len(body), 0x02400000, *fields)
    white = struct.pack(">3l", 0xF6D6, 0x10000, 0xD32D)  # the profile connection space's, D50
    return (header.ljust(68, b"\0") + white).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return struct.pack(">4sxxxx3l", b"XYZ ", *(round(value * 0x10000) for value in values))


def gamma(value: float) -> bytes:
    return struct.pack(">4sxxxxLH", b"curv", 1, round(value * 256))


def rgb_profile(red: bytes, green: bytes, blue: bytes, curve: bytes) -> bytes:
    curves = dict.fromkeys(["rTRC", "gTRC", "bTRC"], curve)
    return profile("RGB ", "XYZ ", {"rXYZ": red, "gXYZ": green, "bXYZ": blue, **curves})


def red_ink() -> bytes:
    """Return a profile of CMYK whose cyan ink is red, and whose other inks are black."""
    table = []
    for cyan, *others in itertools.product((0, 1), repeat=4):
        lightness, a, b = (0, 0, 0) if any(others) else (53, 80, 67) if cyan else (100, 0, 0)
        table += [round(lightness * 652.8), (a + 128) * 256, (b + 128) * 256]
    head = struct.pack(">4sxxxxBBBx9l", b"mft2", 4, 3, 2, *[0x10000, 0, 0, 0] * 2, 0x10000)
    curves = struct.pack(">HH", 0, 0xFFFF)
    grid = struct.pack(f">{len(table)}H", *table)
    lut = head + struct.pack(">HH", 2, 2) + curves * 4 + grid + curves * 3
    return profile("CMYK", "Lab ", {"A2B0": lut})


# Apple's Display P3 but for its gamma of 2.2, and sRGB with its three primaries rotated.
P3 = (
    xyz(0.51512, 0.24120, -0.00105),
    xyz(0.29198, 0.69225, 0.04189),
    xyz(0.15710, 0.06657, 0.78407),
)
SRGB = (
    xyz(0.43607, 0.22249, 0.01392),
    xyz(0.38515, 0.71687, 0.09708),
    xyz(0.14307, 0.06061, 0.71410),
)
WIDE_PROFILE = rgb_profile(*P3, gamma(2.2))
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR_GREY = profile("GRAY", "XYZ ", {"wtpt": xyz(0.9642, 1, 0.8249), "kTRC": gamma(1)})
SRGB_CURVE = SRGB_PROFILE[SRGB_PROFILE.index(b"para") :][:32]
GREEN, CONVERTED = (30, 160, 60), (0, 164, 35)
RED_INK = (250, 0, 7)  # what L*a*b* 53, 80, 67 is in sRGB


def plain(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (64, 48), colour)


def assert_colour(pixels: np.ndarray, colour: tuple[int, ...], tolerance: int = 1) -> None:
    assert_close(pixels, np.broadcast_to(np.array(colour), pixels.shape), tolerance)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_icc_profile_is_applied_in_every_format(kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="pip install pillow-heif to open HEIC")

    photo = encoded(plain(GREEN), kind, icc_profile=WIDE_PROFILE, quality=100)

    image = open_photo(photo)
    assert_colour(np.asarray(image), CONVERTED, 1 if kind in ("PNG", "TIFF") else 10)
    assert image.info == {}
    # Once: the result is sRGB.
    assert_close(opened(image), np.asarray(image), tolerance=0)


def test_icc_profile_is_judged_by_content_not_name() -> None:
    rotated = bytearray(SRGB_PROFILE)
    names = {name: rotated.index(name) for name in (b"rXYZ", b"gXYZ", b"bXYZ")}
    for name, after in zip(names, (b"gXYZ", b"bXYZ", b"rXYZ"), strict=True):
        rotated[names[name] : names[name] + 4] = after

    assert_colour(opened(encoded(plain(GREEN), "PNG", icc_profile=bytes(rotated))), (160, 60, 30))


def test_icc_profile_is_applied_in_memory() -> None:
    for mode in ("RGB", "RGBX", "YCbCr", "RGBA", "P"):
        image = plain(GREEN).quantize(4) if mode == "P" else plain(GREEN).convert(mode)
        image.info["icc_profile"] = WIDE_PROFILE
        before = image.tobytes()
        assert_colour(opened(image), CONVERTED, tolerance=6 if mode == "YCbCr" else 1)
        assert image.tobytes() == before


def test_icc_profile_keeps_alpha() -> None:
    layered = plain((*GREEN, 128), "RGBA")
    layered.paste((0, 0, 0, 0), (0, 0, 32, 48))

    pixels = opened(encoded(layered, "PNG", icc_profile=WIDE_PROFILE))

    assert (pixels[:, :32] == 255).all()
    assert_colour(pixels[:, 32:], (127, 209, 145))  # half of CONVERTED, half white
    one = plain(GREEN)
    one.paste("black", (0, 0, 32, 48))
    pixels = opened(encoded(one, "PNG", icc_profile=WIDE_PROFILE, transparency=(0, 0, 0)))
    assert (pixels[:, :32] == 255).all()
    assert_colour(pixels[:, 32:], CONVERTED)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_icc_profile_is_applied(mode: str) -> None:
    image = Image.fromarray(np.full((48, 64), 55 * 257, np.uint16))
    image = image if mode == "I;16" else plain(55, "L").convert(mode)
    assert image.mode == mode

    # 55 / 255 of the light is 128 in sRGB.
    assert_colour(opened(encoded(image, "PNG", icc_profile=LINEAR_GREY)), (128,) * 3)


def test_cmyk_icc_profile_is_applied() -> None:
    for ink, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 255, 0, 0), 0)):
        photo = encoded(plain(ink, "CMYK"), "TIFF", icc_profile=red_ink())
        assert_colour(opened(photo), (colour,) * 3, tolerance=2)
    for kind in ("TIFF", "JPEG"):
        photo = encoded(plain((255, 0, 0, 0), "CMYK"), kind, icc_profile=red_ink(), quality=100)
        assert_colour(opened(photo), RED_INK, tolerance=3)


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("RGB", SRGB_PROFILE),
        ("RGB", rgb_profile(*SRGB, SRGB_CURVE)),
        ("RGB", b"nonsense"),
        ("RGB", WIDE_PROFILE[:200]),
        ("RGB", WIDE_PROFILE[:128] + b"\xff" * 200),
        ("RGB", WIDE_PROFILE.replace(b"curv", b"none")),
        ("RGB", WIDE_PROFILE.replace(b"mntr", b"link")),
        ("RGB", WIDE_PROFILE + bytes(9_000_000)),
        ("RGB", LINEAR_GREY),
        ("RGB", red_ink()),
        ("L", WIDE_PROFILE),
        ("L", red_ink()),
        ("CMYK", WIDE_PROFILE),
        ("CMYK", LINEAR_GREY),
        ("LAB", WIDE_PROFILE),
    ],
)
def test_unusable_icc_profile_is_ignored(mode: str, data: bytes) -> None:
    image = Image.fromarray(SCENE)
    image = image if mode == "LAB" else image.convert(mode)
    if mode == "LAB":
        image = Image.frombytes("LAB", (WIDTH, HEIGHT), bytes(range(96)) * (WIDTH * HEIGHT // 32))
    without = opened(encoded(image, "TIFF"))

    assert_close(opened(encoded(image, "TIFF", icc_profile=data)), without, tolerance=0)


def endless_profile(steps: int) -> bytes:
    """Return a small profile with many steps for every colour, all the same bytes."""
    corners = itertools.product((0, 1), repeat=3)
    cube = struct.pack(">4sxxxxHH3B13x", b"clut", 3, 3, 2, 2, 2)
    cube += b"".join(struct.pack(">3f", *corner) for corner in corners)
    head = struct.pack(">4sxxxxHHL", b"mpet", 3, 3, steps)
    places = struct.pack(">LL", len(head) + 8 * steps, len(cube)) * steps
    return profile("RGB ", "XYZ ", {"D2B0": head + places + cube})


def test_icc_profile_bomb_is_ignored() -> None:
    started = time.process_time()
    photo = encoded(Image.fromarray(SCENE), "PNG", icc_profile=endless_profile(4_000))
    assert len(photo) < 40_000

    assert_close(opened(photo), SCENE, tolerance=0)

    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("mode", "colour", "data", "converted"),
    [
        ("RGB", GREEN, WIDE_PROFILE, CONVERTED),
        ("RGBA", (*GREEN, 0), WIDE_PROFILE, (255, 255, 255)),
        ("L", 55, LINEAR_GREY, (128, 128, 128)),
        ("CMYK", (255, 0, 0, 0), red_ink(), RED_INK),
    ],
)
def test_large_photo_with_icc_profile_is_reduced_further(
    mode: str, colour: Any, data: bytes, converted: tuple[int, int, int]
) -> None:
    large = Image.new(mode, (2_501, 2_000), colour)

    for photo in (large, encoded(large, "JPEG" if mode != "RGBA" else "TIFF", quality=95)):
        without = open_photo(photo)
        assert without.size == (2_501, 2_000)
    large.info["icc_profile"] = data
    image = open_photo(large)

    assert (image.size, full_size(image)) == ((1_251, 1_000), (2_501, 2_000))
    assert_colour(np.asarray(image), converted, tolerance=2)
    if mode == "RGB":
        image = open_photo(encoded(large, "JPEG", quality=95, icc_profile=data))
        assert (image.size, full_size(image)) == ((1_251, 1_000), (2_501, 2_000))
        assert_colour(np.asarray(image), converted, tolerance=6)


# Folders


def paths_in(folder: Path) -> dict[str, str | None]:
    """Return what is found, by name: the error, or None."""
    found = [
        (str(path.relative_to(folder)), str(error) if error else None)
        for path, error in find_photos(folder)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_find_photos_follows_links_without_loops(tmp_path: Path) -> None:
    album, other = tmp_path / "album", tmp_path / "other"
    (album / "deep" / "deeper").mkdir(parents=True)
    (other / "more").mkdir(parents=True)
    for path in (album / "a.jpg", album / "deep" / "b.jpg", other / "c.jpg", other / "more/d.jpg"):
        path.touch()
    (album / "a_link_to_deep").symlink_to("deep")
    (album / "deep" / "deeper" / "up").symlink_to("..")
    (album / "deep" / "self").symlink_to(".")
    (album / "linked").symlink_to(other)
    (album / "again").symlink_to(other)
    (other / "back").symlink_to(album)
    (other / "loop").symlink_to("loop")

    # Each folder once, under its own name where it has one.
    assert list(paths_in(album)) == [
        "a.jpg", "deep/b.jpg", "again/c.jpg", "again/loop", "again/more/d.jpg"
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(album)
    assert "deep/b.jpg" in paths_in(tmp_path / "link")


def test_find_photos_yields_everything_that_looks_like_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "a.JPG b.nef c.DNG d.jxl e.psd f.tga g.jp2 h.svg i.mpo".split()  # noqa: SIM905
    for name in (*names, "notes.txt", "README", "captions.csv", "video.mov", "IMG_1.AAE"):
        (tmp_path / name).write_text("Here is text.")
    (tmp_path / "photo").write_bytes(encoded(Image.fromarray(SCENE), "WEBP"))
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "disk").symlink_to("/nowhere/photos")
    (tmp_path / "secret").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    listing = os.scandir

    def scandir(path: Path) -> Any:  # root may read every folder
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)

    found = paths_in(tmp_path)

    assert found.keys() == {*names, "photo", "broken.png", "disk", "secret"}
    assert "cannot read the folder" in str(found["secret"])
    assert "secret: Permission denied" in str(found["secret"])
    assert [name for name, error in found.items() if error] == ["secret"]
    with pytest.raises(ImageError, match=r"broken\.png: it is a broken link"):
        open_photo(tmp_path / "broken.png")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_error_names_pillow_heif_if_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_FORMATS", [each for each in images._FORMATS if each != "HEIF"])
    monkeypatch.setattr(images, "SUFFIXES", SUFFIXES - {".heic", ".heif", ".hif"})
    for name in ("1.HEIC", "2.hif", "no-suffix", "named.jpg"):
        (tmp_path / name).write_bytes(HEIC)
    (tmp_path / "text.heic").write_text("no photo")
    (tmp_path / "jpeg.heic").write_bytes(encoded(Image.fromarray(SCENE), "JPEG"))

    found = paths_in(tmp_path)

    assert {name for name, error in found.items() if error} == {"1.HEIC", "2.hif"}
    assert len(found) == 6
    for name in found.keys() - {"jpeg.heic"}:
        with pytest.raises(ImageError, match="is a HEIC photo: pip install pillow-heif"):
            open_photo(tmp_path / name)
    with pytest.raises(ImageError, match="the photo is a HEIC photo: pip install pillow-heif"):
        open_photo(HEIC)
    assert opened(tmp_path / "jpeg.heic").shape == SCENE.shape


# Animations


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_opens_at_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    photo = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert getattr(Image.open(io.BytesIO(photo)), "n_frames", 1) == 3

    assert_close(opened(photo), np.broadcast_to([255, 0, 0], (8, 12, 3)), tolerance=3)


def test_transparent_animation_is_blended_with_white() -> None:
    frames = []
    for shift in (0, 6):
        frame = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
        frame.paste((255, 0, 0, 255), (shift, 0, shift + 6, 8))
        frames.append(frame)

    pixels = opened(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2))

    assert_close(pixels[:, :6], np.broadcast_to([255, 0, 0], (8, 6, 3)), tolerance=0)
    assert (pixels[:, 6:] == 255).all()


# Rotation


@pytest.mark.parametrize("number", STORED)
def test_exif_orientation_is_applied_in_every_format_and_in_memory(number: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[number](SCENE)))
    exif = with_orientation(number)
    # The borders of the four fields lie on JPEG's blocks.
    jpeg = encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    assert_close(opened(jpeg), SCENE, tolerance=5)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert_close(opened(encoded(stored, kind, exif=exif, **options)), SCENE, tolerance=0)
    assert_close(opened(encoded(stored.quantize(4), "PNG", exif=exif)), SCENE, tolerance=2)
    assert_close(opened(encoded(stored.convert("RGBA"), "PNG", exif=exif)), SCENE, tolerance=0)
    stored.getexif()[ORIENTATION] = number
    assert_close(opened(stored), SCENE, tolerance=0)


@pytest.mark.parametrize("number", STORED)
def test_exif_orientation_is_applied_to_wide_gray(number: int) -> None:
    stored = np.ascontiguousarray(STORED[number](RAMP))
    exif = with_orientation(number)
    sixteen_bit = Image.fromarray(stored.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert_close(opened(encoded(sixteen_bit, kind, exif=exif)), RAMP)
    floats = Image.fromarray((stored / 255).astype(np.float32))
    assert_close(opened(encoded(floats, "TIFF", exif=exif)), RAMP)
    for dtype in (np.uint16, np.int32, np.float32):
        photo = Image.fromarray(stored.astype(dtype))
        photo.getexif()[ORIENTATION] = number
        assert_close(opened(photo), RAMP)


BROKEN_EXIF = {
    "no TIFF header": b"Exif\0\0nonsense!",
    "nothing in it": b"Exif\0\0",
    "points far away": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "cut off": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
    "orientation is a text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
    "orientation is 99": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    scene, gray = Image.fromarray(SCENE), Image.fromarray(RAMP.astype(np.uint16) * 257)
    jpeg = encoded(scene, "JPEG", exif=exif, quality=95, subsampling=0)

    assert_close(opened(jpeg), SCENE, tolerance=5)
    assert_close(opened(encoded(scene, "PNG", exif=exif)), SCENE, tolerance=0)
    assert_close(opened(encoded(scene, "WEBP", exif=exif, lossless=True)), SCENE, tolerance=0)
    assert_close(opened(encoded(gray, "PNG", exif=exif)), RAMP)


def test_exif_bomb_is_ignored() -> None:
    fractions = 1_000_000  # a second or more in Pillow
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHLL", 1, ORIENTATION, 5, fractions, 26)
    photo = encoded(Image.fromarray(SCENE), "PNG", exif=exif + bytes(4 + 8 * fractions))
    started = time.process_time()

    assert_close(opened(photo), SCENE, tolerance=0)

    assert time.process_time() - started < 0.5


# Large photos


@pytest.mark.parametrize(
    ("kind", "mode", "number"),
    [
        ("JPEG", "RGB", 6),
        ("PNG", "RGBA", 1),
        ("TIFF", "F", 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("JPEG", "L", 1),
                ("PNG", "RGB", 6),
                ("PNG", "L", 1),
                ("PNG", "P", 6),
                ("PNG", "I;16", 1),
                ("TIFF", "CMYK", 6),
                ("TIFF", "LAB", 1),
                ("TIFF", "I", 6),
            )
        ),
    ],
)
def test_large_photo_is_reduced_and_remembers_its_size(kind: str, mode: str, number: int) -> None:
    wide, small = mode in ("I;16", "I", "F"), Image.fromarray(SCENE)
    if wide:
        dtype, scale = {"I;16": ("u2", 257), "I": ("i4", 257), "F": ("f4", 1)}[mode]
        small = Image.fromarray((RAMP * np.array(scale)).astype(dtype))
    elif mode == "LAB":
        rgb, other = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(rgb, other, "RGB", "LAB")
        small = ImageCms.applyTransform(small, transform) or small
    else:
        small = small.quantize(4) if mode == "P" else small.convert(mode)
    # 17 megapixels, and neither side is even.
    scene = small.resize((5_087, 3_391), Image.Resampling.NEAREST)
    stored = scene.transpose(Image.Transpose.ROTATE_90) if number == 6 else scene
    assert stored.mode == mode

    image = open_photo(encoded(stored, kind, exif=with_orientation(number)))

    assert (image.mode, image.size, full_size(image)) == ("RGB", (2_544, 1_696), (5_087, 3_391))
    # What was opened before is opened again as it is, and what somebody cuts from it is as it is.
    assert full_size(open_photo(image)) == (5_087, 3_391)
    assert full_size(image.crop((0, 0, 9, 9))) == (9, 9)
    expected = open_photo(small).resize(image.size, Image.Resampling.NEAREST)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
    # But for the pixels where two colours meet.
    assert np.percentile(difference, 98) <= 6


def test_large_photo_with_alpha_is_blended_with_white() -> None:
    layered = Image.new("RGBA", (5_000, 3_500), (0, 0, 0, 0))
    layered.paste((200, 100, 50, 255), (0, 0, 2_500, 3_500))

    pixels = np.asarray(open_photo(layered))

    assert (pixels[:, :1_250] == (200, 100, 50)).all()
    assert (pixels[:, 1_250:] == 255).all()


# Refusals


def test_text_file_named_jpg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("This is no photo.", encoding="utf-8")

    with pytest.raises(ImageError, match=r"photo\.jpg isn't an image we can read\. Use JPEG"):
        open_photo(path)


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_almost_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.png"
    path.write_bytes(content)

    with pytest.raises(ImageError, match=r"empty\.png"):
        open_photo(path)
    with pytest.raises(ImageError, match="the photo isn't an image we can read"):
        open_photo(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.jpg"
    for share in (0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError, match=r"cut\.jpg is(n't an image| broken)"):
            open_photo(path)


def test_truncated_jpeg_is_called_broken(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(Image.fromarray(SCENE), "JPEG")[:-60])

    with pytest.raises(ImageError, match=r"cut\.jpg is broken: it starts like a JPEG but"):
        open_photo(path)


def test_missing_path_folder_and_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no file .*nowhere\.jpg"):
        open_photo(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="is not a file"):
        open_photo(tmp_path)
    for name in ("", "a\0b.jpg", "x" * 5000):
        with pytest.raises(ImageError):
            open_photo(name)
    for address in (
        "https://example.org//a.jpg",
        "HTTP://x/a.jpg",
        "s3://bucket/a.jpg",
        "file:///a",
    ):
        with pytest.raises(ImageError, match=f"^{address} is an address, not a file: download it"):
            open_photo(address)
    with pytest.raises(ImageError, match="there is no file C:"):
        open_photo(r"C:\photos\a.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    errors: list[Exception] = []

    def try_it() -> None:
        try:
            open_photo(path)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(timeout=30)

    assert not thread.is_alive()
    assert [type(error) for error in errors] == [ImageError]
    assert "is not a file" in str(errors[0])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(SCENE), "PNG"))
    path.chmod(0)

    with pytest.raises(ImageError, match=r"cannot read .*secret\.png"):
        open_photo(path)


@pytest.mark.parametrize(
    ("width", "height"),
    # Under Pillow's own limit, between its warning and its error, and far beyond.
    [(8_000, 8_000), (12_000, 12_000), (50_000, 50_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)],
)
def test_too_many_pixels_are_refused_before_decoding(
    tmp_path: Path, width: int, height: int
) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))
    assert path.stat().st_size < 100

    # Decoded, it would be called broken: there are hardly any pixels in it.
    with pytest.raises(ImageError, match=r"huge\.png has .*pixels.*: scale it down"):
        open_photo(path)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "EPS", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="Use JPEG, PNG, WebP, GIF, BMP or TIFF"):
        open_photo(encoded(Image.fromarray(SCENE), kind))


def test_oversized_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    path.write_bytes(encoded(Image.fromarray(SCENE), "TIFF", compression="tiff_lzw"))
    assert_close(opened(path), SCENE, tolerance=0)
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES)
    assert_close(opened(path), SCENE, tolerance=0)
    with path.open("r+b") as file:
        file.truncate(2 * 2**30)
    with pytest.raises(ImageError, match=r"sparse\.tif has 2,147 megabytes, more than 250"):
        open_photo(path)


def test_file_without_pixels_is_called_broken() -> None:
    with pytest.raises(ImageError, match="is broken: it starts like a PNG"):
        open_photo(png_header(100, 100))


def test_max_pixels_is_respected() -> None:
    assert open_photo(SCENE, max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    for photo in (SCENE, Image.fromarray(SCENE), encoded(Image.fromarray(SCENE), "PNG")):
        with pytest.raises(ImageError, match="48 x 32 pixels"):
            open_photo(photo, max_pixels=WIDTH * HEIGHT - 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_zero_sized_image_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="is empty"):
        open_photo(Image.new("RGB", size))


class Unseekable(io.BytesIO):
    """A pipe, say."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise OSError("not seekable")


def test_file_objects_are_read_from_their_start(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(SCENE), "PNG")
    (tmp_path / "photo.png").write_bytes(data)
    written = io.BytesIO()
    written.write(data)  # it stands at its end
    with (
        (tmp_path / "photo.png").open("rb") as file,
        tempfile.SpooledTemporaryFile() as spooled,
    ):
        spooled.write(data)
        for photo in (written, file, spooled, file, Unseekable(data)):
            assert np.array_equal(np.asarray(open_photo(photo)), SCENE)
    with pytest.raises(ImageError, match="closed file"):
        open_photo(file)


def test_file_object_errors_name_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    text: Any = io.StringIO("photo")
    with pytest.raises(ImageError, match="opened as text: open it in binary mode"):
        open_photo(text)
    with pytest.raises(ImageError, match="isn't an image"):
        open_photo(io.BytesIO(b""))
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    endless = io.BytesIO(bytes(5000))
    with pytest.raises(ImageError, match="megabytes"):
        open_photo(endless)
    assert endless.tell() == 1001


@pytest.mark.parametrize("photo", [None, 7, ["photo.jpg"]])
def test_other_types_are_refused(photo: Any) -> None:
    with pytest.raises(ImageError, match=rf"{type(photo).__name__} isn't a photo: use a path"):
        open_photo(photo)


# Arrays

BOOLS = RAMP > 127


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (SCENE, SCENE),
        (np.asfortranarray(SCENE[:, ::-1])[:, ::-1], SCENE),
        (SCENE / 255, SCENE),
        ((SCENE / 255).astype(np.float32), SCENE),
        ((SCENE / 255).astype(np.float16), SCENE),
        (SCENE.astype(np.uint16) * 257, SCENE),
        (RAMP, RAMP),
        (RAMP[..., None], RAMP),
        (RAMP / 255, RAMP),
        (RAMP.astype(np.uint16) * 257, RAMP),
        ((RAMP.astype(np.uint16) * 257).astype(">u2"), RAMP),
        ((RAMP / 255).astype(">f4"), RAMP),
        (BOOLS, BOOLS * 255),
        (np.concatenate([SCENE, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=-1), SCENE),
        (np.zeros((1, 1, 4)), np.full((1, 1, 3), 255)),
        (np.ones((1, 1)), np.full((1, 1), 255)),
    ],
)
def test_arrays_open(array: np.ndarray, expected: np.ndarray) -> None:
    before = array.copy()

    assert_close(opened(array), expected)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), r"shape \(5,\) isn't a photo"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\) isn't a photo"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\) isn't a photo"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\) isn't a photo: use \(H, W\)"),
        (np.array(3, np.uint8), r"shape \(\) isn't a photo"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (np.zeros((4, 0), np.uint8), "is empty"),
        (np.full((4, 4), 1.5), "between 0 and 1"),
        (np.full((4, 4), -0.1), "between 0 and 1"),
        (SCENE.astype(np.float32), "between 0 and 1"),
        (np.full((4, 4, 3), np.nan), "between 0 and 1"),
        (np.full((4, 4, 3), np.inf), "between 0 and 1"),
        (np.zeros((4, 4), np.int64), "array of int64 isn't a photo: use uint8"),
        (np.zeros((4, 4), np.complex64), "array of complex64 isn't a photo"),
        (np.full((4, 4), "a"), "isn't a photo"),
        (np.full((4, 4), None), "array of object isn't a photo"),
    ],
)
def test_unsuitable_arrays_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_photo(array)


# Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_returns_normalized_channels_first_floats(interpolation: str) -> None:
    image = Image.new("RGB", (57, 91), (255, 127, 0))

    pixels = Transform(size=24, mean=MEAN, std=STD, interpolation=interpolation)(image)

    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == np.float32
    assert pixels.flags["C_CONTIGUOUS"]
    for channel, value in enumerate((255, 127, 0)):
        normalised = (value / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(pixels[channel], normalised, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "interpolation"),
    [
        ((400, 40), "bilinear"),
        ((40, 400), "bicubic"),
        ((3, 2), "bicubic"),
        ((900, 1200), "bilinear"),
    ],
)
def test_preprocess_keeps_the_whole_photo(size: tuple[int, int], interpolation: str) -> None:
    # A corner each of red, green, blue and yellow: a crop would lose some of them.
    corners = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=np.uint8) * 255
    image = Image.fromarray(corners).resize(size, Image.Resampling.NEAREST)

    transform = Transform(size=224, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
    pixels = transform(image).transpose(1, 2, 0)

    for row in (0, -1):
        for column in (0, -1):
            np.testing.assert_allclose(pixels[row, column], corners[row, column] / 255, atol=0.01)
    # Each colour keeps the share of the picture that it had.
    shares = np.asarray(image).mean(axis=(0, 1)) / 255
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), shares, atol=0.02)


def test_preprocess_keeps_orientation() -> None:
    transform = Transform(size=8, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    pixels = transform(Image.fromarray(SCENE))

    top_left, top_right = pixels[:, 1, 1], pixels[:, 1, 6]
    np.testing.assert_allclose(top_left, SCENE[0, 0] / 255, atol=0.01)
    np.testing.assert_allclose(top_right, SCENE[0, -1] / 255, atol=0.01)
    np.testing.assert_allclose(pixels[:, 6, 1], SCENE[-1, 0] / 255, atol=0.01)


# For the browser


def shown(photo: Image.Image, **options: int) -> Image.Image:
    """Return what the browser decodes."""
    image = Image.open(io.BytesIO(display_jpeg(photo, **options)))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((48, 32), (48, 32)),
        ((1024, 1024), (1024, 1024)),
        ((1025, 1000), (1024, 999)),
        ((4000, 3000), (1024, 768)),
        ((3000, 4000), (768, 1024)),
        ((1, 5000), (1, 1024)),
        ((5000, 1), (1024, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_display_jpeg_shrinks_but_never_enlarges(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert shown(Image.new("RGB", size, "teal")).size == expected


def test_display_jpeg_looks_like_the_photo() -> None:
    image = shown(Image.fromarray(SCENE).resize((4096, 1024), Image.Resampling.NEAREST))

    pixels = np.asarray(image)
    for row, y in ((0, 64), (31, 192)):
        for column, x in ((0, 256), (47, 768)):
            assert_close(pixels[y, x], SCENE[row, column], tolerance=4)


@pytest.mark.parametrize("size", [(4000, 3000), (1024, 1024)])
def test_display_jpeg_of_noise_stays_small(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)

    assert len(display_jpeg(Image.fromarray(noise))) <= 250_000


def test_display_jpeg_uses_the_best_quality_that_fits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    sizes = [
        len(display_jpeg(Image.fromarray(noise), max_bytes=limit)) for limit in (10**6, 20_000, 1)
    ]

    assert sizes[0] > 20_000 >= sizes[1] > sizes[2]


@pytest.mark.parametrize("size", [(48, 32), (2000, 1000)])
def test_display_jpeg_has_no_metadata(size: tuple[int, int]) -> None:
    exif = with_orientation(6)
    exif[0x010E] = "secret place"
    stored = Image.new("RGB", size, "teal")
    photo = encoded(stored, "JPEG", exif=exif, comment="secret comment", icc_profile=b"secret" * 50)
    assert photo.count(b"secret") == 52

    for source in (open_photo(photo), Image.open(io.BytesIO(photo))):
        data = display_jpeg(source)
        assert b"secret" not in data
        assert b"Exif" not in data
        assert not {"exif", "comment", "icc_profile"} & set(Image.open(io.BytesIO(data)).info)
