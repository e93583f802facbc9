"""Links that open a state: the address follows the visitor, and brings everything back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlencode

import pytest
from playwright.sync_api import Page, expect

from captioner import Captioner
from captioner.config import DecodingOptions
from captioner.web import example_photos
from tests.web.browser.visits import (
    ASK,
    CAT,
    ask_for_captions,
    bring,
    click_example,
    expect_idle,
    expect_pressed,
    expect_words,
    pressed,
    set_setting,
    state,
    steer,
    type_own,
    wait_for_photo,
)


def query(page: Page) -> dict[str, str]:
    """What the address says, without the theme."""
    fields = parse_qs(str(page.evaluate("location.search.slice(1)")), keep_blank_values=True)
    assert fields.pop("__theme") == ["light"]
    return {name: value for name, (value,) in fields.items()}


def test_link_opens_words_beam_settings_and_appearance(
    open_page: Callable[..., Page], captioner: Captioner
) -> None:
    fields = {"example": "tower", "prefix": "a tall", "beam": 2, "word": 3, "beam_size": 4}
    fields |= {"ban_repeats": 0, "length_penalty": 1.0, "seed": 7}
    fields |= {"colors": "viridis", "map": "cells", "scale": "caption", "opacity": 50}
    page = open_page(f"__theme=light&{urlencode(fields)}")
    options = DecodingOptions(
        prefix="a tall", beam_size=4, ban_repeats=False, length_penalty=1.0, seed=7
    )
    beams = captioner.caption(example_photos()["tower"].path, options).beams
    expect(page.locator(".beam .text")).to_have_text([beam.text for beam in beams], timeout=ASK)
    expect(page.locator(".beam").nth(1)).to_have_attribute("aria-pressed", "true")
    expect_words(page, beams[1].text)
    expect(page.locator(".word.given .text")).to_have_text(["a", "tall"])
    expect_pressed(page, 2)
    expect(page.get_by_label("Example: tower")).to_have_attribute("aria-pressed", "true")
    for selector, value in (
        ("[name=beam_size]", "4"),
        ("[name=length_penalty]", "1"),
        ("[name=seed]", "7"),
        (".colors", "viridis"),
        (".shape", "cells"),
        (".range", "caption"),
        (".strength", "50"),
    ):
        expect(page.locator(selector)).to_have_value(value)
    expect(page.locator("[name=ban_repeats]")).not_to_be_checked()
    # The address is what the visitor came by, in other words perhaps.
    sent = {name: str(value) for name, value in fields.items()} | {"length_penalty": "1"}
    assert query(page) == sent


def test_address_follows_the_visitor_and_restores_the_state(
    visit: Page, captioner: Captioner
) -> None:
    assert query(visit) == {"example": "cat", "word": str(pressed(visit) + 1)}
    visit.locator(".beam").nth(1).click()
    visit.locator(".word").nth(3).click()
    assert query(visit) == {"example": "cat", "beam": "2", "word": "4"}
    click_example(visit, "lion")
    assert query(visit)["example"] == "lion"
    assert "beam" not in query(visit)
    click_example(visit, "cat")
    ask_for_captions(visit, 2)
    kept = captioner.caption(CAT, DecodingOptions(beam_size=2)).words[0].text
    other = steer(visit, 1)
    visit.locator(".appearance summary").click()
    visit.locator(".shape").select_option("cells")
    visit.locator(".word").nth(2).click()
    expected = {"example": "cat", "prefix": f"{kept} {other}", "yours": "1", "word": "3"}
    assert query(visit) == expected | {"beam_size": "2", "map": "cells"}

    def comparable() -> dict[str, Any]:
        """The state, without what lies folded on one visit and not on the other."""
        visit.mouse.move(0, 0)
        found = state(visit)
        del found["viewer"]
        return found | {
            "words": visit.locator(".word").all_inner_texts(),
            "beams": visit.locator(".beam").all_inner_texts(),
            "given": visit.locator(".word.given .text").all_inner_texts(),
            "panel": visit.locator(".panel").inner_text(),
            "changed": visit.locator(".changed-text").inner_text(),
        }

    def expect_back() -> None:
        wait_for_photo(visit)
        expect(visit.locator(".word.given")).to_have_count(1, timeout=ASK)
        expect_idle(visit)
        assert comparable() == before

    before = comparable()
    visit.get_by_role("button", name="Copy link").click()
    expect(visit.locator(".exported")).to_have_text("Link copied.")
    link = visit.evaluate("navigator.clipboard.readText()")
    assert link == visit.url
    visit.reload()
    expect_back()
    visit.goto("about:blank")
    visit.go_back()
    expect_back()
    visit.goto("about:blank")
    visit.goto(link)
    expect_back()
    visit.get_by_role("button", name="Copy caption").click()
    expect(visit.locator(".exported")).to_have_text("Caption copied.")
    text = visit.evaluate("navigator.clipboard.readText()")
    assert text.split() == visit.locator(".word .text").all_inner_texts()[:-1]

    # A score, with a word that the model doesn't know.
    type_own(visit, "a zorblax runs", "Score")
    expect_words(visit, "a zorblax runs")
    assert query(visit)["whole"] == "1"
    visit.reload()
    wait_for_photo(visit)
    expect_words(visit, "a zorblax runs")
    expect(visit.locator(".word.given")).to_have_count(4)


def test_links_never_lead_to_a_visitors_photo(visit: Page) -> None:
    expect(visit.locator(".link")).to_be_enabled()
    bring(visit, CAT)
    assert query(visit) == {}
    expect(visit.locator(".link")).to_be_disabled()
    expect(visit.locator(".link")).to_have_attribute(
        "title", "Links work only for the examples, because uploaded photos are deleted."
    )
    steer(visit, 1)
    set_setting(visit, "beam_size", "2")
    assert query(visit) == {}
    click_example(visit, "lion")
    expect(visit.locator(".link")).to_be_enabled()
    assert query(visit)["example"] == "lion"


NONSENSE = [
    urlencode({"example": "../../etc/passwd", "word": "x", "beam": "y", "colors": "constructor"}),
    urlencode({"example": "__proto__", "map": "jet", "scale": 7, "yours": "1,2", "whole": 1}),
    urlencode({"beam": 99, "word": -5, "opacity": "much", "ban_repeats": "perhaps"}),
    urlencode({"beam_size": 99, "max_words": 0, "temperature": "NaN", "seed": "Infinity"}),
    urlencode({"beam_size": "", "length_penalty": -1, "seed": 1.5, "temperature": 0.001}),
    urlencode({"prefix": "zorblax", "beam": 1e300, "word": 0.5, "opacity": 1e300}),
    urlencode({"prefix": "a " * 300}),
    urlencode({"prefix": "<img src=x onerror=alert(1)>", "yours": "7,x,-1,0.5"}),
    "example=cat&example=lion&word=%ff&word=%&&",
]


@pytest.mark.slow
def test_invalid_address_opens_the_default(
    page: Page, open_page: Callable[..., Page], captioner: Captioner
) -> None:
    text = captioner.caption(CAT).text
    for fields in NONSENSE:
        open_page(f"__theme=light&{fields}")
        expect_idle(page)
        expect_words(page, text)
        expect(page.get_by_label("Example: cat")).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".word[aria-pressed=true]")).to_have_count(1)
        errors = page.get_by_role("button", name="Error Close")
        expect(errors).to_have_count(int("prefix" in fields))
        assert query(page)["example"] == "cat"
        assert set(query(page)) <= {"example", "word", "beam"}
