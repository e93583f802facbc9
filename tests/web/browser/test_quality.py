"""What holds for the whole page: for every visitor, on every visit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from captioner.web import AttentionViewer, Example, View
from captioner.web.middleware import RequestFilter
from captioner.web.server import launch_options
from tests.web.browser.visits import (
    ASK,
    KNOWN,
    bring,
    cells,
    click_cell,
    click_example,
    expect_words,
    make_view,
    open_all,
    steer,
    type_own,
    wait_for_photo,
    word,
)

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


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_page_is_accessible_fresh_on_tour_and_unfolded(
    page: Page, open_page: Callable[..., Page], theme: str
) -> None:
    open_page(f"__theme={theme}")
    expect_no_barrier(page)
    page.locator(".tour").click()
    page.locator(".next").click()
    expect(page.locator(".in-tour")).to_be_visible()
    expect_no_barrier(page)
    page.keyboard.press("Escape")
    steer(page, 5)
    open_all(page)
    click_cell(page, 0, 0)
    expect(page.locator(".word.sharing")).not_to_have_count(0)
    expect_no_barrier(page)
    type_own(page, "a zorblax on the grass", "Score")
    expect_words(page, "a zorblax on the grass")
    page.locator(".camera").click()
    expect(page.locator(".shoot")).to_be_focused(timeout=ASK)
    expect_no_barrier(page)
    page.locator(".close").click()


@pytest.mark.parametrize("theme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_standalone_page_is_accessible(
    open_standalone: Callable[[View], Page], page: Page, theme: Any
) -> None:
    page.emulate_media(color_scheme=theme)
    open_standalone(KNOWN)
    for summary in page.locator("summary:visible").all():
        summary.click()
    click_cell(page, 0, 0)
    expect_no_barrier(page)


@pytest.mark.slow
def test_reduced_motion_disables_all_animation(browser: Browser, served_page: str) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(served_page)
    wait_for_photo(page)
    open_all(page)
    page.locator(".word").nth(2).click()
    page.locator(".tour").click()
    moving = page.locator(".page, .page *").evaluate_all("""all => all.filter((each) =>
        [null, "::before", "::after"].some((part) => {
            const { transitionDuration, animationName } = getComputedStyle(each, part);
            return transitionDuration.split(", ").some((time) => parseFloat(time) > 0)
                || animationName !== "none";
        })).map((each) => each.className)""")
    assert moving == []
    running = """() => document.getAnimations().filter((each) =>
        each.playState === "running" && each.effect.target.closest(".page")).length"""
    assert page.evaluate(running) == 0
    context.close()


# ---- What goes over the network.


def test_visit_requests_no_other_host(visit: Page, example_photos: list[Path]) -> None:
    requests: list[str] = []
    visit.on("request", lambda request: requests.append(request.url))
    visit.reload()
    wait_for_photo(visit)
    bring(visit, example_photos[0])
    click_example(visit, "lion")
    open_all(visit)
    steer(visit, 2)
    visit.locator(".undo").click()
    with visit.expect_download():
        visit.locator("[data-format=png]").click()
    visit.locator(".link").click()
    type_own(visit, "a cat", "Score")
    expect_words(visit, "a cat")
    visit.wait_for_load_state("networkidle")
    assert len(requests) > 20
    hosts = {url.split("/")[2].split(":")[0] for url in requests if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


# ---- Words are words.

HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "${window.hacked=1}",
    "{{value}}",
    "`${window.hacked=1}`",
    "</script><script>window.hacked=1</script>",
    "\"'><svg onload=window.hacked=1>",
    "constructor",
    "__proto__",
]
HOSTILE_VIEW = make_view([word(text, cells({(3, 3): 1.0})) for text in HOSTILE])


def expect_only_text(page: Page) -> None:
    expect(page.locator(".word .text")).to_have_text([*HOSTILE, "end"])
    expect(page.locator(".beam .text")).to_have_text([" ".join(HOSTILE)])
    page.locator(".overview summary").click()
    click_cell(page, 3, 3)
    expect(page.locator(".cells-note")).to_contain_text(HOSTILE[0])
    page.keyboard.press("Escape")
    for number, text in enumerate(HOSTILE):
        page.locator(".word").nth(number).click()
        expect(page.locator(".word-title")).to_have_text(f"“{text}”")
        expect(page.locator(".alternatives li").first).to_contain_text(text)
        expect(page.locator(".badge")).to_contain_text(text)
        expect(page.locator(".tile").nth(number)).to_contain_text(text)
    expect(page.locator(".viewer img")).to_have_count(1)
    expect(page.locator(".page :is(svg, script), img[src=x], svg[onload]")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def test_page_shows_hostile_caption_as_text(page: Page) -> None:
    # As Gradio's own value, with which the page is built.
    (text, *_) = HOSTILE
    assert HOSTILE_VIEW.photo
    example = Example(
        "lion", text, "${window.hacked=1}" + text, HOSTILE_VIEW.photo, HOSTILE_VIEW.caption
    )
    with gr.Blocks(analytics_enabled=False) as demo:
        AttentionViewer(View(HOSTILE_VIEW.caption, examples=[example]))
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(RequestFilter()))
    try:
        page.goto(f"{url}?__theme=light")
        wait_for_photo(page)
        expect_only_text(page)
        expect(page.locator(".note")).to_have_text("${window.hacked=1}" + text)
        expect(page.locator(".examples button")).to_have_attribute("title", text)
    finally:
        demo.close()


def test_standalone_page_shows_hostile_caption_as_text(
    open_standalone: Callable[[View], Page],
) -> None:
    expect_only_text(open_standalone(HOSTILE_VIEW))


@pytest.mark.slow
def test_hostile_visitor_words_are_shown_as_text(visit: Page) -> None:
    type_own(visit, " ".join(HOSTILE), "Score")
    expect(visit.locator(".word.given").nth(1).locator(".text")).to_have_text("srcx", timeout=ASK)
    type_own(visit, " ".join(HOSTILE), "Continue")
    expect(visit.get_by_text("vocabulary").last).to_be_visible(timeout=ASK)
    expect(visit.locator("img[src=x], svg[onload]")).to_have_count(0)
    assert visit.evaluate("window.hacked") is None
