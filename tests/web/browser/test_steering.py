"""The visitor's own words and settings, and undoing them."""

from __future__ import annotations

from collections.abc import Callable

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
    open_settings,
    set_setting,
    state,
    steer,
    type_own,
    words_of,
)


def test_alternative_keeps_earlier_words_and_can_be_undone(
    visit: Page, captioner: Captioner
) -> None:
    visit.locator(".beam").nth(2).click()
    visit.locator(".word").nth(5).click()
    visit.mouse.move(0, 0)
    earlier = state(visit)
    kept = words_of(visit)[:5]
    expect(visit.locator(".changed")).to_be_hidden()

    other = steer(visit, 5)
    prefix = " ".join([*kept, other])
    expect_words(visit, captioner.caption(CAT, DecodingOptions(prefix=prefix)).text)
    expect(visit.locator(".word.given .text")).to_have_text([other])
    expect(visit.locator(".word.given .number")).to_contain_text("yours")
    expect(visit.locator(".changed-text")).to_have_text(
        f"You chose “{other}”. The model wrote the rest."
    )
    expect_pressed(visit, 5)
    visit.mouse.move(0, 0)
    assert state(visit) != earlier

    visit.locator(".undo").click()
    visit.mouse.move(0, 0)
    expect(visit.locator(".changed")).to_be_hidden()
    assert state(visit) == earlier
    expect(visit.locator(".beam").nth(2)).to_have_attribute("aria-pressed", "true")


@pytest.mark.slow
def test_settings_keep_the_visitors_words_and_undo_is_stepwise(
    visit: Page, captioner: Captioner
) -> None:
    states = []

    def remember() -> None:
        visit.mouse.move(0, 0)
        states.append(state(visit))

    open_settings(visit)
    visit.locator(".word").nth(1).click()
    remember()
    first = steer(visit, 1)
    remember()
    ask_for_captions(visit, 5)
    expect(visit.locator(".word.given .text")).to_have_text([first])
    kept = [words_of(visit)[0], first]
    beams = captioner.caption(CAT, DecodingOptions(beam_size=5, prefix=" ".join(kept))).beams
    expect(visit.locator(".beam .text")).to_have_text([beam.text for beam in beams])
    visit.locator(".word").nth(3).click()
    remember()
    # Another word follows the settings that there are now.
    third = words_of(visit)[2]
    second = steer(visit, 3)
    expect(visit.locator(".word.given .text")).to_have_text([first, second])
    prefix = " ".join([*kept, third, second])
    beams = captioner.caption(CAT, DecodingOptions(beam_size=5, prefix=prefix)).beams
    expect(visit.locator(".beam .text")).to_have_text([beam.text for beam in beams])
    remember()
    visit.locator(".settings [name=ban_unknown]").uncheck()
    expect_idle(visit)
    expect(visit.locator(".word.given .text")).to_have_text([first, second])
    remember()
    visit.locator(".plain").click()
    expect(visit.locator(".beam")).to_have_count(1, timeout=ASK)
    expect(visit.locator(".word.given .text")).to_have_text([first, second])

    assert len({str(each) for each in states}) == len(states)
    for earlier in states[::-1]:
        visit.locator(".undo").click()
        visit.mouse.move(0, 0)
        expect(visit.locator(".word .text").first).to_be_visible()
        assert state(visit) == earlier
    expect(visit.locator(".undo")).to_be_hidden()


def test_visitor_can_end_the_caption(open_page: Callable[..., Page], captioner: Captioner) -> None:
    # The end must be among the alternatives of a word.
    name, text, at = next(
        (name, caption.text, at)
        for name, example in example_photos().items()
        for caption in [captioner.caption(example.path)]
        for at, word in enumerate(caption.words)
        if at and "<eos>" in dict(word.alternatives)
    )
    page = open_page(f"__theme=light&example={name}")
    expect_words(page, text)
    page.locator(".word").nth(at).click()
    page.locator(".alternatives button", has_text="end here").click()
    expect_words(page, " ".join(text.split()[:at]))
    expect(page.locator(".word.given .text")).to_have_text(["end"])
    expect(page.locator(".changed-text")).to_have_text("You ended the caption.")
    # The first word can't be the end.
    page.locator(".word").first.click()
    expect(page.locator(".alternatives button", has_text="end here")).to_have_count(0)
    # A search has nothing to add to a caption that has ended; the next word follows the setting.
    set_setting(page, "beam_size", "2")
    expect_words(page, " ".join(text.split()[:at]))
    page.locator(".undo").click()
    expect_words(page, text)


def test_typed_words_are_continued_by_button_and_keyboard(
    visit: Page, captioner: Captioner
) -> None:
    beginning = "two women in a red"
    written = captioner.caption(CAT, DecodingOptions(prefix=beginning)).text
    assert len(written.split()) > 5
    type_own(visit, " Two women, in a RED ", "Continue")
    expect_words(visit, written)
    expect(visit.locator(".word.given .text")).to_have_text(beginning.split())
    visit.locator(".undo").click()
    expect(visit.locator(".word.given")).to_have_count(0)
    visit.locator(".own input").fill(beginning)
    visit.locator(".own input").press("Enter")
    expect_words(visit, written)

    # Marks follow the words that the model reads: a dash is none.
    type_own(visit, "two - women", "Continue")
    expect(visit.locator(".word.given .text")).to_have_text(["two", "women"], timeout=ASK)
    expect(visit.locator(".changed-text")).to_contain_text("You chose “two”, “women”.")
    other = steer(visit, 2)
    expect(visit.locator(".word.given .text")).to_have_text(["two", "women", other])

    # A word that the model doesn't know is named, and nothing else changes.
    visit.mouse.move(0, 0)
    before = state(visit)
    type_own(visit, "a zorblax on", "Continue")
    expect(visit.get_by_text("zorblax").last).to_be_visible(timeout=ASK)
    expect_idle(visit)
    visit.mouse.move(0, 0)
    assert state(visit) == before


@pytest.mark.slow
def test_scored_caption_shows_end_and_unknown_words_and_can_be_steered(
    visit: Page, captioner: Captioner
) -> None:
    type_own(visit, "A zorblax on the grass!", "Score")
    expect_words(visit, "a zorblax on the grass")
    scored = captioner.score(CAT, "A zorblax on the grass!")
    words = visit.locator(".word")
    expect(visit.locator(".word.given")).to_have_count(6)
    expect(words.nth(1).locator(".number")).to_contain_text("unknown")
    expect(words.nth(4).locator(".number")).to_contain_text("yours")
    expect(words.nth(5).locator(".text")).to_have_text("end")
    expect(visit.locator(".beam")).to_have_count(1)
    expect(visit.locator(".beams-title")).to_have_text("Your caption, as the model scores it")
    log_probability = f"log p \N{MINUS SIGN}{-scored.log_probability:.2f}"
    expect(visit.locator(".beam .number")).to_contain_text(log_probability)
    expect(visit.locator(".changed-text")).to_have_text("The model scored your caption.")
    # Nothing can follow an unknown word.
    words.nth(4).click()
    expect(visit.locator(".alternatives button")).to_have_count(0)
    words.nth(1).click()
    expect(visit.locator(".alternatives button")).not_to_have_count(0)
    # Settings don't change a score.
    set_setting(visit, "beam_size", "5")
    expect(visit.locator(".beam")).to_have_count(1)
    expect(visit.locator(".beam .number")).to_contain_text(log_probability)

    type_own(visit, "a cat on the grass", "Score")
    expect_words(visit, "a cat on the grass")
    other = steer(visit, 2)
    assert words_of(visit)[:3] == ["a", "cat", other]
    expect(visit.locator(".word.given .text")).to_have_text(["a", "cat", other])
    expect(visit.locator(".beam")).to_have_count(5)


@pytest.mark.slow
def test_presets_are_plain_greedy_and_defaults(
    open_page: Callable[..., Page], captioner: Captioner
) -> None:
    plain = DecodingOptions.plain_greedy()
    name, ours, theirs = next(
        (name, ours, theirs)
        for name, example in list(example_photos().items())[1:]
        for ours in [captioner.caption(example.path)]
        for theirs in [captioner.caption(example.path, plain)]
        if ours.text != theirs.text and "<unk>" not in theirs.text
    )
    page = open_page(f"__theme=light&example={name}")
    open_settings(page)
    page.get_by_role("button", name="Plain greedy").click()
    expect_words(page, theirs.text)
    expect(page.locator(".beam")).to_have_count(1)
    expect(page.locator("[name=beam_size]")).to_have_value("1")
    expect(page.locator(".settings :checked")).to_have_count(0)
    page.get_by_role("button", name="Reset to defaults").click()
    expect_words(page, ours.text)
    expect(page.locator(".beam")).to_have_count(3)
    expect(page.locator("[name=beam_size]")).to_have_value("3")
    expect(page.locator(".settings :checked")).to_have_count(4)

    # A value out of range is refused by the form, before anything is asked.
    before = state(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for value in ("0", "6", ""):
        page.locator("[name=beam_size]").fill(value)
        page.locator("[name=beam_size]").press("Enter")
        assert page.locator("[name=beam_size]").evaluate("input => !input.validity.valid")
    assert not requests
    page.locator("[name=beam_size]").fill("3")
    page.locator("[name=beam_size]").press("Tab")
    expect_idle(page)
    assert state(page) == before


@pytest.mark.parametrize("photo", ["example", pytest.param("upload", marks=pytest.mark.slow)])
def test_new_photo_drops_words_and_keeps_settings(
    visit: Page, captioner: Captioner, photo: str
) -> None:
    steer(visit, 1)
    ask_for_captions(visit, 2)
    path = example_photos()["motorcycle"].path
    if photo == "upload":
        bring(visit, path)
    else:
        click_example(visit, "motorcycle")
    beams = captioner.caption(path, DecodingOptions(beam_size=2)).beams
    expect(visit.locator(".beam .text")).to_have_text([beam.text for beam in beams], timeout=ASK)
    expect(visit.locator(".changed")).to_be_hidden()
    expect(visit.locator(".word.given")).to_have_count(0)
    expect(visit.locator("[name=beam_size]")).to_have_value("2")
