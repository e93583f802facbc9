"""Looking around in a caption: maps, words, cells, beams, playing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

from captioner import Captioner
from captioner.viewer import View
from tests.browser.visits import (
    KNOWN,
    cells,
    drawn,
    expect_pressed,
    expect_words,
    picture,
    view_of,
    word,
)

CORNERS_AND_MORE = [(0, 0), (0, 6), (6, 0), (3, 3), (1, 5), (4, 2), (5, 6)]

# Points at every word in turn: what one animation frame shows, and what it asks of the server.
HOVER = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    const map = document.querySelector(".viewer .map");
    const seen = [];
    await frame();
    performance.clearResourceTimings();
    for (const node of document.querySelectorAll(".word[aria-pressed=false]")) {
        const before = map.toDataURL();
        await frame();
        const start = performance.now();
        node.dispatchEvent(new PointerEvent("pointerenter", { pointerType: "mouse" }));
        const took = performance.now() - start;
        await frame();
        seen.push({ took, changed: map.toDataURL() !== before });
    }
    return { seen, requests: performance.getEntriesByType("resource").length };
}"""


def test_pointing_at_a_word_paints_its_map_in_one_frame_without_a_request(cat: Page) -> None:
    cat.wait_for_load_state("networkidle")
    requests: list[str] = []
    cat.on("request", lambda request: requests.append(request.url))
    result = cat.evaluate(HOVER)
    times = [each["took"] for each in result["seen"]]
    print(f"map painted in {statistics.median(times):.1f} ms, at most {max(times):.1f} ms")
    assert len(times) > 3
    assert all(each["changed"] for each in result["seen"])
    assert result["requests"] == 0
    assert requests == []


def test_the_pointer_previews_a_word_and_a_click_pins_it(cat: Page) -> None:
    start = drawn(cat)
    cat.locator(".word").nth(5).hover()
    expect_pressed(cat, 5)
    assert drawn(cat) != start
    cat.mouse.move(0, 0)
    expect_pressed(cat, 1)
    assert drawn(cat) == start
    cat.locator(".word").nth(5).click()
    cat.mouse.move(0, 0)
    expect_pressed(cat, 5)
    assert drawn(cat) != start


@pytest.mark.parametrize("size", [(630, 210), (210, 630), (420, 420)])
def test_the_brightest_place_is_the_cell_that_the_word_looks_at(
    show: Callable[[View], Page], size: tuple[int, int]
) -> None:
    looks = [word(f"{cell}", cells({cell: 1.0})) for cell in CORNERS_AND_MORE]
    page = show(view_of(looks, size))
    page.add_style_tag(content=".badge { display: none }")
    page.wait_for_function("document.querySelector('.photo').naturalWidth > 0")
    for shape in ("smooth", "raw cells"):
        page.locator(".shape").select_option(shape)
        for at, cell in enumerate(CORNERS_AND_MORE):
            page.locator(".word").nth(at).click()
            frame = picture(page.locator(".frame"))
            # The outermost pixels show what is behind the round corners.
            pixels = np.asarray(frame.convert("L"))[8:-8, 8:-8]
            brightest = np.argwhere(pixels == pixels.max()) + 8.5
            side = np.array(frame.size[::-1]) / 7
            corner = side * cell
            # Where two cells meet, a pixel belongs to both.
            assert (brightest > corner - 1).all()
            assert (brightest < corner + side + 1).all()


def click_cell(page: Page, row: int, column: int) -> None:
    page.locator(".grid [role=gridcell]").nth(row * 7 + column).hover(force=True)
    page.mouse.down()
    page.mouse.up()


def answers(page: Page) -> list[str]:
    return [text.replace("\n", ": ") for text in page.locator(".answers li").all_inner_texts()]


def test_a_cell_tells_which_words_looked_there_most_first(show: Callable[[View], Page]) -> None:
    page = show(KNOWN)
    click_cell(page, 0, 0)
    assert answers(page) == ["one: 75 %", "two: 25 %", "three: 0.0 %"]
    page.locator(".answers button").nth(1).click()
    expect_pressed(page, 1)
    click_cell(page, 5, 5)
    assert answers(page)[0] == "three: 100 %"


def test_a_second_click_on_a_cell_takes_the_question_back(show: Callable[[View], Page]) -> None:
    page = show(KNOWN)
    question = page.locator(".question").inner_text()
    click_cell(page, 0, 0)
    expect(page.locator(".cell[aria-selected=true]")).to_have_count(1)
    click_cell(page, 0, 0)
    expect(page.locator(".cell[aria-selected=true]")).to_have_count(0)
    assert answers(page) == []
    assert page.locator(".question").inner_text() == question


def test_a_drag_asks_for_several_cells_together(show: Callable[[View], Page]) -> None:
    page = show(KNOWN)
    cell = page.locator(".grid [role=gridcell]")
    cell.nth(0).hover(force=True)
    page.mouse.down()
    cell.nth(1).hover(force=True)
    page.mouse.up()
    cell.nth(8).hover(force=True)
    assert answers(page) == ["one: 100 %", "two: 25 %", "three: 0.0 %"]


def test_another_caption_brings_its_own_words_and_maps_and_details(
    cat: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    (photo,) = [path for path in example_photos if path.name == "chelsea.png"]
    beams = captioner.caption(photo).beams
    assert len(beams) == 3
    maps = []
    expect(cat.locator(".beam .text")).to_have_text([beam.text for beam in beams])
    for number, beam in list(enumerate(beams))[::-1]:
        cat.locator(".beam").nth(number).click()
        expect_words(cat, beam.text)
        last = len(beam.words) - 1
        cat.locator(".word").nth(last).click()
        expect(cat.locator(".detail")).to_contain_text(f"most at the {beam.words[-1].place} ")
        weights = beam.words[-1].attention.flatten()
        strongest = cat.locator(".cell").nth(int(weights.argmax()))
        name = strongest.get_attribute("aria-label") or ""
        assert float(name.split(": ")[1].rstrip(" %")) == pytest.approx(
            100 * weights.max(), abs=0.51
        )
        maps.append(drawn(cat))
    # A map depends on the words before its own.
    assert len(set(maps)) == len({tuple(word.text for word in beam.words[:-1]) for beam in beams})


# Notes every word that the badge shows from now on.
NOTE = """() => {
    window.shown = [];
    const badge = document.querySelector(".badge");
    const note = () => window.shown.push(badge.textContent.split(" ")[0]);
    new MutationObserver(note).observe(badge, { childList: true });
}"""


def test_play_steps_through_the_words_and_stops_at_the_end(show: Callable[[View], Page]) -> None:
    page = show(KNOWN)
    page.evaluate(NOTE)
    page.locator(".play").click()
    expect(page.locator(".play")).to_have_text("Pause")
    expect(page.locator(".play")).to_have_text("Play", timeout=10_000)
    assert page.evaluate("window.shown") == ["one", "two", "three", "end"]
    expect_pressed(page, 3)


def test_play_can_be_paused_and_starts_anew_after_the_end(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    page.locator(".word").last.click()
    page.locator(".play").click()
    expect_pressed(page, 0)
    page.locator(".play").click()
    expect(page.locator(".play")).to_have_text("Play")


def test_the_slider_goes_to_a_word(open_standalone: Callable[[View], Page]) -> None:
    page = open_standalone(KNOWN)
    page.locator(".position").fill("2")
    expect_pressed(page, 2)
    expect(page.locator(".position")).to_have_attribute("aria-valuetext", "three")
    expect(page.locator(".position")).to_have_attribute("max", "3")


def test_strength_zero_shows_the_bare_photo(open_standalone: Callable[[View], Page]) -> None:
    page = open_standalone(KNOWN)
    page.add_style_tag(content=".badge { display: none }")
    frame = page.locator(".frame")
    covered = picture(frame)
    page.locator(".strength").fill("0")
    bare = picture(frame)
    page.add_style_tag(content=".map { display: none }")
    assert not ImageChops.difference(bare, picture(frame)).getbbox()
    assert ImageChops.difference(bare, covered).getbbox()


def test_shapes_and_colours_and_scales_all_draw_another_map(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    maps = [drawn(page)]
    colours = page.locator(".colors option").all_inner_texts()
    assert len(colours) == 4
    for name in colours[1:]:
        page.locator(".colors").select_option(name)
        maps.append(drawn(page))
    page.locator(".shape").select_option("raw cells")
    maps.append(drawn(page))
    page.locator(".range").select_option("shared")
    maps.append(drawn(page))
    assert len(set(maps)) == len(maps)


def test_the_scale_says_what_its_colours_stand_for(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    scale = page.locator(".scale")
    expect(scale).to_contain_text("each word has its own scale")
    expect(scale.locator(".high")).to_have_text("75 %")
    page.locator(".range").select_option("shared")
    expect(scale).to_contain_text("one scale for all words")
    expect(scale.locator(".high")).to_have_text("100 %")


def test_the_overview_shows_a_tile_for_every_word_and_the_end(cat: Page) -> None:
    cat.locator(".overview summary").click()
    expect(cat.locator(".tile")).to_have_count(cat.locator(".word").count())
    texts = cat.locator(".tile").all_inner_texts()
    assert [text.split()[0] for text in texts] == cat.locator(".word .text").all_inner_texts()
    maps = cat.locator(".tile canvas").evaluate_all("all => all.map((one) => one.toDataURL())")
    assert len(set(maps)) == len(maps)
    cat.locator(".tile").nth(4).click()
    expect_pressed(cat, 4)


def test_a_tap_on_a_word_shows_it(open_standalone: Callable[[View], Page]) -> None:
    page = open_standalone(KNOWN)
    page.locator(".word").nth(2).dispatch_event("pointerenter", {"pointerType": "touch"})
    expect_pressed(page, 0)
    page.locator(".word").nth(2).dispatch_event("click")
    expect_pressed(page, 2)


def test_the_caption_is_the_photos_alternative_text(
    open_standalone: Callable[[View], Page],
) -> None:
    expect(open_standalone(KNOWN).locator(".photo")).to_have_attribute("alt", "one two three")


def test_the_photo_is_seen_through_the_map(show: Callable[[View], Page]) -> None:
    view = view_of([word("left", cells({(3, 0): 1.0}))])
    colours = Image.new("RGB", (420, 280), "blue")
    colours.paste("red", (210, 0, 420, 280))
    page = show(View(colours, view.caption))
    page.wait_for_function("document.querySelector('.photo').naturalWidth > 0")
    page.locator(".strength").fill("0")
    frame = picture(page.locator(".frame"))
    red, _, blue = frame.getpixel((frame.width * 3 // 4, frame.height // 4))  # type: ignore[misc]
    assert red > 200 > 60 > blue
    red, _, blue = frame.getpixel((frame.width // 4, frame.height // 4))  # type: ignore[misc]
    assert blue > 200 > 60 > red
