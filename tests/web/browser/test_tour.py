"""The tour: five steps on what is there, by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.web.browser.visits import expect_pressed, pressed, state, tab_to

TARGETS = [".words", ".alternatives", ".frame", ".captions", ".export"]

# Where target and bubble lie, and how much of the target is in the window and not under the bubble.
SEEN = """() => {
    const target = document.querySelector(".in-tour").getBoundingClientRect();
    const bubble = document.querySelector(".bubble").getBoundingClientRect();
    const top = Math.max(target.top, 0), bottom = Math.min(target.bottom, innerHeight);
    const overlap = bubble.right <= target.left || bubble.left >= target.right ? 0
        : Math.max(Math.min(bubble.bottom, bottom) - Math.max(bubble.top, top), 0);
    return { visible: bottom - top - overlap, height: target.height, overlap,
        bubble: bubble.top >= 0 && bubble.bottom <= innerHeight && bubble.left >= 0
            && bubble.right <= innerWidth,
        middle: document.elementFromPoint(
            (target.left + target.right) / 2, (top + bottom) / 2)?.closest(".in-tour") !== null };
}"""


def expect_step(page: Page, at: int) -> None:
    """The step's target is marked, and can be seen beside the bubble."""
    expect(page.locator(".bubble h2")).to_contain_text(f"{at + 1}/5 ")
    expect(page.locator(".in-tour")).to_have_count(1)
    assert page.locator(TARGETS[at]).evaluate("target => target.matches('.in-tour')")
    found = page.evaluate(SEEN)
    assert found["bubble"], at
    assert found["overlap"] == 0, at
    assert found["visible"] == pytest.approx(found["height"], abs=1), at
    assert found["middle"], at


@pytest.mark.parametrize(
    ("width", "height"), [pytest.param(1366, 768, marks=pytest.mark.slow), (360, 740)]
)
def test_tour_steps_show_their_targets(
    page: Page, open_page: Callable[..., Page], width: int, height: int
) -> None:
    page.set_viewport_size({"width": width, "height": height})
    open_page()
    bubble = page.locator(".bubble")
    expect(bubble).to_be_hidden()
    before = state(page)
    page.get_by_role("button", name="Tour").click()
    expect(page.get_by_role("dialog")).to_have_count(1)
    for at in range(5):
        expect_step(page, at)
        page.locator(".next").click()
    expect(bubble).to_be_hidden()
    expect(page.locator(".tour")).to_be_focused()
    expect(page.locator(".in-tour")).to_have_count(0)
    # Back, and closed in the middle.
    page.locator(".tour").click()
    expect(page.locator(".previous")).to_be_disabled()
    page.locator(".next").click()
    page.locator(".previous").click()
    expect_step(page, 0)
    page.get_by_role("button", name="Close", exact=True).click()
    expect(bubble).to_be_hidden()
    expect(page.locator(".tour")).to_be_focused()
    page.mouse.move(0, 0)
    assert state(page) == before
    # It never opens by itself, and leaves nothing behind.
    page.reload()
    page.locator(".word").first.wait_for()
    expect(bubble).to_be_hidden()


def test_keyboard_runs_the_tour(visit: Page) -> None:
    bubble = visit.locator(".bubble")
    at_first = pressed(visit)
    tab_to(visit, ".tour")
    visit.keyboard.press("Enter")
    expect(visit.locator(".next")).to_be_focused()
    for key, at in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
        ("Enter", 1),
        ("Space", 2),
    ):
        visit.keyboard.press(key)
        expect_step(visit, at)
    # The words behind it don't move along.
    expect_pressed(visit, at_first)
    visit.keyboard.press("Escape")
    expect(bubble).to_be_hidden()
    expect(visit.locator(".tour")).to_be_focused()
    visit.keyboard.press("Enter")
    expect_step(visit, 0)
    for _ in range(5):
        visit.keyboard.press("ArrowRight")
    expect(bubble).to_be_hidden()
    expect(visit.locator(".tour")).to_be_focused()
    # What it points to can be tried out while it is open.
    visit.keyboard.press("Enter")
    visit.locator(".word").nth(2).click()
    expect_pressed(visit, 2)
    expect(bubble).to_be_visible()
