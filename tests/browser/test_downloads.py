"""What a visitor takes away."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.visits import bring, drawn, expect_pressed, expect_words, words_of

MARK = b"secret-place-4711"


def take(page: Page, kind: str) -> bytes:
    """Click a file's button; return the file."""
    with page.expect_download() as download:
        page.locator(f"[data-format={kind}]").click()
    assert download.value.suggested_filename == f"caption.{kind}"
    return download.value.path().read_bytes()


def test_a_file_comes_down_and_is_what_it_is_called(cat: Page) -> None:
    assert take(cat, "png").startswith(b"\x89PNG\r\n\x1a\n")
    assert take(cat, "gif").startswith(b"GIF89a")
    assert take(cat, "html").startswith(b"<!doctype html>")
    expect(cat.locator(".taken")).to_have_text("Saved.")


def test_the_json_holds_every_caption(cat: Page) -> None:
    values = json.loads(take(cat, "json"))
    assert values["text"].split() == words_of(cat)
    texts = cat.locator(".beam .text").all_inner_texts()
    assert [beam["text"] for beam in values["beams"]] == texts


def test_the_web_page_works_offline_from_a_file(
    cat: Page, browser: Browser, tmp_path: Path
) -> None:
    cat.locator(".beam").nth(1).click()
    path = tmp_path / "caption.html"
    path.write_bytes(take(cat, "html"))
    context = browser.new_context(offline=True)
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelector('.photo').naturalWidth > 0")
    expect_words(page, " ".join(words_of(cat)))
    expect(page.locator(".beam").nth(1)).to_have_attribute("aria-pressed", "true")
    before = drawn(page)
    page.locator(".word").last.hover()
    expect_pressed(page, page.locator(".word").count() - 1)
    assert drawn(page) != before
    page.locator(".beam").first.click()
    page.locator(".overview summary").click()
    expect(page.locator(".tile")).to_have_count(page.locator(".word").count())
    for gone in (".alternatives button", "[data-format]:visible", ".undo:visible"):
        expect(page.locator(gone)).to_have_count(0)
    assert requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert complaints == []
    context.close()


def test_no_file_carries_what_the_camera_wrote(visit: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = MARK.decode()
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 11.0), 29: MARK.decode()})
    Image.radial_gradient("L").convert("RGB").save(photo, exif=exif, comment=MARK)
    assert photo.read_bytes().count(MARK) == 4
    bring(visit, photo)
    source = visit.locator(".photo").get_attribute("src") or ""
    files = [visit.request.get(source).body()]
    files += [take(visit, kind) for kind in ("png", "gif", "json", "html")]
    # The web page holds its photo as text.
    (inside,) = re.findall(rb"data:image/jpeg;base64,([\w+/=]+)", files[-1])
    files.append(base64.b64decode(inside))
    for number, data in enumerate(files):
        assert len(data) > 100
        assert MARK not in data
        if number in (0, 1, 2, 5):
            path = tmp_path / f"{number}"
            path.write_bytes(data)
            with Image.open(path) as picture:
                assert not picture.getexif()
                assert "comment" not in picture.info


def test_a_photo_that_was_deleted_meanwhile_is_asked_for_again(cat: Page) -> None:
    source = cat.locator(".photo").get_attribute("src") or ""
    Path(source.partition("file=")[2]).unlink()
    cat.locator("[data-format=png]").click()
    told = cat.get_by_text("The photo is no longer kept here: bring it again.")
    expect(told).to_be_visible(timeout=15_000)
    expect(cat.locator(".taken")).to_have_text("")
