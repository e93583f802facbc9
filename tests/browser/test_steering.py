"""The visitor's own words and settings, and taking them back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from captioner import Captioner
from captioner.config import DecodingOptions
from tests.browser.visits import (
    ask_for_captions,
    bring,
    everything,
    expect_pressed,
    expect_words,
    steer,
    words_of,
)


@pytest.fixture(scope="session")
def cat_photo(example_photos: list[Path]) -> Path:
    (photo,) = [path for path in example_photos if path.name == "chelsea.png"]
    return photo


def test_an_alternative_keeps_what_is_before_it_and_writes_the_rest_anew(
    cat: Page, captioner: Captioner, cat_photo: Path
) -> None:
    kept = words_of(cat)[:5]
    other = steer(cat, 5)
    prefix = " ".join([*kept, other])
    expect_words(cat, captioner.caption(cat_photo, DecodingOptions(prefix=prefix)).text)
    expect(cat.locator(".word.given .text")).to_have_text([other])
    expect(cat.locator(".word.given .number")).to_contain_text("yours")
    expect(cat.locator(".steered-text")).to_contain_text(f"You fixed: {other}.")
    expect_pressed(cat, 5)


def test_undo_brings_the_earlier_caption_back_exactly(cat: Page) -> None:
    cat.locator(".beam").nth(2).click()
    cat.locator(".word").nth(5).click()
    cat.mouse.move(0, 0)
    earlier = everything(cat)
    steer(cat, 5)
    assert everything(cat) != earlier
    cat.locator(".undo").click()
    cat.mouse.move(0, 0)
    expect(cat.locator(".steered")).to_be_hidden()
    assert everything(cat) == earlier
    expect(cat.locator(".beam").nth(2)).to_have_attribute("aria-pressed", "true")


def test_what_was_steered_twice_is_taken_back_twice(cat: Page) -> None:
    words = [words_of(cat)]
    first = steer(cat, 1)
    words.append(words_of(cat))
    second = steer(cat, 3)
    words.append(words_of(cat))
    expect(cat.locator(".word.given .text")).to_have_text([first, second])
    assert words[2][:3] == words[1][:3]
    cat.locator(".undo").click()
    expect_words(cat, " ".join(words[1]))
    expect(cat.locator(".word.given .text")).to_have_text([first])
    cat.locator(".undo").click()
    expect_words(cat, " ".join(words[0]))
    expect(cat.locator(".word.given")).to_have_count(0)
    expect(cat.locator(".undo")).to_be_hidden()


def test_what_was_taken_back_is_also_what_is_taken_away(cat: Page) -> None:
    words = words_of(cat)
    steer(cat, 1)
    cat.locator(".undo").click()
    expect_words(cat, " ".join(words))
    with cat.expect_download() as download:
        cat.locator("[data-format=json]").click()
    assert json.loads(download.value.path().read_text())["text"] == " ".join(words)


def test_a_caption_ends_where_the_visitor_ends_it(
    visit: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    # The end must be among the words that nearly were.
    photo, first, at = next(
        (photo, caption.text, at)
        for photo in example_photos
        for caption in [captioner.caption(photo)]
        for at, word in enumerate(caption.words)
        if at and "<eos>" in dict(word.alternatives)
    )
    bring(visit, photo)
    expect_words(visit, first)
    visit.locator(".word").nth(at).click()
    visit.locator(".alternatives button", has_text="end here").click()
    expect_words(visit, " ".join(first.split()[:at]))
    expect(visit.locator(".word.given .text")).to_have_text(["end"])
    expect(visit.locator(".steered-text")).to_have_text("You ended the caption.")
    visit.locator(".undo").click()
    expect_words(visit, first)


@pytest.mark.parametrize("press_enter", [False, True])
def test_a_typed_beginning_is_written_on(
    cat: Page, captioner: Captioner, cat_photo: Path, press_enter: bool
) -> None:
    beginning = "two women in a red"
    cat.get_by_label("Your own words").fill(beginning)
    if press_enter:
        cat.get_by_label("Your own words").press("Enter")
    else:
        cat.get_by_role("button", name="Write on from here").click()
    written = captioner.caption(cat_photo, DecodingOptions(prefix=beginning))
    assert len(written.words) > 5
    expect_words(cat, written.text)
    expect(cat.locator(".word.given .text")).to_have_text(beginning.split())


def test_a_beginning_with_an_unknown_word_says_which(cat: Page) -> None:
    words = words_of(cat)
    cat.get_by_label("Your own words").fill("a zorblax on")
    cat.get_by_role("button", name="Write on from here").click()
    expect(cat.get_by_text("\"zorblax\" isn't in the model's vocabulary")).to_be_visible()
    assert words_of(cat) == words


def test_a_typed_caption_is_read_with_its_end_and_its_unknown_words(
    cat: Page, captioner: Captioner, cat_photo: Path
) -> None:
    cat.get_by_label("Your own words").fill("A zorblax on the grass!")
    cat.get_by_role("button", name="Read it as it is").click()
    expect_words(cat, "a zorblax on the grass")
    read = captioner.score(cat_photo, "A zorblax on the grass!")
    words = cat.locator(".word")
    expect(cat.locator(".word.given")).to_have_count(6)
    expect(words.nth(1).locator(".number")).to_have_text("unknown")
    expect(words.nth(4).locator(".number")).to_contain_text("yours")
    expect(words.nth(5).locator(".text")).to_have_text("end")
    expect(cat.locator(".beam")).to_have_count(1)
    log_probability = f"log p \N{MINUS SIGN}{-read.log_probability:.2f}"
    expect(cat.locator(".beam .number")).to_have_text(log_probability)
    cat.locator(".undo").click()
    expect(cat.locator(".word.given")).to_have_count(0)


def test_a_read_caption_can_be_written_on_from_any_of_its_words(cat: Page) -> None:
    cat.get_by_label("Your own words").fill("a cat on the grass")
    cat.get_by_role("button", name="Read it as it is").click()
    expect_words(cat, "a cat on the grass")
    other = steer(cat, 2)
    assert words_of(cat)[:3] == ["a", "cat", other]
    expect(cat.locator(".word.given .text")).to_have_text(["a", "cat", other])


def test_a_new_photo_forgets_what_was_steered(
    cat: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    steer(cat, 1)
    bring(cat, example_photos[0])
    expect_words(cat, captioner.caption(example_photos[0]).text)
    expect(cat.locator(".undo")).to_be_hidden()
    expect(cat.locator(".word.given")).to_have_count(0)


def test_the_presets_are_the_original_report_and_the_defaults(
    visit: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    report = DecodingOptions.report()
    photo, own, original = next(
        (photo, own, original)
        for photo in example_photos
        for own, original in [(captioner.caption(photo), captioner.caption(photo, report))]
        if own.text != original.text
    )
    bring(visit, photo)
    visit.get_by_role("button", name="Settings").click()
    visit.get_by_role("button", name="As the original report").click()
    expect_words(visit, original.text)
    expect(visit.locator(".beam")).to_have_count(1)
    expect(visit.get_by_label("number input for Captions")).to_have_value("1")
    visit.get_by_role("button", name="Back to the defaults").click()
    expect_words(visit, own.text)
    expect(visit.locator(".beam")).to_have_count(3)
    expect(visit.get_by_label("number input for Captions")).to_have_value("3")


def test_a_beam_of_one_gives_one_caption(cat: Page, captioner: Captioner, cat_photo: Path) -> None:
    ask_for_captions(cat, 1)
    greedy = dataclasses.replace(DecodingOptions(), beam_size=1)
    expect_words(cat, captioner.caption(cat_photo, greedy).text)


def test_steering_follows_the_settings(cat: Page, captioner: Captioner, cat_photo: Path) -> None:
    ask_for_captions(cat, 5)
    kept = words_of(cat)[:1]
    other = steer(cat, 1)
    options = DecodingOptions(beam_size=5, prefix=" ".join([*kept, other]))
    expect(cat.locator(".beam .text")).to_have_text(
        [beam.text for beam in captioner.caption(cat_photo, options).beams]
    )


def test_no_alternative_is_offered_that_cannot_be_written_on(cat: Page) -> None:
    cat.get_by_label("Your own words").fill("a zorblax on the grass")
    cat.get_by_role("button", name="Read it as it is").click()
    expect_words(cat, "a zorblax on the grass")
    cat.locator(".word").nth(4).click()
    expect(cat.locator(".alternatives button[title^=Write]")).to_have_count(0)
    cat.locator(".word").nth(1).click()
    expect(cat.locator(".alternatives button[title^=Write]")).not_to_have_count(0)


def test_words_without_a_photo_are_told_what_is_missing(visit: Page) -> None:
    visit.get_by_label("Your own words").fill("a dog")
    visit.get_by_role("button", name="Read it as it is").click()
    expect(visit.get_by_text("bring one first")).to_be_visible(timeout=15_000)
