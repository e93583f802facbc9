"""The page's own components, and what the page answers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import matplotlib as mpl
import numpy as np
import pytest
from gradio.data_classes import ImageData
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import Captioner, DecodingOptions, viewer
from captioner.caption import Beam, Caption, Word
from captioner.config import ModelConfig
from captioner.errors import CaptionerError, ConfigError, ImageError
from captioner.images import open_photo
from captioner.viewer import Answers, AttentionViewer, PhotoInput, View, setting_values, told
from captioner.viewer.attention import Steering, Taking, ViewData
from captioner.viewer.settings import decoding_options

DEFAULT = setting_values(DecodingOptions())
REPORT = setting_values(DecodingOptions.report())


def word(text: str) -> Word:
    return Word(text, 0.5, ((text, 0.5),), np.full((7, 7), 1 / 49, dtype=np.float32))


class Parrot:
    """Stands in for a model, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[DecodingOptions | None] = []

    def caption(self, photo: Image.Image, options: DecodingOptions | None = None) -> Caption:
        self.asked.append(options)
        return self.score(photo, f"answer {len(self.asked)}")

    def score(self, photo: Image.Image, text: str) -> Caption:
        words = tuple(word(each) for each in text.split())
        return Caption((Beam(words, word("<eos>"), -1.0, -1.0),), photo.size)


def steering(text: str, *places: int, whole: bool = False) -> Steering:
    """Return the event that the viewer sends."""
    return Steering(None, {"text": text, "given": list(places), "whole": whole})


@pytest.fixture(scope="module")
def photo(example_photos: list[Path]) -> Image.Image:
    return open_photo(example_photos[0])


@pytest.fixture(scope="module")
def answers(captioner: Captioner, example_photos: list[Path]) -> Answers:
    return Answers(captioner, [str(path) for path in example_photos[:2]])


# Settings


@pytest.mark.parametrize("options", [DecodingOptions(), DecodingOptions.report()])
def test_the_controls_show_options_and_give_them_back(options: DecodingOptions) -> None:
    # Where words are drawn, as many captions are drawn as a search would keep.
    shown = dataclasses.replace(options, samples=options.beam_size)
    assert decoding_options(*setting_values(options)) == shown


@given(
    st.builds(
        DecodingOptions,
        beam_size=st.integers(1, 5),
        length_penalty=st.floats(0, 2),
        max_length=st.integers(5, 32),
        temperature=st.just(0.0) | st.floats(0.1, 2),
        seed=st.integers(0, 2**53),
        ban_repeats=st.booleans(),
        ban_trigrams=st.booleans(),
        ban_unknown=st.booleans(),
        ban_bad_endings=st.booleans(),
    )
)
def test_any_options_that_the_controls_can_show_come_back(options: DecodingOptions) -> None:
    shown = dataclasses.replace(options, samples=options.beam_size)
    assert decoding_options(*setting_values(options)) == shown


def test_the_controls_start_with_the_defaults_and_are_told_apart() -> None:
    controls = viewer.controls()
    assert [control.value for control in controls] == DEFAULT
    assert len({control.label for control in controls}) == len(controls)


def test_an_emptied_seed_is_zero() -> None:
    assert decoding_options(3, 0.5, 18, 0.0, None, []).seed == 0


NO_BEAM_SIZES: list[object] = [0, 6, 10**9, math.nan, math.inf, "3", None, True, [3], {}]
NO_TEMPERATURES: list[object] = [-0.1, math.nan, "0", None]
NO_BANS: list[object] = [None, 5, "ban", {}, ["nothing"], [1], [[]]]


@pytest.mark.parametrize(
    ("number", "sent"),
    [
        *((0, sent) for sent in NO_BEAM_SIZES),
        *((3, sent) for sent in NO_TEMPERATURES),
        *((5, sent) for sent in NO_BANS),
    ],
)
def test_a_control_refuses_in_words_what_it_cannot_show(number: int, sent: object) -> None:
    control = viewer.controls()[number]
    with pytest.raises(gr.Error, match=control.label) as refused:
        control.preprocess(sent)
    assert not refused.value.print_exception


@pytest.mark.parametrize("sent", [-1, 2**63, 1.5, math.inf, math.nan, "1", [1]])
def test_a_seed_that_is_none_is_refused(sent: object) -> None:
    seed = viewer.controls()[4].preprocess(sent)
    with pytest.raises(ConfigError, match="seed is"):
        decoding_options(3, 0.5, 18, 0.0, seed, [])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="beam_size is 0"):
        decoding_options(0, *DEFAULT[1:])


# Answers


def test_a_photo_gets_the_caption_that_the_settings_ask_for(
    answers: Answers, captioner: Captioner, photo: Image.Image
) -> None:
    for settings, options in ((DEFAULT, DecodingOptions()), (REPORT, DecodingOptions.report())):
        view = answers.caption(photo, *settings)
        assert view is not None
        assert view.photo is photo
        assert view.caption.to_dict() == captioner.caption(photo, options).to_dict()


def test_without_a_photo_there_is_nothing_to_show(answers: Answers) -> None:
    assert answers.caption(None, *DEFAULT) is None
    assert answers.brought(None, *DEFAULT)[1] is None


def test_words_without_a_photo_are_told_what_is_missing(answers: Answers) -> None:
    calls: list[Callable[[], View | None]] = [
        lambda: answers.write_on(None, "a dog", *DEFAULT),
        lambda: answers.read(None, "a dog"),
        lambda: answers.steer(None, steering("a dog", 1), *DEFAULT),
        lambda: answers.steer(None, steering("a dog", whole=True), *DEFAULT),
    ]
    for call in calls:
        with pytest.raises(gr.Error, match="bring one first"):
            call()


def test_a_beginning_is_written_on_and_marked_as_given(
    answers: Answers, photo: Image.Image
) -> None:
    view = answers.write_on(photo, "Two women", *DEFAULT)
    assert view is not None
    assert view.caption.text.startswith("two women ")
    assert view.caption.given == (0, 1)


def test_a_whole_caption_is_read(
    answers: Answers, captioner: Captioner, photo: Image.Image
) -> None:
    view = answers.read(photo, "a zyzzyva runs")
    assert view is not None
    assert view.caption.to_dict() == captioner.score(photo, "a zyzzyva runs").to_dict()
    assert view.caption.given == (0, 1, 2, 3)


def test_steering_keeps_the_words_before_and_marks_the_visitor_s_only(
    answers: Answers, photo: Image.Image
) -> None:
    first = answers.caption(photo, *DEFAULT)
    assert first is not None
    before = [word.text for word in first.caption.words[:2]]
    view = answers.steer(photo, steering(" ".join([*before, "cat"]), 2), *DEFAULT)
    assert view is not None
    for beam in view.caption.beams:
        assert [word.text for word in beam.words[:3]] == [*before, "cat"]
        assert len(beam.words) > 3
    assert view.caption.given == (2,)

    again = answers.steer(photo, steering(f"{view.caption.text} and", 2, 9), *DEFAULT)
    assert again is not None
    assert again.caption.text.startswith(f"{view.caption.text} and ")
    assert again.caption.given == (2, 9)


def test_steering_to_the_end_ends_the_caption_there(
    answers: Answers, captioner: Captioner, photo: Image.Image
) -> None:
    view = answers.steer(photo, steering("a dog", 1, whole=True), *DEFAULT)
    assert view is not None
    assert view.caption.text == "a dog"
    assert view.caption.given == (1, 2)
    assert view.caption.log_probability == captioner.score(photo, "a dog").log_probability


@pytest.mark.parametrize(
    "ask",
    [
        lambda answers, photo: answers.write_on(photo, "a zyzzyva", *DEFAULT),
        lambda answers, photo: answers.write_on(photo, "a " * 40, *DEFAULT),
        lambda answers, photo: answers.read(photo, "!?"),
        lambda answers, photo: answers.read(photo, "a " * 400),
        lambda answers, photo: answers.steer(photo, steering("a zyzzyva", 1), *DEFAULT),
        lambda answers, photo: answers.steer(photo, steering("", whole=True), *DEFAULT),
        lambda answers, photo: answers.caption(photo, 0, *DEFAULT[1:]),
        lambda answers, photo: answers.brought(photo, 0, *DEFAULT[1:]),
        lambda answers, photo: answers.write_on(photo, None, *DEFAULT),
        lambda answers, photo: answers.write_on(photo, "a" * 10_000, *DEFAULT),
        lambda answers, photo: answers.read(photo, None),
        lambda answers, photo: answers.read(photo, "a" * 10**6),
        lambda answers, photo: answers.steer(photo, steering("a " * 10**5), *DEFAULT),
        lambda answers, _: answers.example(0, 0, *DEFAULT[1:]),
        lambda answers, _: answers.example(10**6, *DEFAULT),
        lambda answers, _: answers.example(-1, *DEFAULT),
        lambda answers, _: answers.example("0", *DEFAULT),
        lambda answers, _: answers.example([0], *DEFAULT),
        lambda answers, _: answers.api(None),
    ],
)
def test_what_goes_wrong_is_told_in_one_sentence(
    ask: Callable[[Answers, Image.Image], object], answers: Answers, photo: Image.Image
) -> None:
    with pytest.raises(gr.Error) as refused:
        ask(answers, photo)
    message = refused.value.message
    assert message[0].isupper()
    assert message.endswith(".")
    assert not message.endswith("..")
    assert ". " not in message
    assert "\n" not in message
    assert isinstance(refused.value.__cause__, CaptionerError)
    assert not refused.value.print_exception


@pytest.mark.parametrize(("kind", "drawn"), [("JPEG", True), ("PNG", True), ("TIFF", False)])
def test_a_photo_that_browsers_cannot_draw_is_shown_as_a_copy(
    answers: Answers, tmp_path: Path, photo: Image.Image, kind: str, drawn: bool
) -> None:
    path = tmp_path / "photo"
    photo.save(path, kind)
    sent = open_photo(path)
    shown, view = answers.brought(sent, *DEFAULT)
    assert view is not None
    assert view.photo is sent
    assert (shown is sent) == (not drawn)


def test_the_api_answers_with_plain_json(
    answers: Answers, captioner: Captioner, photo: Image.Image
) -> None:
    values = answers.api(photo)
    assert json.loads(json.dumps(values, allow_nan=False)) == captioner.caption(photo).to_dict()


# Examples


def test_an_example_is_the_caption_of_its_file(
    answers: Answers, captioner: Captioner, example_photos: list[Path]
) -> None:
    path, view = answers.example(1, *DEFAULT)
    assert path == str(example_photos[1])
    assert view.caption.to_dict() == captioner.caption(example_photos[1]).to_dict()
    assert max(view.photo.size) <= 1024
    width, height = view.caption.size
    assert view.photo.width / view.photo.height == pytest.approx(width / height, rel=0.01)


def test_the_model_is_asked_once_for_an_example_and_its_settings(
    example_photos: list[Path],
) -> None:
    model = Parrot()
    answers = Answers(model, [str(path) for path in example_photos[:2]])
    captions = [answers.example(0, *settings)[1].caption for settings in (REPORT, REPORT, DEFAULT)]
    count = len(model.asked)
    assert captions[0] is captions[1]
    assert captions[2].text != captions[0].text
    assert answers.example(1, *REPORT)[1].caption.text not in {each.text for each in captions}
    assert len(model.asked) == count + 1
    for settings in (REPORT, DEFAULT):
        answers.example(0, *settings)
    assert len(model.asked) == count + 1
    assert model.asked.count(DecodingOptions.report()) == 2


def test_an_example_is_captioned_before_anybody_asks(example_photos: list[Path]) -> None:
    model = Parrot()
    answers = Answers(model, [str(path) for path in example_photos[:2]])
    assert len(model.asked) == 2
    texts = [answers.example(number, *DEFAULT)[1].caption.text for number in (1, 0, 1)]
    assert texts == ["answer 2", "answer 1", "answer 2"]
    assert len(model.asked) == 2


def test_no_visitor_s_photo_is_kept(photo: Image.Image) -> None:
    model = Parrot()
    answers = Answers(model, [])
    for _ in range(2):
        answers.caption(photo, *DEFAULT)
    assert len(model.asked) == 2


def test_the_example_photos_are_there_and_have_names_of_their_own() -> None:
    photos = viewer.example_photos()
    assert len(photos) >= 6
    assert all(Path(path).is_file() for path in photos)
    assert len(set(photos.values())) == len(photos)


def test_no_name_of_an_example_breaks_out_of_the_script() -> None:
    names = ["lion", 'a "cat"', "${x}", "`"]
    (listed,) = re.findall(r"const subjects = (.*);", viewer.name_examples(names))
    assert json.loads(listed) == names


# The viewer


def test_the_viewer_gives_back_what_it_was_given(captioner: Captioner, photo: Image.Image) -> None:
    view = View(photo, captioner.score(photo, "a zyzzyva </script> runs"))
    component = AttentionViewer()
    data = component.postprocess(view)
    assert data is not None
    sent = json.loads(data.model_dump_json())
    back = component.preprocess(ViewData(**sent))
    assert back is not None
    assert back.caption.text == view.caption.text
    assert back.caption.size == view.caption.size
    assert back.caption.given == view.caption.given
    np.testing.assert_allclose(back.caption.attention, view.caption.attention, atol=1e-6)
    assert max(back.photo.size) <= 1024
    assert back.photo.width / back.photo.height == pytest.approx(photo.width / photo.height, 0.01)


def test_the_viewer_s_photo_is_a_small_file_without_metadata(photo: Image.Image) -> None:
    large = photo.resize((3000, 2000))
    large.info["comment"] = b"secret"
    data = AttentionViewer().postprocess(View(large, Parrot().caption(large)))
    assert data is not None
    file = Path(data.photo.path).read_bytes()
    assert file.startswith(b"\xff\xd8\xff")
    assert len(file) <= 250_000
    assert b"secret" not in file
    assert data.caption["size"] == [3000, 2000]


def test_an_empty_viewer_stays_empty_and_nothing_can_be_taken_of_it() -> None:
    component = AttentionViewer()
    assert component.postprocess(None) is None
    with pytest.raises(gr.Error, match="bring a photo first"):
        component.preprocess(None)


NO_EVENTS: list[object] = [None, [], "text", {}]
NO_PLACES: list[object] = [None, "01", 5, [2], [-1], [10**9], ["0"], [True], [[0]]]
NO_BEAMS: list[object] = [None, "0", 0.5, math.nan, [0]]


@pytest.mark.parametrize(
    ("receive", "data"),
    [
        *((Steering, data) for data in NO_EVENTS),
        *((Steering, {"text": "a b", "given": given, "whole": False}) for given in NO_PLACES),
        (Steering, {"text": 5, "given": [], "whole": False}),
        (Steering, {"text": "a b", "given": [], "whole": "yes"}),
        *((Taking, data) for data in NO_EVENTS),
        *((Taking, {"format": "png", "beam": beam}) for beam in NO_BEAMS),
        (Taking, {"format": ["png"], "beam": 0}),
    ],
)
def test_an_event_that_the_browser_never_sends_is_refused(
    receive: Callable[[None, object], object], data: object
) -> None:
    with pytest.raises(gr.Error, match="load the page again") as refused:
        receive(None, data)
    assert not refused.value.print_exception


@pytest.mark.parametrize(
    "data", [0, "x", [], {}, {"photo": {"path": "/etc/passwd"}, "caption": {}}]
)
def test_a_value_that_the_browser_never_sends_is_refused(data: object) -> None:
    with pytest.raises(gr.Error, match="load the page again") as refused:
        ViewData.model_validate(data, context={"validate_meta": True})  # as Gradio does
    assert not refused.value.print_exception


@pytest.mark.parametrize("where", ["elsewhere", "gone"])
def test_a_photo_that_the_page_did_not_keep_is_not_opened(
    where: str, photo: Image.Image, example_photos: list[Path]
) -> None:
    component = AttentionViewer()
    data = component.postprocess(View(photo, Parrot().caption(photo)))
    assert data is not None
    data.photo.path = str(example_photos[0] if where == "elsewhere" else f"{data.photo.path}.jpg")
    with pytest.raises(gr.Error, match="no longer kept here"):
        component.preprocess(data)


@pytest.mark.parametrize("values", [{}, {"text": "a dog"}, {"size": [1, 2], "beams": []}])
def test_a_forged_caption_is_refused(photo: Image.Image, values: dict[str, Any]) -> None:
    component = AttentionViewer()
    data = component.postprocess(View(photo, Parrot().caption(photo)))
    assert data is not None
    with pytest.raises(gr.Error, match="This is not the JSON of a caption"):
        component.preprocess(ViewData(photo=data.photo, caption=values))


SCRIPT = (Path(viewer.__file__).parent / "script.js").read_text(encoding="utf-8")
(_TABLE,) = re.findall(r"const COLORS = \{(.*?)\};", SCRIPT, flags=re.DOTALL)
COLORS = dict(re.findall(r'(\w+): "([0-9a-f ]+)"', _TABLE))


def test_the_colours_of_captioner_overlay_are_there() -> None:
    assert {"inferno", "viridis", "cividis"} <= set(COLORS)


@pytest.mark.parametrize("name", COLORS)
def test_the_browser_s_colours_are_matplotlib_s(name: str) -> None:
    points = np.array([list(bytes.fromhex(each)) for each in COLORS[name].split()])
    assert len(points) >= 16
    expected = mpl.colormaps[name](np.linspace(0, 1, len(points)))[:, :3] * 255
    np.testing.assert_allclose(points, expected, atol=2)


# How it works


def test_how_it_works_names_the_real_sizes() -> None:
    config = ModelConfig(
        vocabulary_size=12_345,
        encoder_channels=1_280,
        embedding_size=111,
        hidden_size=222,
        attention_size=333,
    )
    encoder = {"name": "tiny", "grid": [7, 9], "transform": {"size": 288}}
    text = viewer.how_it_works(config, encoder)
    for part in ("`tiny`", "288 x 288", "7 x 9", "1,280", "width 333", "63 vectors"):
        assert part in text
    for part in ("222 units", "111 numbers", "12,345 words"):
        assert part in text


def test_how_it_works_fits_the_shipped_model(captioner: Captioner) -> None:
    checkpoint = captioner.checkpoint
    text = viewer.how_it_works(checkpoint.model.config, checkpoint.encoder)
    for part in ("efficientnet_lite2", "288 x 288", "7 x 7", "1,504", "512 units"):
        assert part in text
    assert f"{len(checkpoint.vocabulary):,} words" in text


def test_how_it_works_changes_with_the_model() -> None:
    encoder = {"name": "tiny", "grid": [7, 7], "transform": {"size": 224}}
    changes: list[dict[str, Any]] = [
        {},
        {"mean_start": True},
        {"deep_output": True},
        {"word_query": True},
    ]
    plain, mean, deep, query = (
        viewer.how_it_works(ModelConfig(vocabulary_size=50, encoder_channels=8, **change), encoder)
        for change in changes
    )
    assert "started from zeros" in plain
    assert "started from the mean of the grid" in mean
    assert "From the LSTM's state comes" in plain
    assert "the word before and the mean that was read comes" in deep
    assert "remembers and the word before with each" in query
    assert len({plain, mean, deep, query}) == 4


# Problems


def test_a_known_problem_is_told() -> None:
    @told
    def fail() -> None:
        raise ImageError("there is no file x.jpg")

    with pytest.raises(gr.Error) as refused:
        fail()
    assert refused.value.message == "There is no file x.jpg."


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, RuntimeError, gr.Error])
def test_other_problems_are_left_alone(error: type[Exception]) -> None:
    cause = error("what nobody should read")

    @told
    def fail() -> None:
        raise cause

    with pytest.raises(error) as raised:
        fail()
    assert raised.value is cause


def test_what_goes_well_is_handed_through() -> None:
    @told
    def add(a: int, *, b: int) -> int:
        return a + b

    assert add(1, b=2) == 3
    assert add.__name__ == "add"


# Photos that come in


@pytest.fixture
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder where Gradio puts uploads."""
    folder = Path(PhotoInput().GRADIO_CACHE, tmp_path_factory.mktemp("uploads").name)
    folder.mkdir(parents=True)
    return folder


def test_an_upload_arrives_upright_and_knows_its_format(uploads: Path) -> None:
    path = uploads / "upload"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(path, "JPEG", exif=exif)
    photo = PhotoInput().preprocess(ImageData(path=str(path)))
    assert photo is not None
    assert (photo.mode, photo.size, photo.format) == ("RGB", (20, 40), "JPEG")


def test_a_sixteen_bit_upload_is_not_white(uploads: Path) -> None:
    path = uploads / "grey.png"
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(path)
    photo = PhotoInput().preprocess(ImageData(path=str(path)))
    assert photo is not None
    assert photo.getpixel((4, 4)) == (128, 128, 128)


def test_no_upload_is_no_photo() -> None:
    assert PhotoInput().preprocess(None) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no photo", "The photo is not a photo that can be read"),
        (b"", "The photo is not a photo that can be read"),
        (b"GIF89a", "The photo is"),
    ],
)
def test_a_bad_upload_is_told(uploads: Path, data: bytes, message: str) -> None:
    path = uploads / "upload.jpg"
    path.write_bytes(data)
    with pytest.raises(gr.Error, match=message):
        PhotoInput().preprocess(ImageData(path=str(path)))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (
            {"path": str(Path(PhotoInput().GRADIO_CACHE, "gone.jpg"))},
            r"^'The photo did not arrive: send it again\.'$",
        ),
        ({"path": "a\0b"}, r"^'The photo did not arrive: send it again\.'$"),
        ({"url": "data:image/png;base64,!!!!"}, r"^'No photo came with the request"),
        ({"url": "http://127.0.0.1:9/x.png"}, r"^'No photo came with the request"),
        ({}, r"^'No photo came with the request"),
    ],
)
def test_an_upload_that_did_not_arrive_is_told(payload: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error, match=message):
        PhotoInput().preprocess(ImageData(**payload))


def test_an_example_and_a_picture_are_shown(example_photos: list[Path]) -> None:
    component = PhotoInput()
    assert component.postprocess(None) is None
    example = component.postprocess(str(example_photos[0]))
    assert example is not None
    assert example.path is not None
    assert example.path != str(example_photos[0])
    assert Path(example.path).read_bytes() == example_photos[0].read_bytes()
    noise = Image.effect_noise((30, 20), 80).convert("RGB")
    picture = component.postprocess(noise)
    assert picture is not None
    assert picture.path is not None
    with Image.open(picture.path) as shown:
        assert shown.format == "PNG"
        assert np.array_equal(np.asarray(shown), np.asarray(noise))
