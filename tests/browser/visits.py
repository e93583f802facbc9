"""What the tests do on the page again and again, and captions whose maps are known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from captioner.caption import Beam, Caption, Word
from captioner.viewer import View

# ---- Captions whose maps are known.


def cells(shares: dict[tuple[int, int], float]) -> np.ndarray:
    """A map that looks at these cells and no others."""
    attention = np.zeros((7, 7), dtype=np.float32)
    for cell, share in shares.items():
        attention[cell] = share
    return attention


def word(text: str, attention: np.ndarray, probability: float = 0.5) -> Word:
    return Word(text, probability, ((text, probability), ("other", 0.25)), attention)


def view_of(words: Sequence[Word], size: tuple[int, int] = (420, 280)) -> View:
    """These words over a grey photo; the end looks at the lower right corner."""
    beam = Beam(tuple(words), word("<eos>", cells({(6, 6): 1.0})), -3.0, -1.0)
    return View(Image.new("RGB", size, (90, 90, 90)), Caption((beam,), size))


# "one" looks at two cells, "two" at one of them and another, "three" elsewhere.
KNOWN = view_of(
    [
        word("one", cells({(0, 0): 0.75, (0, 1): 0.25})),
        word("two", cells({(0, 0): 0.25, (1, 1): 0.75})),
        word("three", cells({(5, 5): 1.0})),
    ]
)

# ---- Steps of a visit.


def bring(page: Page, photo: Path) -> None:
    """Upload a photo and wait until its caption is there."""
    earlier = page.locator(".photo").get_attribute("src")
    page.locator("input[type=file]").first.set_input_files(photo)
    if earlier:
        expect(page.locator(".photo")).not_to_have_attribute("src", earlier, timeout=30_000)
    page.locator(".word").first.wait_for()


def click_example(page: Page, subject: str) -> None:
    page.get_by_label(f"Example: {subject}", exact=True).click()
    page.locator(".word").first.wait_for()


def expect_words(page: Page, text: str) -> None:
    """Wait until these words, and the end, are the caption."""
    expect(page.locator(".word .text")).to_have_text([*text.split(), "end"], timeout=15_000)


def words_of(page: Page) -> list[str]:
    """The caption's words, without the end."""
    return page.locator(".word .text").all_inner_texts()[:-1]


def expect_pressed(page: Page, at: int) -> None:
    """Wait until one word is shown: this one."""
    expect(page.locator(".word[aria-pressed=true]")).to_have_count(1)
    expect(page.locator(".word").nth(at)).to_have_attribute("aria-pressed", "true")


def drawn(page: Page) -> str:
    """The map's pixels."""
    return str(page.locator(".map").evaluate("canvas => canvas.toDataURL()"))


def everything(page: Page) -> tuple[str, str]:
    """All that the viewer says, and its map."""
    return page.locator(".filled").inner_text(), drawn(page)


def steer(page: Page, at: int, choice: int = 0) -> str:
    """Put an alternative in the place of a word; return it."""
    page.locator(".word").nth(at).click()
    alternative = page.locator(".alternatives button").nth(choice)
    text = alternative.locator("span").first.inner_text()
    alternative.click()
    expect(page.locator(".word").nth(at).locator(".text")).to_have_text(text)
    expect(page.locator(".word").nth(at)).to_have_class("word given")
    return text


def ask_for_captions(page: Page, count: int) -> None:
    """Unfold the settings, ask for so many captions and wait for them."""
    page.get_by_role("button", name="Settings").click()
    number = page.get_by_label("number input for Captions")
    for _ in range(10):
        # Gradio sets the value once more while it unfolds: what was typed before that is lost.
        number.fill(str(count))
        number.press("Tab")
        page.wait_for_timeout(500)
        if number.input_value() == str(count):
            break
    expect(page.locator(".beam")).to_have_count(count, timeout=30_000)


def open_all(page: Page) -> None:
    """Unfold everything that can be unfolded."""
    for button in page.locator(".gr-accordion > button").all():
        button.click()
    folded = page.locator("[data-testid=accordion-content]")
    for number in range(folded.count()):
        expect(folded.nth(number)).to_be_visible()
    if page.locator(".overview summary").is_visible():
        page.locator(".overview summary").click()
        page.locator(".tile").first.wait_for()


def picture(place: Locator) -> Image.Image:
    """What the visitor sees there."""
    return Image.open(io.BytesIO(place.screenshot())).convert("RGB")


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until this has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def expect_focus_kept(page: Page) -> None:
    page.wait_for_function("document.querySelector('.viewer').contains(document.activeElement)")
