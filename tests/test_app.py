"""The real page, served on localhost, as a program sees it through gradio_client."""

from __future__ import annotations

from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
from captioner import Captioner


def test_the_endpoint_answers_with_the_captions_json(
    served_page: str, captioner: Captioner, example_photos: list[Path]
) -> None:
    client = Client(served_page, verbose=False)
    for photo in example_photos[:2]:
        caption = client.predict(handle_file(photo), api_name="/caption")
        assert caption == captioner.caption(photo).to_dict()


def test_the_endpoint_is_the_only_one_that_is_public(served_page: str) -> None:
    client = Client(served_page, verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert isinstance(endpoints, dict)
    assert set(endpoints["named_endpoints"]) == {"/caption"}
    assert not endpoints["unnamed_endpoints"]


def test_a_bad_upload_says_what_is_wrong_and_the_next_photo_works(
    served_page: str, example_photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    client = Client(served_page, verbose=False)
    with pytest.raises(AppError, match="not a photo that can be read"):
        client.predict(handle_file(bad), api_name="/caption")
    caption = client.predict(handle_file(example_photos[0]), api_name="/caption")
    assert len(caption["text"].split()) >= 3


def test_a_request_without_a_photo_says_so(served_page: str) -> None:
    client = Client(served_page, verbose=False)
    with pytest.raises(AppError, match="No photo came with the request"):
        client.predict(None, api_name="/caption")


def test_a_missing_checkpoint_is_one_line_and_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["--checkpoint", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_is_layout_and_events_only() -> None:
    assert len(Path(app.__file__).read_text(encoding="utf-8").splitlines()) < 120
