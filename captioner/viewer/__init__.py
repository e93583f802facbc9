"""The page's own Gradio component, and the handlers of its events."""

from captioner.viewer.attention import (
    ON_EXPORT_FAILED,
    ON_EXPORTED,
    ON_REQUEST_FAILED,
    AttentionViewer,
    CaptionRequest,
    Example,
    ExportRequest,
    View,
)
from captioner.viewer.errors import show_errors
from captioner.viewer.explanation import how_it_works
from captioner.viewer.handlers import Handlers, preview_picture
from captioner.viewer.photos import ExamplePhoto, PhotoInput, example_photos

__all__ = [
    "ON_EXPORTED",
    "ON_EXPORT_FAILED",
    "ON_REQUEST_FAILED",
    "AttentionViewer",
    "CaptionRequest",
    "Example",
    "ExamplePhoto",
    "ExportRequest",
    "Handlers",
    "PhotoInput",
    "View",
    "example_photos",
    "how_it_works",
    "preview_picture",
    "show_errors",
]
