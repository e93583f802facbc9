"""Photos that come in: the visitor's own, and the examples that pip brought."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import gradio as gr
from gradio.data_classes import ImageData
from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from PIL import Image
from pydantic import ValidationError

from captioner.errors import ImageError
from captioner.images import open_photo
from captioner.viewer.problems import told

# Photos that come with the packages that the app needs anyway, and what they show.
_EXAMPLES = {
    ("gradio", "media_assets/images"): {
        "lion.jpg": "lion",
        "cheetah1.jpg": "cheetah",
        "tower.jpg": "tower",
    },
    ("skimage", "data"): {
        "astronaut.png": "astronaut",
        "chelsea.png": "cat",
        "coffee.png": "cup of coffee",
        "motorcycle_left.png": "motorcycle",
    },
    ("matplotlib", "mpl-data/sample_data"): {"grace_hopper.jpg": "officer"},
}


def example_photos() -> dict[str, str]:
    """Return the paths of the example photos that are there, and what each shows."""
    photos = {
        Path(str(files(package))) / folder / name: subject
        for (package, folder), names in _EXAMPLES.items()
        for name, subject in names.items()
    }
    return {str(path): subject for path, subject in photos.items() if path.is_file()}


def example_shelf(photo: gr.Image, paths: list[str]) -> gr.Dataset:
    """Return buttons that show photos; a click gives the number of one."""
    return gr.Dataset(
        label="Examples",
        components=[photo],
        samples=[[path] for path in paths],
        type="index",
        elem_id="examples",
    )


def name_examples(subjects: Iterable[str]) -> str:
    """Return JavaScript that names the buttons of ``#examples``, for those who hear the page."""
    return f"""() => {{
        const subjects = {json.dumps(list(subjects))};
        document.querySelectorAll("#examples .gallery-item").forEach((button, number) => {{
            button.setAttribute("aria-label", `Example: ${{subjects[number]}}`);
        }});
    }}"""


# What every browser draws (an MPO as a JPEG); of other files (TIFF, HEIC) it gets a PNG.
BROWSER_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF"})


class PhotoData(ImageData):
    """A photo as it travels: the path of a file that was uploaded."""

    @classmethod
    @told
    def model_validate(cls, *args: Any, **kwargs: Any) -> Self:
        """Validate, with an error that says what to send: Gradio would answer with nothing."""
        try:
            return super().model_validate(*args, **kwargs)
        except ValidationError as error:
            raise ImageError(
                "the photo is not an uploaded file: send it to /gradio_api/upload first, then name "
                'it as {"path": …, "meta": {"_type": "gradio.FileData"}}, with the path that came '
                "back"
            ) from error


class PhotoInput(gr.Image):
    """``gr.Image`` that opens photos by ``captioner.images.open_photo``.

    The stock one opens files before any function of ours runs: a bad file gives a bare "Error", a
    bomb is decoded whole, and 16-bit and float pictures turn white or black.
    """

    is_template = True  # the browser draws it as the stock image component
    data_model = PhotoData

    @told
    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        """Return an upright RGB picture, or show what is wrong with the file."""
        if payload is None:
            return None
        try:
            if payload.path is None:
                raise ImageError("no photo came with the request: send it as a file")
            # Gradio does not look where a path leads that comes without its mark of a file.
            path = Path(payload.path).resolve()
            if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()):
                raise ImageError("the photo was not uploaded: send the file first")
            return open_photo(path.read_bytes())
        except (OSError, ValueError) as error:  # ValueError: no name that a file has
            raise ImageError("the photo did not arrive: send it again") from error

    def postprocess(  # type: ignore[override]
        self, value: str | Image.Image | None
    ) -> ImageData | None:
        """Show an example, from a copy where Gradio may serve it, or a picture, without loss."""
        if value is None:
            return None
        if isinstance(value, Image.Image):
            path = save_pil_to_cache(value, self.GRADIO_CACHE, "photo", "png")
        else:
            path = save_file_to_cache(value, self.GRADIO_CACHE)
        return ImageData(path=path)
