"""The page's one component: photo input, attention viewer and settings, drawn in the browser.

Hovering, clicking and playing need no request. These events go to the server: ``caption`` (write or
score a caption), ``explain`` (its words' verdicts and further maps), ``steps`` (how a word was
chosen), ``cover`` (test a map by covering cells) and ``export`` (make a file).
``inference/viewer.js`` draws, here and in the standalone page of ``inference/render.py``;
``steps.js`` draws the steps, and ``cover.js`` tests the maps. ``page.js`` holds the state of the
page.
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
from captioner.inference.cover import CoverTest, check_cells
from captioner.web.controls import decoding_options, setting_values
from captioner.web.errors import show_errors

_Kind = TypeVar("_Kind")
_HERE = Path(__file__).parent
_INFERENCE = _HERE.parent / "inference"
_THUMBNAIL_SIDE = 128

# Starts the page's script and passes every answer to it.
_ON_LOAD = """
const page = mountPage(element, {
  caption: (request) => trigger("caption", request),
  explain: (request) => trigger("explain", request),
  cover: (request) => trigger("cover", request),
  save: (request) => trigger("export", request),
  explainSteps: (request) => trigger("steps", request),
  upload,
});
element.addEventListener("request-failed", () => page.fail());
element.addEventListener("cover-failed", () => page.uncover());
element.addEventListener("export-ended", ({ detail }) => page.saved(detail));
element.addEventListener("steps-failed", () => page.failSteps());
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
# Run in the browser after an event: a request or a cover failed, an export failed or succeeded.
ON_REQUEST_FAILED = f"() => {{ {_PAGE}.dispatchEvent(new Event('request-failed')); }}"
ON_STEPS_FAILED = f"() => {{ {_PAGE}.dispatchEvent(new Event('steps-failed')); }}"
ON_COVER_FAILED = f"() => {{ {_PAGE}.dispatchEvent(new Event('cover-failed')); }}"
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
    """An example photo with its caption.

    Attributes:
        name: in links.
        title: a few words about the photo.
        note: a remark about its caption.
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
        caption: with all of its beams; that of the covered photo if there is a ``cover``.
        photo: upright RGB, or None where the browser draws its own copy.
        request: the number of the answered request.
        examples: only in the page's first value.
        explained: whether this adds what explains a caption that the browser has.
        cover: only in the answer to the event ``cover``.
    """

    caption: Caption
    photo: Image.Image | None = None
    request: int = 0
    examples: Sequence[Example] = ()
    explained: bool = False
    cover: CoverTest | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class StepsView:
    """An answer to the browser: how a word was chosen.

    Attributes:
        steps: ``WordSteps.to_dict()``.
        request: the number of the answered request.
    """

    steps: dict[str, Any]
    request: int = 0


class ExampleData(GradioModel):
    """An ``Example`` as JSON; ``answer`` is a JSON file with its caption."""

    name: str
    title: str
    note: str
    photo: FileData
    thumbnail: FileData
    answer: FileData


class ViewData(GradioModel):
    """A ``View`` as JSON, with its photos as JPEG files; or a ``StepsView``.

    ``cover`` has no caption of its own.
    """

    caption: dict[str, Any] = Field(default_factory=dict)
    steps: dict[str, Any] | None = None
    photo: FileData | None = None
    request: int = 0
    explained: bool = False
    examples: list[ExampleData] = Field(default_factory=list)
    defaults: dict[str, Any] = Field(default_factory=dict)
    plain: dict[str, Any] = Field(default_factory=dict)
    cover: dict[str, Any] | None = None


class ClientEvent(gr.EventData):
    """An event's data from the browser; a program may send anything.

    Attributes:
        example: name of an example, or None.
        path: of an uploaded photo, or None.
    """

    def __init__(self, target: Any, data: Any) -> None:
        """Read ``example``, the name of an example, or else ``file``, the path of an upload.

        Its key is not "path": Gradio checks every "path" in an event, and fails with a traceback.
        """
        super().__init__(target, data)
        values = self._data if isinstance(self._data, dict) else {}
        self.example = None if values.get("example") is None else self._field("example", str)
        self.path = None if self.example is not None else self._field("file", str)

    def _field(self, name: str, kind: type[_Kind]) -> _Kind:
        value = self._data.get(name) if isinstance(self._data, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"the request has no valid {name}: reload the page")
        return value


class CaptionRequest(ClientEvent):
    """The data of the event ``caption``.

    Attributes:
        request: its number, returned with the answer.
        text: the beginning of the caption, or the whole caption to score.
        given: indices of the visitor's own words in ``text``.
        whole: whether to score ``text`` instead of continuing it.
        options: of the search, without ``text``.
        drawn: whether the browser can draw the photo by itself.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check the fields; the page itself sends only valid ones."""
        super().__init__(target, data)
        self.request = self._field("request", int)
        self.text = self._field("text", str)
        self.given: list[int] = self._field("given", list)
        self.whole = self._field("whole", bool)
        self.drawn = self._field("drawn", bool)
        self.options: DecodingOptions = decoding_options(self._field("settings", dict))
        words = len(self.text.split())
        if not all(type(index) is int and 0 <= index < words for index in self.given):
            raise ConfigError("the request marks words that do not exist: reload the page")


class ExplainRequest(ClientEvent):
    """The data of the event ``explain``.

    Attributes:
        request: the number of the request that the caption answered.
        caption: the caption on the screen.
        beam: index of the beam to explain; not checked yet.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check the fields; the page itself sends only valid ones."""
        super().__init__(target, data)
        self.request = self._field("request", int)
        self.caption = Caption.from_dict(self._field("caption", dict))
        self.beam = self._field("beam", int)


class CoverRequest(ClientEvent):
    """The data of the event ``cover``.

    Attributes:
        request: its number, returned with the answer.
        text: the caption on the screen.
        word: index of the chosen word; not checked yet.
        cells: to cover, row * 7 + column.
        options: of the search for the new caption.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check the fields; the page itself sends only valid ones."""
        super().__init__(target, data)
        self.request = self._field("request", int)
        self.text = self._field("text", str)
        self.word = self._field("word", int)
        cells = self._field("cells", list)
        if not all(type(cell) is int for cell in cells):
            raise ConfigError("the request has no valid cells: reload the page")
        self.cells = check_cells(cells)
        self.options: DecodingOptions = decoding_options(self._field("settings", dict))


class ExportRequest(ClientEvent):
    """The data of the event ``export``.

    Attributes:
        format: "png", "gif", "json" or "html"; not checked yet.
        caption: the caption on the screen.
        beam: index of the chosen beam; not checked yet.
        word: index of the chosen word; not checked yet.
        appearance: of the maps; not checked yet.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check the fields; the page itself sends only valid ones."""
        super().__init__(target, data)
        self.format = self._field("format", str)
        self.caption = Caption.from_dict(self._field("caption", dict))
        self.beam = self._field("beam", int)
        self.word = self._field("word", int)
        self.appearance = self._field("appearance", dict)


class StepsRequest(ClientEvent):
    """The data of the event ``steps``.

    Attributes:
        request: its number, returned with the answer.
        words: the caption's.
        word: index of the word in question; not checked yet.
    """

    @show_errors
    def __init__(self, target: Any, data: Any) -> None:
        """Check the fields; the page itself sends only valid ones."""
        super().__init__(target, data)
        self.request = self._field("request", int)
        self.words: list[str] = self._field("words", list)
        self.word = self._field("word", int)
        if not all(isinstance(word, str) for word in self.words):
            raise ConfigError("the request has no valid words: reload the page")


class AttentionViewer(gr.HTML):
    """Shows a ``View``; its events are in the module's docstring."""

    data_model = ViewData

    def __init__(self, value: View | None = None, **kwargs: Any) -> None:
        """Take the arguments of ``gr.HTML``, except for template, style and script."""
        parts = {
            path.name: path.read_text(encoding="utf-8")
            for folder in (_HERE, _INFERENCE)
            for path in folder.glob("*.*")
            if path.suffix in (".html", ".css", ".js")
        }
        # The template is static: Gradio would run ${...} inside a value that it filled in.
        super().__init__(
            value,
            html_template=parts["page.html"].replace("<!-- viewer -->", parts["viewer.html"]),
            css_template="".join(
                parts[name] for name in ("viewer.css", "page.css", "steps.css", "cover.css")
            ),
            js_on_load="".join(
                parts[name] for name in ("viewer.js", "steps.js", "cover.js", "page.js")
            )
            + _ON_LOAD,
            apply_default_css=False,
            **kwargs,
        )

    def save(self, data: bytes, name: str) -> FileData:
        """Save a file in the folder that Gradio serves to its page."""
        return FileData(path=save_bytes_to_cache(data, name, self.GRADIO_CACHE), orig_name=name)

    def postprocess(  # type: ignore[override]
        self, value: View | StepsView | None
    ) -> ViewData | None:
        """Return the view as the browser receives it."""
        if value is None:
            return None
        if isinstance(value, StepsView):
            return ViewData(steps=value.steps, request=value.request)
        data = ViewData(
            caption=value.caption.to_dict(), request=value.request, explained=value.explained
        )
        if value.photo is not None:
            data.photo = self.save(display_jpeg(value.photo), "photo.jpg")
        if value.cover is not None:
            data.cover = value.cover.to_dict()
            del data.cover["caption"]
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
        """Return None: the events' data is complete without the value."""
