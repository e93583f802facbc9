"""The attention viewer: a photo, its caption as words, and each word's map, drawn in the browser.

Python hands over one value (``View``); hovering, clicking and playing need no request. What is
asked of the server comes as two events: ``steer`` (write on from other words) and ``take`` (make a
file). The drawing is in ``script.js``, which the standalone page of ``overlay.py`` shares.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, GradioModel
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from captioner.caption import Caption
from captioner.images import display_jpeg, open_photo
from captioner.viewer.problems import told

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


class AttentionViewer(gr.HTML):
    """Shows a ``View``; fires ``steer`` and ``take``.

    ``steer`` carries ``text`` (the words to keep), ``given`` (places of the visitor's own among
    them) and ``whole`` (whether the caption ends there); ``take`` carries ``format`` ("png",
    "gif", "json", "html") and ``beam``.
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
    def preprocess(self, payload: ViewData | None) -> View | None:  # type: ignore[override]
        """Return what is shown, the photo as large as the browser has it."""
        if payload is None:
            return None
        photo = open_photo(Path(payload.photo.path))
        return View(photo, Caption.from_dict(payload.caption))
