"""The page in Chromium, as a visitor uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

CAPTION = "#caption textarea, #caption input"


def test_a_dropped_photo_is_captioned_by_itself(
    page: Page, served_page: str, example_photos: list[Path]
) -> None:
    page.goto(served_page)
    page.locator("input[type=file]").first.set_input_files(str(example_photos[0]))
    caption = page.locator(CAPTION)
    expect(caption).not_to_have_value("", timeout=30_000)
    words = caption.input_value().split()
    assert len(words) >= 3
    expect(page.locator(".thumbnail-item")).to_have_count(len(words), timeout=15_000)


def test_an_example_is_captioned_on_a_click(page: Page, served_page: str) -> None:
    page.goto(served_page)
    page.locator(".gallery-item").nth(1).click()
    expect(page.locator(CAPTION)).not_to_have_value("", timeout=30_000)


def test_a_broken_upload_says_so_and_the_next_photo_works(
    page: Page, served_page: str, example_photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    page.goto(served_page)
    page.locator("input[type=file]").first.set_input_files(str(bad))
    expect(page.get_by_text("not a photo that can be read")).to_be_visible(timeout=15_000)
    page.get_by_label("Clear").first.click()
    page.locator("input[type=file]").first.set_input_files(str(example_photos[0]))
    expect(page.locator(CAPTION)).not_to_have_value("", timeout=30_000)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways_and_nothing_is_asked_of_other_hosts(
    page: Page, served_page: str, width: int
) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(served_page)
    expect(page.locator(CAPTION)).to_be_visible(timeout=15_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert {host.split(":")[0] for host in hosts if host} <= {"127.0.0.1", "localhost"}
