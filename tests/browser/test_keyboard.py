"""The whole page with nothing but the keyboard."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from captioner.viewer import View
from tests.browser.visits import KNOWN, expect_focus_kept, expect_pressed, tab_to, words_of


def test_an_example_is_chosen_and_its_words_are_walked_through(visit: Page) -> None:
    visit.get_by_label("Example: cat").wait_for()
    tab_to(visit, "[aria-label='Example: cat']")
    visit.keyboard.press("Enter")
    visit.locator(".word").first.wait_for()
    tab_to(visit, ".word")
    last = visit.locator(".word").count() - 1
    for key, at in [
        ("ArrowRight", 2),
        ("ArrowDown", 3),
        ("ArrowLeft", 2),
        ("ArrowUp", 1),
        ("End", last),
        ("ArrowRight", last),
        ("Home", 0),
        ("ArrowLeft", 0),
    ]:
        visit.keyboard.press(key)
        expect_pressed(visit, at)
        expect(visit.locator(".word").nth(at)).to_be_focused()


def test_steering_and_undo_keep_the_focus_in_the_viewer(cat: Page) -> None:
    words = words_of(cat)
    cat.locator(".grid").focus()
    tab_to(cat, ".word")
    cat.keyboard.press("ArrowRight")
    tab_to(cat, ".alternatives button")
    other = cat.locator(".alternatives button span").first.inner_text()
    cat.keyboard.press("Enter")
    expect(cat.locator(".word.given .text")).to_have_text([other])
    expect_focus_kept(cat)
    assert words_of(cat)[:3] == [*words[:2], other]
    tab_to(cat, ".undo")
    cat.keyboard.press("Enter")
    expect(cat.locator(".word.given")).to_have_count(0)
    expect_focus_kept(cat)
    assert words_of(cat) == words


def test_the_photo_is_asked_with_arrows_and_space_and_escape(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    tab_to(page, ".grid")
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    chosen = page.locator(".cell[aria-selected=true]")
    expect(chosen).to_have_count(1)
    expect(chosen).to_have_attribute("aria-label", "row 2, column 2: 0.0 %")
    active = page.locator(".grid").get_attribute("aria-activedescendant")
    assert active == chosen.get_attribute("id")
    expect(page.locator(".answers li").first).to_contain_text("two")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    expect(chosen).to_have_count(2)
    page.keyboard.press("Space")
    expect(chosen).to_have_count(1)
    page.keyboard.press("Escape")
    expect(chosen).to_have_count(0)
    expect(page.locator(".answers li")).to_have_count(0)


def test_another_caption_is_chosen(cat: Page) -> None:
    cat.locator(".grid").focus()
    tab_to(cat, ".beam[aria-pressed=false]")
    cat.keyboard.press("Enter")
    expect(cat.locator(".beam").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(cat.locator(".beam").nth(1)).to_be_focused()


def test_sliders_selects_play_and_details_work(open_standalone: Callable[[View], Page]) -> None:
    page = open_standalone(KNOWN)
    expect_pressed(page, 0)
    tab_to(page, ".play")
    page.keyboard.press("Space")
    expect(page.locator(".play")).to_have_text("Pause")
    page.keyboard.press("Space")
    expect(page.locator(".play")).to_have_text("Play")
    page.locator(".word").first.click()
    tab_to(page, ".position")
    page.keyboard.press("ArrowRight")
    expect_pressed(page, 1)
    tab_to(page, ".strength")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".strength")).to_have_value("70")
    for select, value in [(".shape", "cells"), (".colors", "viridis"), (".range", "caption")]:
        tab_to(page, select)
        page.keyboard.press("ArrowDown")
        expect(page.locator(select)).to_have_value(value)
    tab_to(page, "summary")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(4)


def test_a_beginning_is_typed_and_sent(cat: Page) -> None:
    tab_to(cat, "textarea")
    cat.keyboard.type("two women")
    tab_to(cat, "button.sm")
    cat.keyboard.press("Enter")
    expect(cat.locator(".word.given .text")).to_have_text(["two", "women"])


def test_a_settings_slider_works_by_keyboard(cat: Page) -> None:
    cat.get_by_role("button", name="Settings").click()
    cat.get_by_label("range slider for Captions").focus()
    cat.keyboard.press("ArrowLeft")
    cat.keyboard.press("ArrowLeft")
    expect(cat.locator(".beam")).to_have_count(1, timeout=15_000)
