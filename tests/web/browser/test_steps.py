"""How a word was chosen: every step with its numbers, which add up on the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, Request, Route, expect

from captioner import Captioner
from captioner import web as viewer
from captioner.model.steps import WordSteps, word_steps
from captioner.web import example_photos
from tests.model.tiny import ALL_ON, CHANNELS, REPORT, VOCABULARY, Options, make_model
from tests.web.browser.test_quality import expect_no_barrier
from tests.web.browser.visits import (
    ASK,
    bring,
    expect_pressed,
    pressed,
    sent,
    steer,
    tab_to,
    words_of,
)


def numbers(page: Page, selector: str) -> list[float]:
    """Return the numbers that are written there."""
    texts = page.locator(selector).all_inner_texts()
    return [float(re.sub(r"[=+%\s]", "", text).replace("\u2212", "-")) for text in texts]


def expect_steps_of(page: Page, word: str) -> None:
    """Wait until the section explains a word."""
    expect(page.locator(".steps-title")).to_contain_text(f"\u2068{word}\u2069", timeout=ASK)
    expect(page.locator(".steps-list")).to_have_attribute("aria-busy", "false")


def open_steps(page: Page) -> None:
    """Open the section and wait for the word that is chosen."""
    page.locator(".steps summary").click()
    expect_steps_of(page, page.locator(".word[aria-pressed=true] .text").inner_text())


def steps_requests(page: Page) -> list[Request]:
    """Return a list that grows by every request for steps."""
    found: list[Request] = []

    def note(request: Request) -> None:
        if "/queue/join" in request.url and "words" in sent(request):
            found.append(request)

    page.on("request", note)
    return found


def test_numbers_of_the_open_section_add_up(visit: Page, captioner: Captioner) -> None:
    open_steps(visit)
    at, words = pressed(visit), words_of(visit)
    expected = captioner.steps(example_photos()["cat"].path, words, at)
    scores, shares = numbers(visit, ".scores td"), numbers(visit, ".shares td")
    assert scores == pytest.approx(expected.scores, abs=0.051)
    assert shares == pytest.approx([100 * share for share in expected.attention], abs=0.051)
    assert sum(shares) == pytest.approx(100, abs=49 * 0.05)
    expect(visit.locator(".shares caption")).to_contain_text("together 100.0%")
    rows = visit.locator(".candidates tbody tr")
    assert rows.count() == len(expected.candidates)
    for place, each in enumerate(expected.candidates, 1):
        row = f".candidates tbody tr:nth-child({place}) td"
        output, evidence, pointer, logit, probability = numbers(visit, row)
        assert output + evidence + pointer == pytest.approx(logit, abs=0.021)
        assert logit == pytest.approx(each.logit, abs=0.0051)
        assert probability == pytest.approx(100 * each.probability, abs=0.051)
    expect(visit.locator(".candidates .chosen th")).to_contain_text(words[at])
    number = float(visit.locator(".word .number").nth(at).inner_text().rstrip("%"))
    assert numbers(visit, ".candidates .chosen td:last-child")[0] == pytest.approx(number, abs=0.6)


def test_steps_stand_in_order_beside_their_code(visit: Page, captioner: Captioner) -> None:
    open_steps(visit)
    expected = captioner.steps(example_photos()["cat"].path, words_of(visit), pressed(visit)).code
    steps = visit.locator(".step")
    assert [
        name.split()[-1] for name in steps.evaluate_all("all => all.map((x) => x.className)")
    ] == [name for name in expected if name != "deep"]
    for name, lines in expected.items():
        step = visit.locator(f".step.{'output' if name == 'deep' else name}")
        assert step.locator(".equation").inner_text().strip()
        for line in lines:
            expect(step.locator(".code span", has_text=f"{line.file}:{line.line}")).to_be_visible()
            assert line.text in step.locator(".code code").all_inner_texts()


def test_closed_section_requests_nothing_and_open_one_follows_the_word(visit: Page) -> None:
    requests = steps_requests(visit)
    visit.locator(".word").nth(1).click()
    visit.wait_for_timeout(400)
    assert requests == []
    open_steps(visit)
    words = [*words_of(visit), "(end)"]
    for at in (0, len(words) - 1, 2):
        visit.locator(".word").nth(at).click()
        expect_steps_of(visit, words[at])
    # Looking at the same word again, or another map of it, needs no request.
    count = len(requests)
    assert count == 4
    visit.locator(".word").nth(2).click()
    visit.locator(".strength").evaluate("each => each.dispatchEvent(new Event('input'))")
    visit.wait_for_timeout(400)
    assert len(requests) == count


def test_steps_follow_a_rewritten_caption_an_upload_and_undo(
    visit: Page, example_photos: list[Path], captioner: Captioner
) -> None:
    open_steps(visit)
    words = words_of(visit)
    expect_steps_of(visit, steer(visit, 2))
    visit.locator(".undo").click()
    expect_steps_of(visit, words[2])
    bring(visit, example_photos[1])
    words, at = words_of(visit), pressed(visit)
    expect_steps_of(visit, words[at])
    expected = captioner.steps(example_photos[1], words, at)
    expect(visit.locator(".candidates .chosen")).to_have_count(1)
    assert numbers(visit, ".scores td") == pytest.approx(expected.scores, abs=0.06)


def test_keyboard_opens_the_section_and_walks_along_the_words(visit: Page) -> None:
    tab_to(visit, ".steps summary")
    visit.keyboard.press("Enter")
    words, at = words_of(visit), pressed(visit)
    expect_steps_of(visit, words[at])
    tab_to(visit, ".earlier")
    visit.keyboard.press("Enter")
    expect_pressed(visit, at - 1)
    expect_steps_of(visit, words[at - 1])
    expect(visit.locator(".earlier")).to_be_focused()
    visit.locator(".word").first.click()
    expect_steps_of(visit, words[0])
    expect(visit.locator(".earlier")).to_be_disabled()
    visit.locator(".word").last.click()
    expect_steps_of(visit, "(end)")
    expect(visit.locator(".later")).to_be_disabled()


def test_section_is_usable_after_an_error(visit: Page) -> None:
    visit.locator(".word").first.click()
    open_steps(visit)

    def spoil(route: Route) -> None:
        text = route.request.post_data or ""
        route.continue_(post_data=text.replace('"example":"cat"', '"example":"gone"'))

    visit.route("**/queue/join*", spoil)
    visit.locator(".word").nth(1).click()
    expect(visit.get_by_text("There is no such example").last).to_be_visible(timeout=ASK)
    expect(visit.locator(".steps-list")).to_have_attribute("aria-busy", "false")
    expect(visit.locator(".steps-title")).to_contain_text("The first word")
    visit.unroute("**/queue/join*")
    # Also the word that failed can be asked for again.
    for at in (2, 1):
        visit.locator(".word").nth(at).click()
        expect_steps_of(visit, words_of(visit)[at])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_shows_all_steps_without_scrolling_sideways(
    page: Page, open_page: Callable[..., Page], theme: str
) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    open_page(f"__theme={theme}")
    open_steps(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.locator(".steps, .steps *").evaluate_all(
        """all => all.filter((each) => each.getBoundingClientRect().right > 360
            || (each.clientWidth && each.scrollWidth > each.clientWidth + 1)
        ).map((each) => each.outerHTML)"""
    )
    assert wide == []
    expect(page.locator(".scores td")).to_have_count(49)
    expect_no_barrier(page)


# ---- Other models.

WEB = Path(viewer.__file__).parent
(SECTION,) = re.findall(
    r'<details class="steps">.*?</details>', (WEB / "page.html").read_text(), flags=re.DOTALL
)
HOSTILE = "<img src=x onerror=window.hacked=1>"


def draw(page: Page, options: Options, word: int, text: str) -> WordSteps:
    """Draw the steps of a tiny model in an empty page; the word is written as ``text``."""
    texts = [f"w{index}" for index in range(VOCABULARY)]
    texts[word] = text
    cells = torch.randn(49, CHANNELS, generator=torch.Generator().manual_seed(1))
    steps = word_steps(make_model(**options), cells, [9, word], texts)
    page.set_content(SECTION)
    page.add_script_tag(path=WEB / "steps.js")
    page.evaluate(
        """steps => {
            const root = document.querySelector(".steps");
            root.open = true;
            const explain = ({ request }) => view.show(request, steps);
            const view = mountSteps(root, { explain, move: () => {} });
            view.choose({ words: ["w9", steps.word], word: 1 });
        }""",
        steps.to_dict(),
    )
    page.locator(".candidates").wait_for()
    return steps


def test_steps_that_the_model_lacks_are_not_drawn(page: Page) -> None:
    steps = draw(page, REPORT, 5, "dog")
    assert page.locator(".step").count() == len(steps.code) == 7
    names = page.locator(".step").evaluate_all("all => all.map((each) => each.className)")
    assert names == [f"step {name}" for name in steps.code]
    expect(page.locator(".candidates thead th")).to_have_text(["word", "logit", "p(w)"])
    expect(page.locator(".query")).not_to_contain_text("last word")
    assert not re.search("NaN|undefined|null", page.locator(".steps").inner_text())


def test_hostile_word_that_only_the_pointer_writes_is_explained_as_text(page: Page) -> None:
    draw(page, ALL_ON, 21, HOSTILE)
    expect(page.locator(".output")).to_contain_text("Only the pointer can write it")
    for part in (".steps-title", ".output", ".pointer", ".softmax", ".candidates .chosen"):
        expect(page.locator(part)).to_contain_text(HOSTILE)
    assert not re.search("NaN|undefined|null", page.locator(".steps").inner_text())
    expect(page.locator("img")).to_have_count(0)
    assert page.evaluate("window.hacked") is None
