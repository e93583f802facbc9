"""Exports: what is on the screen, as a file."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from captioner.config import Appearance
from captioner.images import open_photo
from captioner.inference.caption import Caption
from captioner.inference.render import render
from tests.web.browser.visits import (
    ASK,
    CAT,
    bring,
    click_example,
    drawn,
    expect_pressed,
    expect_words,
    sent,
    steer,
    wait_for_photo,
    words_of,
)

MARK = b"secret-place-4711"


def take(page: Page, kind: str) -> tuple[bytes, dict[str, Any]]:
    """Click a file's button; return the file, and what the page sent for it."""
    with page.expect_download() as download, page.expect_request("**/queue/join*") as request:
        page.locator(f"[data-format={kind}]").click()
    assert download.value.suggested_filename == f"caption.{kind}"
    return download.value.path().read_bytes(), sent(request.value)


def test_exported_files_match_the_screen(visit: Page, browser: Browser, tmp_path: Path) -> None:
    appearance = {"colors": "viridis", "shape": "cells", "scale": "caption", "strength": 0.4}
    appearance |= {"map": "mattered", "special": True}
    visit.locator(".beam").nth(1).click()
    visit.locator(".word").nth(3).click()
    visit.locator(".appearance summary").click()
    visit.locator(".colors").select_option("viridis")
    visit.locator(".shape").select_option("cells")
    visit.locator(".range").select_option("caption")
    visit.locator(".strength").fill("40")
    visit.locator(".maps [value=mattered]").click()
    visit.locator(".special").check()
    expect(visit.locator(".word .sign").last).not_to_be_empty()
    visit.locator(".word").nth(1).hover()  # which shows it, but doesn't choose it

    starts = {
        "png": b"\x89PNG\r\n\x1a\n",
        "gif": b"GIF89a",
        "json": b"{",
        "html": b"<!doctype html>",
    }
    files = {}
    for kind, start in starts.items():
        files[kind], request = take(visit, kind)
        assert files[kind].startswith(start)
        caption = Caption.from_dict(request["caption"])
        assert (request["beam"], request["word"], request["appearance"]) == (1, 3, appearance)
        assert (request["example"], request["file"], request["format"]) == ("cat", None, kind)
        look = Appearance.from_dict(appearance)
        assert files[kind] == render(open_photo(CAT), caption, kind, 1, 3, look)
    expect(visit.locator(".exported")).to_have_text("Saved.")

    values = json.loads(files["json"])
    texts = visit.locator(".beam .text").all_inner_texts()
    assert [beam["text"] for beam in values["beams"]] == texts
    assert values["beams"][values["chosen"]]["text"].split() == words_of(visit)

    # The web page opens there, and works offline from a file.
    path = tmp_path / "caption.html"
    path.write_bytes(files["html"])
    context = browser.new_context(offline=True)
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    wait_for_photo(page)
    expect_words(page, " ".join(words_of(visit)))
    expect(page.locator(".beam").nth(1)).to_have_attribute("aria-pressed", "true")
    expect_pressed(page, 3)
    for selector, value in (
        *((".colors", "viridis"), (".shape", "cells")),
        *((".range", "caption"), (".strength", "40")),
    ):
        expect(page.locator(selector)).to_have_value(value)
    expect(page.locator(".maps [value=mattered]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".special")).to_be_checked()
    expect(page.locator(".verdict")).not_to_be_empty()
    expect(page.locator("h1")).to_have_text(re.compile("attention"))
    before = drawn(page)
    page.locator(".word").last.hover()
    expect_pressed(page, page.locator(".word").count() - 1)
    assert drawn(page) != before
    page.locator(".beam").first.click()
    page.locator(".overview summary").click()
    expect(page.locator(".tile")).to_have_count(page.locator(".word").count())
    for gone in (".alternatives button", "[data-format]:visible", ".undo:visible"):
        expect(page.locator(gone)).to_have_count(0)
    expect(page.locator(".hint")).not_to_contain_text("Click")
    assert requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert complaints == []
    context.close()


def test_exported_files_follow_steering_undo_and_the_next_photo(visit: Page) -> None:
    words = words_of(visit)
    steer(visit, 1)
    steered, _ = take(visit, "json")
    assert json.loads(steered)["text"].split() == words_of(visit)
    assert json.loads(steered)["given"] == [1]
    visit.locator(".undo").click()
    expect_words(visit, " ".join(words))
    assert json.loads(take(visit, "json")[0])["text"] == " ".join(words)
    click_example(visit, "tower")
    expect(visit.locator(".exported")).to_have_text("")
    assert json.loads(take(visit, "json")[0])["text"].split() == words_of(visit)


@pytest.mark.slow
def test_exported_files_carry_no_metadata_and_need_their_photo(visit: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = MARK.decode()
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 11.0), 29: MARK.decode()})
    Image.radial_gradient("L").convert("RGB").save(photo, exif=exif, comment=MARK)
    assert photo.read_bytes().count(MARK) == 4
    # A format that the browser doesn't draw, so that the page shows the server's copy.
    drawing = tmp_path / "photo.tif"
    Image.open(photo).save(drawing, exif=exif)
    assert MARK in drawing.read_bytes()
    files = []
    for path in (photo, drawing):
        bring(visit, path)
        source = visit.locator(".photo").get_attribute("src") or ""
        if source.startswith("http"):
            files.append(visit.request.get(source).body())
        files += [take(visit, kind)[0] for kind in ("png", "gif", "json", "html")]
        # The web page holds its photo as text.
        (inside,) = re.findall(rb"data:image/jpeg;base64,([\w+/=]+)", files[-1])
        files.append(base64.b64decode(inside))
    assert len(files) == 11
    for number, data in enumerate(files):
        assert len(data) > 100
        assert MARK not in data
        if data.startswith((b"\x89PNG", b"GIF8", b"\xff\xd8")):
            picture_path = tmp_path / f"{number}"
            picture_path.write_bytes(data)
            with Image.open(picture_path) as picture:
                assert not picture.getexif()
                assert "comment" not in picture.info

    # A photo that was deleted meanwhile is asked for again.
    _, request = take(visit, "json")
    Path(request["file"]).unlink()
    visit.locator("[data-format=png]").click()
    shown = visit.get_by_text("The photo is no longer stored here: upload it again.")
    expect(shown).to_be_visible(timeout=ASK)
    expect(visit.locator(".exported")).to_have_text("")
