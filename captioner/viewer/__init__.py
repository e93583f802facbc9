"""The page's own Gradio components."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from captioner.errors import ImageError
from captioner.images import open_photo


class PhotoInput(gr.Image):
    """``gr.Image`` that opens photos by ``captioner.images.open_photo``.

    The stock one opens files before any function of ours runs: a bad file gives a bare "Error", a
    bomb is decoded whole, and 16-bit and float pictures turn white or black.
    """

    is_template = True  # the browser draws it as the stock image component

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        """Return an upright RGB picture, or show what is wrong with the file."""
        if payload is None:
            return None
        try:
            if payload.url and payload.url.startswith("data:"):
                return open_photo(base64.b64decode(payload.url.partition(",")[2], validate=True))
            if payload.path is None:
                raise ImageError("no photo came with the request: send it as a file")
            return open_photo(Path(payload.path).read_bytes())
        except (ImageError, binascii.Error, OSError) as error:
            message = str(error) if isinstance(error, ImageError) else "the photo did not arrive"
            raise gr.Error(f"{message[:1].upper()}{message[1:]}.", print_exception=False) from error
