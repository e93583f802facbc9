"""Testing a map: the photo is covered where it is hottest, or where the visitor likes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageFilter
from playwright.sync_api import Page, expect

from captioner import Captioner, ImageError
from captioner.images import open_photo
from captioner.inference.caption import Caption, percent
from captioner.model.cover import BLUR
from tests.web.browser.test_first_screen import expect_large_targets, expect_no_sideways_scroll
from tests.web.browser.test_quality import expect_no_barrier
from tests.web.browser.visits import (
    ASK,
    CAT,
    click_cell,
    click_example,
    drawn,
    expect_words,
    open_all,
    sent,
    state,
    tab_to,
)

COVERED = ".frame.covered"


@pytest.fixture(scope="module")
def cat(captioner: Captioner) -> Caption:
    return captioner.caption(CAT)


@pytest.fixture
def requests(page: Page) -> Iterator[list[dict[str, object]]]:
    """The data of the covers that the page asked for."""
    found: list[dict[str, object]] = []
    page.on(
        "request",
        lambda request: (
            found.append(sent(request))
            if "queue/join" in request.url and "cells" in sent(request)
            else None
        ),
    )
    yield found
    assert all(each["settings"] for each in found)


def hottest(caption: Caption, word: int, count: int) -> list[int]:
    """The cells where the word's map is hottest."""
    maps = caption.words[word].maps
    cells = maps.get("evidence", maps["attended"])
    return np.argsort(-cells.ravel(), kind="stable")[:count].tolist()


def cover(page: Page, button: str = ".cover-hottest") -> None:
    """Press a button that covers, and wait for the result."""
    page.locator(button).click()
    expect(page.locator(COVERED)).to_be_visible(timeout=ASK)
    expect(page.locator(".result")).to_be_visible()


def expect_uncovered(page: Page) -> None:
    expect(page.locator(COVERED)).to_have_count(0)
    for part in (".result", ".uncover", ".covered-badge"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator(".finding")).to_have_text("")
    pixels = np.asarray(canvas(page, ".cover"))
    assert (pixels[..., 3] == 0).all()


def canvas(page: Page, name: str) -> Image.Image:
    url = page.locator(name).evaluate("canvas => canvas.toDataURL()")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA")


def test_hottest_cells_are_covered_and_uncovered(
    visit: Page, captioner: Captioner, cat: Caption, requests: list[dict[str, object]]
) -> None:
    at = [word.text for word in cat.words].index("cat")
    visit.locator(".word").nth(at).click()
    expect(visit.locator(".test-title")).to_have_text("Test the map “Evidence” of “cat”")
    expect(visit.locator(".test output")).to_have_text("6 of 49 cells")
    visit.mouse.move(0, 0)
    before = state(visit)
    visit.locator(".count").focus()
    for _ in range(2):
        visit.keyboard.press("ArrowLeft")
    # While the slider is used, the cells are outlined over the map.
    assert np.asarray(canvas(visit, ".cover"))[..., 3].any()
    cover(visit)
    cells = hottest(cat, at, 4)
    (asked,) = requests
    assert (asked["cells"], asked["word"], asked["text"]) == (cells, at, cat.text)

    test = captioner.cover(CAT, cat.text, at, cells)
    mean = sum(test.random) / len(test.random)
    was, after, left = map(percent, (test.before, test.after, mean))
    change = "falls" if test.after < test.before else "rises"
    expect(visit.locator(".finding")).to_have_text(
        f"Without these 4 cells “cat” {change} from {was} to {after}; "
        f"a random cover of equal size leaves {left}."
    )
    low, high = percent(min(test.random)), percent(max(test.random))
    numbers = [was, after, f"{left} ({low} to {high})"]
    expect(visit.locator(".chance .number")).to_have_text(numbers)
    widths = visit.locator(".track").evaluate_all(
        "all => all.map((each) => parseFloat(getComputedStyle(each, '::before').width))"
    )
    shares = np.array([test.before, test.after, mean])
    assert np.divide(widths, widths[0]) == pytest.approx(shares / test.before, rel=0.02)
    expect(visit.locator(".anew-text")).to_have_text(test.caption.text)
    new = [word.text for word in test.caption.words if word.text not in cat.text.split()]
    assert visit.locator(".anew-text strong").all_inner_texts() == new
    expect(visit.locator(".remark")).to_contain_text("no proof that the map is right, unless")
    expect(visit.locator(".covered-badge")).to_have_text("4 of 49 cells covered")
    # The caption above is the old one.
    expect_words(visit, cat.text)

    visit.locator(".uncover").click()
    expect(visit.locator(".cover-hottest")).to_be_focused()
    for _ in range(2):
        visit.locator(".count").press("ArrowRight")
    visit.locator(".word").nth(at).focus()
    expect_uncovered(visit)
    assert state(visit) == before


def test_cover_over_the_photo_is_the_models(visit: Page, cat: Caption) -> None:
    visit.locator(".word").nth(1).click()
    cover(visit)
    visit.mouse.move(0, 0)
    found = np.asarray(canvas(visit, ".cover").convert("RGB"), float)
    height, width = found.shape[:2]
    photo = open_photo(CAT).resize((width, height))
    square = photo.resize((288, 288)).filter(ImageFilter.GaussianBlur(BLUR * 288))
    is_covered = np.isin(np.arange(49), hottest(cat, 1, 6)).reshape(7, 7)
    for row, column in np.ndindex(7, 7):
        # Without the outline.
        top, bottom = (round((row + part) * height / 7) for part in (0.15, 0.85))
        left, right = (round((column + part) * width / 7) for part in (0.15, 0.85))
        part = np.s_[top:bottom, left:right]
        sharp, blurred = (
            np.abs(found[part] - np.asarray(each, float)[part]).mean()
            for each in (photo, square.resize((width, height)))
        )
        assert (blurred < 6) if is_covered[row, column] else (sharp < 6)
        assert (blurred < sharp) == is_covered[row, column]


def test_visitor_covers_what_they_select_by_keyboard(
    visit: Page, captioner: Captioner, cat: Caption, requests: list[dict[str, object]]
) -> None:
    visit.locator(".word").last.click()
    expect(visit.locator(".test-title")).to_have_text("Test the map “Attended” of the end")
    visit.locator(".cover-selected").press("Enter")
    expect(visit.locator(".finding")).to_contain_text("First select what to cover")
    assert requests == []

    visit.locator(".photo").scroll_into_view_if_needed()
    visit.locator(".grid").focus()
    for key in ("Space", "ArrowRight", "Space", "ArrowDown", "Space"):
        visit.keyboard.press(key)
    expect(visit.locator(".cover-selected")).to_contain_text("(3 selected)")
    tab_to(visit, ".cover-selected")
    visit.keyboard.press("Enter")
    expect(visit.locator(COVERED)).to_be_visible(timeout=ASK)
    (asked,) = requests
    assert (asked["cells"], asked["word"]) == ([0, 1, 8], len(cat.words))
    test = captioner.cover(CAT, cat.text, len(cat.words), [0, 1, 8])
    was = percent(test.before)
    expect(visit.locator(".finding")).to_contain_text("Without these 3 cells the end of the")
    expect(visit.locator(".chance .number").first).to_have_text(was)
    tab_to(visit, ".uncover")
    visit.keyboard.press("Enter")
    expect_uncovered(visit)
    expect(visit.locator(".cell[aria-selected=true]")).to_have_count(3)

    visit.locator(".grid").focus()
    visit.keyboard.press("Escape")
    click_cell(visit, 3, 3)
    cover(visit, ".cover-selected")
    expect(visit.locator(".finding")).to_contain_text("Without this cell ")


CHANGES: dict[str, Callable[[Page], object]] = {
    "word": lambda page: page.locator(".word").nth(2).click(),
    "caption": lambda page: page.locator(".beam").nth(1).click(),
    "photo": lambda page: click_example(page, "cheetah"),
}


def test_another_word_caption_or_photo_removes_the_cover(visit: Page) -> None:
    for change in CHANGES.values():
        cover(visit)
        change(visit)
        expect_uncovered(visit)


def test_pointed_word_shows_its_map_through_the_cover(visit: Page) -> None:
    cover(visit)
    visit.mouse.move(0, 0)
    visit.locator(".viewer").scroll_into_view_if_needed()
    earlier = drawn(visit)
    visit.locator(".word").nth(3).hover()
    assert drawn(visit) != earlier
    expect(visit.locator(".cover")).to_have_css("visibility", "hidden")
    visit.mouse.move(0, 0)
    expect(visit.locator(".cover")).to_have_css("visibility", "visible")


def test_late_answer_to_another_word_is_dropped(visit: Page, cat: Caption) -> None:
    visit.evaluate("""() => {
        window.findings = [];
        const node = document.querySelector(".finding");
        const note = () => window.findings.push(node.textContent);
        new MutationObserver(note).observe(node, { childList: true });
    }""")
    visit.locator(".cover-hottest").click()
    visit.locator(".word").nth(1).click()
    cover(visit)
    shown = [each for each in visit.evaluate("window.findings") if each.startswith("Without")]
    # The first word's answer came first; its probability is another.
    assert len(shown) == 1
    assert re.search(rf"“{cat.words[1].text}” .* {percent(cat.words[1].probability)}", shown[0])


def test_failed_cover_is_explained_and_leaves_the_photo_uncovered(
    visit: Page, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImageError("the cover slipped")

    with monkeypatch.context() as patch:
        patch.setattr(captioner, "cover", fail)
        visit.locator(".cover-hottest").click()
        expect(visit.get_by_text("The cover slipped.").last).to_be_visible(timeout=ASK)
    expect_uncovered(visit)
    cover(visit)


@pytest.mark.parametrize("theme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_result_is_accessible_and_fits_a_phone(
    page: Page, open_page: Callable[..., Page], theme: str
) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    open_page(f"__theme={theme}")
    click_cell(page, 3, 3)
    cover(page, ".cover-selected")
    # The photo is far above: the result has a small one.
    expect(page.locator(".small")).to_be_in_viewport()
    expect(page.locator(".chance").last).to_be_in_viewport()
    expect_no_sideways_scroll(page, 360)
    expect_no_barrier(page)
    open_all(page)
    expect_large_targets(page)
