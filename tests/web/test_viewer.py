"""The page's own component, the handlers of its events, and the photo input of the API."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
import matplotlib as mpl
import numpy as np
import pytest
from gradio.data_classes import ImageData
from gradio.utils import get_upload_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import Captioner, DecodingOptions
from captioner import web as viewer
from captioner.config import FORMATS, ModelConfig
from captioner.errors import CaptionerError, ConfigError, ImageError
from captioner.images import Photo, open_photo
from captioner.inference.caption import Beam, Caption, Word
from captioner.inference.captioner import EncodedPhoto
from captioner.inference.cover import CoverTest
from captioner.web import (
    AttentionViewer,
    CaptionRequest,
    CoverRequest,
    Example,
    ExamplePhoto,
    ExplainRequest,
    ExportRequest,
    Handlers,
    PhotoInput,
    StepsRequest,
    StepsView,
    View,
    show_errors,
)
from captioner.web.controls import decoding_options, setting_values

DEFAULT = setting_values(DecodingOptions())
REPORT = setting_values(DecodingOptions.plain_greedy())
Fields: TypeAlias = dict[str, Any]


def word(text: str) -> Word:
    return Word(text, 0.5, ((text, 0.5),), {"attended": np.full((7, 7), 1 / 49, np.float32)})


@dataclasses.dataclass(frozen=True)
class Explained:
    """Stands in for the steps of a word."""

    word: str

    def to_dict(self) -> Fields:
        return {"word": self.word}


class Parrot:
    """Stands in for a model and counts its calls."""

    def __init__(self) -> None:
        self.encoded = 0
        self.options: list[DecodingOptions | None] = []

    def encode(self, photo: Photo) -> EncodedPhoto:
        self.encoded += 1
        return EncodedPhoto(None, open_photo(photo).size)  # type: ignore[arg-type]

    def caption(
        self, photo: Photo | EncodedPhoto, options: DecodingOptions | None = None
    ) -> Caption:
        self.options.append(options)
        return self.score(photo, f"answer {len(self.options)}")

    def score(self, photo: Photo | EncodedPhoto, text: str) -> Caption:
        size = photo.size if isinstance(photo, EncodedPhoto) else open_photo(photo).size
        words = tuple(map(word, text.split()))
        return Caption((Beam(words, word("<eos>"), -1.0, -1.0),), size)

    def explain(self, photo: Photo | EncodedPhoto, caption: Caption, beam: int = 0) -> Caption:  # noqa: ARG002
        return dataclasses.replace(caption, seen=((),) * 49)

    def words_of(self, text: str) -> list[str]:
        return text.split()

    def steps(self, photo: Photo | EncodedPhoto, words: Sequence[str], index: int) -> Explained:
        assert isinstance(photo, EncodedPhoto)
        return Explained(words[index])

    def cover(
        self,
        photo: Photo,
        text: str,
        word: int,
        cells: Sequence[int],
        *,
        options: DecodingOptions | None = None,
    ) -> CoverTest:
        self.options.append(options)
        caption = self.score(photo, f"{text} without {word}")
        return CoverTest(tuple(cells), caption, 0.5, 0.25, (0.4, 0.6))


CAPTION = Parrot().score(Image.new("RGB", (40, 20)), "a dog")


def request(**fields: Any) -> CaptionRequest:
    """Return the event that the page sends, by default for the example "one"."""
    sent: Fields = {"request": 7, "example": None if "file" in fields else "one", "file": None}
    sent |= {"text": "", "given": [], "whole": False, "drawn": True, "settings": DEFAULT}
    return CaptionRequest(None, sent | fields)


def cover_request(**fields: Any) -> CoverRequest:
    """Return the event of a button that covers cells, by default of the example "one"."""
    sent: Fields = {"request": 7, "example": None if "file" in fields else "one", "file": None}
    sent |= {"text": "a dog", "word": 1, "cells": [24, 3], "settings": DEFAULT}
    return CoverRequest(None, sent | fields)


def export_request(**fields: Any) -> ExportRequest:
    """Return the event of an export button."""
    sent: Fields = {"example": None if "file" in fields else "one", "file": None, "format": "png"}
    sent |= {"caption": CAPTION.to_dict(), "beam": 0, "word": 0, "appearance": {}}
    return ExportRequest(None, sent | fields)


def explain_request(**fields: Any) -> ExplainRequest:
    """Return the event that asks for verdicts."""
    sent: Fields = {"request": 7, "example": None if "file" in fields else "one", "file": None}
    sent |= {"caption": CAPTION.to_dict(), "beam": 0}
    return ExplainRequest(None, sent | fields)


def steps_request(**fields: Any) -> StepsRequest:
    """Return the event that explains a word."""
    sent: Fields = {"request": 7, "example": None if "file" in fields else "one", "file": None}
    return StepsRequest(None, sent | {"words": ["a", "dog"], "word": 1} | fields)


@pytest.fixture(scope="module")
def examples(example_photos: list[Path]) -> dict[str, ExamplePhoto]:
    return {
        name: ExamplePhoto(path, f"photo {name}", "a note")
        for name, path in zip(("one", "two"), example_photos, strict=False)
    }


@pytest.fixture(scope="module")
def photo(examples: dict[str, ExamplePhoto]) -> Path:
    return examples["one"].path


@pytest.fixture(scope="module")
def handlers(captioner: Captioner, examples: dict[str, ExamplePhoto]) -> Handlers:
    return Handlers(captioner, examples)


@pytest.fixture
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder where Gradio puts uploads."""
    folder = Path(get_upload_folder(), tmp_path_factory.mktemp("uploads").name)
    folder.mkdir(parents=True)
    return folder


# Settings


@pytest.mark.parametrize("options", [DecodingOptions(), DecodingOptions.plain_greedy()])
def test_options_round_trip_through_the_form(options: DecodingOptions) -> None:
    # As many captions are sampled as a search would keep.
    expected = dataclasses.replace(options, samples=options.beam_size)
    assert decoding_options(setting_values(options)) == expected


@given(
    st.builds(
        DecodingOptions,
        beam_size=st.integers(1, 5),
        length_penalty=st.floats(0, 2),
        max_length=st.integers(3, 32),
        temperature=st.just(0.0) | st.floats(0.1, 2),
        seed=st.integers(0, 2**53),
        ban_repeats=st.booleans(),
        ban_trigrams=st.booleans(),
        ban_unknown=st.booleans(),
        ban_bad_endings=st.booleans(),
    )
)
def test_any_options_in_range_round_trip_through_the_form(options: DecodingOptions) -> None:
    expected = dataclasses.replace(options, samples=options.beam_size)
    assert decoding_options(json.loads(json.dumps(setting_values(options)))) == expected


NO_NUMBERS: list[object] = [math.nan, math.inf, -1, "3", None, True, [3], {}]
BAD_SETTINGS: dict[str, list[object]] = {
    "beam_size": [0, 6, 10**9, 2.5, *NO_NUMBERS],
    "max_words": [0, 31, 10**9, 2.5, *NO_NUMBERS],
    "length_penalty": [6, *NO_NUMBERS],
    "temperature": [11, 0.001, *NO_NUMBERS],
    "seed": [2**63, 1.5, *NO_NUMBERS],
    **{name: [None, 5, "yes", [], {}] for name in DEFAULT if name.startswith("ban_")},
}


@pytest.mark.parametrize("name", DEFAULT)
def test_invalid_settings_are_refused(name: str) -> None:
    for sent in BAD_SETTINGS[name]:
        with pytest.raises(gr.Error, match=f"(?i){name}") as refused:
            request(settings=DEFAULT | {name: sent})
        assert not refused.value.print_exception
    with pytest.raises(gr.Error, match="reload the page"):
        request(settings={each: DEFAULT[each] for each in DEFAULT if each != name})


def test_unknown_settings_are_refused() -> None:
    for name in ("top_p", "samples", "prefix", "max_length", "x", ""):
        with pytest.raises(ConfigError, match="reload the page"):
            decoding_options(DEFAULT | {name: 1})


WEB = Path(viewer.__file__).parent
PAGE = (WEB / "page.html").read_text(encoding="utf-8")


def test_form_has_every_setting_with_its_range() -> None:
    named = {
        name: (kind, rest)
        for kind, name, rest in re.findall(r'<input type="(\w+)" name="(\w+)"([^>]*)>', PAGE)
        if name != "text"
    }
    assert set(named) == set(DEFAULT)
    for name, (kind, rest) in named.items():
        assert kind == ("checkbox" if isinstance(DEFAULT[name], bool) else "number")
        if kind == "number":
            for end in ("min", "max"):
                (number,) = re.findall(rf'{end}="([\d.]+)"', rest)
                decoding_options(DEFAULT | {name: json.loads(number)})
    assert re.findall(r'data-format="(\w+)"', PAGE) == list(FORMATS)


# Captions


def test_caption_follows_the_settings(
    handlers: Handlers, captioner: Captioner, photo: Path
) -> None:
    for settings, options in (
        (DEFAULT, DecodingOptions()),
        (REPORT, DecodingOptions.plain_greedy()),
    ):
        view = handlers.caption(request(settings=settings))
        assert view.caption.to_dict() == captioner.caption(photo, options).to_dict()
        assert (view.request, view.photo) == (7, None)


def test_prefix_is_continued_and_marked_as_given(handlers: Handlers) -> None:
    caption = handlers.caption(request(text="Two women", given=[0, 1])).caption
    assert caption.text.startswith("two women ")
    assert len(caption.words) > 2
    assert caption.given == (0, 1)


def test_given_words_are_marked_as_the_model_reads_them(handlers: Handlers) -> None:
    # A dash is no word to the model.
    for whole, end in ((False, ()), (True, (3,))):
        given = [0, 2, 3]
        caption = handlers.caption(
            request(text="Two - women !? on", given=given, whole=whole)
        ).caption
        assert caption.text.startswith("two women on")
        assert caption.given == (0, 1, *end)


def test_whole_caption_is_scored_with_its_end(
    handlers: Handlers, captioner: Captioner, photo: Path
) -> None:
    text = "a zyzzyva runs"
    view = handlers.caption(request(text=text, given=[0, 1, 2], whole=True))
    assert view.caption.to_dict() == captioner.score(photo, text).to_dict()
    assert view.caption.given == (0, 1, 2, 3)


def test_steering_keeps_earlier_words_and_marks_only_the_visitors(handlers: Handlers) -> None:
    before = [word.text for word in handlers.caption(request()).caption.words[:2]]
    caption = handlers.caption(request(text=" ".join([*before, "cat"]), given=[2])).caption
    for beam in caption.beams:
        assert [word.text for word in beam.words[:3]] == [*before, "cat"]
        assert len(beam.words) > 3
    assert caption.given == (2,)
    ended = handlers.caption(request(text=caption.text, given=[2], whole=True)).caption
    assert ended.text == caption.text
    assert ended.given == (2, len(ended.words))


def test_upload_is_captioned_and_copied_if_the_browser_cannot_draw_it(
    handlers: Handlers, captioner: Captioner, uploads: Path
) -> None:
    path = uploads / "photo.tif"
    Image.radial_gradient("L").convert("RGB").resize((2000, 1000)).save(path)
    for drawn in (True, False):
        view = handlers.caption(request(file=str(path), drawn=drawn))
        assert view.caption.to_dict() == captioner.caption(path).to_dict()
        assert (None if view.photo is None else view.photo.size) == (None if drawn else (1024, 512))


def test_photo_is_encoded_once_and_refused_after_deletion(uploads: Path) -> None:
    model = Parrot()
    handlers = Handlers(model, {})
    path = uploads / "photo.png"
    Image.new("RGB", (40, 20)).save(path)
    texts = [
        handlers.caption(request(file=str(path), text=text, given=[], whole=whole)).caption.text
        for text, whole in (("", False), ("", False), ("a", False), ("a b", True))
    ]
    # Nothing that a visitor wrote or got is kept.
    assert texts == ["answer 1", "answer 2", "answer 3", "a b"]
    assert model.encoded == 1
    path.unlink()
    with pytest.raises(gr.Error, match="no longer stored here"):
        handlers.caption(request(file=str(path)))


def test_photo_is_opened_once_per_request(
    captioner: Captioner, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = uploads / "photo.tif"
    Image.radial_gradient("L").convert("RGB").save(path)
    handlers = Handlers(captioner, {})
    reads: list[Path] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    for drawn in (False, False, True, True):
        handlers.caption(request(file=str(path), drawn=drawn))
    # Once for a browser that cannot draw it, once for one that can.
    assert reads == [path, path]


def test_examples_are_captioned_at_the_start(examples: dict[str, ExamplePhoto]) -> None:
    model = Parrot()
    handlers = Handlers(model, examples)
    assert [example.caption.text for example in handlers.examples] == ["answer 1", "answer 2"]
    assert [example.name for example in handlers.examples] == ["one", "two"]
    for example in handlers.examples:
        assert max(example.photo.size) <= 1024
        width, height = example.caption.size
        assert example.photo.width / example.photo.height == pytest.approx(width / height, rel=0.01)

    def texts(*asked: tuple[str, Fields]) -> list[str]:
        return [
            handlers.caption(request(example=name, settings=settings)).caption.text
            for name, settings in asked
        ]

    assert texts(("two", DEFAULT), ("one", DEFAULT)) == ["answer 2", "answer 1"]
    assert texts(("one", REPORT), ("one", REPORT)) == ["answer 3", "answer 3"]
    assert texts(("two", REPORT), ("one", DEFAULT)) == ["answer 4", "answer 1"]
    # Another visitor's words are never marked in an answer that was kept.
    assert handlers.caption(request(text="a", given=[0])).caption.given == (0,)
    assert handlers.caption(request(text="a")).caption.given == ()
    assert model.encoded == 2


# Covers


def test_cover_is_that_of_the_captioner(
    handlers: Handlers, captioner: Captioner, photo: Path
) -> None:
    for settings, options in (
        (DEFAULT, DecodingOptions()),
        (REPORT, DecodingOptions.plain_greedy()),
    ):
        view = handlers.cover(cover_request(settings=settings))
        assert view.cover is not None
        expected = captioner.cover(photo, "a dog", 1, [3, 24], options=options)
        assert view.cover.to_dict() == expected.to_dict()
        assert (view.request, view.photo) == (7, None)


def test_cover_is_sent_with_its_caption_once() -> None:
    test = Parrot().cover(Image.new("RGB", (40, 20)), "a dog", 1, [3])
    data = AttentionViewer().postprocess(View(test.caption, request=3, cover=test))
    assert data is not None
    assert data.caption == test.caption.to_dict()
    assert data.cover is not None
    assert {**data.cover, "caption": data.caption} == test.to_dict()
    plain = AttentionViewer().postprocess(View(test.caption))
    assert plain is not None
    assert plain.cover is None


@pytest.mark.parametrize(
    "cells",
    [[], list(range(49)), [3, 3], [-1], [49], [True], [3.0], ["3"], [None], [[3]], None, "3", {}],
)
def test_invalid_cells_are_refused(cells: object) -> None:
    with pytest.raises(gr.Error, match="cells") as refused:
        cover_request(cells=cells)
    assert not refused.value.print_exception


Ask: TypeAlias = Callable[[Handlers, Path], object]
PROBLEMS: dict[str, Ask] = {
    "unknown word": lambda handlers, _: handlers.caption(request(text="a zyzzyva")),
    "no word to cover": lambda handlers, _: handlers.cover(cover_request(word=3)),
    "long text to cover": lambda handlers, _: handlers.cover(cover_request(text="a " * 1500)),
    "long beginning": lambda handlers, _: handlers.caption(request(text="a " * 40)),
    "nothing to score": lambda handlers, _: handlers.caption(request(text="!?", whole=True)),
    "no caption": lambda handlers, _: handlers.caption(request(text="", whole=True)),
    "long caption": lambda handlers, _: handlers.caption(request(text="a " * 400, whole=True)),
    "long text": lambda handlers, _: handlers.caption(request(text="a" * 10**6)),
    "unknown example": lambda handlers, _: handlers.caption(request(example="three")),
    "broken file": lambda handlers, path: handlers.caption(request(file=str(path))),
    "broken file, exported": lambda handlers, path: handlers.export(export_request(file=str(path))),
    "unknown format": lambda handlers, _: handlers.export(export_request(format="exe")),
    "path for a format": lambda handlers, _: handlers.export(export_request(format="../png")),
    "unknown beam": lambda handlers, _: handlers.export(export_request(beam=1)),
    "negative beam": lambda handlers, _: handlers.export(export_request(beam=-1)),
    "unknown word, exported": lambda handlers, _: handlers.export(export_request(word=3)),
    "negative word": lambda handlers, _: handlers.export(export_request(word=-1)),
    "unknown look": lambda handlers, _: handlers.export(export_request(appearance={"x": 1})),
    "unknown colors": lambda handlers, _: handlers.export(
        export_request(appearance={"colors": "jet"})
    ),
    "strength of no number": lambda handlers, _: handlers.export(
        export_request(appearance={"strength": "1"})
    ),
    "API without a photo": lambda handlers, _: handlers.api(None, {}),
    "API options of no object": lambda handlers, _: handlers.api(b"", [5]),
    "API option unknown": lambda handlers, _: handlers.api(b"", {"beams": 5}),
    "API option out of range": lambda handlers, _: handlers.api(b"", {"top_p": 2}),
    "API with many beams": lambda handlers, _: handlers.api(b"", {"beam_size": 6}),
    "API with many samples": lambda handlers, _: handlers.api(
        b"", {"samples": 6, "temperature": 1}
    ),
    "API with a long caption": lambda handlers, _: handlers.api(b"", {"max_length": 33}),
    "API with a long prefix": lambda handlers, _: handlers.api(b"", {"prefix": "a " * 1001}),
    "unknown word, explained": lambda handlers, _: handlers.steps(steps_request(word=3)),
    "negative word, explained": lambda handlers, _: handlers.steps(steps_request(word=-1)),
    "many words, explained": lambda handlers, _: handlers.steps(steps_request(words=["a"] * 10**5)),
    "unknown example, explained": lambda handlers, _: handlers.steps(steps_request(example="x")),
}


@pytest.mark.parametrize("ask", PROBLEMS.values(), ids=PROBLEMS)
def test_handler_errors_are_one_sentence(ask: Ask, handlers: Handlers, uploads: Path) -> None:
    bad = uploads / "broken.jpg"
    bad.write_text("no photo")
    with pytest.raises(gr.Error) as refused:
        ask(handlers, bad)
    message = refused.value.message
    assert message[0].isupper() or message[0] == '"'
    assert message.endswith((".", "?"))
    assert not message.endswith("..")
    assert ". " not in message or "an image we can read" in message
    assert "\n" not in message
    assert str(bad) not in message
    assert isinstance(refused.value.__cause__, CaptionerError)
    assert not refused.value.print_exception


@pytest.mark.parametrize(
    "where", ["elsewhere", "up", "link", "folder", "gone", "\0", "a" * 5000, ""]
)
def test_only_uploaded_files_are_opened(
    where: str, handlers: Handlers, uploads: Path, photo: Path
) -> None:
    (uploads / "link").symlink_to(photo)
    places = {
        "elsewhere": str(photo),
        "up": f"{uploads}/{'../' * 30}{photo}",
        "link": str(uploads / "link"),
        "folder": str(uploads),
        "gone": str(uploads / "gone.jpg"),
    }
    path = places.get(where, where)
    calls: list[Callable[[], object]] = [
        lambda: handlers.caption(request(file=path)),
        lambda: handlers.export(export_request(file=path)),
        lambda: handlers.steps(steps_request(file=path)),
    ]
    for call in calls:
        with pytest.raises(gr.Error, match="no longer stored here") as refused:
            call()
        assert str(photo) not in refused.value.message


def test_steps_are_those_of_the_word_on_the_screen(
    handlers: Handlers, captioner: Captioner, photo: Path
) -> None:
    words = ["a", "zyzzyva", "dog"]
    for index in range(4):
        answer = handlers.steps(steps_request(words=words, word=index))
        assert answer.steps == captioner.steps(photo, words, index).to_dict()
        assert answer.request == 7
        assert json.loads(json.dumps(answer.steps, allow_nan=False))["word"] == answer.steps["word"]


def test_explained_photo_is_not_encoded_again(uploads: Path) -> None:
    model = Parrot()
    handlers = Handlers(model, {})
    path = uploads / "photo.png"
    Image.new("RGB", (40, 20)).save(path)
    handlers.caption(request(file=str(path)))
    assert handlers.steps(steps_request(file=str(path))).steps == {"word": "dog"}
    assert model.encoded == 1


def test_api_returns_plain_json(handlers: Handlers, captioner: Captioner, photo: Path) -> None:
    values = handlers.api(photo.read_bytes(), {})
    assert json.loads(json.dumps(values, allow_nan=False)) == captioner.caption(photo).to_dict()


# Events


NO_DATA: list[object] = [None, [], "text", 5, {}]
NO_TEXTS: list[object] = [None, 5, ["a"], {}]
NO_INDICES: list[object] = [None, "01", 5, [2], [-1], [10**9], ["0"], [True], [[0]], [0.0], [None]]
NO_WHOLE_NUMBERS: list[object] = [None, "0", 0.5, math.nan, [0], True]
NO_FLAGS: list[object] = [None, "yes", 1, []]
NO_DICTS: list[object] = [None, [], "x", 5]
NO_CAPTIONS: list[object] = [
    *NO_DICTS,
    {},
    {"text": "a"},
    {"size": [1, 2], "beams": [], "given": []},
]

BAD_CAPTION_REQUESTS: dict[str, list[object]] = {
    "request": NO_WHOLE_NUMBERS,
    "example": [5, ["one"], {}],
    "file": NO_TEXTS,
    "text": NO_TEXTS,
    "given": NO_INDICES,
    "whole": NO_FLAGS,
    "drawn": NO_FLAGS,
    "settings": NO_DICTS,
}
BAD_EXPORT_REQUESTS: dict[str, list[object]] = {
    "example": [5, ["one"], {}],
    "file": NO_TEXTS,
    "format": NO_TEXTS,
    "caption": NO_CAPTIONS,
    "beam": NO_WHOLE_NUMBERS,
    "word": NO_WHOLE_NUMBERS,
    "appearance": NO_DICTS,
}
BAD_STEPS_REQUESTS: dict[str, list[object]] = {
    "request": NO_WHOLE_NUMBERS,
    "example": [5, ["one"], {}],
    "file": NO_TEXTS,
    "words": [None, "a dog", 5, {}, [5], ["a", None], [["a"]]],
    "word": NO_WHOLE_NUMBERS,
}
BAD_REQUESTS: dict[Callable[..., object], dict[str, list[object]]] = {
    request: BAD_CAPTION_REQUESTS,
    export_request: BAD_EXPORT_REQUESTS,
    steps_request: BAD_STEPS_REQUESTS,
}


@pytest.mark.parametrize(
    ("build", "name"),
    [(build, name) for build, values in BAD_REQUESTS.items() for name in values],
)
def test_invalid_event_data_is_refused(build: Callable[..., object], name: str) -> None:
    # Two words, of which index 2 is out of range; without an example the file counts.
    fields = {"text": "ab cd"} if build is request else {}
    for value in BAD_REQUESTS[build][name]:
        with pytest.raises(gr.Error, match=r"reload the page|not the JSON of a caption") as refused:
            build(**fields | {name: value})
        assert not refused.value.print_exception


@pytest.mark.parametrize("event", [CaptionRequest, ExplainRequest, ExportRequest, StepsRequest])
def test_event_without_data_is_refused(event: Callable[[None, object], object]) -> None:
    for data in NO_DATA:
        with pytest.raises(gr.Error, match="reload the page"):
            event(None, data)


# Verdicts


def test_explanation_has_verdicts_and_the_number_of_its_request(
    handlers: Handlers, captioner: Captioner, photo: Path
) -> None:
    caption = captioner.caption(photo)
    view = handlers.explain(explain_request(caption=caption.to_dict(), request=12, beam=1))
    assert (view.explained, view.request, view.photo) == (True, 12, None)
    expected = captioner.explain(photo, caption, 1)
    assert [word.verdict for word in view.caption.beams[1].words] == [
        word.verdict for word in expected.beams[1].words
    ]
    assert view.caption.seen == expected.seen


@pytest.mark.parametrize(
    "fields", [{"beam": 9}, {"beam": -1}, {"example": "nothing"}, {"file": "/etc/passwd"}]
)
def test_explanation_of_what_is_not_there_is_refused(handlers: Handlers, fields: Fields) -> None:
    with pytest.raises(gr.Error):
        handlers.explain(explain_request(**fields))


# The component


def test_view_is_sent_as_json_and_files_without_metadata(photo: Path) -> None:
    large = open_photo(photo).resize((3000, 2000))
    large.info["comment"] = b"secret"
    hostile = Parrot().score(large, "a zyzzyva </script> runs")
    component = AttentionViewer()
    data = component.postprocess(
        View(hostile, large, 3, [Example("one", "photo one", "a note", large, CAPTION)])
    )
    assert data is not None
    sent = json.loads(data.model_dump_json())
    assert Caption.from_dict(sent["caption"]).text == hostile.text
    np.testing.assert_allclose(
        Caption.from_dict(sent["caption"]).attention, hostile.attention, atol=1e-6
    )
    assert (sent["request"], sent["defaults"], sent["plain"]) == (3, DEFAULT, REPORT)
    (example,) = sent["examples"]
    assert (example["name"], example["title"], example["note"]) == ("one", "photo one", "a note")
    assert json.loads(Path(example["answer"]["path"]).read_text()) == CAPTION.to_dict()
    for file, side in (
        (sent["photo"], 1024),
        (example["photo"], 1024),
        (example["thumbnail"], 128),
    ):
        content = Path(file["path"]).read_bytes()
        assert content.startswith(b"\xff\xd8\xff")
        assert len(content) <= 250_000
        assert b"secret" not in content
        with Image.open(file["path"]) as picture:
            assert max(picture.size) == side
            assert picture.width / picture.height == pytest.approx(1.5, rel=0.01)


def test_answer_holds_only_the_caption() -> None:
    component = AttentionViewer()
    data = component.postprocess(View(CAPTION, request=2))
    assert data is not None
    assert (data.photo, data.examples, data.defaults, data.request) == (None, [], {}, 2)
    assert component.postprocess(None) is None


def test_explanation_is_sent_without_a_caption() -> None:
    data = AttentionViewer().postprocess(StepsView({"word": "dog"}, request=3))
    assert data is not None
    assert (data.steps, data.caption, data.photo, data.request) == ({"word": "dog"}, {}, None, 3)


def test_example_photos_are_installed_and_described() -> None:
    photos = viewer.example_photos()
    assert len(photos) >= 8
    for name, example in photos.items():
        assert re.fullmatch(r"[a-z]+", name)
        assert example.path.is_file()
        assert example.note.endswith((".", "?"))
    for part in ("path", "title", "note"):
        assert len({getattr(example, part) for example in photos.values()}) == len(photos)


SCRIPT = (WEB.parent / "inference" / "viewer.js").read_text(encoding="utf-8")
(_TABLE,) = re.findall(r"const COLORS = \{(.*?)\};", SCRIPT, flags=re.DOTALL)
COLORS = dict(re.findall(r'(\w+): "([0-9a-f ]{100,})"', _TABLE))  # but brightness only


def test_script_has_the_color_maps_of_render() -> None:
    assert {"inferno", "viridis", "cividis"} <= set(COLORS)


@pytest.mark.parametrize("name", COLORS)
def test_browser_colors_match_matplotlib(name: str) -> None:
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
    assert "the previous word and that mean comes" in deep
    assert "hidden state and the previous word with each" in query
    assert len({plain, mean, deep, query}) == 4


def test_how_it_works_defines_a_right_caption_if_there_is_a_confidence() -> None:
    config = ModelConfig(vocabulary_size=50, encoder_channels=8)
    encoder = {"name": "tiny", "grid": [7, 7], "transform": {"size": 224}}
    assert "two thirds" in viewer.how_it_works(config, encoder, has_confidence=True)
    assert "two thirds" not in viewer.how_it_works(config, encoder)


# Errors


def test_captioner_error_is_shown() -> None:
    @show_errors
    def fail() -> None:
        raise ImageError("there is no file x.jpg")

    with pytest.raises(gr.Error) as refused:
        fail()
    assert refused.value.message == "There is no file x.jpg."


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, RuntimeError, gr.Error])
def test_other_errors_pass_through(error: type[Exception]) -> None:
    cause = error("secret")

    @show_errors
    def fail() -> None:
        raise cause

    with pytest.raises(error) as raised:
        fail()
    assert raised.value is cause


def test_result_passes_through() -> None:
    @show_errors
    def add(a: int, *, b: int) -> int:
        return a + b

    assert add(1, b=2) == 3
    assert add.__name__ == "add"


# Photos of the API


def test_upload_is_captioned_upright(handlers: Handlers, uploads: Path) -> None:
    path = uploads / "upload"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(path, "JPEG", exif=exif)
    data = PhotoInput().preprocess(ImageData(path=str(path)))
    assert data == path.read_bytes()
    assert handlers.api(data, {})["size"] == [20, 40]


def test_missing_upload_is_none() -> None:
    assert PhotoInput().preprocess(None) is None


@pytest.mark.parametrize("data", [b"no photo", b"", b"GIF89a"])
def test_unreadable_upload_is_an_error_in_a_sentence(handlers: Handlers, data: bytes) -> None:
    with pytest.raises(gr.Error, match="The photo is"):
        handlers.api(data, {})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (
            {"path": str(Path(PhotoInput().GRADIO_CACHE, "gone.jpg"))},
            r"^'The upload failed; send the photo again\.'$",
        ),
        ({"path": "a\0b"}, r"^'The upload failed; send the photo again\.'$"),
        ({"url": "data:image/png;base64,!!!!"}, r"^'No photo came with the request"),
        ({"url": "http://127.0.0.1:9/x.png"}, r"^'No photo came with the request"),
        ({}, r"^'No photo came with the request"),
    ],
)
def test_missing_file_is_an_error(payload: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error, match=message):
        PhotoInput().preprocess(ImageData(**payload))
