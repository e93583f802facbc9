"""The handlers of the page's events. Keeps no photo of any visitor."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Protocol

from gradio.utils import get_upload_folder
from PIL import Image

from captioner.config import DecodingOptions
from captioner.errors import ConfigError, ImageError
from captioner.images import DISPLAY_SIDE, Photo, open_photo
from captioner.inference.caption import Caption
from captioner.inference.captioner import EncodedPhoto
from captioner.inference.render import Appearance, render
from captioner.model.vocabulary import clean
from captioner.web.attention_viewer import CaptionRequest, Example, ExportRequest, View
from captioner.web.errors import show_errors
from captioner.web.photo_input import ExamplePhoto, example_photos
from captioner.web.settings import decoding_options, setting_values

_MAX_CHARACTERS = 2000
_KEPT_PHOTOS = 64  # encoded, 0.3 MB each


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


class Handlers:
    """What the page's events do."""

    def __init__(self, model: Model, examples: dict[str, ExamplePhoto]) -> None:
        """Serve a model; ``examples`` by name, captioned at once."""
        self._model = model
        self._paths = {name: example.path for name, example in examples.items()}
        # Steering and settings ask again and again for the same photo: its cells are kept.
        self._encoded = functools.lru_cache(_KEPT_PHOTOS)(
            lambda path: model.encode(path.read_bytes())  # bytes: errors must not name the path
        )
        self._caption_example = functools.lru_cache(256)(self._write)
        defaults = decoding_options(setting_values(DecodingOptions()))  # as a request brings them
        self.examples = [
            Example(
                name,
                example.title,
                example.note,
                _display_copy(example.path),
                self._caption_example(example.path, defaults),
            )
            for name, example in examples.items()
        ]

    def _write(self, path: Path, options: DecodingOptions) -> Caption:
        return self._model.caption(self._encoded(path), options)

    def _path(self, request: CaptionRequest | ExportRequest) -> Path:
        """Return the requested photo's file."""
        if request.example is not None:
            if request.example not in self._paths:
                raise ImageError("there is no such example: choose one that is shown")
            return self._paths[request.example]
        try:
            path = Path(request.path or "").resolve()
            known = path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()
        except (OSError, ValueError):  # not a possible file name
            known = False
        if not known:
            raise ImageError("the photo is no longer stored here: upload it again")
        return path

    @show_errors
    def caption(self, request: CaptionRequest) -> View:
        """Write a caption that begins with the visitor's words, or score the whole of it."""
        if len(request.text) > _MAX_CHARACTERS:
            raise ConfigError(
                f"the text has {len(request.text)} characters; the limit is {_MAX_CHARACTERS}"
            )
        path = self._path(request)
        given = _marks(request.text, request.given)
        if request.whole:
            caption = self._model.score(self._encoded(path), request.text)
            given.append(len(caption.words))
        else:
            options = dataclasses.replace(request.options, prefix=request.text)
            write = self._write if request.example is None else self._caption_example
            caption = write(path, options)
        # Most of the kept words are the model's own: only the visitor's are marked.
        caption = dataclasses.replace(caption, given=tuple(given))
        photo = None if request.drawn else _display_copy(path)
        return View(caption, photo, request.request)

    @show_errors
    def export(self, request: ExportRequest) -> tuple[bytes, str]:
        """Return a file of what is on the screen: its data and its name."""
        photo = open_photo(self._path(request).read_bytes())  # errors must not name the path
        appearance = Appearance.from_dict(request.appearance)
        data = render(
            photo, request.caption, request.format, request.beam, request.word, appearance
        )
        return data, f"caption.{request.format}"

    @show_errors
    def api(self, photo: Image.Image | None) -> dict[str, Any]:
        """Return a caption as JSON: text, size, and beams with every word's numbers and map."""
        if photo is None:
            raise ImageError("no photo came with the request: send one")
        return self._model.caption(photo).to_dict()


def _marks(text: str, given: list[int]) -> list[int]:
    """Return the indices of the visitor's words among those that the model reads.

    It may read more or fewer than are typed: of "two - women" it reads two.
    """
    marked, count = set(given), 0
    marks: list[int] = []
    for index, typed in enumerate(text.split()):
        words = len(clean(typed).split())
        if index in marked:
            marks += range(count, count + words)
        count += words
    return marks


def preview_picture(model: Model) -> bytes:
    """Return a PNG for links to the page: the first example, all of its words with their maps."""
    path = next(iter(example_photos().values())).path
    return render(open_photo(path), model.caption(path), "png")


def _display_copy(path: Path) -> Image.Image:
    photo = open_photo(path)
    photo.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return photo
