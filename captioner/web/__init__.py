"""The page's own Gradio component, and the handlers of its events."""

from captioner.web import gradio_setup  # noqa: F401 -- first: see there

# isort: split
from captioner.web.attention_viewer import (
    ON_COVER_FAILED,
    ON_EXPORT_FAILED,
    ON_EXPORTED,
    ON_REQUEST_FAILED,
    ON_STEPS_FAILED,
    AttentionViewer,
    CaptionRequest,
    CoverRequest,
    Example,
    ExplainRequest,
    ExportRequest,
    StepsRequest,
    StepsView,
    View,
)
from captioner.web.controls import how_it_works
from captioner.web.errors import show_errors
from captioner.web.handlers import Handlers, preview_picture
from captioner.web.photo_input import ExamplePhoto, PhotoInput, example_photos

__all__ = [
    "ON_COVER_FAILED",
    "ON_EXPORTED",
    "ON_EXPORT_FAILED",
    "ON_REQUEST_FAILED",
    "ON_STEPS_FAILED",
    "AttentionViewer",
    "CaptionRequest",
    "CoverRequest",
    "Example",
    "ExamplePhoto",
    "ExplainRequest",
    "ExportRequest",
    "Handlers",
    "PhotoInput",
    "StepsRequest",
    "StepsView",
    "View",
    "example_photos",
    "how_it_works",
    "preview_picture",
    "show_errors",
]
