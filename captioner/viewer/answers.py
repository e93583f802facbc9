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
from captioner.errors import ImageError
from captioner.images import open_photo
from captioner.viewer.attention import View
from captioner.viewer.problems import told
from captioner.viewer.settings import decoding_options


class Model(Protocol):
    """What is asked of ``captioner.Captioner``."""

    def caption(self, photo: Image.Image, options: DecodingOptions | None = None) -> Caption:
        """Write a caption."""

    def score(self, photo: Image.Image, text: str) -> Caption:
        """Read a caption."""

    def words(self, text: str) -> list[str]:
        """Split a text."""


class Answers:
    """Event handlers; ``settings`` are the values of ``captioner.viewer.controls()``."""

    def __init__(self, model: Model, examples: Sequence[str]) -> None:
        """Serve a model; ``examples`` are paths of photos."""
        self._model = model
        self._examples = examples
        # Only the examples are kept, which belong to nobody.
        self._example = functools.lru_cache(maxsize=64)(self._caption_example)

    def _caption_example(self, number: int, options: DecodingOptions) -> View:
        photo = open_photo(self._examples[number])
        return View(photo, self._model.caption(photo, options))

    def warm_up(self) -> None:
        """Caption the examples with the default settings, so that a click is answered at once."""
        for number in range(len(self._examples)):
            self._example(number, DecodingOptions())

    def _write(
        self, photo: Image.Image | None, text: str, fixed: Sequence[int], settings: tuple[Any, ...]
    ) -> View | None:
        if photo is None:
            return None
        options = dataclasses.replace(decoding_options(*settings), prefix=text)
        return View(photo, self._model.caption(photo, options), tuple(fixed))

    @told
    def caption(self, photo: Image.Image | None, *settings: Any) -> View | None:
        """Caption what was brought; nothing if the photo was taken away."""
        return self._write(photo, "", (), settings)

    @told
    def example(self, number: int, *settings: Any) -> tuple[str, View]:
        """Return an example's photo and its caption."""
        return self._examples[number], self._example(number, decoding_options(*settings))

    @told
    def steer(self, photo: Image.Image | None, event: gr.EventData, *settings: Any) -> View | None:
        """Write on from the words that ``AttentionViewer`` sent, or end the caption there."""
        if event.whole and photo is not None:
            return View(photo, self._model.score(photo, event.text), tuple(event.fixed), read=True)
        return self._write(photo, event.text, event.fixed, settings)

    @told
    def write_on(self, photo: Image.Image | None, text: str, *settings: Any) -> View | None:
        """Write on from a beginning that the visitor typed."""
        return self._write(photo, text, range(len(self._model.words(text))), settings)

    @told
    def read(self, photo: Image.Image | None, text: str) -> View | None:
        """Read a whole caption that the visitor typed."""
        if photo is None:
            return None
        fixed = range(len(self._model.words(text)))
        return View(photo, self._model.score(photo, text), tuple(fixed), read=True)

    @told
    def api(self, photo: Image.Image | None) -> dict[str, Any]:
        """Return a caption as JSON: text, size, and beams with every word's numbers and map."""
        if photo is None:
            raise ImageError("no photo came with the request: send one")
        return self._model.caption(photo).to_dict()
