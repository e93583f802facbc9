"""The page as a visitor feels it: from an action to the painted map, in Chromium on localhost."""

from __future__ import annotations

import base64
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from captioner import Captioner
from captioner import web as viewer
from captioner.images import open_photo
from tests.benchmarks.conftest import Ratios
from tests.page import running_page
from tests.web.browser.conftest import browser

__all__ = ["browser"]
pytestmark = pytest.mark.benchmark
TIMES = 20

# Resolves to the milliseconds from the action to the frame after the viewer shows the new caption.
_TIME = """async (act) => {
    const shown = () => {
        const photo = document.querySelector(".photo");
        const words = [...document.querySelectorAll(".word .text")].map((node) => node.textContent);
        return photo.complete ? photo.src + words.join(" ") : null;
    };
    const before = shown();
    const started = performance.now();
    await act();
    return new Promise((done) => {
        const look = () => {
            const now = shown();
            if (now === null || now === before) return requestAnimationFrame(look);
            requestAnimationFrame(() => done(performance.now() - started));
        };
        look();
    });
}"""
_DROP = """() => {
    const bytes = Uint8Array.from(atob(window.sent), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }));
    document.querySelector(".page").dispatchEvent(
        new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""
_CLICK = "() => document.querySelector('%s').click()"


def _jpeg() -> bytes:
    """Return a JPEG of 2000 x 1350 pixels, half a megabyte."""
    photo = open_photo(viewer.example_photos()["motorcycle"].path)
    file = io.BytesIO()
    photo.resize((2000, 1350)).save(file, "JPEG", quality=90)
    return file.getvalue()


def test_waiting(ratios: Ratios, captioner: Captioner, browser: Browser, tmp_path: Path) -> None:
    photo = _jpeg()

    def model() -> float:
        started = time.perf_counter()
        captioner.caption(photo)
        return 1000 * (time.perf_counter() - started)

    def measure(name: str, aim: str, before: Callable[[int], object], act: str) -> None:
        model()
        waits, alone = [], []
        for turn in range(TIMES):
            before(turn)
            page.wait_for_timeout(100)
            waits.append(page.evaluate(f"({_TIME})({act})"))
            alone.append(model())
        ratios.add(
            name,
            statistics.median(waits) / statistics.median(alone),
            aim,
            milliseconds=statistics.median(waits),
            reference_milliseconds=statistics.median(alone),
        )

    with running_page(tmp_path / "page") as served:
        page: Page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(served.address)
        page.locator(".word").first.wait_for()
        page.evaluate("(sent) => { window.sent = sent; }", base64.b64encode(photo).decode())
        examples = page.locator(".examples button")
        measure(
            "click on an example -> its painted map / one photo -> caption",
            "<= 100 ms",
            # As a hand does, which is over the button before it presses.
            lambda turn: examples.nth(1 + turn % 2).hover(),
            _CLICK % ".examples button:hover",
        )
        measure(
            "dropped photo -> its painted map / one photo -> caption",
            "<= 3",
            lambda turn: examples.nth(turn % 2).click(),
            _DROP,
        )
        measure(
            "click on an alternative -> the new caption / one photo -> caption",
            "<= 3",
            lambda _: page.locator(".word").nth(1).click(),
            _CLICK % ".alternatives button",
        )
        page.close()
