"""What holds for the whole page: for every visitor, on every screen, on every visit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from captioner.viewer import View
from tests.browser.visits import (
    KNOWN,
    bring,
    cells,
    click_example,
    expect_words,
    open_all,
    steer,
    view_of,
    word,
)

THEMES = ["light", "dark"]

# ---- Accessible.


def expect_no_barrier(page: Page) -> None:
    """No serious finding of axe, which has looked at the contrast."""
    results = Axe().run(page).response
    found = [
        (rule["id"], [node["target"] for node in rule["nodes"]])
        for rule in results["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
    assert found == []
    assert "color-contrast" in {rule["id"] for rule in results["passes"]}


@pytest.mark.parametrize("theme", THEMES)
def test_a_fresh_page_has_no_barrier(page: Page, served_page: str, theme: str) -> None:
    page.goto(f"{served_page}?__theme={theme}")
    page.get_by_label("Example: cat").wait_for()
    expect_no_barrier(page)


@pytest.mark.parametrize("theme", THEMES)
def test_a_page_with_everything_unfolded_has_no_barrier(
    page: Page, served_page: str, theme: str
) -> None:
    page.goto(f"{served_page}?__theme={theme}")
    click_example(page, "cat")
    open_all(page)
    steer(page, 5)
    page.locator(".grid").click(position={"x": 20, "y": 20})
    expect(page.locator(".answers li").first).to_be_visible()
    expect_no_barrier(page)


@pytest.mark.parametrize("theme", THEMES)
def test_the_standalone_page_has_no_barrier(
    open_standalone: Callable[[View], Page], page: Page, theme: Any
) -> None:
    page.emulate_media(color_scheme=theme)
    open_standalone(KNOWN)
    open_all(page)
    page.locator(".grid").click(position={"x": 20, "y": 20})
    expect_no_barrier(page)


# ---- On every screen.


def expect_no_sideways_scroll(page: Page, width: int) -> None:
    """Nothing is wider than the screen, not even where a box of its own would cut it off."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    parts = page.locator(".viewer :is(button, select, input, p, h2, img, canvas):visible")
    outside = """(all, width) => all.filter((each) => {
        const { left, right } = each.getBoundingClientRect();
        return left < 0 || right > width;
    }).map((each) => each.className || each.tagName)"""
    assert parts.evaluate_all(outside, width) == []


def test_a_narrow_page_never_scrolls_sideways(page: Page, served_page: str) -> None:
    page.set_viewport_size({"width": 360, "height": 780})
    page.goto(f"{served_page}?__theme=light")
    page.get_by_label("Example: cat").wait_for()
    expect_no_sideways_scroll(page, 360)
    click_example(page, "cat")
    expect_no_sideways_scroll(page, 360)
    open_all(page)
    steer(page, 5)
    expect_no_sideways_scroll(page, 360)


def test_a_long_word_does_not_make_a_narrow_page_scroll(show: Callable[[View], Page]) -> None:
    page = show(view_of([word("donaudampfschifffahrtsgesellschaft" * 3, cells({(3, 3): 1.0}))]))
    page.set_viewport_size({"width": 360, "height": 780})
    expect_no_sideways_scroll(page, 360)


@pytest.mark.parametrize("width", [360, 1280])
def test_everything_that_is_pressed_is_large_enough(
    page: Page, served_page: str, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{served_page}?__theme=light")
    click_example(page, "cat")
    open_all(page)
    steer(page, 5)
    page.locator(".grid").click(position={"x": 20, "y": 20})
    controls = page.locator(".viewer :is(button, select, input, summary):visible")
    sizes = controls.evaluate_all("""all => all.map((each) => {
        const { width, height } = each.getBoundingClientRect();
        return [each.className || each.tagName, width, height];
    })""")
    assert len(sizes) > 30
    assert [size for size in sizes if min(size[1:]) < 24] == []


def test_nothing_moves_for_those_who_asked_for_less_motion(
    browser: Browser, served_page: str
) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(served_page)
    click_example(page, "cat")
    open_all(page)
    page.locator(".word").nth(2).click()
    moving = page.locator(".viewer, .viewer *").evaluate_all("""all => all.filter((each) =>
        [null, "::before", "::after"].some((part) => {
            const { transitionDuration, animationName } = getComputedStyle(each, part);
            return transitionDuration.split(", ").some((time) => parseFloat(time) > 0)
                || animationName !== "none";
        })).map((each) => each.className)""")
    assert moving == []
    running = """() => document.getAnimations().filter((each) =>
        each.playState === "running" && each.effect.target.closest(".viewer")).length"""
    assert page.evaluate(running) == 0
    context.close()


# ---- What goes over the network.


def test_nothing_is_asked_of_another_host_in_a_whole_visit(
    visit: Page, example_photos: list[Path]
) -> None:
    requests: list[str] = []
    visit.on("request", lambda request: requests.append(request.url))
    visit.reload()
    bring(visit, example_photos[0])
    click_example(visit, "cat")
    open_all(visit)
    steer(visit, 2)
    visit.locator(".undo").click()
    with visit.expect_download():
        visit.locator("[data-format=png]").click()
    visit.get_by_label("Your own words").fill("a cat")
    visit.get_by_role("button", name="Read it as it is").click()
    expect_words(visit, "a cat")
    visit.wait_for_load_state("networkidle")
    assert len(requests) > 20
    hosts = {url.split("/")[2].split(":")[0] for url in requests if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


def test_the_answer_to_a_large_photo_stays_small(visit: Page, tmp_path: Path) -> None:
    photo = tmp_path / "noise.jpg"
    Image.effect_noise((4000, 3000), 80).convert("RGB").save(photo, quality=50)
    client = visit.context.new_cdp_session(visit)
    client.send("Network.enable")
    addresses: dict[str, str] = {}
    sizes: dict[str, int] = {}
    client.on(
        "Network.requestWillBeSent",
        lambda event: addresses.update({event["requestId"]: event["request"]["url"]}),
    )

    def count(event: dict[str, Any]) -> None:
        address = addresses.get(event["requestId"], "asked for before")
        sizes[address] = sizes.get(address, 0) + event["dataLength"]

    client.on("Network.dataReceived", count)
    bring(visit, photo)
    visit.wait_for_function("document.querySelector('.photo').naturalWidth > 0")
    source = visit.locator(".photo").get_attribute("src")
    stream = sum(size for address, size in sizes.items() if "/queue/data" in address)
    picture = sum(size for address, size in sizes.items() if address == source)
    print(f"payload: {stream} bytes of values, {picture} bytes of photo")
    assert stream > 1000
    assert picture > 10_000
    assert stream + picture < 400_000


# ---- Words are words.

HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "${window.hacked=1}",
    "{{value}}",
    "`${window.hacked=1}`",
    "</script><script>window.hacked=1</script>",
    "\"'><svg onload=window.hacked=1>",
]
HOSTILE_VIEW = view_of([word(text, cells({(3, 3): 1.0})) for text in HOSTILE])


def expect_only_text(page: Page) -> None:
    expect(page.locator(".word .text")).to_have_text([*HOSTILE, "end"])
    expect(page.locator(".beam .text")).to_have_text([" ".join(HOSTILE)])
    open_all(page)
    page.locator(".grid").click(position={"x": 200, "y": 100})
    for number, text in enumerate(HOSTILE):
        page.locator(".word").nth(number).click()
        expect(page.locator(".word-title")).to_have_text(f"“{text}”")
        expect(page.locator(".alternatives li").first).to_contain_text(text)
        expect(page.locator(".badge")).to_contain_text(text)
    expect(page.locator(".viewer img")).to_have_count(1)
    expect(page.locator(".viewer :is(svg, script)")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def test_a_hostile_caption_is_shown_as_text(show: Callable[[View], Page]) -> None:
    expect_only_text(show(HOSTILE_VIEW))


def test_a_hostile_caption_is_shown_as_text_in_the_standalone_page(
    open_standalone: Callable[[View], Page],
) -> None:
    expect_only_text(open_standalone(HOSTILE_VIEW))


def test_hostile_words_of_the_visitor_are_only_words(cat: Page) -> None:
    cat.get_by_label("Your own words").fill(" ".join(HOSTILE))
    cat.get_by_role("button", name="Read it as it is").click()
    expect(cat.locator(".word.given").nth(1).locator(".text")).to_have_text("srcx")
    cat.get_by_role("button", name="Write on from here").click()
    expect(cat.get_by_text("isn't in the model's vocabulary")).to_be_visible()
    expect(cat.locator("img[src=x], svg[onload]")).to_have_count(0)
    assert cat.evaluate("window.hacked") is None
