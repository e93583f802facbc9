"""What a visitor sees without having done or scrolled anything, and where it lies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from playwright.sync_api import Page, expect

from captioner import Captioner
from tests.web.browser.visits import (
    CAT,
    cells,
    click_cell,
    drawn,
    expect_pressed,
    expect_words,
    make_view,
    open_all,
    pressed,
    steer,
    wait_for_photo,
    word,
)

Box: TypeAlias = dict[str, float]
LONG = make_view(
    [
        word(text, cells({(3, 3): 1.0}))
        for text in re.findall(
            r"\w+",
            "a large group of people sitting around a wooden table in front of an enormous "
            "building with several colorful umbrellas and many parked bicycles",
        )
    ]
)


def box(page: Page, selector: str) -> Box:
    """Return the box around all that is visible of these elements, in the window."""
    read = """all => {
        const boxes = all.map((each) => each.getBoundingClientRect());
        const end = (side, choose) => choose(...boxes.map((each) => each[side]));
        return { left: end("left", Math.min), top: end("top", Math.min),
            right: end("right", Math.max), bottom: end("bottom", Math.max) };
    }"""
    found = page.locator(f"{selector}:visible")
    assert found.count()
    return dict(found.evaluate_all(read))


def expect_on_the_first_screen(page: Page, *selectors: str) -> None:
    assert page.evaluate("scrollY") == 0
    size = page.viewport_size
    assert size
    for selector in selectors:
        found = box(page, selector)
        assert found["left"] >= 0, selector
        assert found["top"] >= 0, selector
        assert found["right"] <= size["width"], selector
        assert found["bottom"] <= size["height"], selector


def test_first_screen_shows_caption_and_map_without_a_request(
    page: Page, served_page: str, captioner: Captioner
) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(served_page)
    wait_for_photo(page)
    page.wait_for_load_state("networkidle")
    assert len(requests) > 5
    assert not [url for url in requests if "/queue" in url or "/call" in url]

    best = captioner.caption(CAT)
    expect_words(page, best.text)
    at = pressed(page)
    expect_pressed(page, at)
    assert best.words[at].text not in ("a", "an", "the", "of", "in", "on", "is", "are", "its")
    expect(page.locator(".word-title")).to_have_text(f"“{best.words[at].text}”")
    expect(page.locator(".alternatives li")).to_have_count(len(best.words[at].alternatives))
    colors = """map => {
        const { data } = map.getContext("2d").getImageData(0, 0, map.width, map.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }"""
    assert page.locator(".map").evaluate(colors) > 100
    expect(page.get_by_label("Example: cat")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".note")).not_to_be_empty()
    # The name of a model's word, its map and its panel change together.
    before = drawn(page)
    page.locator(".word").nth(at + 1).hover()
    expect_pressed(page, at + 1)
    assert drawn(page) != before


FRAMES = """() => {
    const { width, height } = document.querySelector(".frame").getBoundingClientRect();
    const photo = document.querySelector(".photo");
    const box = photo.getBoundingClientRect();
    const large = [...document.images].filter((each) => each.getBoundingClientRect().width > 100);
    return { frame: width / height, photo: photo.naturalWidth / photo.naturalHeight,
        covered: Math.abs(box.width - width) < 1 && Math.abs(box.height - height) < 1,
        large: large.length, width, height };
}"""


def expect_no_bands(page: Page) -> dict[str, Any]:
    """The photo fills its frame in its own shape, and is nowhere else on the page."""
    wait_for_photo(page)
    found = page.evaluate(FRAMES)
    assert found["frame"] == pytest.approx(found["photo"], rel=0.01)
    assert found["covered"]
    assert found["large"] == 1
    return dict(found)


STAGE = (".frame", ".word", ".word-title", ".detail", ".hint", ".alternatives li")


def test_wide_screen_shows_photo_words_and_panel_without_scrolling(
    page: Page, open_page: Callable[..., Page], show: Callable[..., Page]
) -> None:
    for example in ("cat", "tower"):
        open_page(f"__theme=light&example={example}")
        expect_no_bands(page)
        expect_on_the_first_screen(page, *STAGE)
        photo, panel, words = (box(page, each) for each in (".frame", ".panel", ".caption"))
        # The panel is beside the photo, and the words right above it.
        assert panel["left"] >= photo["right"]
        assert abs(panel["top"] - photo["top"]) < 20
        assert 0 <= photo["top"] - words["bottom"] < 20
        assert photo["bottom"] - photo["top"] > 300
    expect(page.locator(".hint")).to_have_text("Click a word to rewrite the caption from here:")
    # Answers about cells are given on the words, which stay in sight.
    click_cell(page, 3, 3)
    expect_on_the_first_screen(page, ".word .number", ".cell[aria-selected=true]")
    show(LONG)
    expect_no_bands(page)
    expect_on_the_first_screen(page, *STAGE)


def test_phone_shows_photo_and_words_without_scrolling(
    page: Page, open_page: Callable[..., Page], show: Callable[..., Page]
) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for example in ("cat", "tower"):
        open_page(f"__theme=light&example={example}")
        expect_no_bands(page)
        expect_on_the_first_screen(page, ".frame", ".word")
        photo, words, panel = (box(page, each) for each in (".frame", ".caption", ".panel"))
        assert words["top"] >= photo["bottom"]
        assert 0 <= panel["top"] - words["bottom"] < 20
        assert box(page, ".word-title")["top"] - words["bottom"] < 30
        for part in (".words", ".panel", ".input", ".honest"):
            found = box(page, part)
            assert 0 <= found["left"] <= 16
            assert 0 <= 360 - found["right"] <= 16
    click_cell(page, 3, 3)
    expect_on_the_first_screen(page, ".word .number", ".cell[aria-selected=true]")
    show(LONG)
    expect_on_the_first_screen(page, ".frame")


# ---- On every screen.


def expect_no_sideways_scroll(page: Page, width: int) -> None:
    """Nothing is wider than the screen, not even where a box of its own would cut it off."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    parts = page.locator(
        ".page :is(button, select, input, p, h2, img, canvas, label):visible"
        ":not(.examples *)"  # a row of its own, which scrolls
    )
    outside = """(all, width) => all.filter((each) => {
        const { left, right } = each.getBoundingClientRect();
        return left < 0 || right > width;
    }).map((each) => each.className || each.tagName)"""
    assert parts.evaluate_all(outside, width) == []


def expect_large_targets(page: Page) -> None:
    """Everything that is pressed has at least 24 pixels a side."""
    controls = page.locator(".page :is(button, select, input, summary):visible")
    sizes = controls.evaluate_all("""all => all.map((each) => {
        const { width, height } = each.getBoundingClientRect();
        return [each.className || each.name || each.tagName, width, height];
    })""")
    assert len(sizes) > 50
    assert [size for size in sizes if min(size[1:]) < 24] == []


@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.slow)])
def test_page_never_scrolls_sideways_and_targets_are_large_enough(
    page: Page, open_page: Callable[..., Page], width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    open_page()
    expect_no_sideways_scroll(page, width)
    steer(page, 5)
    click_cell(page, 0, 0)
    open_all(page)
    expect_no_sideways_scroll(page, width)
    expect_large_targets(page)


def test_long_word_does_not_widen_a_narrow_page(show: Callable[..., Page]) -> None:
    text = "donaudampfschifffahrtsgesellschaft" * 3
    page = show(make_view([word(text, cells({(3, 3): 1.0}))]))
    page.set_viewport_size({"width": 360, "height": 780})
    expect_no_sideways_scroll(page, 360)
