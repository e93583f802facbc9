"""The four maps of a word, its verdict, and what the detectors see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from captioner import Captioner
from tests.web.browser.visits import (
    ASK,
    CAT,
    cells,
    click_cell,
    drawn,
    expect_words,
    make_view,
    picture,
    steer,
    word,
)

# Evidence for the lower left, and against the upper right.
EVIDENCE = cells({(6, 0): 2.0, (0, 6): -1.0})
VIEW = make_view(
    [
        word("a", cells({(3, 3): 1.0}), verdict="from the sentence"),
        word(
            "dog",
            cells({(0, 0): 1.0}),
            verdict="seen there",
            evidence=EVIDENCE,
            mattered=cells({(2, 2): 0.0421}),
            shown=cells({(5, 5): 0.9}),
        ),
        word("cat", cells({(0, 1): 1.0}), verdict="guessed", evidence=-EVIDENCE),
    ]
)


def light_of(page: Page) -> np.ndarray:
    """The mean color (7, 7, 3) of each cell, as the visitor sees it."""
    page.add_style_tag(content=".badge { display: none }")
    frame = picture(page.locator(".frame")).resize((420, 280))
    pixels = np.asarray(frame, dtype=float)
    return pixels.reshape(7, 40, 7, 60, 3).mean(axis=(1, 3))


def test_switch_and_its_key_show_each_map(show: Callable[..., Page]) -> None:
    page = show(VIEW)
    expect(page.locator(".word[aria-pressed=true] .text")).to_have_text("dog")
    page.mouse.move(0, 0)
    hottest = {"evidence": (6, 0), "attended": (0, 0), "mattered": (2, 2), "shown": (5, 5)}
    page.locator(".word").nth(1).focus()
    for name, cell in hottest.items():
        expect(page.locator(f".maps [value={name}]")).to_have_attribute("aria-pressed", "true")
        light = light_of(page).sum(axis=2)
        assert np.unravel_index(light.argmax(), light.shape) == cell
        page.keyboard.press("m")
    expect(page.locator(".maps [value=evidence]")).to_have_attribute("aria-pressed", "true")
    page.locator(".maps [value=mattered]").click()
    expect(page.locator(".high")).to_have_text("+0.04")
    expect(page.locator(".scale-text")).to_contain_text("falls without the cell")


def test_cells_that_speak_against_a_word_are_blue(show: Callable[..., Page]) -> None:
    page = show(VIEW)
    page.mouse.move(0, 0)
    expect(page.locator(".low")).to_have_text("\u22122.00")
    expect(page.locator(".scale-text")).to_contain_text("blue cells speak against the word")
    red, _, blue = light_of(page)[0, 6]
    assert blue > red + 20
    red, _, blue = light_of(page)[6, 0]
    assert red > blue + 20


def test_word_without_the_map_shows_its_attention_and_says_so(show: Callable[..., Page]) -> None:
    page = show(VIEW)
    page.locator(".word").first.click()
    page.mouse.move(0, 0)
    expect(page.locator(".scale-text")).to_contain_text("This word has no map “evidence”; Attended")
    light = light_of(page).sum(axis=2)
    assert np.unravel_index(light.argmax(), light.shape) == (3, 3)


def test_difference_from_the_mean_map_shows_what_is_special(show: Callable[..., Page]) -> None:
    page = show(VIEW)
    page.mouse.move(0, 0)
    before = drawn(page)
    page.get_by_label("only what is special to this word").check()
    # The mean of "dog" and "cat" is nothing, since they are opposites.
    assert drawn(page) == before
    page.locator(".maps [value=attended]").click()
    expect(page.locator(".low")).to_have_text("\u221275%")  # of (0, 0): 1, 0 and 0, 0
    expect(page.locator(".scale-text")).to_contain_text("difference from the caption")


def test_words_have_their_verdict_in_words_and_shape(show: Callable[..., Page]) -> None:
    page = show(VIEW)
    expect(page.locator(".word .sign")).to_have_text(["○", "●", "?", "◐"])
    expect(page.locator(".verdict")).to_have_text(
        "● Seen there: its evidence and what mattered lie in the same place. With nothing to see "
        "in any cell its probability would be 30%, not 50%."
    )
    page.locator(".word").nth(2).click()
    expect(page.locator(".verdict")).to_contain_text("? Guessed: neither a detector nor a class")


def test_verdicts_and_further_maps_arrive_by_themselves(visit: Page, captioner: Captioner) -> None:
    explained = captioner.explain(CAT, captioner.caption(CAT))
    signs = {"seen there": "●", "from the scene": "◐", "from the sentence": "○", "guessed": "?"}
    expected = [signs[word.verdict or ""] for word in [*explained.words, explained.beams[0].end]]
    expect(visit.locator(".word .sign")).to_have_text(expected, timeout=ASK)
    chosen = visit.locator(".word[aria-pressed=true] .text").inner_text()
    visit.locator(".maps [value=mattered]").click()
    expect(visit.locator(".scale-text")).to_contain_text("Mattered")
    expect(visit.locator(".word[aria-pressed=true] .text")).to_have_text(chosen)
    # Another caption gets its own, as does one that the visitor steers.
    visit.locator(".beam").nth(1).click()
    expect(visit.locator(".word .sign").last).not_to_be_empty(timeout=ASK)
    steer(visit, 1)
    expect(visit.locator(".word .sign").last).not_to_be_empty(timeout=ASK)


def test_cell_tells_what_the_detectors_see_in_it(visit: Page, captioner: Captioner) -> None:
    caption = captioner.caption(CAT)
    seen = captioner.explain(CAT, caption).seen
    assert seen
    expect(visit.locator(".word .sign").last).not_to_be_empty(timeout=ASK)
    expect(visit.locator(".seen-note")).to_be_hidden()
    click_cell(visit, 3, 3)
    names = [text for text, _ in seen[3 * 7 + 3]]
    assert "cat" in names
    expect(visit.locator(".seen-words li")).to_have_count(len(names))
    expect(visit.locator(".seen-words")).to_contain_text("in the caption")
    visit.get_by_role("button", name="Clear the selection").click()
    expect(visit.locator(".seen-note")).to_be_hidden()


def test_link_keeps_the_map(open_page: Callable[..., Page]) -> None:
    page = open_page("__theme=light&example=cat&map=attended&special=1")
    expect(page.locator(".maps [value=attended]")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("only what is special to this word")).to_be_checked()
    page.locator(".maps [value=shown]").click()
    page.wait_for_function("location.search.includes('map=shown')")
    page.locator(".maps [value=evidence]").click()
    page.wait_for_function("!location.search.includes('map=')")
    page.reload()
    expect_words(page, page.locator(".photo").get_attribute("alt") or "")
    expect(page.get_by_label("only what is special to this word")).to_be_checked()


@pytest.mark.parametrize("width", [360])
def test_switch_fits_a_phone(show: Callable[..., Page], width: int) -> None:
    page = show(VIEW)
    page.set_viewport_size({"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for button in page.locator(".maps button").all():
        box = button.bounding_box()
        assert box
        assert box["height"] >= 24
        assert box["x"] + box["width"] <= width
    page.set_viewport_size({"width": 1366, "height": 768})
