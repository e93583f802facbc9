"""The real page, served on localhost, as a program sees it."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
from captioner import Captioner, DecodingOptions
from captioner.errors import CheckpointError
from captioner.inference.caption import Caption


@pytest.fixture(scope="module")
def client(served_page: str) -> Client:
    return Client(served_page, verbose=False)


def ask(url: str, data: bytes | None = None, kind: str = "application/json") -> Any:
    """Return the answer to a plain request: GET, or POST where there is something to send."""
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    # Not urlopen, which keeps the proxies of its first call in this process.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return answer.headers.get_content_type(), answer.read().decode()


def upload(page: str, photo: Path) -> str:
    """Send a file as a form does; return its path on the server."""
    head = (
        "--edge\r\n"
        f'Content-Disposition: form-data; name="files"; filename="{photo.name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + photo.read_bytes() + b"\r\n--edge--\r\n"
    _, text = ask(f"{page}gradio_api/upload", body, "multipart/form-data; boundary=edge")
    (path,) = json.loads(text)
    return str(path)


def call(page: str, *data: object) -> tuple[str, Any]:
    """Call ``/caption`` as curl does; return the last event's name and data."""
    url = f"{page}gradio_api/call/caption"
    _, text = ask(url, json.dumps({"data": data}).encode())
    kind, text = ask(f"{url}/{json.loads(text)['event_id']}")
    assert kind == "text/event-stream"
    *_, event, line = text.strip().splitlines()
    return event.removeprefix("event: "), json.loads(line.removeprefix("data: "))


def test_the_shipped_checkpoint_captions_through_the_page(
    client: Client, captioner: Captioner, example_photos: list[Path]
) -> None:
    for photo in example_photos[:2]:
        values = client.predict(handle_file(photo), api_name="/caption")
        assert values == captioner.caption(photo).to_dict()
        assert Caption.from_dict(values).text == values["text"]


def test_plain_requests_get_the_same_json(
    served_page: str, captioner: Captioner, example_photos: list[Path]
) -> None:
    path = upload(served_page, example_photos[1])
    photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event, data = call(served_page, photo, {})
    assert event == "complete"
    assert data == [captioner.caption(example_photos[1]).to_dict()]


@pytest.mark.parametrize(
    "options", [{"beam_size": 5, "prefix": "two dogs"}, {"temperature": 0.8, "samples": 2}]
)
def test_programs_choose_the_decoding(
    client: Client, captioner: Captioner, example_photos: list[Path], options: dict[str, Any]
) -> None:
    photo = example_photos[0]
    values = client.predict(handle_file(photo), options, api_name="/caption")
    assert values == captioner.caption(photo, DecodingOptions(**options)).to_dict()


def test_missing_options_are_an_error_that_names_them(served_page: str) -> None:
    answered = httpx.post(f"{served_page}gradio_api/call/caption", json={"data": [None]})
    assert answered.status_code == 400
    assert "needs 2 (photo, options)" in answered.json()["detail"]


def test_captioning_is_all_that_programs_are_offered(client: Client) -> None:
    endpoints = client.view_api(print_info=False, return_format="dict")
    assert isinstance(endpoints, dict)
    assert list(endpoints["named_endpoints"]) == ["/caption"]
    assert not endpoints["unnamed_endpoints"]
    photo, options = endpoints["named_endpoints"]["/caption"]["parameters"]
    assert photo["parameter_name"] == "photo"
    assert options["parameter_name"] == "options"
    assert options["parameter_default"] == {}
    assert len(endpoints["named_endpoints"]["/caption"]["returns"]) == 1


def test_a_missing_photo_is_an_error_that_says_so(client: Client) -> None:
    with pytest.raises(AppError, match=r"^No photo came with the request: send one\.$"):
        client.predict(None, api_name="/caption")


def test_a_missing_photo_is_an_error_for_plain_requests_too(served_page: str) -> None:
    event, data = call(served_page, None, {})
    assert event == "error"
    assert data["error"] == "No photo came with the request: send one."


def test_a_file_that_was_not_sent_is_not_read(served_page: str, example_photos: list[Path]) -> None:
    # Gradio does not check the path of ImageData that comes without its meta.
    event, data = call(served_page, {"path": str(example_photos[0])}, {})
    assert event == "error"
    assert data["error"] == "The photo was not uploaded: send the file first."


def test_a_bad_upload_says_what_is_wrong_and_the_next_photo_works(
    client: Client, example_photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    with pytest.raises(AppError, match="isn't an image we can read"):
        client.predict(handle_file(bad), api_name="/caption")
    values = client.predict(handle_file(example_photos[0]), api_name="/caption")
    assert len(values["text"].split()) >= 3


_FILE = {"meta": {"_type": "gradio.FileData"}}
_PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    "data",
    [
        ["photo.jpg"],
        [_PNG],
        ["https://example.org/photo.jpg"],
        [5],
        [0.5],
        [True],
        [[]],
        [[{"path": "photo.jpg"}]],
        [{"path": 5}],
        [{"path": ["photo.jpg"]}],
        [{"path": "photo.jpg"}],
        [{"path": "photo.jpg", **_FILE}],
        [{"path": "photo.jpg", "size": "large", **_FILE}],
        [{"path": "photo.jpg", "meta": "gradio.FileData"}],
        [{"path": 5, **_FILE}],
        [_FILE],
        [{"url": _PNG}],
        [{"url": 5}],
        [{}],
        [],
        [None, None],
        "photo.jpg",
        {},
        {"path": "photo.jpg", **_FILE},
        5,
        None,
    ],
    ids=repr,
)
def test_call_says_what_to_send_when_it_brings_no_photo(
    served_page: str, capfd: pytest.CaptureFixture[str], data: object
) -> None:
    url = f"{served_page}gradio_api/call/caption"
    values = [*data, {}] if isinstance(data, list) else data
    answered = httpx.post(url, json={"data": values})
    if answered.status_code == 200:
        told = httpx.get(f"{url}/{answered.json()['event_id']}", timeout=60).text
        assert told.startswith("event: error")
        sentence = json.loads(told.partition("data: ")[2])["error"]
    else:
        assert answered.status_code == 400
        sentence = answered.json()["detail"]
    assert "/gradio_api/upload" in sentence or "file first" in sentence or "as a file" in sentence
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("route", "request_", "status"),
    [
        ("call/nothing", {"data": [None]}, 404),
        ("call/js_fn", {"data": [None]}, 404),
        ("call/caption", {"data": [None], "session_hash": ""}, 400),
        ("call/caption", {"data": [None], "session_hash": 5}, 400),
        ("call/caption", [], 400),
        ("call/caption", "photo.jpg", 400),
        ("queue/join", {"data": [None], "fn_index": 0}, 400),
        ("queue/join", {"data": [None], "fn_index": 0, "session_hash": ""}, 400),
        ("queue/join", {"data": [None], "fn_index": 0, "session_hash": None}, 400),
        ("queue/join", {"data": [None], "fn_index": 999, "session_hash": "x"}, 404),
        ("queue/join", {"data": [None], "fn_index": -1, "session_hash": "x"}, 404),
        ("queue/join", {"data": [None], "fn_index": "x", "session_hash": "x"}, 404),
        ("queue/join", {"data": [None], "fn_index": [0], "session_hash": "x"}, 404),
        ("queue/join", {"data": [None], "session_hash": "x"}, 404),
        ("queue/join", {"data": [None], "fn_index": 1, "session_hash": "x"}, 400),
        ("queue/join", {"fn_index": 0, "session_hash": "x"}, 400),
        ("queue/join", {"data": "x", "fn_index": 0, "session_hash": "x"}, 400),
        ("queue/join", {"data": [None], "fn_index": 0, "session_hash": "x", "batched": "?"}, 400),
        ("cancel", {"session_hash": "x"}, 400),
        ("reset", [], 400),
    ],
)
def test_request_is_refused_in_a_sentence_when_it_fits_no_event(
    served_page: str,
    capfd: pytest.CaptureFixture[str],
    route: str,
    request_: object,
    status: int,
) -> None:
    answered = httpx.post(f"{served_page}gradio_api/{route}", json=request_)
    assert answered.status_code == status
    assert re.fullmatch(r"[^\[{].{10,}\.", answered.json()["detail"])
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ["call/caption/nobody", "queue/data?session_hash=nobody"])
def test_answer_is_not_found_when_nobody_asked(
    served_page: str, capfd: pytest.CaptureFixture[str], route: str
) -> None:
    answered = httpx.get(f"{served_page}gradio_api/{route}")
    assert answered.status_code == 404
    assert answered.json()["detail"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ImportError("no socksio\npip install it"), 1, "app.py: ImportError: no socksio\n"),
        (OSError(), 1, "app.py: OSError: OSError\n"),
        (CheckpointError("no checkpoint"), 2, "app.py: no checkpoint\n"),
    ],
)
def test_failure_to_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    line: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Captioner, "from_pretrained", load)
    assert app.main([]) == code
    assert capsys.readouterr().err == line


def test_a_missing_checkpoint_is_one_line_and_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["--checkpoint", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_is_layout_and_events_only() -> None:
    assert len(Path(app.__file__).read_text(encoding="utf-8").splitlines()) < 120
