"""The page's one component: photo input, attention viewer and settings, drawn in the browser.

Hovering, clicking and playing need no request. The server is asked with two events: ``caption``
(write or score a caption) and ``export`` (make a file). ``viewer.js`` draws; the standalone page of
``captioner.overlay`` shares it. ``page.js`` holds the state of the page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.data_classes import FileData, GradioModel
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from pydantic import Field

from captioner.config import DecodingOptions
from captioner.errors import ConfigError
from captioner.images import display_jpeg
from captioner.inference.caption import Caption
from captioner.web.errors import show_errors
from captioner.web.settings import decoding_options, setting_values

_Kind = TypeVar("_Kind")
_HERE = Path(__file__).parent
_THUMBNAIL_SIDE = 128

# Starts the page's script, and hands it every answer.
_ON_LOAD = """
const page = mountPage(element, {
  caption: (request) => trigger("caption", request),
  save: (request) => trigger("export", request),
  upload,
});
element.addEventListener("request-failed", () => page.fail());
element.addEventListener("export-ended", ({ detail }) => page.saved(detail));
let started = false;
const load = () => {
  if (!props.value) return;
  if (started) page.answer(props.value);
  else page.start(props.value);
  started = true;
};
watch("value", load);
load();
"""

_PAGE = "document.querySelector('.page').parentElement"
# Run in the browser after an event: a request failed, an export failed or succeeded.
ON_REQUEST_FAILED = f"() => {{ {_PAGE}.dispatchEvent(new Event('request-failed')); }}"
ON_EXPORT_FAILED = f"""() => {{
    {_PAGE}.dispatchEvent(new CustomEvent("export-ended", {{ detail: "" }}));
}}"""
ON_EXPORTED = f"""(file) => {{
    const link = Object.assign(document.createElement("a"), {{ href: file.url }});
    link.download = file.orig_name;
    link.click();
    {_PAGE}.dispatchEvent(new CustomEvent("export-ended", {{ detail: "Saved." }}));
}}"""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A photo that the page offers.

    Attributes:
        name: what links call it.
        title: what the photo shows.
        note: what to notice about its caption.
        photo: upright RGB, scaled for display.
        caption: with the default settings.
    """

    name: str
    title: str
    note: str
    photo: Image.Image
    caption: Caption


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """An answer to the browser.

    Attributes:
        caption: its beams; each can be chosen.
        photo: upright RGB, or None where the browser draws its own copy.
        request: the number of the request that this answers.
        examples: only in the page's first value.
    """

    caption: Caption
    photo: Image.Image | None = None
    request: int = 0
    examples: Sequence[Example] = ()


class ExampleData(GradioModel):
    """An ``Example`` as it travels; ``answer`` is a JSON file with its caption."""

    name: str
    title: str
    note: str
    photo: FileData
    thumbnail: FileData
    answer: FileData


class ViewData(GradioModel):
    """A ``View`` as it travels: photos as JPEG files, captions as JSON."""

    caption: dict[str, Any]
    photo: FileData | None = None
    request: int = 0
    examples: list[ExampleData] = Field(default_factory=list)
    defaults: dict[str, Any] = Field(default_factory=dict)
    plain: dict[str, Any] = Field(default_factory=dict)


class _ClientEvent(gr.EventData):
    """The data that the browser sends with an event; a program may send anything."""

    def _field(self, name: str, kind: type[_Kind]) -> _Kind:
        value = self._data.get(name) if isinstance(self._data, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"the page sent no valid {name}: reload the page")
        return value

    def _photo(self) -> None:
        """Read which photo is meant: ``example`` is its name, else ``file`` an uploaded one's path.

        Gradio itself looks at every "path" in an event, and fails with a traceback in the log.
        """
        data = self._data if isinstance(self._data, dict) else {}
        self.example = None if data.get("example") is None else self._field("example", str)
        self.path = None if self.example is not None else self._field("file", str)


class CaptionRequest(_ClientEvent):
    """What the event ``caption`` carries.

    Attributes:
        request: its number, sent back with the answer.
        example: name of an example, or None.
        path: of an uploaded photo, or None.
        text: the words that the caption begins with, or the whole caption to score.
        given: indices of the visitor's own words in ``text``.
        whole: whether to score ``text`` as it is.
        options: of the search, without ``text``.
        drawn: whether the browser can draw the photo by itself.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check every field; the browser never sends others."""
        super().__init__(target, data)
        self.request = self._field("request", int)
        self._photo()
        self.text = self._field("text", str)
        self.given: list[int] = self._field("given", list)
        self.whole = self._field("whole", bool)
        self.drawn = self._field("drawn", bool)
        self.options: DecodingOptions = decoding_options(self._field("settings", dict))
        words = len(self.text.split())
        if not all(type(index) is int and 0 <= index < words for index in self.given):
            raise ConfigError("the page marked words that are not there: reload the page")


class ExportRequest(_ClientEvent):
    """What the event ``export`` carries.

    Attributes:
        example: name of an example, or None.
        path: of an uploaded photo, or None.
        format: "png", "gif", "json" or "html", or another text.
        caption: the caption on the screen.
        beam: index of the chosen beam, or another number.
        word: index of the chosen word, or another number.
        appearance: how its maps are drawn.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check every field; the browser never sends others."""
        super().__init__(target, data)
        self._photo()
        self.format = self._field("format", str)
        self.caption = Caption.from_dict(self._field("caption", dict))
        self.beam = self._field("beam", int)
        self.word = self._field("word", int)
        self.appearance = self._field("appearance", dict)


class AttentionViewer(gr.HTML):
    """Shows a ``View``; fires the events ``caption`` and ``export``."""

    data_model = ViewData

    def __init__(self, value: View | None = None, **kwargs: Any) -> None:
        """Take what ``gr.HTML`` takes, except for template, style and script."""
        parts = {
            path.name: path.read_text(encoding="utf-8")
            for path in _HERE.glob("*.*")
            if path.suffix in (".html", ".css", ".js")
        }
        # The template is static: Gradio would run ${...} inside a value that it filled in.
        super().__init__(
            value,
            html_template=parts["page.html"].replace("<!-- viewer -->", parts["viewer.html"]),
            css_template=parts["viewer.css"] + parts["page.css"],
            js_on_load=parts["viewer.js"] + parts["page.js"] + _ON_LOAD,
            apply_default_css=False,
            **kwargs,
        )

    def save(self, data: bytes, name: str) -> FileData:
        """Keep a file where the page may fetch it."""
        return FileData(path=save_bytes_to_cache(data, name, self.GRADIO_CACHE), orig_name=name)

    def postprocess(self, value: View | None) -> ViewData | None:  # type: ignore[override]
        """Return what the browser draws."""
        if value is None:
            return None
        data = ViewData(caption=value.caption.to_dict(), request=value.request)
        if value.photo is not None:
            data.photo = self.save(display_jpeg(value.photo), "photo.jpg")
        if value.examples:
            data.defaults = setting_values(DecodingOptions())
            data.plain = setting_values(DecodingOptions.plain_greedy())
            data.examples = [self._example(example) for example in value.examples]
        return data

    def _example(self, example: Example) -> ExampleData:
        return ExampleData(
            name=example.name,
            title=example.title,
            note=example.note,
            photo=self.save(display_jpeg(example.photo), "photo.jpg"),
            thumbnail=self.save(display_jpeg(example.photo, max_side=_THUMBNAIL_SIDE), "small.jpg"),
            answer=self.save(json.dumps(example.caption.to_dict()).encode(), "caption.json"),
        )

    def preprocess(self, payload: ViewData | None) -> None:  # type: ignore[override]
        """Return nothing: events carry all that they need."""
