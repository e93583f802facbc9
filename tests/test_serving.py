"""The page as a process on the open internet: load, the end, files, addresses, headers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import app
from captioner import serving
from captioner.errors import WriteError
from captioner.serving import MAX_WAITING
from tests.page import CALL, ROOT, UPLOAD, Page, answer, ask, captions, run, running_page, visits

SECRETS = [
    "/etc/passwd",
    "/proc/self/environ",
    str(ROOT / "app.py"),
    str(ROOT / "assets/checkpoint/config.json"),
    str(ROOT / ".git/config"),
]


@pytest.fixture(scope="module")
def photos(example_photos: list[Path]) -> list[bytes]:
    """A hundred photos, each of another part of an example."""
    made, random = [], np.random.default_rng(0)
    for number in range(100):
        image = Image.open(example_photos[number % len(example_photos)]).convert("RGB")
        left, top = (int(random.integers(0, side // 3)) for side in image.size)
        part = image.crop((left, top, left + image.width // 2, top + image.height // 2))
        file = io.BytesIO()
        part.resize((320, 240)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Iterator[Page]:
    with running_page(tmp_path_factory.mktemp("page")) as page:
        captions(page.address, photos[:1])  # by then it has said all that it says at its start
        yield page


@pytest.mark.parametrize(
    "seconds", [20, pytest.param(120, marks=pytest.mark.benchmark)], ids=["short", "two minutes"]
)
def test_a_hundred_visitors_at_once_get_their_own_captions(
    page: Page, photos: list[bytes], seconds: int
) -> None:
    expected = captions(page.address, photos)
    assert len(set(expected)) == 100
    seen = visits(page.address, photos, expected, seconds)
    assert not seen.mixed_up
    assert len(seen.seconds) > seconds  # that it goes on; two idle cores caption nine a second
    print(
        f"\n{len(seen.seconds)} captions in {seconds} s, {seen.busy} times busy, "
        f"seconds p50 {np.percentile(seen.seconds, 50):.2f}, "
        f"p95 {np.percentile(seen.seconds, 95):.2f}; health p50 "
        f"{1000 * np.percentile(seen.health, 50):.0f} ms, p95 "
        f"{1000 * np.percentile(seen.health, 95):.0f} ms, {page.anonymous() // 1000} MB"
    )
    assert "Traceback" not in page.log


def test_who_waits_is_answered_when_the_page_is_asked_to_end(
    tmp_path: Path, photos: list[bytes]
) -> None:
    with running_page(tmp_path) as page:
        expected = captions(page.address, photos[:10])

        async def end() -> list[str]:
            async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
                events = [(await ask(client, photo))[1] for photo in photos[:10]]
                waiting = [asyncio.create_task(answer(client, event)) for event in events]
                page.process.send_signal(signal.SIGTERM)
                while (health := await client.get("/healthz")).status_code == 200:
                    await asyncio.sleep(0.01)
                assert health.json() == {"status": "stopping"}
                status, refusal = await ask(client, photos[10])
                assert status == 503
                assert "try again" in refusal
                refused = await client.post(CALL, json={"data": [None]})
                assert refused.status_code == 503
                return await asyncio.gather(*waiting)

        started = time.monotonic()
        assert run(end()) == expected
        assert page.process.wait(timeout=30) == 0
        assert time.monotonic() - started < 30
        assert not [path for path in page.folder.rglob("*") if path.is_file()]
        assert "Traceback" not in page.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_open_page_does_not_keep_the_server(
    tmp_path: Path, photos: list[bytes], number: signal.Signals
) -> None:
    with running_page(tmp_path) as page:
        captions(page.address, photos[:1])
        session = httpx.stream("GET", f"{page.address}/gradio_api/heartbeat/me", timeout=60)
        with session as heartbeat:
            assert heartbeat.status_code == 200
            # The system gives it to any thread; the first one is the one that Python asks.
            threads = [int(path.name) for path in Path(f"/proc/{page.process.pid}/task").iterdir()]
            assert not ctypes.CDLL(None).tgkill(page.process.pid, max(threads), number)
            assert page.process.wait(timeout=30) == 0
        assert not [path for path in page.folder.rglob("*") if path.is_file()]


def test_a_second_signal_does_not_wait_and_leaves_no_file_either(
    tmp_path: Path, photos: list[bytes]
) -> None:
    with running_page(tmp_path) as page:

        async def end_twice() -> float:
            async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
                for photo in photos[:15]:
                    await ask(client, photo)
                started = time.monotonic()
                page.process.send_signal(signal.SIGINT)
                while (await client.get("/healthz")).status_code == 200:
                    assert time.monotonic() - started < 15
                    await asyncio.sleep(0.01)
                page.process.send_signal(signal.SIGINT)
                return started

        started = run(end_twice())
        assert page.process.wait(timeout=30) == 0
        assert time.monotonic() - started < 15
        assert not [path for path in page.folder.rglob("*") if path.is_file()]
        assert "Traceback" not in page.log


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        (["--port", "-1"], "cannot listen on 127.0.0.1, port -1"),
        (["--host", "192.0.2.77"], "cannot listen on 192.0.2.77"),
        (["--host", "no-such-host.invalid"], "cannot listen on no-such-host.invalid"),
        ([], "Address already in use"),
    ],
)
def test_where_it_cannot_listen_it_says_so_at_once(
    page: Page, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        assert app.main(options or ["--port", page.address.rpartition(":")[2]]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "choose another --host or --port" in line


def test_another_user_may_own_gradios_folder(tmp_path: Path, photos: list[bytes]) -> None:
    code = "import sys, gradio.routes, app; gradio.routes.DEFAULT_TEMP_DIR = '/dev/null'; "
    with running_page(tmp_path, "-c", code + "sys.exit(app.main())") as page:
        assert captions(page.address, photos[:1])


def test_a_folder_for_temporary_files_is_made_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "new"))
    with serving.temporary_files() as folder:
        assert folder.parent == tmp_path / "new"
    assert not folder.exists()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/dev/null/nowhere")
    with (
        pytest.raises(WriteError, match="cannot write /dev/null/nowhere"),
        serving.temporary_files(),
    ):
        pass


_TELL_WHAT_IS_KEPT = """
import sys, app
from captioner import serving
from gradio.routes import file_upload_statuses as uploads
serving.SWEEP_SECONDS = 2
forget = serving._forget
def forget_and_tell(queue, unread):
    before = len(queue.pending_messages_per_session) + len(uploads._statuses)
    forget(queue, unread)
    rest = (queue.pending_messages_per_session, queue.pending_event_ids_session)
    rest += (uploads._statuses, uploads._signals)
    print("kept", before, *map(len, rest), flush=True)
serving._forget = forget_and_tell
sys.exit(app.main())
"""


def test_nothing_is_kept_of_answers_fetched_or_not(tmp_path: Path, photos: list[bytes]) -> None:
    with running_page(tmp_path, "-c", _TELL_WHAT_IS_KEPT) as page:

        async def fetched_late() -> str:
            text = ""
            async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
                _, event = await ask(client, photos[0])
                await asyncio.sleep(8)
                with contextlib.suppress(httpx.RemoteProtocolError):  # Gradio breaks off
                    async with client.stream("GET", f"{CALL}/{event}") as told:
                        async for part in told.aiter_text():
                            text += part
            return text

        assert "event: error" in run(fetched_late())
        assert captions(page.address, photos[:5])
        followed = {"params": {"upload_id": "me"}, "files": {"files": ("p.jpg", photos[0])}}
        assert len(httpx.post(page.address + UPLOAD, **followed).json()) == 1  # type: ignore[arg-type]
        asked = httpx.get(page.address + "/gradio_api/upload_progress", params={"upload_id": "you"})
        assert asked.status_code == 404
        deadline = time.monotonic() + 30
        while not page.log.splitlines()[-1].startswith("kept 0 "):
            assert time.monotonic() < deadline, page.log
            time.sleep(0.5)
        told = [line.split()[1:] for line in page.log.splitlines() if line.startswith("kept")]
        assert max(int(line[0]) for line in told) > 0  # that there was something
        assert told[-1] == ["0"] * 5


def test_a_file_is_deleted_after_its_time_and_the_examples_stay(
    tmp_path: Path, photos: list[bytes]
) -> None:
    code = "import app, sys; from captioner import serving; sweep = serving._sweep\n"
    code += "def tell(*its): sweep(*its); print('known', *map(len, its[2]), flush=True)\n"
    code += "serving._sweep, serving.SWEEP_SECONDS, serving.KEPT_SECONDS = tell, 1, 2\n"
    code += "sys.exit(app.main())"
    with running_page(tmp_path, "-c", code) as page:
        (folder,) = page.folder.glob("captioner-*")
        own = {path for path in folder.rglob("*") if path.is_file()}
        (path,) = httpx.post(page.address + UPLOAD, files={"files": ("p.jpg", photos[0])}).json()
        assert Path(path).read_bytes() == photos[0]
        address = f"{page.address}/gradio_api/file={path}"
        assert httpx.get(address).content == photos[0]
        deadline = time.monotonic() + 15
        while Path(path).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.get(address).status_code in (403, 404)
        # What Gradio itself never looks at again.
        assert httpx.post(page.address + UPLOAD, files={"x": ("p.jpg", photos[0])}).json() == []
        assert len({path for path in folder.rglob("*") if path.is_file()} - own) == 1
        while {path for path in folder.rglob("*") if path.is_file()} != own:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        uploads = [line.split()[1] for line in page.log.splitlines() if line[:5] == "known"]
        assert uploads[-1] == "0"
        assert "1" in uploads
        late = httpx.post(
            page.address + CALL,
            json={"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]},
        ).json()["event_id"]
        told = httpx.get(f"{page.address}{CALL}/{late}").text
        assert "event: error" in told
        assert "send it again" in told
        # The pictures on the examples' buttons are the page's own.
        shelf = [
            each["props"]["samples"]
            for each in httpx.get(f"{page.address}/config").json()["components"]
            if each["props"].get("elem_id") == "examples"
        ]
        pictures = [row[0]["url"] for row in shelf[0]]
        assert len(pictures) > 2
        for picture in pictures:
            assert httpx.get(picture).headers["content-type"].startswith("image/"), picture


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "route",
    [
        "/gradio_api/file={}",
        "/gradio_api/file/{}",
        "/gradio_api/file={temporary}/../../../../../../../../..{}",
        "/gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}",
        "/gradio_api/file=file://{}",
        "/gradio_api/proxy=file://{}",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{}",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}",
        "/svelte/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}",
        "/gradio_api/custom_component/1/component/client/..%2f..%2f..%2f..%2f..%2f..{}",
        "/gradio_api/stream/a/b/1/{}",
    ],
)
def test_no_file_of_the_server_can_be_read(page: Page, route: str, secret: str) -> None:
    (temporary,) = page.folder.glob("captioner-*")
    place = route.format(secret, temporary=temporary)
    answered = httpx.get(page.address + place)
    assert answered.status_code >= 400
    assert Path(secret).read_bytes()[:40] not in answered.content


@pytest.mark.parametrize(
    "place",
    [
        "GET /gradio_api/deep_link?session_hash=x",
        "GET /gradio_api/custom_component/a/client/b/c%0AFAKE%20LINE",
        "GET /gradio_api/file/http://127.0.0.1:9/x",
        "GET /gradio_api/proxy=http://127.0.0.1:9/x",
        "GET /gradio_api/stream/a/b/1/playlist-file",
        "GET /gradio_api/runs",
        "GET /gradio_api/dev/reload",
        "GET /monitoring",
        "POST /login",
        "POST /gradio_api/run/caption",
        "POST /gradio_api/api/caption",
        "POST /gradio_api/component_server",
        "POST /gradio_api/process_recording",
        "POST /gradio_api/run-history/connect",
        "POST /gradio_api/stream/a",
        "POST /gradio_api/vibe-edit",
        "POST /",
        "PUT /",
        "DELETE /gradio_api/file=x",
    ],
)
def test_what_the_page_does_not_need_is_shut(page: Page, place: str) -> None:
    before = page.log
    method, _, path = place.partition(" ")
    answered = httpx.request(method, page.address + path)
    assert answered.status_code == 404
    assert answered.json() == {"detail": "There is nothing at this address."}
    assert page.log == before


def test_no_file_of_the_server_can_be_captioned(page: Page, example_photos: list[Path]) -> None:
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        call = httpx.post(
            page.address + CALL, json={"data": [{"path": str(example_photos[0]), **meta}]}
        )
        if meta:
            assert call.status_code == 400
            assert call.json()["detail"].startswith("The photo was not uploaded")
            continue
        told = httpx.get(f"{page.address}{CALL}/{call.json()['event_id']}").text
        assert "event: error" in told
        assert "beams" not in told


def test_nobody_can_list_or_guess_what_another_visitor_sent(
    page: Page, photos: list[bytes], tmp_path: Path
) -> None:
    (path,) = httpx.post(page.address + UPLOAD, files={"files": ("p.jpg", photos[0])}).json()
    for folder in (Path(path).parent, Path(path).parent.parent, page.folder):
        assert httpx.get(f"{page.address}/gradio_api/file={folder}").status_code >= 400
    # Another server calls the same photo something else: its name cannot be known beforehand.
    with running_page(tmp_path) as other:
        (elsewhere,) = httpx.post(
            other.address + UPLOAD, files={"files": ("p.jpg", photos[0])}
        ).json()
        assert Path(elsewhere).parent.parent != Path(path).parent.parent
        assert httpx.get(f"{other.address}/gradio_api/file={path}").status_code >= 400


class _Count(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]


def test_no_address_makes_the_server_fetch(page: Page, photos: list[bytes]) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), _Count) as inside:
        inside.asked = 0  # type: ignore[attr-defined]
        threading.Thread(target=inside.serve_forever, daemon=True).start()
        addresses = [
            f"http://127.0.0.1:{inside.server_address[1]}/photo.jpg",
            "https://example.org/photo.jpg",
            "http://169.254.169.254/latest/meta-data",
        ]
        count = len(httpx.get(f"{page.address}/config").json()["dependencies"])
        before = page.connections
        for address in addresses:
            for route, status in (("file=", 403), ("file/", 404), ("proxy=", 404)):
                answered = httpx.get(f"{page.address}/gradio_api/{route}{address}")
                assert answered.status_code == status
            for file in (
                {"path": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "p", "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "/tmp/" + "p" * 300, "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "\0", "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": None, "url": address},
                {"path": address},
                address,
            ):
                call = httpx.post(page.address + CALL, json={"data": [file]})
                if call.status_code == 200:
                    told = httpx.get(f"{page.address}{CALL}/{call.json()['event_id']}").text
                    assert "event: error" in told
                for number in range(count):
                    httpx.post(
                        f"{page.address}/gradio_api/queue/join",
                        json={"data": [file] * 12, "fn_index": number, "session_hash": "x"},
                    )
        # Until all of that is done: the queue is emptied in order.
        assert captions(page.address, photos[:1])
        inside.shutdown()
        assert inside.asked == 0  # type: ignore[attr-defined]
    assert "socket.connect" not in page.connections.removeprefix(before)


def test_nothing_is_looked_up_outside_the_machine(page: Page) -> None:
    assert "socket.connect" in page.connections  # Gradio asks itself whether it runs
    for line in page.connections.splitlines():
        assert "127.0.0.1" in line or "localhost" in line or "/" in line, line


def test_what_is_too_large_is_refused(page: Page) -> None:
    for body in (b'{"data": ["' + bytes(3_000_000) + b'"]}', b"[" + b"[]," * 60_000 + b"0]"):
        assert httpx.post(page.address + CALL, content=body).status_code == 413
    named = httpx.post(page.address + CALL, json={"data": [None], "session_hash": "x" * 101})
    assert (named.status_code, "too long" in named.text) == (400, True)
    progress = page.address + "/gradio_api/upload_progress"
    assert httpx.get(progress, params={"upload_id": "x" * 2000}).status_code == 414
    # Gradio would take a part that is no file into memory, whatever its size.
    for name in ("p.jpg", None):
        sent = httpx.post(page.address + UPLOAD, files={"files": (name, bytes(11_000_000))})
        assert sent.status_code == 413
    before = page.anonymous()
    large = (bytes(1_000_000) for _ in range(300))
    with contextlib.suppress(httpx.HTTPError):  # it may be cut off before the answer is read
        assert httpx.post(page.address + UPLOAD, content=large).status_code == 413
    assert page.anonymous() - before < 100_000


def test_uploads_do_not_fill_the_disk(tmp_path: Path, photos: list[bytes]) -> None:
    code = "import app, sys; from captioner import serving; "
    code += "serving._SPARE_BYTES = 10**18; sys.exit(app.main())"
    with running_page(tmp_path, "-c", code) as page:
        answered = httpx.post(page.address + UPLOAD, files={"files": ("p.jpg", photos[0])})
        assert answered.status_code == 503
        assert "disk is full" in answered.json()["detail"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 200_000, b"null", b"[]", b""])
def test_a_request_that_is_no_json_is_refused_in_words(page: Page, body: bytes) -> None:
    before = page.log
    answered = httpx.post(page.address + CALL, content=body)
    assert 400 <= answered.status_code < 500
    assert answered.json()["detail"]
    assert page.log == before


@pytest.mark.parametrize("place", ["/", "/config", "/healthz", "/gradio_api/file=/etc/passwd"])
def test_every_answer_carries_the_headers(page: Page, place: str) -> None:
    headers = httpx.get(page.address + place).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "default-src 'self'" in headers["content-security-policy"]
    # A Space is shown in a frame of its host's page.
    assert "x-frame-options" not in headers
    assert "frame-ancestors" not in headers["content-security-policy"]


def test_a_full_queue_says_that_the_page_is_busy(page: Page, photos: list[bytes]) -> None:
    async def many() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
            upload = await client.post(UPLOAD, files={"files": ("p.jpg", photos[0])})
            file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
            calls = await asyncio.gather(
                *(client.post(CALL, json={"data": [file]}) for _ in range(3 * MAX_WAITING))
            )
            events = [call.json()["event_id"] for call in calls if call.status_code == 200]
            for event in events:
                await answer(client, event)
            return [(call.status_code, call.text) for call in calls]

    answered = run(many())
    assert {status for status, _ in answered} == {200, 503}
    assert all("Queue is full" in text for status, text in answered if status == 503)
