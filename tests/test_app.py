"""The real page, served on localhost, as a program sees it through gradio_client."""

from __future__ import annotations

from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
from captioner import viewer
from captioner import Captioner


def test_the_shipped_checkpoint_captions_through_the_page(
    served_page: str, captioner: Captioner, example_photos: list[Path]
) -> None:
    client = Client(served_page, verbose=False)
    for photo in example_photos[:2]:
        text, maps = client.predict(handle_file(photo), api_name="/caption")
        caption = captioner.caption(photo)
        assert text == caption.text
        assert [item["caption"].split(" · ")[0] for item in maps] == [
            word.text for word in caption.words
        ]


def test_a_bad_upload_says_what_is_wrong_and_the_next_photo_works(
    served_page: str, example_photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    client = Client(served_page, verbose=False)
    with pytest.raises(AppError, match="not a photo that can be read"):
        client.predict(handle_file(bad), api_name="/caption")
    text, _ = client.predict(handle_file(example_photos[0]), api_name="/caption")
    assert len(text.split()) >= 3


def test_the_example_photos_are_there() -> None:
    assert len(viewer.example_photos()) >= 6


def test_a_missing_checkpoint_is_one_line_and_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["--checkpoint", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
