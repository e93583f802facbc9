"""The page's own Gradio components, and what the page answers."""

from captioner.viewer.answers import Answers
from captioner.viewer.attention import (
    FORGET_FILE,
    SAVE_FILE,
    AttentionViewer,
    Steering,
    Taking,
    View,
)
from captioner.viewer.explanation import how_it_works
from captioner.viewer.photos import PhotoInput, example_photos, example_shelf, name_examples
from captioner.viewer.problems import told
from captioner.viewer.settings import controls, setting_values

__all__ = [
    "FORGET_FILE",
    "SAVE_FILE",
    "Answers",
    "AttentionViewer",
    "PhotoInput",
    "Steering",
    "Taking",
    "View",
    "controls",
    "example_photos",
    "example_shelf",
    "how_it_works",
    "name_examples",
    "setting_values",
    "told",
]
