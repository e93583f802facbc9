"""Photos come in, whatever their kind, and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from captioner import Captioner
from tests.browser.visits import bring, click_example, expect_words, words_of


def drawing(width: int, height: int) -> Image.Image:
    """A bright disc in the left half: neither turned nor mirrored is it the same."""
    disc = Image.radial_gradient("L").resize((width // 2, height))
    image = Image.new("L", (width, height), 30)
    image.paste(disc, (0, 0))
    return image


def sixteen_bit(path: Path) -> tuple[int, int]:
    values = np.asarray(drawing(160, 120)).astype(np.uint16) * 257
    Image.fromarray(values).save(path.with_suffix(".png"))
    return 160, 120


def cmyk(path: Path) -> tuple[int, int]:
    drawing(160, 120).convert("RGB").convert("CMYK").save(path.with_suffix(".jpg"))
    return 160, 120


def turned_by_exif(path: Path) -> tuple[int, int]:
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(160, 120).save(path.with_suffix(".jpg"), exif=exif)
    return 120, 160


def transparent(path: Path) -> tuple[int, int]:
    image = drawing(160, 120).convert("RGB")
    image.putalpha(drawing(160, 120))
    image.save(path.with_suffix(".png"))
    return 160, 120


def portrait(path: Path) -> tuple[int, int]:
    drawing(120, 200).save(path.with_suffix(".jpg"))
    return 120, 200


def panorama(path: Path) -> tuple[int, int]:
    drawing(900, 300).save(path.with_suffix(".jpg"))
    return 900, 300


@pytest.mark.parametrize(
    "save", [sixteen_bit, cmyk, turned_by_exif, transparent, portrait, panorama]
)
def test_a_photo_of_any_kind_is_captioned_and_framed_upright(
    visit: Page, captioner: Captioner, tmp_path: Path, save: Callable[[Path], tuple[int, int]]
) -> None:
    width, height = save(tmp_path / "photo")
    (path,) = tmp_path.iterdir()
    bring(visit, path)
    expect_words(visit, captioner.caption(path).text)
    frame = visit.locator(".frame").bounding_box()
    assert frame
    assert frame["width"] / frame["height"] == pytest.approx(width / height, rel=0.01)
    visit.wait_for_function("document.querySelector('.photo').naturalWidth > 0")
    shown = "image => [image.naturalWidth, image.naturalHeight]"
    assert visit.locator(".photo").evaluate(shown) == [width, height]


def test_an_example_is_captioned_on_a_click(
    cat: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    (photo,) = [path for path in example_photos if path.name == "chelsea.png"]
    expect_words(cat, captioner.caption(photo).text)


def test_a_second_photo_replaces_the_first(
    cat: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    earlier = words_of(cat)
    bring(cat, example_photos[0])
    expect_words(cat, captioner.caption(example_photos[0]).text)
    assert words_of(cat) != earlier


def test_of_two_photos_in_a_hurry_the_later_one_stays(
    visit: Page, captioner: Captioner, example_photos: list[Path]
) -> None:
    chooser = visit.locator("input[type=file]").first
    chooser.set_input_files(example_photos[0])
    chooser.set_input_files(example_photos[1])
    expect_words(visit, captioner.caption(example_photos[1]).text)
    click_example(visit, "officer")
    click_example(visit, "cheetah")
    expect_words(visit, captioner.caption(example_photos[1]).text)


def test_the_camera_takes_a_photo(visit: Page) -> None:
    visit.get_by_label("Capture from camera").click()
    visit.get_by_text("Click to Access Webcam").click()
    visit.wait_for_function("document.querySelector('#bring video')?.videoWidth > 0")
    visit.get_by_label("capture photo").click()
    visit.locator(".word").first.wait_for()
    assert visit.locator(".photo").evaluate("photo => photo.naturalWidth") >= 640


def test_a_photo_taken_away_takes_its_caption_along(cat: Page) -> None:
    cat.get_by_label("Remove Image").click()
    expect(cat.locator(".viewer .empty")).to_be_visible()
    expect(cat.locator(".viewer .filled")).to_be_hidden()


def test_a_photo_taken_away_at_once_leaves_nothing(visit: Page, tmp_path: Path) -> None:
    photo = tmp_path / "large.jpg"
    drawing(4000, 3000).save(photo)
    visit.locator("input[type=file]").first.set_input_files(photo)
    visit.get_by_label("Remove Image").click()
    visit.wait_for_load_state("networkidle")
    expect(visit.locator(".viewer .empty")).to_be_visible()


def test_a_broken_upload_says_what_is_wrong_and_the_next_photo_works(
    cat: Page, captioner: Captioner, example_photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    cat.locator("input[type=file]").first.set_input_files(bad)
    expect(cat.get_by_text("not a photo that can be read")).to_be_visible(timeout=15_000)
    expect(cat.locator(".viewer .empty")).to_be_visible()
    bring(cat, example_photos[0])
    expect_words(cat, captioner.caption(example_photos[0]).text)


def test_two_visitors_never_see_each_others_photo_or_caption(
    browser: Browser, served_page: str, captioner: Captioner, example_photos: list[Path]
) -> None:
    photos = example_photos[0], example_photos[3]
    contexts = [browser.new_context() for _ in photos]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(served_page)
    for page, photo in zip(pages, photos, strict=True):
        page.locator("input[type=file]").first.set_input_files(photo)
    for page, photo in zip(pages, photos, strict=True):
        expect_words(page, captioner.caption(photo).text)
    sources = [page.locator(".photo").get_attribute("src") or "" for page in pages]
    folders = [source.split("/")[-2] for source in sources]
    assert len(set(folders)) == 2
    assert words_of(pages[0]) != words_of(pages[1])
    for own, page in zip(folders, pages, strict=True):
        (other,) = set(folders) - {own}
        assert own in page.content()
        assert other not in page.content()
    for context in contexts:
        context.close()
