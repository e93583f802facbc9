"""The whole page with nothing but the keyboard."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from captioner.web import View
from tests.web.browser.visits import (
    ASK,
    KNOWN,
    cells,
    expect_idle,
    expect_pressed,
    make_view,
    open_settings,
    tab_to,
    word,
    words_of,
)


def walk(page: Page, *steps: tuple[str, int]) -> None:
    """Press keys; after each, that word is shown and has the focus."""
    for key, at in steps:
        page.keyboard.press(key)
        expect_pressed(page, at)
        expect(page.locator(".word").nth(at)).to_be_focused()


def expect_focus_in_the_viewer(page: Page) -> None:
    page.wait_for_function("document.querySelector('.viewer').contains(document.activeElement)")


def test_keyboard_opens_an_example_walks_steers_and_undoes(visit: Page) -> None:
    tab_to(visit, "[aria-label='Example: lion']")
    visit.keyboard.press("Enter")
    expect(visit.get_by_label("Example: lion")).to_have_attribute("aria-pressed", "true")
    tab_to(visit, ".word")
    visit.keyboard.press("Home")
    last = visit.locator(".word").count() - 1
    walk(visit, ("ArrowRight", 1), ("ArrowDown", 2), ("ArrowLeft", 1), ("ArrowUp", 0))
    walk(visit, ("End", last), ("ArrowRight", last), ("Home", 0), ("ArrowLeft", 0))

    words = words_of(visit)
    walk(visit, ("ArrowRight", 1))
    tab_to(visit, ".alternatives button")
    other = visit.locator(".alternatives button span").first.inner_text()
    visit.keyboard.press("Enter")
    expect(visit.locator(".word.given .text")).to_have_text([other], timeout=ASK)
    expect_focus_in_the_viewer(visit)
    assert words_of(visit)[:2] == [words[0], other]
    tab_to(visit, ".undo")
    visit.keyboard.press("Enter")
    expect(visit.locator(".word.given")).to_have_count(0)
    expect_focus_in_the_viewer(visit)
    assert words_of(visit) == words

    tab_to(visit, ".beam[aria-pressed=false]")
    visit.keyboard.press("Enter")
    expect(visit.locator(".beam").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(visit.locator(".beam").nth(1)).to_be_focused()


def test_keyboard_types_words_and_changes_settings(visit: Page) -> None:
    tab_to(visit, ".own input")
    visit.keyboard.type("two women")
    tab_to(visit, ".continue")
    visit.keyboard.press("Enter")
    expect(visit.locator(".word.given .text")).to_have_text(["two", "women"], timeout=ASK)
    open_settings(visit)
    tab_to(visit, "[name=beam_size]")
    visit.keyboard.press("ArrowDown")
    visit.keyboard.press("ArrowDown")
    visit.keyboard.press("Tab")
    expect(visit.locator(".beam")).to_have_count(1, timeout=ASK)
    tab_to(visit, "[name=ban_repeats]")
    visit.keyboard.press("Space")
    expect(visit.locator("[name=ban_repeats]")).not_to_be_checked()
    expect_idle(visit)
    tab_to(visit, ".default")
    visit.keyboard.press("Enter")
    expect(visit.locator(".beam")).to_have_count(3, timeout=ASK)


def test_keyboard_selects_and_clears_cells(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    tab_to(page, ".grid")
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    selected = page.locator(".cell[aria-selected=true]")
    expect(selected).to_have_count(1)
    # Of the word that is chosen, "three".
    expect(selected).to_have_attribute("aria-label", "row 2, column 2: 0.0%")
    active = page.locator(".grid").get_attribute("aria-activedescendant")
    assert active == selected.get_attribute("id")
    numbers = page.locator(".word .number")
    expect(numbers).to_have_text(["0.0%", "75%", "0.0%", "0.0%"])
    expect(page.locator(".cells-note")).to_contain_text("two 75%")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(selected).to_have_count(2)
    expect(numbers).to_have_text(["75%", "100%", "0.0%", "0.0%"])
    page.keyboard.press("Space")
    expect(selected).to_have_count(1)
    page.keyboard.press("Escape")
    expect(selected).to_have_count(0)
    expect(numbers).to_have_text(["50%"] * 4)
    expect(page.locator(".cells-note")).to_be_empty()


def test_keyboard_operates_sliders_selects_and_play(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    expect_pressed(page, 2)
    tab_to(page, ".play")
    page.keyboard.press("Space")
    expect(page.locator(".play")).to_have_text("Pause")
    page.keyboard.press("Space")
    expect(page.locator(".play")).to_have_text("Play")
    page.locator(".word").first.click()
    tab_to(page, ".appearance summary")
    page.keyboard.press("Enter")
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
    tab_to(page, ".overview summary")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(4)


def test_arrow_keys_follow_right_to_left_words(show: Callable[..., Page]) -> None:
    words = [word(text, cells({(0, 0): 1.0})) for text in ("كلب", "بني", "يجري")]
    page = show(make_view(words), language="ar")
    page.locator(".word").nth(1).click()
    walk(page, ("ArrowLeft", 2), ("ArrowRight", 1), ("ArrowDown", 2), ("ArrowUp", 1))
