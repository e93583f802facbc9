"""Good and bad photos of every kind, through ``open_photo``, the command line and the page.

``python -m pytest tests/test_bad_photos.py -m "slow or not slow" -s`` prints what each one costs.
"""

# ruff: noqa: T201

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from captioner import Captioner
from captioner.__main__ import main
from captioner.errors import ImageError
from captioner.images import open_photo
from tests.page import CALL, UPLOAD, Page, running_page
from tests.photo_kinds import (
    BROKEN,
    CAPTION,
    JPEG,
    KINDS,
    LARGE_KINDS,
    NOT_AN_IMAGE,
    PNG,
    SAME,
    SCENE,
    TOO_LARGE,
    UNREADABLE,
    many_strips,
)
from tests.test_images import encoded, with_orientation

MAX_SECONDS, MAX_MEGABYTES = 5, 500  # per photo, above the warm process
# Each of these takes another way through a command or the page.
FRONT_KINDS = (
    "text",
    "EPS",
    "JPEG without its last two bytes",
    "bomb of 120 megapixels",
    "PNG with 100 MB of text in zTXt",
    "PNG",
    "EXIF rotation 6 of PNG",
    "CMYK JPEG of Adobe",
)
NAMES = {
    "parent folders": "../../../../etc/photo.png",
    "emoji": "\N{CAT}\N{ZERO WIDTH JOINER}\N{BLACK LARGE SQUARE} \N{SNOWMAN}.png",
    "300 characters": "a" * 296 + ".png",
    "quotes and a tag": "\"><img src=x onerror=alert(1)>'.png",
    "only a suffix": ".png",
}


class _Meter:
    """Measures processor time and peak memory of a process."""

    def __init__(self, pid: int | str = "self") -> None:
        self._home = Path(f"/proc/{pid}")

    def _memory(self, field: str) -> int:
        """Return a field of the process's status, in kB."""
        match = re.search(rf"^{field}:\s+(\d+)", (self._home / "status").read_text(), re.MULTILINE)
        assert match
        return int(match[1])

    def _seconds(self) -> float:
        fields = (self._home / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def limit(self, label: str) -> Iterator[None]:
        """Check the time that the process computes, and its peak memory above the present one."""
        with contextlib.suppress(OSError):  # resets VmHWM; without it the peak is overstated
            (self._home / "clear_refs").write_text("5")
        seconds, memory = self._seconds(), self._memory("VmRSS")
        yield
        seconds = self._seconds() - seconds
        megabytes = (self._memory("VmHWM") - memory) * 1.024e-3
        print(f"\n{label:47} {seconds:4.1f} s {megabytes:4.0f} MB", end=" ")
        assert seconds < MAX_SECONDS, label
        assert megabytes < MAX_MEGABYTES, label


def _assert_outcome(text: str, expected: str, scene_caption: str, label: object = "") -> None:
    """Check a caption or an error message."""
    if expected == SAME:
        assert text == scene_caption, label
    elif expected == CAPTION:
        assert re.fullmatch(r"[a-z' -]+( [a-z'-]+){2,}", text), (label, text)
    else:
        assert re.search(expected, text), (label, text)
        assert len(text.splitlines()) == 1, label
        assert len(text) < 200, label


@pytest.fixture(scope="module")
def scene_caption(captioner: Captioner) -> str:
    return captioner.caption(PNG).text


# The opener


def test_every_kind_is_opened_or_refused_within_limits(
    captioner: Captioner, scene_caption: str
) -> None:
    meter, opened = _Meter(), dict[str, Image.Image]()
    for kind, (expected, make) in KINDS.items():
        data = make()
        with meter.limit(kind):
            try:
                photo = open_photo(data)
            except ImageError as error:
                _assert_outcome(str(error), expected, scene_caption, kind)
                continue
        assert expected in (CAPTION, SAME), f"{kind} was opened"
        assert photo.mode == "RGB"
        if expected == SAME:
            assert ImageChops.difference(photo, SCENE).getbbox() is None, kind
        opened[kind] = photo
    captions = captioner.caption_batch(list(opened.values()))
    for kind, caption in zip(opened, captions, strict=True):
        _assert_outcome(caption.text, CAPTION, scene_caption, kind)


@pytest.mark.slow
def test_tiff_of_many_strips_is_refused_within_limits() -> None:
    data = many_strips(60_000)
    with _Meter().limit("TIFF with 60,000 strips"), pytest.raises(ImageError, match=BROKEN):
        open_photo(data)


# The command line


def _run_caption(
    paths: Sequence[str | Path], capsys: pytest.CaptureFixture[str]
) -> Callable[[str | Path], str]:
    """Caption ``paths``, some of them bad; return a lookup of the one line about a path."""
    assert main(["caption", *map(str, paths)]) == 1
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert all(line.startswith("captioner: ") for line in errors), printed.err
    output = [*printed.out.splitlines(), *(line.removeprefix("captioner: ") for line in errors)]

    def line_about(path: str | Path) -> str:
        (line,) = (line for line in output if str(path) in line)
        return line.replace(str(path), "", 1).strip()

    return line_about


def test_command_line_prints_one_line_per_photo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scene_caption: str
) -> None:
    for kind in FRONT_KINDS:
        (tmp_path / f"{kind}.jpg").write_bytes(KINDS[kind][1]())
    line_about = _run_caption(sorted(tmp_path.iterdir()), capsys)
    for kind in FRONT_KINDS:
        line = line_about(tmp_path / f"{kind}.jpg")
        _assert_outcome(line, KINDS[kind][0], scene_caption, kind)


def test_command_line_takes_or_refuses_paths_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scene_caption: str
) -> None:
    album, outside = tmp_path / "album", tmp_path / "outside.png"
    (tmp_path / "folder.jpg").mkdir()
    album.mkdir()
    outside.write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.jpg")
    (album / "link.png").symlink_to("../outside.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / NAMES["emoji"]).write_bytes(PNG)
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.write(JPEG)
        file.truncate(2 * 2**30)
    expected: dict[str | Path, str] = {
        outside: SAME,
        f"{album}/../{NAMES['emoji']}": SAME,
        album / "link.png": SAME,
        tmp_path / "folder.jpg": "holds no photo",
        tmp_path / "pipe.jpg": "is not a file",
        tmp_path / "missing.jpg": "there is no file",
        tmp_path / "dangling.png": "there is no file",
        tmp_path / "loop.png": "there is no file",
        tmp_path / NAMES["300 characters"]: "cannot read .*: File name too long",
        tmp_path / "sparse.jpg": r"has 2,147 megabytes, more than 250: scale it down",
        "/dev/zero": "is not a file",
    }
    paths = [path for path in expected if path != album / "link.png"]
    line_about = _run_caption([*paths, album], capsys)
    for path, outcome in expected.items():
        _assert_outcome(line_about(path), outcome, scene_caption, path)


# The page


@dataclasses.dataclass
class Answer:
    """The page's caption of a photo, with the photo's size, or an error message."""

    text: str
    size: list[int] | None = None


def _post(client: httpx.Client, data: bytes, name: str = "photo.jpg") -> Answer:
    """Upload a photo and ask for its caption."""
    upload = client.post(UPLOAD, files={"files": (name, data)})
    assert upload.status_code == 200, upload.text
    file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
    call = client.post(CALL, json={"data": [file, {}]})
    text = client.get(f"{CALL}/{call.json()['event_id']}").text
    *_, event, line = text.strip().splitlines()
    values = json.loads(line.removeprefix("data: "))
    if event == "event: complete":
        return Answer(values[0]["text"], values[0]["size"])
    assert event == "event: error", text
    return Answer(values["error"])


def test_page_captions_or_refuses_each_kind(
    served_page: str, scene_caption: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with httpx.Client(base_url=served_page, timeout=120) as client:
        for kind in FRONT_KINDS:
            answer = _post(client, KINDS[kind][1]())
            _assert_outcome(answer.text, KINDS[kind][0], scene_caption, kind)
            assert answer.size in (None, [320, 240]), kind
            assert _post(client, PNG).text == scene_caption, f"the photo after {kind}"
    assert "Traceback" not in capfd.readouterr().err


def test_page_takes_a_file_of_any_name(served_page: str, scene_caption: str) -> None:
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    with httpx.Client(base_url=served_page, timeout=120) as client:
        for label, name in NAMES.items():
            before = sorted(uploads.parent.iterdir())
            assert _post(client, PNG, name).text == scene_caption, label
            answer = _post(client, b"nothing", name)
            assert re.match(f"The photo is.* {NOT_AN_IMAGE}", answer.text), label
            assert sorted(uploads.parent.iterdir()) == before, label


@pytest.fixture(scope="module")
def warm_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, httpx.Client]]:
    """The page in a process of its own, which has captioned some photos."""
    with (
        running_page(tmp_path_factory.mktemp("page") / "home") as page,
        httpx.Client(base_url=page.address, timeout=120) as client,
    ):
        for _ in range(3):
            _post(client, JPEG)
        yield page, client


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_page_captions_a_large_photo_within_limits(
    kind: str, warm_page: tuple[Page, httpx.Client]
) -> None:
    page, client = warm_page
    data = LARGE_KINDS[kind]()
    with _Meter(page.process.pid).limit(kind):
        answer = _post(client, data)
    _assert_outcome(answer.text, CAPTION, "", kind)
    with Image.open(io.BytesIO(data)) as photo:
        assert sorted(answer.size or ()) == sorted(photo.size)
    assert "Traceback" not in page.log


# Damaged bytes

SMALL = encoded(SCENE.resize((96, 72)), "JPEG", exif=with_orientation(6), comment=b"a cat")
OFFSETS = st.integers(0, len(SMALL) - 1)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), OFFSETS, st.integers(0, 255)),
        st.tuples(st.just("cut"), OFFSETS, st.integers(1, 64)),
        st.tuples(st.just("double"), OFFSETS, st.integers(1, 64)),
        st.tuples(st.just("insert"), OFFSETS, st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=6,
)


def _edited(edits: Sequence[tuple[str, int, Any]]) -> bytes:
    data = bytearray(SMALL)
    for edit, offset, value in edits:
        if edit == "set":
            data[offset : offset + 1] = bytes([value])
        elif edit == "cut":
            del data[offset : offset + value]
        else:
            data[offset:offset] = data[offset : offset + value] if edit == "double" else value
    return bytes(data)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(EDITS)
def test_edited_jpeg_is_opened_or_refused(edits: list[tuple[str, int, Any]]) -> None:
    started = time.process_time()
    try:
        outcome = open_photo(_edited(edits)).mode
    except ImageError as error:
        outcome = str(error)
    assert re.search(f"^RGB$|{UNREADABLE}|{TOO_LARGE}|is empty", outcome)
    assert time.process_time() - started < MAX_SECONDS
