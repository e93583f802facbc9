"""Exploring a caption: maps, words, cells, beams, playing."""

from __future__ import annotations

import dataclasses
import datetime as dt
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

from captioner import Captioner, DecodingOptions
from captioner.inference.caption import Word
from captioner.web import View, example_photos
from tests.web.browser.visits import (
    CAT,
    KNOWN,
    cells,
    click_cell,
    drawn,
    expect_pressed,
    expect_words,
    make_view,
    open_settings,
    picture,
    set_setting,
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

# Where the brightest pixels of photo and map together lie, from low to high, as [row, column] of
# 7 x 7 cells; and whether photo, map and cells cover the frame exactly.
BRIGHTEST = """() => {
    const box = (name) => {
        const { x, y, width, height } = document.querySelector(name).getBoundingClientRect();
        return [x, y, width, height].map(Math.round).join();
    };
    const same = [".photo", ".map", ".grid"].every((name) => box(name) === box(".frame"));
    const { width, height } = document.querySelector(".map");
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(document.querySelector(".photo"), 0, 0, width, height);
    context.drawImage(document.querySelector(".map"), 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    let most = -1, at = [];
    for (let pixel = 0; pixel < width * height; pixel++) {
        const light = data[4 * pixel] + data[4 * pixel + 1] + data[4 * pixel + 2];
        if (light > most) [most, at] = [light, []];
        if (light === most) at.push(pixel);
    }
    const rows = at.map((pixel) => (7 * (Math.floor(pixel / width) + 0.5)) / height);
    const columns = at.map((pixel) => (7 * ((pixel % width) + 0.5)) / width);
    const ends = (take) => [rows, columns].map((all) => all.reduce((a, b) => take(a, b)));
    return { same, low: ends(Math.min), high: ends(Math.max) };
}"""


def test_hover_paints_the_map_in_one_frame_and_click_pins_it(visit: Page) -> None:
    visit.wait_for_load_state("networkidle")
    requests: list[str] = []
    visit.on("request", lambda request: requests.append(request.url))
    result = visit.evaluate(HOVER)
    times = [each["took"] for each in result["seen"]]
    print(f"map painted in {statistics.median(times):.1f} ms, at most {max(times):.1f} ms")
    assert len(times) > 3
    assert all(each["changed"] for each in result["seen"])
    assert result["requests"] == 0
    assert requests == []

    visit.locator(".word").nth(1).click()
    visit.mouse.move(0, 0)
    start = drawn(visit)
    visit.locator(".word").nth(5).hover()
    expect_pressed(visit, 5)
    assert drawn(visit) != start
    visit.mouse.move(0, 0)
    expect_pressed(visit, 1)
    assert drawn(visit) == start
    visit.locator(".word").nth(5).click()
    visit.mouse.move(0, 0)
    expect_pressed(visit, 5)
    assert drawn(visit) != start


@pytest.mark.parametrize("size", [(630, 210), pytest.param((210, 630), marks=pytest.mark.slow)])
def test_brightest_place_is_the_attended_cell(
    show: Callable[..., Page], size: tuple[int, int]
) -> None:
    page = show(make_view([word(f"{cell}", cells({cell: 1.0})) for cell in CORNERS_AND_MORE], size))
    page.locator(".appearance summary").click()
    for shape in ("smooth", "raw cells"):
        page.locator(".shape").select_option(shape)
        for at, cell in enumerate(CORNERS_AND_MORE):
            page.locator(".word").nth(at).dispatch_event("click")
            found = page.evaluate(BRIGHTEST)
            assert found["same"]
            # Where two cells meet, a pixel belongs to both.
            assert (np.array(found["low"]) > np.array(cell) - 0.05).all()
            assert (np.array(found["high"]) < np.array(cell) + 1.05).all()
    # The same on the screen, with all that the browser lays over the photo.
    page.add_style_tag(content=".badge { display: none }")
    page.mouse.move(0, 0)
    frame = picture(page.locator(".frame"))
    pixels = np.asarray(frame.convert("L"))[8:-8, 8:-8]  # without the round corners
    brightest = np.argwhere(pixels == pixels.max()) + 8.5
    place = brightest * 7 / frame.size[::-1]
    assert (place > np.array(cell) - 0.05).all()
    assert (place < np.array(cell) + 1.05).all()


def test_photo_is_visible_through_the_map(show: Callable[..., Page]) -> None:
    view = make_view([word("left", cells({(3, 0): 1.0}))])
    colors = Image.new("RGB", (420, 280), "blue")
    colors.paste("red", (210, 0, 420, 280))
    page = show(View(view.caption, colors))
    page.locator(".appearance summary").click()
    page.locator(".strength").fill("0")
    frame = picture(page.locator(".frame"))
    red, _, blue = frame.getpixel((frame.width * 3 // 4, frame.height // 4))  # type: ignore[misc]
    assert red > 200 > 60 > blue
    red, _, blue = frame.getpixel((frame.width // 4, frame.height // 4))  # type: ignore[misc]
    assert blue > 200 > 60 > red


# ---- Which words looked here?


def shares(page: Page) -> list[str]:
    """The numbers on the words."""
    return page.locator(".word .number").all_inner_texts()


def border(page: Page, row: int, column: int) -> str:
    """The color and the width of a cell's border, as the browser draws it."""
    read = "cell => [getComputedStyle(cell).borderTopColor, getComputedStyle(cell).borderTopWidth]"
    return " ".join(page.locator(".cell").nth(row * 7 + column).evaluate(read))


def test_selected_cells_show_each_words_share(show: Callable[..., Page]) -> None:
    page = show(KNOWN)
    probabilities = ["50%"] * 4
    assert shares(page) == probabilities
    selected = page.locator(".cell[aria-selected=true]")

    click_cell(page, 0, 0)
    assert shares(page) == ["75%", "25%", "0.0%", "0.0%"]
    # While the mouse is over the grid.
    assert border(page, 0, 0) == "rgb(255, 255, 255) 2px"
    assert border(page, 0, 1) == "rgba(255, 255, 255, 0.18) 1px"
    assert page.locator(".grid").evaluate("grid => grid.matches(':hover')")
    expect(page.locator(".cells-note")).to_contain_text("one 75%, two 25%")
    expect(page.locator(".badge")).to_contain_text("this cell")

    click_cell(page, 5, 5)
    assert shares(page) == ["0.0%", "0.0%", "100%", "0.0%"]
    expect(selected).to_have_count(1)
    click_cell(page, 5, 5)
    assert shares(page) == probabilities
    expect(selected).to_have_count(0)
    expect(page.locator(".cells-note")).to_have_text("")

    # A drag that starts on the one selected cell selects; another cell joins it with Shift.
    click_cell(page, 0, 0)
    grid = page.locator(".grid").bounding_box()
    assert grid
    place = {
        (row, column): (
            grid["x"] + (column + 0.5) * grid["width"] / 7,
            grid["y"] + (row + 0.5) * grid["height"] / 7,
        )
        for row in range(7)
        for column in range(7)
    }
    page.mouse.move(*place[0, 0])
    page.mouse.down()
    page.mouse.move(*place[0, 1], steps=3)
    page.mouse.up()
    page.mouse.move(*place[1, 1], steps=3)
    expect(selected).to_have_count(2)
    assert shares(page) == ["100%", "25%", "0.0%", "0.0%"]
    page.keyboard.down("Shift")
    page.mouse.click(*place[1, 1])
    page.keyboard.up("Shift")
    assert shares(page) == ["100%", "100%", "0.0%", "0.0%"]
    expect(page.locator(".badge")).to_contain_text("these 3 cells")

    # The selection stays when another word is shown, and goes with its button.
    page.locator(".word").nth(2).click()
    assert shares(page) == ["100%", "100%", "0.0%", "0.0%"]
    page.get_by_role("button", name="Clear the selection").click()
    assert shares(page) == probabilities
    expect(selected).to_have_count(0)
    expect(page.locator(".clear")).to_be_hidden()
    expect(page.locator(".grid")).to_be_focused()


def percent(share: float) -> float:
    """Half of the last digit that the page shows of it."""
    return 0.51 if share >= 0.0995 else 0.051


def test_each_caption_has_its_own_words_maps_and_numbers(visit: Page, captioner: Captioner) -> None:
    beams = captioner.caption(CAT).beams
    assert len(beams) == 3
    maps = []
    expect(visit.locator(".beam .text")).to_have_text([beam.text for beam in beams])
    for number, beam in list(enumerate(beams))[::-1]:
        visit.locator(".beam").nth(number).click()
        expect_words(visit, beam.text)
        last = beam.words[-1]
        visit.locator(".word").nth(len(beam.words) - 1).click()
        expect(visit.locator(".detail")).to_contain_text(f"strongest at {last.region} ")
        strongest = visit.locator(".cell").nth(int(last.attention.argmax()))
        name = strongest.get_attribute("aria-label") or ""
        share = float(last.attention.max())
        shown = float(name.split(": ")[1].rstrip("%"))
        assert shown == pytest.approx(100 * share, abs=percent(share))
        click_cell(visit, 4, 2)
        for shown_share, each in zip(shares(visit), [*beam.words, beam.end], strict=True):
            share = float(each.attention[4, 2])
            number_shown = float(shown_share.rstrip("%"))
            assert number_shown == pytest.approx(100 * share, abs=percent(share))
        maps.append(drawn(visit))
    # A map depends on the words before its own.
    assert len(set(maps)) == len({tuple(word.text for word in beam.words[:-1]) for beam in beams})


# ---- Numbers and unknown words.


@pytest.mark.slow
def test_captions_show_their_ranking_score(visit: Page, captioner: Captioner) -> None:
    def number(value: float) -> str:
        return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")

    def expect_numbers(options: DecodingOptions) -> list[float]:
        beams = captioner.caption(CAT, options).beams
        expect(visit.locator(".beam .number")).to_have_text(
            [f"score {number(b.score)} · log p {number(b.log_probability)}" for b in beams]
        )
        return [beam.score for beam in beams]

    scores = expect_numbers(DecodingOptions())
    assert sorted(scores, reverse=True) == scores
    expect(visit.locator(".ranking")).to_contain_text("Ranked by score")
    expect(visit.locator(".ranking")).to_contain_text("length")
    expect(visit.locator(".beams-title")).to_have_text("Alternative captions")
    set_setting(visit, "temperature", "1")
    expect(visit.locator(".beams-title")).to_have_text("Sampled captions")
    expect(visit.locator(".ranking")).to_contain_text("drawn at random")
    expect_numbers(DecodingOptions(temperature=1.0, samples=3))


@pytest.mark.parametrize(
    ("confidence", "text"),
    [
        (1.0, "Sure: about 9 in 10 captions like this are right"),
        (0.75, "Sure: about 8 in 10 captions like this are right"),
        (0.74, "Fairly sure: about 7 in 10 captions like this are right"),
        (0.54, "Unsure: about 5 in 10 captions like this are right"),
        (0.3, "Unsure: about 3 in 10 captions like this are right"),
        (0.0, "A guess: about 1 in 10 captions like this are right"),
    ],
)
def test_confidence_of_the_best_caption_is_one_line_of_words(
    open_standalone: Callable[[View], Page], confidence: float, text: str
) -> None:
    (beam,) = KNOWN.caption.beams
    caption = dataclasses.replace(KNOWN.caption, beams=(beam, beam), confidence=confidence)
    page = open_standalone(dataclasses.replace(KNOWN, caption=caption))
    page.set_viewport_size({"width": 360, "height": 640})
    line = page.locator(".confidence")
    expect(line).to_have_text(text)
    place = "node => [node.offsetTop, node.offsetHeight]"
    before = line.evaluate(place)
    assert before[1] < 24
    page.locator(".beam").nth(1).click()
    expect(line).to_have_text("")  # nothing is known of the others
    assert line.evaluate(place) == before


def test_caption_without_confidence_has_no_line_for_it(
    open_standalone: Callable[[View], Page],
) -> None:
    expect(open_standalone(KNOWN).locator(".confidence")).to_be_hidden()


def look(page: Page, at: int) -> tuple[str, str]:
    """The color and the decoration of a word's chip, away from the pointer."""
    page.mouse.move(0, 0)
    read = """node => [getComputedStyle(node).backgroundColor,
        getComputedStyle(node.querySelector(".text")).textDecorationLine + " " +
        getComputedStyle(node.querySelector(".text")).textDecorationStyle]"""
    color, decoration = page.locator(".word").nth(at).evaluate(read)
    return color, decoration


UNK = "<unk>"


def test_unknown_word_is_named_and_never_looks_chosen(
    show: Callable[..., Page],
) -> None:
    at = cells({(3, 3): 1.0})
    words = [
        word("a", at),
        Word(UNK, 0.4, ((UNK, 0.4), ("dog", 0.3)), {"attended": at}),
        word("constructor", at, known=False),
        Word("dog", 0.3, ((UNK, 0.4), ("dog", 0.3)), {"attended": at}),
    ]
    page = show(make_view(words))
    assert page.locator(".word .text").all_inner_texts() == [
        *("a", "(unknown word)", "constructor", "dog", "end")
    ]
    expect(page.locator(".beam .text")).to_have_text("a (unknown word) constructor dog")
    expect(page.locator(".photo")).to_have_attribute("alt", "a (unknown word) constructor dog")
    page.locator(".overview summary").click()
    page.locator(".word").first.click()
    chosen, unknown, known = look(page, 0), look(page, 2), look(page, 3)
    assert len({chosen, unknown, known}) == 3
    assert chosen[0] != unknown[0]
    expect(page.locator(".word").nth(2)).to_contain_text("unknown")
    for number in range(5):
        page.locator(".word").nth(number).click()
        shown = page.locator(".page").evaluate("page => page.innerHTML + page.innerText")
        assert "unk&gt;" not in shown
        assert UNK not in shown
    # Nothing can follow an unknown word, and none can be put there.
    expect(page.locator(".alternatives button")).to_have_count(0)
    page.locator(".word").nth(1).click()
    expect(page.locator(".alternatives button")).to_have_text(["dog30%"])
    expect(page.locator(".alternatives span.bar")).to_contain_text("(unknown word)")


@pytest.mark.slow
def test_unknown_words_of_plain_decoding_are_named(
    open_page: Callable[..., Page], captioner: Captioner
) -> None:
    name = next(
        name
        for name, example in example_photos().items()
        if UNK in captioner.caption(example.path, DecodingOptions.plain_greedy()).text
    )
    page = open_page(f"__theme=light&example={name}")
    open_settings(page)
    page.locator(".plain").click()
    expect(page.locator(".word .text", has_text="(unknown word)")).not_to_have_count(0)
    assert UNK not in page.locator("body").inner_text()


def test_words_have_language_and_direction(show: Callable[..., Page]) -> None:
    page = show(
        make_view([word("كلب", cells({(0, 0): 1.0})), word("يجري", cells({(1, 1): 1.0}))]),
        language="ar",
    )
    page.locator(".overview summary").click()
    parts = [
        ".word .text",
        ".badge",
        ".word-title",
        ".alternatives .bar > :first-child",
        ".beam .text",
    ]
    for part in parts:
        expect(page.locator(part).first).to_have_attribute("dir", "auto")
        assert page.locator(part).first.evaluate("node => node.closest('[lang]').lang") == "ar"
    # The first word is on the right; numbers and the page's own words stay English.
    first, second = (page.locator(".word").nth(at).bounding_box() for at in (0, 1))
    assert first
    assert second
    assert first["x"] > second["x"]
    for part in (".detail", ".hint", ".honest", ".word.end .text", ".beams-title"):
        assert page.locator(part).first.evaluate("node => node.closest('[lang]').lang") == "en"


# ---- Playing, the position, the appearance: the same in the standalone page.

# Notes every word that the badge shows from now on.
NOTE = """() => {
    window.shown = [];
    const badge = document.querySelector(".badge");
    const note = () => window.shown.push(badge.textContent.split(" ")[0]);
    new MutationObserver(note).observe(badge, { childList: true });
}"""


@pytest.fixture
def clock(page: Page) -> Iterator[Any]:
    """A clock that tests move. It belongs to the context, which later tests share."""
    page.clock.install(time=dt.datetime(2026, 1, 1))
    yield page.clock
    page.clock.resume()


def test_play_steps_through_the_words_and_stops(
    page: Page, clock: Any, open_standalone: Callable[[View], Page]
) -> None:
    open_standalone(KNOWN)
    clock.pause_at(dt.datetime(2026, 1, 2))
    play = page.locator(".play")
    page.locator(".word").first.dispatch_event("click")
    page.evaluate(NOTE)
    play.click()
    expect(play).to_have_text("Pause")
    for at in (1, 2, 3):
        clock.run_for(900)
        expect_pressed(page, at)
    clock.run_for(2000)
    expect(play).to_have_text("Play")
    assert page.evaluate("window.shown") == ["one", "two", "three", "end"]
    # After the end it starts anew, and it can be paused.
    play.click()
    expect_pressed(page, 0)
    play.click()
    expect(play).to_have_text("Play")
    clock.run_for(2000)
    expect_pressed(page, 0)


def test_appearance_settings_change_the_map(
    open_standalone: Callable[[View], Page],
) -> None:
    page = open_standalone(KNOWN)
    expect(page.locator(".photo")).to_have_attribute("alt", "one two three")
    page.locator(".appearance summary").click()
    page.locator(".position").fill("2")
    expect_pressed(page, 2)
    expect(page.locator(".position")).to_have_attribute("aria-valuetext", "three")
    expect(page.locator(".position")).to_have_attribute("max", "3")
    page.locator(".word").nth(1).dispatch_event("pointerenter", {"pointerType": "touch"})
    expect_pressed(page, 2)  # a finger that comes by points at nothing
    page.locator(".word").nth(0).dispatch_event("click")
    expect_pressed(page, 0)

    scale = page.locator(".scale")
    expect(scale).to_contain_text("scaled per word")
    expect(scale.locator(".high")).to_have_text("75%")
    maps = [drawn(page)]
    colors = page.locator(".colors option").all_inner_texts()
    assert len(colors) == 4
    for name in colors[1:]:
        page.locator(".colors").select_option(name)
        maps.append(drawn(page))
    page.locator(".shape").select_option("raw cells")
    maps.append(drawn(page))
    page.locator(".range").select_option("same for all words")
    maps.append(drawn(page))
    assert len(set(maps)) == len(maps)
    expect(scale).to_contain_text("the same for all words")
    expect(scale.locator(".high")).to_have_text("100%")

    page.add_style_tag(content=".badge { display: none }")
    frame = page.locator(".frame")
    covered = picture(frame)
    page.locator(".strength").fill("0")
    bare = picture(frame)
    page.add_style_tag(content=".map { display: none }")
    assert not ImageChops.difference(bare, picture(frame)).getbbox()
    assert ImageChops.difference(bare, covered).getbbox()


def test_overview_has_a_tile_for_every_word_and_the_end(visit: Page) -> None:
    visit.locator(".overview summary").click()
    expect(visit.locator(".tile")).to_have_count(visit.locator(".word").count())
    texts = visit.locator(".tile").all_inner_texts()
    assert [text.split()[0] for text in texts] == visit.locator(".word .text").all_inner_texts()
    maps = visit.locator(".tile canvas").evaluate_all("all => all.map((one) => one.toDataURL())")
    assert len(set(maps)) == len(maps)
    visit.locator(".tile").nth(4).click()
    expect_pressed(visit, 4)
