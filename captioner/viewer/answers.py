"""What the page answers to what a visitor does. Keeps nothing of any visitor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import gradio as gr
from PIL import Image

from captioner.caption import Caption
from captioner.config import DecodingOptions
from captioner.errors import ConfigError, ImageError
from captioner.images import DISPLAY_SIDE, open_photo
from captioner.viewer.attention import Steering, View
from captioner.viewer.photos import BROWSER_FORMATS
from captioner.viewer.problems import told
from captioner.viewer.settings import decoding_options, setting_values


class Model(Protocol):
    """What is asked of ``captioner.Captioner``."""

    def caption(self, photo: Image.Image, options: DecodingOptions | None = None) -> Caption:
        """Write a caption."""

    def score(self, photo: Image.Image, text: str) -> Caption:
        """Read a caption."""


_MOST_CHARACTERS = 2000


def _check_text(text: object) -> None:
    """Refuse what nobody types."""
    if not isinstance(text, str):
        raise ConfigError("the words did not arrive: type them again")
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(
            f"the words have {len(text)} characters and may have {_MOST_CHARACTERS}: shorten them"
        )


def _ask_for_a_photo(text: str) -> None:
    """Tell a visitor who has typed something why nothing comes of it."""
    if text.strip():
        raise ImageError("there is no photo to write about: bring one first")


class Answers:
    """Event handlers; ``settings`` are the values of ``captioner.viewer.controls()``."""

    def __init__(self, model: Model, examples: Sequence[str]) -> None:
        """Serve a model; ``examples`` are paths of photos, captioned at once."""
        self._model = model
        self._examples = examples
        # Only examples are kept, which belong to nobody: a click is answered at once.
        self._shown = [open_photo(path) for path in examples]
        for photo in self._shown:
            photo.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
        self._caption_example = functools.lru_cache(maxsize=256)(
            lambda number, options: model.caption(open_photo(examples[number]), options)
        )
        for number in range(len(examples)):
            self.example(number, *setting_values(DecodingOptions()))

    @told
    def brought(self, photo: Image.Image | None, *settings: Any) -> tuple[Any, View | None]:
        """Caption an upload; show it as PNG where browsers cannot draw the file itself."""
        shown = gr.skip()
        if photo is not None and photo.format not in BROWSER_FORMATS:
            shown = photo
        return shown, self.caption(photo, *settings)

    @told
    def caption(self, photo: Image.Image | None, *settings: Any) -> View | None:
        """Caption the photo; nothing where there is none."""
        return self.write_on(photo, "", *settings)

    @told
    def example(self, number: int, *settings: Any) -> tuple[str, View]:
        """Return an example's photo and its caption."""
        if type(number) is not int or not 0 <= number < len(self._examples):
            raise ImageError("there is no such example: choose one that is shown")
        caption = self._caption_example(number, decoding_options(*settings))
        return self._examples[number], View(self._shown[number], caption)

    @told
    def write_on(self, photo: Image.Image | None, text: str, *settings: Any) -> View | None:
        """Write on from a beginning; without one, write a caption."""
        _check_text(text)
        if photo is None:
            _ask_for_a_photo(text)
            return None
        options = dataclasses.replace(decoding_options(*settings), prefix=text)
        return View(photo, self._model.caption(photo, options))

    @told
    def read(self, photo: Image.Image | None, text: str) -> View | None:
        """Read a whole caption."""
        _check_text(text)
        if photo is None:
            _ask_for_a_photo(text)
            return None
        return View(photo, self._model.score(photo, text))

    @told
    def steer(self, photo: Image.Image | None, event: Steering, *settings: Any) -> View | None:
        """Write on from the words that ``AttentionViewer`` sent, or end the caption there."""
        if event.whole:
            view = self.read(photo, event.text)
        else:
            view = self.write_on(photo, event.text, *settings)
        if view is None:
            return None
        # Most of the words that were kept are the model's own: only the visitor's are marked.
        given = [*event.given, len(view.caption.words)] if event.whole else event.given
        return View(view.photo, dataclasses.replace(view.caption, given=tuple(given)))

    @told
    def api(self, photo: Image.Image | None) -> dict[str, Any]:
        """Return a caption as JSON: text, size, and beams with every word's numbers and map."""
        if photo is None:
            raise ImageError("no photo came with the request: send one")
        return self._model.caption(photo).to_dict()
