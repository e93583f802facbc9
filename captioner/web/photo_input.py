"""The example photos, and the photo input of the API."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import gradio as gr
from gradio.data_classes import ImageData
from pydantic import ValidationError

from captioner.errors import ImageError
from captioner.web.errors import show_errors


@dataclasses.dataclass(frozen=True)
class ExamplePhoto:
    """A photo from a package in ``requirements.txt``.

    Attributes:
        path: of its file.
        title: a few words about the photo.
        note: a remark about its caption.
    """

    path: Path
    title: str
    note: str


# First the ones that the shipped model describes well.
_EXAMPLES = {
    "cat": (
        *("skimage", "data/chelsea.png", "cat"),
        "Right, until the sentence trails off: click “with”, then choose “looking”.",
    ),
    "lion": (
        *("gradio", "media_assets/images/lion.jpg", "lion"),
        "Four of 8,344 training photos had “lion” in a caption. The backbone has seen many more.",
    ),
    "cheetah": (
        *("gradio", "media_assets/images/cheetah1.jpg", "cheetah"),
        "None of its training photos had this word. It names what its backbone recognizes.",
    ),
    "coffee": (
        *("skimage", "data/coffee.png", "cup of coffee"),
        "Right. Type “a cup” under Your own words to see how the model continues.",
    ),
    "tower": (
        *("gradio", "media_assets/images/tower.jpg", "tower"),
        "Start a caption with “a tall” under Your own words, and see how the model continues.",
    ),
    "photographer": (
        *("skimage", "data/camera.png", "photographer with a camera"),
        "It works without color, too, but who is the woman? Click “woman” for the runners-up.",
    ),
    "motorcycle": (
        *("skimage", "data/motorcycle_left.png", "motorcycle"),
        "The motorbike is right, but nobody sits on it. Click “sitting” for the runners-up.",
    ),
    "officer": (
        *("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "officer in front of a flag"),
        "She is Rear Admiral Grace Hopper. The uniform makes the model guess “man”.",
    ),
    "astronaut": (
        *("skimage", "data/astronaut.png", "astronaut"),
        "It has no word for astronauts. The line under the caption shows how unsure it is.",
    ),
}


def example_photos() -> dict[str, ExamplePhoto]:
    """Return the example photos that are installed, by name."""
    photos = {
        name: ExamplePhoto(Path(str(files(package))) / path, title, note)
        for name, (package, path, title, note) in _EXAMPLES.items()
    }
    return {name: photo for name, photo in photos.items() if photo.path.is_file()}


class PhotoData(ImageData):
    """The path of an uploaded file."""

    @classmethod
    @show_errors
    def model_validate(cls, *args: Any, **kwargs: Any) -> Self:
        """Validate with a helpful error: Gradio would send none."""
        try:
            return super().model_validate(*args, **kwargs)
        except ValidationError as error:
            raise ImageError(
                "the photo is not an uploaded file: send it to /gradio_api/upload first, then name "
                'it as {"path": …, "meta": {"_type": "gradio.FileData"}}, with the path that came '
                "back"
            ) from error


class PhotoInput(gr.Image):
    """``gr.Image`` that returns a photo's bytes, so that ``captioner.images`` opens it.

    The stock one opens files itself: a bad file gives a bare "Error", a decompression bomb is
    decoded, and 16-bit and float pictures turn white or black.
    """

    is_template = True  # the browser draws it as the stock image component
    data_model = PhotoData

    @show_errors
    def preprocess(self, payload: ImageData | None) -> bytes | None:  # type: ignore[override]
        """Return an uploaded file."""
        if payload is None:
            return None
        try:
            if payload.path is None:
                raise ImageError("no photo came with the request: send it as a file")
            # Gradio checks a path only if the payload is marked as a file.
            path = Path(payload.path).resolve()
            if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()):
                raise ImageError("the photo was not uploaded: send the file first")
            return path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: not a possible file name
            raise ImageError("the upload failed; send the photo again") from error
