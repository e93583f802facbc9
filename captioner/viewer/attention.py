"""The attention viewer: a photo, its caption as words, and each word's map, drawn in the browser.

Python hands over one value (``View``); hovering, clicking and playing need no request. What is
asked of the server comes as two events: ``steer`` (write on from other words) and ``take`` (make a
file). The drawing is in ``script.js``, which the standalone page of ``overlay.py`` shares.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self, TypeVar

import gradio as gr
from gradio.data_classes import FileData, GradioModel
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from pydantic import ValidationError

from captioner.caption import Caption
from captioner.errors import ConfigError, DataError, ImageError
from captioner.images import display_jpeg, open_photo
from captioner.viewer.problems import told

_Kind = TypeVar("_Kind")
_HERE = Path(__file__).parent
_GLUE = """
const view = mountViewer(element, {
  steer: (request) => trigger("steer", request),
  take: (request) => trigger("take", request),
  restore: (value) => { props.value = value; },
});
const load = () => view.show(props.value);
watch("value", load);
load();
"""

# Hands the visitor the file that an answer to ``take`` brought.
SAVE_FILE = """(file) => {
    const link = Object.assign(document.createElement("a"), { href: file.url });
    link.download = file.orig_name;
    link.click();
    document.querySelectorAll(".viewer .taken").forEach((note) => (note.textContent = "Saved."));
}"""


# Nothing came of it; what is wrong is said elsewhere.
FORGET_FILE = """() =>
    document.querySelectorAll(".viewer .taken").forEach((note) => (note.textContent = ""))
"""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """What the viewer shows.

    Attributes:
        photo: upright RGB.
        caption: its beams; each can be chosen.
    """

    photo: Image.Image
    caption: Caption


class ViewData(GradioModel):
    """A ``View`` as it travels: the photo as a small JPEG file, the caption as JSON."""

    photo: FileData
    caption: dict[str, Any]

    @classmethod
    @told
    def model_validate(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse in words what the browser never sends: Gradio would answer with nothing."""
        try:
            return super().model_validate(*args, **kwargs)
        except ValidationError as error:
            raise DataError("this is no photo with its caption: load the page again") from error


class _Sent(gr.EventData):
    """What the browser sends with an event; a program may send anything."""

    def _field(self, name: str, kind: type[_Kind]) -> _Kind:
        value = self._data.get(name) if isinstance(self._data, dict) else None
        if not isinstance(value, kind):
            raise ConfigError(f"what was clicked came without its {name}: load the page again")
        return value


class Steering(_Sent):
    """What ``AttentionViewer.steer`` carries.

    Attributes:
        text: the words to keep.
        given: places of the visitor's own among them.
        whole: whether the caption ends there.
    """

    @told
    def __init__(self, target: Any, data: Any) -> None:
        """Refuse what the browser never sends."""
        super().__init__(target, data)
        self.text = self._field("text", str)
        self.given: list[int] = self._field("given", list)
        self.whole = self._field("whole", bool)
        words = len(self.text.split())
        if not all(type(place) is int and 0 <= place < words for place in self.given):
            raise ConfigError(
                "what was clicked marks words that are not there: load the page again"
            )


class Taking(_Sent):
    """What ``AttentionViewer.take`` carries.

    Attributes:
        format: "png", "gif", "json" or "html", or another text.
        beam: which caption, or another number.
    """

    @told
    def __init__(self, target: Any, data: Any) -> None:
        """Refuse what the browser never sends."""
        super().__init__(target, data)
        self.format = self._field("format", str)
        self.beam = self._field("beam", int)


class AttentionViewer(gr.HTML):
    """Shows a ``View``; fires ``steer`` and ``take``.

    Who listens to them asks for a ``Steering`` or a ``Taking``.
    """

    data_model = ViewData

    def __init__(self, value: View | None = None, **kwargs: Any) -> None:
        """Take what ``gr.HTML`` takes, but the template, style and script."""
        # The template stays static: Gradio would run ${...} inside a value that it filled in.
        super().__init__(
            value,
            html_template=(_HERE / "template.html").read_text(encoding="utf-8"),
            css_template=(_HERE / "style.css").read_text(encoding="utf-8"),
            js_on_load=(_HERE / "script.js").read_text(encoding="utf-8") + _GLUE,
            apply_default_css=False,
            **kwargs,
        )

    def save(self, data: bytes, name: str) -> str:
        """Keep a file where the page may fetch it; return its path."""
        return save_bytes_to_cache(data, name, self.GRADIO_CACHE)

    def postprocess(self, value: View | None) -> ViewData | None:  # type: ignore[override]
        """Return what the browser draws."""
        if value is None:
            return None
        path = self.save(display_jpeg(value.photo), "photo.jpg")
        return ViewData(
            photo=FileData(path=path, orig_name="photo.jpg", mime_type="image/jpeg"),
            caption=value.caption.to_dict(),
        )

    @told
    def preprocess(self, payload: ViewData | None) -> View:  # type: ignore[override]
        """Return what is shown, the photo as large as the browser has it."""
        if payload is None:
            raise DataError("there is no caption to take: bring a photo first")
        caption = Caption.from_dict(payload.caption)
        path = Path(payload.photo.path).resolve()
        if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()) or not path.is_file():
            raise ImageError("the photo is no longer kept here: bring it again")
        return View(open_photo(path), caption)
