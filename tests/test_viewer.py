"""The page's components without a browser: what goes in, what is answered, what is said."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import gradio as gr
import matplotlib as mpl
import numpy as np
import pytest
from gradio.data_classes import FileData
from PIL import Image

from captioner import Captioner, DecodingOptions, viewer
from captioner.caption import Beam, Caption, Word
from captioner.config import ModelConfig
from captioner.errors import ImageError
from captioner.images import open_photo
from captioner.viewer import (
    Answers,
    AttentionViewer,
    PhotoInput,
    View,
    example_photos,
    how_it_works,
    setting_values,
    told,
)
from captioner.viewer.settings import decoding_options

DEFAULTS = setting_values(DecodingOptions())


class Counting:
    """Stands in for a model, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[DecodingOptions | None] = []

    def _answer(self, photo: Image.Image, text: str) -> Caption:
        even = np.full((7, 7), 1 / 49, np.float32)
        words = tuple(Word(word, 0.5, ((word, 0.5),), even) for word in text.split())
        return Caption((Beam(words, Word("<eos>", 0.5, (), even), -1.0, -1.0),), photo.size)

    def caption(self, photo: Image.Image, options: DecodingOptions | None = None) -> Caption:
        self.asked.append(options)
        return self._answer(photo, f"caption number {len(self.asked)}")

    def score(self, photo: Image.Image, text: str) -> Caption:
        return self._answer(photo, text)


@pytest.fixture(scope="module")
def answers(captioner: Captioner) -> Answers:
    return Answers(captioner, list(example_photos()))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return open_photo(next(iter(example_photos())))


def steering(text: str, given: list[int], whole: bool = False) -> gr.EventData:
    return gr.EventData(None, {"text": text, "given": given, "whole": whole})


# ---- Settings.


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(samples=3),
        DecodingOptions.report(),
        DecodingOptions(
            beam_size=5,
            samples=5,
            length_penalty=1.5,
            max_length=12,
            temperature=0.8,
            seed=7,
            ban_repeats=False,
        ),
    ],
)
def test_the_controls_show_the_options_and_give_them_back(options: DecodingOptions) -> None:
    assert decoding_options(*setting_values(options)) == options


def test_an_emptied_seed_is_zero() -> None:
    beam_size, penalty, words, temperature, _, bans = DEFAULTS
    assert decoding_options(beam_size, penalty, words, temperature, None, bans).seed == 0


# ---- Answers.


def test_a_photo_gets_its_caption(
    answers: Answers, captioner: Captioner, photo: Image.Image
) -> None:
    view = answers.caption(photo, *DEFAULTS)
    assert view is not None
    assert view.photo is photo
    assert view.caption.to_dict() == captioner.caption(photo).to_dict()


def test_no_photo_gets_nothing(answers: Answers) -> None:
    assert answers.caption(None, *DEFAULTS) is None
    assert answers.write_on(None, "a dog", *DEFAULTS) is None
    assert answers.read(None, "a dog") is None
    assert answers.steer(None, steering("a dog", [1]), *DEFAULTS) is None
    assert answers.steer(None, steering("a dog", [1], True), *DEFAULTS) is None


def test_the_endpoint_needs_a_photo(answers: Answers) -> None:
    with pytest.raises(gr.Error, match="No photo came"):
        answers.api(None)


def test_a_file_that_browsers_cannot_draw_is_shown_as_a_picture(
    answers: Answers, photo: Image.Image, tmp_path: Path
) -> None:
    for kind, replaced in (("tiff", True), ("png", False)):
        path = tmp_path / f"photo.{kind}"
        photo.save(path)
        brought = open_photo(path)
        shown, view = answers.brought(brought, *DEFAULTS)
        assert (shown is brought) == replaced
        assert view is not None


def test_a_typed_beginning_is_kept_and_marked(answers: Answers, photo: Image.Image) -> None:
    view = answers.write_on(photo, "Two women", *DEFAULTS)
    assert view is not None
    assert view.caption.text.startswith("two women ")
    assert view.caption.given == (0, 1)


def test_a_typed_caption_is_read(answers: Answers, photo: Image.Image) -> None:
    view = answers.read(photo, "a lion lies")
    assert view is not None
    assert view.caption.text == "a lion lies"
    assert view.caption.given == (0, 1, 2, 3)


def test_steering_keeps_the_words_before_and_marks_the_visitors_own(
    answers: Answers, photo: Image.Image
) -> None:
    view = answers.steer(photo, steering("a brown man", [2]), *DEFAULTS)
    assert view is not None
    assert view.caption.text.startswith("a brown man")
    assert view.caption.given == (2,)


def test_a_caption_that_the_visitor_ended_is_read(answers: Answers, photo: Image.Image) -> None:
    view = answers.steer(photo, steering("a brown dog", [1], whole=True), *DEFAULTS)
    assert view is not None
    assert view.caption.text == "a brown dog"
    assert view.caption.given == (1, 3)


def test_an_unknown_word_is_one_sentence(answers: Answers, photo: Image.Image) -> None:
    with pytest.raises(gr.Error) as raised:
        answers.write_on(photo, "a zyzzyva", *DEFAULTS)
    assert re.fullmatch(r"The model does not know the word 'zyzzyva'.*[^.]\.", raised.value.message)


def test_an_example_is_captioned_once_for_the_same_settings() -> None:
    model = Counting()
    paths = list(example_photos())[:2]
    answers = Answers(model, paths)
    assert len(model.asked) == 2
    path, view = answers.example(1, *DEFAULTS)
    assert path == paths[1]
    assert view.caption.text == "caption number 2"
    assert len(model.asked) == 2
    greedy = setting_values(DecodingOptions.report())
    assert answers.example(1, *greedy)[1].caption.text == "caption number 3"
    answers.example(1, *greedy)
    assert model.asked[2:] == [DecodingOptions.report()]


# ---- What travels.


def test_a_view_comes_back_as_it_went(answers: Answers, photo: Image.Image) -> None:
    view = answers.steer(photo, steering("a man", [1]), *DEFAULTS)
    component = AttentionViewer()
    data = component.postprocess(view)
    assert data is not None
    assert isinstance(data.photo, FileData)
    back = component.preprocess(data)
    assert back is not None
    assert view is not None
    assert back.caption.text == view.caption.text
    assert back.caption.given == (1,)
    assert back.photo.size == photo.size or max(back.photo.size) == 1024
    assert (component.postprocess(None), component.preprocess(None)) == (None, None)


def test_a_forged_caption_is_refused() -> None:
    component = AttentionViewer()
    even = np.full((7, 7), 1 / 49, np.float32)
    beam = Beam((), Word("<eos>", 1.0, (), even), 0.0, 0.0)
    data = component.postprocess(View(Image.new("RGB", (20, 10)), Caption((beam,), (20, 10))))
    assert data is not None
    data.caption["beams"][0]["end"]["attention"] = "everywhere"
    with pytest.raises(gr.Error, match="not the JSON of a caption"):
        component.preprocess(data)


def test_an_example_is_shown_from_a_copy_and_a_picture_without_loss() -> None:
    path = next(iter(example_photos()))
    photos = PhotoInput()
    shown = photos.postprocess(path)
    assert shown is not None
    assert shown.path is not None
    assert shown.path != path
    assert Path(shown.path).read_bytes() == Path(path).read_bytes()
    noise = Image.effect_noise((30, 20), 80).convert("RGB")
    picture = photos.postprocess(noise)
    assert picture is not None
    assert picture.path is not None
    with Image.open(picture.path) as same:
        assert np.array_equal(np.asarray(same), np.asarray(noise))
    assert photos.postprocess(None) is None


# ---- What is said.


def test_an_error_of_ours_is_told_and_another_one_is_not_hidden() -> None:
    @told
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as raised:
        fail(ImageError("the photo is broken: send another"))
    assert raised.value.message == "The photo is broken: send another."
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_how_it_works_has_the_models_own_sizes(captioner: Captioner) -> None:
    checkpoint = captioner.checkpoint
    text = how_it_works(checkpoint.model.config, checkpoint.encoder)
    for size in ("efficientnet_lite2", "224 x 224", "7 x 7", "1,280", "512", "256", "2,541"):
        assert size in text


@pytest.mark.parametrize("option", ["mean_start", "deep_output", "word_query"])
def test_how_it_works_tells_what_the_options_change(captioner: Captioner, option: str) -> None:
    plain = ModelConfig(vocabulary_size=1000, encoder_channels=64)
    changed = dataclasses.replace(plain, **{option: True})
    encoder = captioner.checkpoint.encoder
    assert how_it_works(plain, encoder) != how_it_works(changed, encoder)


def test_there_are_at_least_six_examples_and_each_has_a_name() -> None:
    examples = example_photos()
    assert len(examples) >= 6
    assert all(examples.values())
    assert len(set(examples.values())) == len(examples)


def test_the_scripts_colours_are_matplotlibs() -> None:
    source = Path(viewer.__file__).with_name("script.js").read_text(encoding="utf-8")
    maps = re.findall(r'^    (\w+): "((?:[0-9a-f]{6} ?)+)",$', source, flags=re.MULTILINE)
    assert {name for name, _ in maps} == {"inferno", "viridis", "cividis"}
    for name, colors in maps:
        points = [[int(each[at : at + 2], 16) for at in (0, 2, 4)] for each in colors.split()]
        places = np.linspace(0, 1, len(points))
        wanted = mpl.colormaps[name](places)[:, :3] * 255
        assert np.abs(np.array(points) - wanted).max() <= 2, name
