"""Chromium through playwright; without it these tests skip and say how to install it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from captioner.images import display_jpeg
from captioner.inference.render import page as standalone_page
from captioner.web import View
from tests.web.browser.visits import wait_for_photo, wait_for_verdicts


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
    context = browser.new_context(
        viewport={"width": 1366, "height": 768},
        permissions=["clipboard-read", "clipboard-write", "camera"],
    )
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
def open_page(page: Page, served_page: str) -> Callable[..., Page]:
    """``open_page(query)``: the real page at an address, with a caption."""

    def open_address(query: str = "__theme=light") -> Page:
        page.goto(f"{served_page}?{query}")
        wait_for_photo(page)
        wait_for_verdicts(page)
        return page

    return open_address


@pytest.fixture
def visit(open_page: Callable[..., Page]) -> Page:
    """The real page as a visitor finds it: the cat and its caption."""
    return open_page()


@pytest.fixture
def show(page: Page, open_page: Callable[..., Page]) -> Callable[..., Page]:
    """``show(view, **fields)``: the real page with that photo and caption as an example."""

    def open_view(view: View, **fields: object) -> Page:
        assert view.photo
        photo, answer = display_jpeg(view.photo), json.dumps(view.caption.to_dict() | fields)

        def send(route: Route) -> None:
            name = route.request.url.rpartition("/")[2]
            body = photo if name == "photo.jpg" else answer
            route.fulfill(body=body, content_type="image/jpeg" if body is photo else "text/json")

        page.route("**/photo.jpg", send)
        page.route("**/caption.json", send)
        return open_page("__theme=light&example=lion")

    return open_view


@pytest.fixture
def open_standalone(page: Page, tmp_path: Path) -> Callable[[View], Page]:
    """``open_standalone(view)``: the page of ``captioner.overlay``, opened as a file."""

    def open_file(view: View) -> Page:
        path = tmp_path / "caption.html"
        assert view.photo
        path.write_bytes(standalone_page(view.photo, view.caption))
        page.goto(path.as_uri())
        wait_for_photo(page)
        return page

    return open_file
