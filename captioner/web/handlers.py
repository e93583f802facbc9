"""The handlers of the page's events."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from gradio.utils import get_upload_folder
from PIL import Image

from captioner.config import DecodingOptions
from captioner.errors import ImageError
from captioner.images import DISPLAY_SIDE, Photo, open_photo
from captioner.inference.caption import Caption
from captioner.inference.captioner import EncodedPhoto
from captioner.inference.cover import CoverTest
from captioner.inference.render import Appearance, render
from captioner.web.attention_viewer import (
    CaptionRequest,
    ClientEvent,
    CoverRequest,
    Example,
    ExplainRequest,
    ExportRequest,
    StepsRequest,
    StepsView,
    View,
)
from captioner.web.controls import api_options, check_text, decoding_options, setting_values
from captioner.web.errors import show_errors
from captioner.web.photo_input import ExamplePhoto, example_photos

_MAX_ENCODED = 64  # photos, 0.3 MB each
_MAX_DISPLAYED = 4  # photos that a browser cannot draw, 3 MB each


class Steps(Protocol):
    """The part of ``captioner.model.steps.WordSteps`` that the page uses."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""


class Model(Protocol):
    """The part of ``captioner.Captioner`` that the page uses."""

    def encode(self, photo: Photo) -> EncodedPhoto:
        """Encode a photo."""

    def caption(
        self, photo: Photo | EncodedPhoto, options: DecodingOptions | None = None
    ) -> Caption:
        """Write a caption."""

    def score(self, photo: Photo | EncodedPhoto, text: str) -> Caption:
        """Score a caption."""

    def explain(self, photo: Photo | EncodedPhoto, caption: Caption, beam: int = 0) -> Caption:
        """Explain the words of a beam."""

    def words_of(self, text: str) -> list[str]:
        """Split a text into words as the model reads them."""

    def steps(self, photo: Photo | EncodedPhoto, words: Sequence[str], index: int) -> Steps:
        """Explain how one word of a caption was chosen."""

    def cover(
        self,
        photo: Photo,
        text: str,
        word: int,
        cells: Sequence[int],
        *,
        options: DecodingOptions | None = None,
    ) -> CoverTest:
        """Cover cells of a photo and caption it anew."""


class Handlers:
    """The page's events."""

    def __init__(self, model: Model, examples: dict[str, ExamplePhoto]) -> None:
        """Serve a model; caption the ``examples`` (by name) now."""
        self._model = model
        self._paths = {name: example.path for name, example in examples.items()}
        # Steering and new settings request the same photo many times.
        self._encode = functools.lru_cache(_MAX_ENCODED)(
            lambda path: model.encode(path.read_bytes())  # bytes: errors must not name the path
        )
        self._encode_and_display = functools.lru_cache(_MAX_DISPLAYED)(self._open)
        self._caption_example = functools.lru_cache(256)(
            lambda path, options: model.caption(self._encode(path), options)
        )
        defaults = decoding_options(setting_values(DecodingOptions()))  # as in a request
        self.examples = [
            Example(
                name,
                example.title,
                example.note,
                _display_copy(open_photo(example.path)),
                self._caption_example(example.path, defaults),
            )
            for name, example in examples.items()
        ]

    def _open(self, path: Path) -> tuple[EncodedPhoto, Image.Image]:
        """Open a photo once, to encode and to display it."""
        photo = open_photo(path.read_bytes())  # bytes: errors must not name the path
        return self._model.encode(photo), _display_copy(photo)

    def _path(self, request: ClientEvent) -> Path:
        """Return the requested photo's file."""
        if request.example is not None:
            if request.example not in self._paths:
                raise ImageError("there is no such example: choose one on the page")
            return self._paths[request.example]
        try:
            path = Path(request.path or "").resolve()
            is_upload = path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()
        except (OSError, ValueError):  # not a possible file name
            is_upload = False
        if not is_upload:
            raise ImageError("the photo is no longer stored here: upload it again")
        return path

    @show_errors
    def caption(self, request: CaptionRequest) -> View:
        """Write a caption that begins with the visitor's words, or score the whole of it."""
        check_text(request.text)
        path, photo = self._path(request), None
        given = self._word_indices(request.text, request.given)
        if request.drawn:
            encoded = self._encode(path)
        else:
            encoded, photo = self._encode_and_display(path)
        options = dataclasses.replace(request.options, prefix=request.text)
        if request.whole:
            caption = self._model.score(encoded, request.text)
            given.append(len(caption.words))
        elif request.example is not None:
            caption = self._caption_example(path, options)
        else:
            caption = self._model.caption(encoded, options)
        # The text before a steered word is the model's own: only the visitor's words are marked.
        caption = dataclasses.replace(caption, given=tuple(given))
        return View(caption, photo, request.request)

    def _word_indices(self, text: str, given: list[int]) -> list[int]:
        """Return the indices of the visitor's words among those that the model reads.

        These can be more or fewer than the typed ones: "two - women" has two.
        """
        indices: list[int] = []
        count = 0
        for index, typed in enumerate(text.split()):
            num_words = len(self._model.words_of(typed))
            if index in given:
                indices += range(count, count + num_words)
            count += num_words
        return indices

    @show_errors
    def explain(self, request: ExplainRequest) -> View:
        """Return a caption with its words' verdicts and further maps."""
        encoded = self._encode(self._path(request))
        caption = self._model.explain(encoded, request.caption, request.beam)
        return View(caption, request=request.request, explained=True)

    @show_errors
    def cover(self, request: CoverRequest) -> View:
        """Cover cells of the photo, and caption it without the visitor's words."""
        check_text(request.text)
        photo = self._path(request).read_bytes()  # bytes: errors must not name the path
        test = self._model.cover(
            photo, request.text, request.word, request.cells, options=request.options
        )
        return View(test.caption, request=request.request, cover=test)

    @show_errors
    def export(self, request: ExportRequest) -> tuple[bytes, str]:
        """Return the caption on the screen as a file: its data and its name."""
        photo = open_photo(self._path(request).read_bytes())  # errors must not name the path
        appearance = Appearance.from_dict(request.appearance)
        data = render(
            photo, request.caption, request.format, request.beam, request.word, appearance
        )
        return data, f"caption.{request.format}"

    @show_errors
    def steps(self, request: StepsRequest) -> StepsView:
        """Explain how one word of the caption on the screen was chosen."""
        encoded = self._encode(self._path(request))
        steps = self._model.steps(encoded, request.words, request.word)
        return StepsView(steps.to_dict(), request.request)

    @show_errors
    def api(self, photo: bytes | None, options: Any) -> dict[str, Any]:
        """Return a caption as JSON: text, size, and beams with every word's numbers and map.

        ``options`` has fields of ``DecodingOptions`` by name, such as beam_size and prefix.
        """
        if photo is None:
            raise ImageError("no photo came with the request: send one")
        return self._model.caption(photo, api_options(options)).to_dict()


def preview_picture(model: Model) -> bytes:
    """Return a PNG for links to the page: the first example, all of its words with their maps."""
    path = next(iter(example_photos().values())).path
    return render(open_photo(path), model.caption(path), "png")


def _display_copy(photo: Image.Image) -> Image.Image:
    photo.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return photo
