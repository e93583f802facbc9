"""Steps of a visit that many tests take, and captions whose maps are known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, Request, expect

from captioner.inference.caption import Beam, Caption, Word
from captioner.web import View, example_photos

CAT = example_photos()["cat"].path
ASK = 30_000  # milliseconds that an answer of the model may take on a busy machine

# ---- Captions whose maps are known.


def cells(shares: dict[tuple[int, int], float]) -> np.ndarray:
    """A map with these shares, and none elsewhere."""
    attention = np.zeros((7, 7), dtype=np.float32)
    for cell, share in shares.items():
        attention[cell] = share
    return attention


def word(
    text: str,
    attention: np.ndarray,
    probability: float = 0.5,
    known: bool = True,
    verdict: str = "from the scene",
    **maps: np.ndarray,
) -> Word:
    """A word with a verdict, so that the page asks the server for none."""
    others = ((text, probability), ("other", 0.25))
    return Word(text, probability, others, {"attended": attention} | maps, known, 0.5, verdict)


def make_view(words: Sequence[Word], size: tuple[int, int] = (420, 280)) -> View:
    """These words over a gray photo; the end looks at the lower right corner."""
    beam = Beam(tuple(words), word("<eos>", cells({(6, 6): 1.0})), -3.0, -1.0)
    return View(Caption((beam,), size), Image.new("RGB", size, (90, 90, 90)))


# "one" looks at two cells, "two" at one of them and another, "three" elsewhere.
KNOWN = make_view(
    [
        word("one", cells({(0, 0): 0.75, (0, 1): 0.25})),
        word("two", cells({(0, 0): 0.25, (1, 1): 0.75})),
        word("three", cells({(5, 5): 1.0})),
    ]
)

# ---- Waiting.


def wait_for_photo(page: Page) -> None:
    """Wait until a photo and its words are on the page."""
    page.locator(".word").first.wait_for()
    page.wait_for_function("document.querySelector('.photo').naturalWidth > 0")


def expect_words(page: Page, text: str) -> None:
    """Wait until these words, and the end, are the caption."""
    expect(page.locator(".word .text")).to_have_text([*text.split(), "end"], timeout=ASK)


def expect_pressed(page: Page, at: int) -> None:
    """Wait until one word is shown: this one."""
    expect(page.locator(".word[aria-pressed=true]")).to_have_count(1)
    expect(page.locator(".word").nth(at)).to_have_attribute("aria-pressed", "true")


def expect_idle(page: Page) -> None:
    """Wait until no request is on its way."""
    expect(page.locator(".page")).to_have_attribute("aria-busy", "false", timeout=ASK)


# ---- Reading.


def words_of(page: Page) -> list[str]:
    """The caption's words, without the end."""
    return page.locator(".word .text").all_inner_texts()[:-1]


def pressed(page: Page) -> int:
    """The number of the word that is shown, from 0."""
    words = page.locator(".word").evaluate_all("all => all.map((each) => each.ariaPressed)")
    return int(words.index("true"))


def drawn(page: Page) -> str:
    """The map's pixels."""
    return str(page.locator(".map").evaluate("canvas => canvas.toDataURL()"))


def state(page: Page) -> dict[str, Any]:
    """All that a visitor sees of the caption, and the address."""
    return {
        "address": page.evaluate("location.search"),
        "photo": page.locator(".photo").get_attribute("src"),
        "viewer": page.locator(".viewer").inner_text(),
        "map": drawn(page),
        "form": page.locator(".settings input").evaluate_all(
            "all => all.map(({ type, value, checked }) => (type === 'checkbox' ? checked : value))"
        ),
    }


def sent(request: Request) -> dict[str, Any]:
    """What the page sent with an event."""
    return dict((request.post_data_json or {})["event_data"])


def picture(place: Locator) -> Image.Image:
    """What the visitor sees there."""
    return Image.open(io.BytesIO(place.screenshot())).convert("RGB")


# ---- Acting.


def bring(page: Page, photo: Path) -> None:
    """Upload a photo and wait until its caption is there."""
    earlier = page.locator(".photo").get_attribute("src") or ""
    page.locator(".file").set_input_files(photo)
    expect(page.locator(".photo")).not_to_have_attribute("src", earlier, timeout=ASK)
    expect_idle(page)
    wait_for_photo(page)


def click_example(page: Page, title: str) -> None:
    """Open an example and wait until its caption is there."""
    button = page.get_by_label(f"Example: {title}", exact=True)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect_idle(page)


def steer(page: Page, at: int, choice: int = 0) -> str:
    """Put an alternative in the place of a word; return it."""
    page.locator(".word").nth(at).click()
    alternative = page.locator(".alternatives button").nth(choice)
    text = alternative.locator("span").first.inner_text()
    alternative.click()
    expect(page.locator(".word").nth(at).locator(".text")).to_have_text(text, timeout=ASK)
    expect(page.locator(".word").nth(at)).to_have_class("word given")
    expect_idle(page)
    return text


def type_own(page: Page, text: str, button: str) -> None:
    """Type into "Your own words" and press "Continue" or "Score"."""
    page.locator(".own input").fill(text)
    page.locator(".own").get_by_role("button", name=button).click()


def open_settings(page: Page) -> None:
    if not page.locator(".settings").is_visible():
        page.locator(".search summary").click()


def set_setting(page: Page, name: str, value: str) -> None:
    """Unfold the settings, change one and wait for the answer."""
    open_settings(page)
    field = page.locator(f".settings [name={name}]")
    field.fill(value)
    field.press("Tab")
    expect_idle(page)


def ask_for_captions(page: Page, count: int) -> None:
    """Ask for so many captions and wait for them."""
    set_setting(page, "beam_size", str(count))
    expect(page.locator(".beam")).to_have_count(count, timeout=ASK)


def open_all(page: Page) -> None:
    """Unfold everything that can be unfolded."""
    for button in page.locator(".gr-accordion > button").all():
        button.click()
    folded = page.locator("[data-testid=accordion-content]")
    for number in range(folded.count()):
        expect(folded.nth(number)).to_be_visible()
    for summary in page.locator("summary:visible").all():
        summary.click()
    page.locator(".tile").first.wait_for()


def click_cell(page: Page, row: int, column: int) -> None:
    box = page.locator(".grid").bounding_box()
    assert box
    x, y = ((place + 0.5) / 7 for place in (column, row))
    page.locator(".grid").click(position={"x": x * box["width"], "y": y * box["height"]})


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until this has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")
