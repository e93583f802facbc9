"""Photos come in, by every way and of every kind, or are refused."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from captioner import Captioner
from captioner.config import DecodingOptions
from tests.web.browser.visits import (
    ASK,
    CAT,
    bring,
    click_example,
    expect_idle,
    expect_words,
    sent,
    state,
    steer,
    type_own,
    wait_for_photo,
    wait_for_verdicts,
    words_of,
)


def drawing(width: int, height: int) -> Image.Image:
    """A bright disc in the left half: neither turned nor mirrored is it the same."""
    disc = Image.radial_gradient("L").resize((width // 2, height))
    image = Image.new("L", (width, height), 30)
    image.paste(disc, (0, 0))
    return image


def sixteen_bit(path: Path) -> tuple[int, int]:
    values = np.asarray(drawing(160, 120)).astype(np.uint16) * 257
    Image.fromarray(values).save(path.with_suffix(".png"))
    return 160, 120


def cmyk(path: Path) -> tuple[int, int]:
    drawing(160, 120).convert("RGB").convert("CMYK").save(path.with_suffix(".jpg"))
    return 160, 120


def turned_by_exif(path: Path) -> tuple[int, int]:
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(160, 120).save(path.with_suffix(".jpg"), exif=exif)
    return 120, 160


def transparent(path: Path) -> tuple[int, int]:
    image = drawing(160, 120).convert("RGB")
    image.putalpha(drawing(160, 120))
    image.save(path.with_suffix(".png"))
    return 160, 120


def portrait(path: Path) -> tuple[int, int]:
    drawing(120, 200).save(path.with_suffix(".jpg"))
    return 120, 200


def panorama(path: Path) -> tuple[int, int]:
    drawing(900, 300).save(path.with_suffix(".jpg"))
    return 900, 300


def not_for_browsers(path: Path) -> tuple[int, int]:
    drawing(200, 120).save(path.with_suffix(".tif"))
    return 200, 120


KINDS = [sixteen_bit, cmyk, turned_by_exif, transparent, portrait, panorama, not_for_browsers]


def test_photos_of_any_kind_are_captioned_and_framed_upright(
    visit: Page, captioner: Captioner, tmp_path: Path
) -> None:
    for save in KINDS:
        width, height = save(tmp_path / save.__name__)
        (path,) = tmp_path.glob(f"{save.__name__}.*")
        bring(visit, path)
        expect_words(visit, captioner.caption(path).text)
        frame = visit.locator(".frame").bounding_box()
        assert frame
        assert frame["width"] / frame["height"] == pytest.approx(width / height, rel=0.01)
        shown = "image => [image.naturalWidth, image.naturalHeight]"
        assert visit.locator(".photo").evaluate(shown) == [width, height]
        expect(visit.locator(".examples [aria-pressed=true]")).to_have_count(0)


# ---- Large photos.


def noise(path: Path) -> None:
    """Write 12 megapixels in more than 10 MB, bright on the left, stored on their side."""
    values = np.random.default_rng(0).integers(0, 120, (3000, 4000, 3), np.uint8)
    values[:, :2000] += 100
    exif = Image.Exif()
    exif[0x0112] = 6  # what is on the left is shown at the top
    Image.fromarray(values).save(path, quality=95, exif=exif)
    assert path.stat().st_size > 10_000_000


@pytest.mark.slow
def test_large_photo_is_scaled_down_upright_before_the_upload(
    visit: Page, captioner: Captioner, tmp_path: Path
) -> None:
    noise(tmp_path / "photo.jpg")
    client = visit.context.new_cdp_session(visit)
    client.send("Network.enable")
    addresses: dict[str, str] = {}
    received: dict[str, int] = {}
    client.on(
        "Network.requestWillBeSent",
        lambda event: addresses.update({event["requestId"]: event["request"]["url"]}),
    )

    def count(event: dict[str, Any]) -> None:
        address = addresses.get(event["requestId"], "asked for before")
        received[address] = received.get(address, 0) + event["dataLength"]

    client.on("Network.dataReceived", count)
    with visit.expect_request("**/queue/join*") as asked:
        visit.locator(".file").set_input_files(tmp_path / "photo.jpg")
    expect(visit.locator(".photo")).to_have_attribute("src", re.compile("^blob:"), timeout=ASK)
    expect_idle(visit)
    wait_for_photo(visit)

    uploaded = Path(sent(asked.value)["file"])
    size = uploaded.stat().st_size
    with Image.open(uploaded) as photo:
        width, height = photo.size
        assert not photo.getexif()
        gray = np.asarray(photo.convert("L"), dtype=float)
    assert (width, height) == (1536, 2048)
    assert gray[: height // 2].mean() - gray[height // 2 :].mean() > 80
    expect_words(visit, captioner.caption(uploaded).text)
    frame = visit.locator(".frame").bounding_box()
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(0.75, rel=0.01)
    shown = visit.locator(".photo").evaluate("photo => [photo.naturalWidth, photo.naturalHeight]")
    assert shown == [1536, 2048]
    # The answer is small, too: the photo does not come back.
    stream = sum(size for address, size in received.items() if "/queue/data" in address)
    rest = sum(size for address, size in received.items() if address.startswith("http")) - stream
    print(f"payload: {size} bytes of photo sent, {stream} bytes of values and {rest} others back")
    assert size < 2_000_000
    assert 1000 < stream < 200_000
    assert rest < 50_000


# ---- Other ways.

TRANSFER = """([kind, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "photo.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    if (kind === "paste") {
        document.body.dispatchEvent(
            new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        return;
    }
    for (const name of ["dragenter", "dragover", "drop"]) {
        const event = new DragEvent(name, { ...options, dataTransfer: transfer });
        document.querySelector(".frame").dispatchEvent(event);
        const dropping = document.querySelector(".dropping") !== null;
        if (dropping !== (name === "dragover")) throw new Error(`${name}: ${dropping}`);
    }
}"""


def test_photo_is_dropped_pasted_chosen_and_taken(
    visit: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    for kind, path in (("drop", example_photos[1]), ("paste", example_photos[3])):
        earlier = visit.locator(".photo").get_attribute("src") or ""
        visit.evaluate(TRANSFER, [kind, base64.b64encode(path.read_bytes()).decode()])
        expect(visit.locator(".photo")).not_to_have_attribute("src", earlier, timeout=ASK)
        expect_words(visit, captioner.caption(path).text)
        expect(visit.locator(".dropping")).to_have_count(0)

    # The same file again, by the button that is on the page.
    for _ in range(2):
        click_example(visit, "lion")
        with visit.expect_file_chooser() as chooser:
            visit.locator(".upload").click()
        chooser.value.set_files(CAT)
        expect_words(visit, captioner.caption(CAT).text)
        expect_idle(visit)

    earlier = visit.locator(".photo").get_attribute("src") or ""
    visit.locator(".camera").click()
    shoot = visit.get_by_role("button", name="Take photo")
    expect(shoot).to_be_focused(timeout=ASK)
    visit.evaluate("window.tracks = document.querySelector('video').srcObject.getTracks()")
    shoot.click()
    expect(visit.locator(".photo")).not_to_have_attribute("src", earlier, timeout=ASK)
    wait_for_photo(visit)
    assert visit.locator(".photo").evaluate("photo => photo.naturalWidth") >= 640
    expect(visit.locator(".webcam")).to_be_hidden()
    assert visit.evaluate("tracks.map((track) => track.readyState)") == ["ended"]
    # Nothing is on after the camera was closed without a photo.
    visit.locator(".camera").click()
    expect(shoot).to_be_focused(timeout=ASK)
    visit.evaluate("window.tracks = document.querySelector('video').srcObject.getTracks()")
    visit.get_by_role("button", name="Close camera").click()
    assert visit.evaluate("tracks.map((track) => track.readyState)") == ["ended"]


# ---- Refused.

NO_IMAGE = re.compile("can be read|isn't an image")


def test_refused_photo_leaves_the_page_unchanged_and_shows_the_reason(
    visit: Page, captioner: Captioner, example_photos: list[Path], tmp_path: Path
) -> None:
    broken, huge, text = tmp_path / "broken.jpg", tmp_path / "huge.tif", tmp_path / "notes.txt"
    broken.write_text("no photo")
    huge.write_bytes(b"II*\0" + bytes(10_500_000))
    text.write_text("no photo, and not called one")
    uploads: list[str] = []
    visit.on("request", lambda request: uploads.append(request.url))

    def expect_refused(path: Path, sentence: str | re.Pattern[str]) -> None:
        visit.mouse.move(0, 0)
        before = state(visit)
        visit.locator(".file").set_input_files(path)
        shown = visit.get_by_text(sentence)
        expect(shown.last).to_be_visible(timeout=ASK)
        assert shown.last.inner_text().count(".") <= 2  # one sentence, and what to use
        expect_idle(visit)
        assert state(visit) == before
        expect(visit.locator(".photo")).to_be_visible()
        for close in visit.get_by_label("Close").all():
            close.click()
        expect(visit.get_by_text(sentence)).to_have_count(0 if ".tif" not in path.name else 1)

    for turn in range(2):
        expect_refused(broken, NO_IMAGE)
        expect_refused(text, NO_IMAGE)
        del uploads[:]
        expect_refused(huge, "This file is larger than 10 MB")
        assert not [url for url in uploads if "/upload" in url]
        # All goes on from what is there.
        other = steer(visit, 1)
        assert words_of(visit)[1] == other
        if turn == 0:
            bring(visit, example_photos[1])
            expect_words(visit, captioner.caption(example_photos[1]).text)


@pytest.mark.slow
def test_broken_connection_leaves_the_page_unchanged(
    visit: Page, example_photos: list[Path]
) -> None:
    before, words = state(visit), " ".join(words_of(visit))
    visit.route("**/upload*", lambda route: route.abort())
    visit.locator(".file").set_input_files(example_photos[1])
    expect(visit.locator(".note")).to_contain_text("upload failed", timeout=ASK)
    expect_idle(visit)
    assert state(visit) == before
    visit.unroute("**/upload*")

    visit.route("**/queue/join*", lambda route: route.abort())
    visit.locator(".file").set_input_files(example_photos[1])
    visit.wait_for_event("requestfailed")
    expect_idle(visit)
    # Gradio starts the page anew, and without a connection there are no verdicts.
    expect_words(visit, words)
    expect(visit.locator(".photo")).to_have_attribute("src", before["photo"])
    visit.unroute("**/queue/join*")

    # Both a failure and an answer count after it.
    type_own(visit, "zorblax", "Continue")
    expect(visit.get_by_text("zorblax").last).to_be_visible(timeout=ASK)
    expect_idle(visit)
    assert state(visit) == before
    bring(visit, example_photos[1])


# ---- In a hurry.


class Held:
    """The first request to an address, kept back; later ones pass."""

    def __init__(self, page: Page, pattern: str) -> None:
        self._page, self._pattern = page, pattern
        self._route: Route | None = None
        wait_for_verdicts(page)  # else their request would be the first
        page.route(pattern, self._receive)

    def _receive(self, route: Route) -> None:
        if self._route:
            route.continue_()
        else:
            self._route = route

    def wait(self) -> None:
        """Wait until it has come."""
        while not self._route:
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        """Let it go on its way, and wait until its answer would have been shown."""
        assert self._route
        with self._page.expect_response(self._pattern):
            self._route.continue_()
        self._page.unroute(self._pattern)
        self._page.wait_for_timeout(500)


@pytest.mark.slow
def test_later_of_two_quick_requests_wins(
    visit: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    def expect_unchanged_by(held: Held) -> None:
        expect_idle(visit)
        visit.mouse.move(0, 0)
        before = state(visit)
        held.release()
        expect_idle(visit)
        assert state(visit) == before

    # A photo that is still being sent.
    held = Held(visit, "**/upload*")
    visit.locator(".file").set_input_files(example_photos[1])
    held.wait()
    click_example(visit, "lion")
    expect_unchanged_by(held)

    # A photo whose caption is being written.
    held = Held(visit, "**/queue/join*")
    visit.locator(".file").set_input_files(example_photos[1])
    held.wait()
    click_example(visit, "cat")
    expect_unchanged_by(held)
    expect_words(visit, captioner.caption(CAT).text)

    # A word, then another one; a request that fails, and one that doesn't.
    visit.locator(".word").nth(1).click()
    for fails in (False, True):
        held = Held(visit, "**/queue/join*")
        if fails:
            type_own(visit, "zorblax", "Continue")
        else:
            visit.locator(".alternatives button").first.click()
        held.wait()
        type_own(visit, "two dogs", "Continue")
        expect_words(visit, captioner.caption(CAT, DecodingOptions(prefix="two dogs")).text)
        expect_unchanged_by(held)
        visit.locator(".undo").click()

    # Undo while an answer is on its way.
    steer(visit, 1)
    held = Held(visit, "**/queue/join*")
    type_own(visit, "two dogs", "Continue")
    held.wait()
    visit.locator(".undo").click()
    expect_unchanged_by(held)
    expect_words(visit, captioner.caption(CAT).text)

    # Without anything held back.
    for path in (example_photos[0], example_photos[1]):
        visit.locator(".file").set_input_files(path)
    expect_words(visit, captioner.caption(example_photos[1]).text)
    expect_idle(visit)
    expect_words(visit, captioner.caption(example_photos[1]).text)


@pytest.mark.slow
def test_visitors_never_see_each_others_photo_or_caption(
    browser: Browser, served_page: str, captioner: Captioner, example_photos: list[Path]
) -> None:
    photos = example_photos[1], example_photos[3]
    contexts = [browser.new_context() for _ in photos]
    pages = [context.new_page() for context in contexts]
    paths = []
    for page in pages:
        page.goto(served_page)
        wait_for_photo(page)
    for page, photo in zip(pages, photos, strict=True):
        with page.expect_request("**/queue/join*") as asked:
            page.locator(".file").set_input_files(photo)
        paths.append(sent(asked.value)["file"])
    for page, photo in zip(pages, photos, strict=True):
        expect_words(page, captioner.caption(photo).text)
    assert words_of(pages[0]) != words_of(pages[1])
    folders = [Path(path).parent.name for path in paths]
    assert len(set(folders)) == 2
    for page, (own, other) in zip(pages, (folders, folders[::-1]), strict=True):
        assert other not in page.content()
        assert own != other
    for context in contexts:
        context.close()
