"""Chromium through playwright; without it these tests skip and say how to install it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from captioner.overlay import page as standalone_page
from captioner.serving import Gate, launch_options
from captioner.viewer import AttentionViewer, View
from tests.browser.visits import click_example


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        advice = "no Chromium: apt-get install chromium (Debian, Ubuntu) and run the tests again"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(advice)
        pytest.skip(advice)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--use-fake-device-for-media-stream",  # a camera, whose use is allowed
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One visitor, who has the page's scripts in the cache from the second visit on."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """An empty page; no script in it may throw."""
    page = context.new_page()
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    yield page
    page.close()
    assert not thrown


@pytest.fixture
def visit(page: Page, served_page: str) -> Page:
    """The real page, as a visitor finds it."""
    page.goto(f"{served_page}?__theme=light")
    return page


@pytest.fixture
def cat(visit: Page) -> Page:
    """The real page with the example of the cat captioned."""
    click_example(visit, "cat")
    return visit


@pytest.fixture
def show(page: Page) -> Iterator[Callable[[View], Page]]:
    """``show(view)``: a page with nothing but the viewer, and that view in it."""
    served: list[gr.Blocks] = []

    def open_view(view: View) -> Page:
        with gr.Blocks(analytics_enabled=False) as demo:
            AttentionViewer(view)
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(Gate()))
        served.append(demo)
        page.goto(f"{url}?__theme=light")
        page.locator(".word").first.wait_for()
        return page

    yield open_view
    for demo in served:
        demo.close()


@pytest.fixture
def open_standalone(page: Page, tmp_path: Path) -> Callable[[View], Page]:
    """``open_standalone(view)``: the page of ``captioner.overlay``, opened as a file."""

    def open_file(view: View) -> Page:
        path = tmp_path / "caption.html"
        path.write_bytes(standalone_page(view.photo, view.caption))
        page.goto(path.as_uri())
        page.locator(".word").first.wait_for()
        return page

    return open_file
