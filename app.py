"""The page: drop a photo, read its caption, see where the model looked for each word."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from captioner.errors import CaptionerError
from captioner.overlay import blend
from captioner.predictor import Captioner
from captioner.viewer import PhotoInput

# Photos that come with the packages that the app needs anyway.
EXAMPLES = {
    "gradio": ["lion.jpg", "cheetah1.jpg", "tower.jpg"],
    "skimage": ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png"],
    "matplotlib": ["grace_hopper.jpg"],
}
_FOLDERS = {
    "gradio": "media_assets/images",
    "skimage": "data",
    "matplotlib": "mpl-data/sample_data",
}
_MAP_SIZE = (480, 480)
# A visitor's runs are not kept in the browser, nor shown on a monitoring page.
LAUNCH: dict[str, Any] = {
    "footer_links": ["api"],
    "max_file_size": "10mb",
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    # The gallery's own label lies over its first row, and its grid does not know of phones.
    "css": """
        #maps .grid-wrap { padding-top: 2.2rem; max-height: none }
        #maps .grid-container { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) }
    """,
}


def example_photos() -> list[str]:
    """Return the paths of the example photos that are there."""
    paths = [
        Path(str(files(package))) / _FOLDERS[package] / name
        for package, names in EXAMPLES.items()
        for name in names
    ]
    return [str(path) for path in paths if path.is_file()]


def build_demo(captioner: Captioner) -> gr.Blocks:
    """Return the page around a loaded captioner."""

    def caption(photo: Image.Image | None) -> tuple[str, list[tuple[Image.Image, str]]]:
        """Caption a photo; return the text, and the photo under each word's heat map."""
        if photo is None:
            return "", []
        try:
            result = captioner.caption(photo)
        except CaptionerError as error:
            raise gr.Error(str(error), print_exception=False) from error
        small = photo.copy()
        small.thumbnail(_MAP_SIZE)
        maps = [
            (blend(small, word), f"{word.text} · {word.probability:.0%}") for word in result.words
        ]
        return result.text, maps

    with gr.Blocks(title="Captions with attention", analytics_enabled=False) as demo:
        gr.Markdown("# Captions with attention\nDrop a photo: the caption follows by itself.")
        with gr.Row():
            with gr.Column(scale=2):
                photo = PhotoInput(
                    label="Photo", sources=["upload", "webcam", "clipboard"], height=420
                )
                gr.Examples(example_photos(), photo, label="Examples", cache_examples=False)
            with gr.Column(scale=3):
                text = gr.Textbox(
                    label="Caption", interactive=False, buttons=["copy"], elem_id="caption"
                )
                maps = gr.Gallery(
                    label="Where the model looked, word by word",
                    columns=3,
                    object_fit="contain",
                    height="auto",
                    elem_id="maps",
                )
                gr.Markdown(
                    "A heat map shows where the decoder read for a word (brightest: its strongest "
                    "place). It is no proof of cause. The number is the word's probability."
                )
        # An example's click fires only `change`; so do upload, paste and webcam.
        photo.change(caption, photo, [text, maps], api_name="caption", trigger_mode="always_last")
    return demo


def main(arguments: list[str] | None = None) -> int:
    """Load the checkpoint and serve the page."""
    parser = argparse.ArgumentParser(description="Caption photos in the browser.")
    parser.add_argument(
        "--checkpoint", metavar="PATH|HUB_ID", help="a checkpoint; default: the shipped one"
    )
    parser.add_argument("--encoder-weights", metavar="FILE", help="the encoder's weights")
    parser.add_argument("--host", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner.load(options.checkpoint, options.encoder_weights)
    except CaptionerError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    demo = build_demo(captioner).queue(max_size=20)
    try:
        demo.launch(server_name=options.host, server_port=options.port, **LAUNCH)
    except OSError:
        place = f"port {options.port}" if options.port else "every port from 7860 to 7959"
        print(f"app.py: {place} is taken, choose another --port", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
