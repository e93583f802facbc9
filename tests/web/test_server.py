"""The page as a process on the open internet: load, shutdown, files, addresses, headers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import http.client
import http.server
import io
import json
import os
import re
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import gradio.routes
import httpx
import numpy as np
import pytest
from PIL import Image

import app
from captioner import Captioner
from captioner import web as viewer
from captioner.errors import ConfigError, WriteError
from captioner.web import gradio_setup, middleware, server
from captioner.web.link_preview import LinkPreview
from captioner.web.middleware import RequestFilter
from captioner.web.server import MAX_QUEUE
from tests.page import CALL, ROOT, UPLOAD, Page, answer, ask, captions, run, running_page, visits

SECRETS = [
    "/etc/passwd",
    "/proc/self/environ",
    str(ROOT / "app.py"),
    str(ROOT / "assets/checkpoint/config.json"),
    str(ROOT / "pyproject.toml"),
]


@pytest.fixture(scope="module")
def photos(example_photos: list[Path]) -> list[bytes]:
    """A hundred photos, each a different part of an example."""
    photos, random = [], np.random.default_rng(0)
    for number in range(100):
        image = Image.open(example_photos[number % len(example_photos)]).convert("RGB")
        left, top = (int(random.integers(0, side // 3)) for side in image.size)
        part = image.crop((left, top, left + image.width // 2, top + image.height // 2))
        file = io.BytesIO()
        part.resize((320, 240)).save(file, "JPEG")
        photos.append(file.getvalue())
    return photos


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Restore the handlers that ``serve`` replaces."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Dead proxies, without the package that httpx needs for a SOCKS proxy.
_DEAD_PROXIES = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "NO_PROXY": "example.org",
    "no_proxy": "",
}
# Gradio's usual folder cannot be created: it is another user's.
_UNFRIENDLY_MACHINE = """
import sys; sys.modules["socksio"] = None
import app, gradio.routes; gradio.routes.DEFAULT_TEMP_DIR = "/dev/null"
sys.exit(app.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Iterator[Page]:
    """The page in a process of its own, on a machine where much does not work."""
    home = tmp_path_factory.mktemp("page")
    with running_page(home, "-c", _UNFRIENDLY_MACHINE, settings=_DEAD_PROXIES) as page:
        captions(page.address, photos[:1])  # after this it prints nothing more
        yield page


def test_page_starts_with_dead_proxies_and_without_gradios_folder(page: Page) -> None:
    assert page.log.startswith(f"* Running on local URL:  {page.address}/\n")


@pytest.mark.slow
def test_page_listens_on_ipv6_under_a_root_path(tmp_path: Path, photos: list[bytes]) -> None:
    command = ("app.py", "--host", "::1", "--root-path", "captions/")
    with running_page(tmp_path, *command, host="::1") as page:
        assert captions(page.address, photos[:1])
        assert captions(f"{page.address}/captions", photos[:1])
        assert page.log == f"* Running on local URL:  {page.address}/\n"


@pytest.mark.parametrize(
    ("visitors", "seconds"),
    [
        pytest.param(12, 2, id="a dozen"),
        pytest.param(100, 20, id="a hundred", marks=pytest.mark.slow),
        pytest.param(100, 120, id="two minutes", marks=pytest.mark.benchmark),
    ],
)
def test_simultaneous_visitors_get_their_own_captions(
    page: Page, photos: list[bytes], visitors: int, seconds: int
) -> None:
    photos = photos[:visitors]
    expected = captions(page.address, photos)
    assert len(set(expected)) == visitors
    seen = visits(page.address, photos, expected, seconds)
    assert not seen.mixed_up
    assert len(seen.seconds) > seconds  # two idle cores caption nine per second
    print(
        f"\n{len(seen.seconds)} captions in {seconds} s, {seen.busy} times busy, "
        f"seconds p50 {np.percentile(seen.seconds, 50):.2f}, "
        f"p95 {np.percentile(seen.seconds, 95):.2f}; health p50 "
        f"{1000 * np.percentile(seen.health, 50):.0f} ms, p95 "
        f"{1000 * np.percentile(seen.health, 95):.0f} ms, {page.anonymous() // 1000} MB"
    )
    assert "Traceback" not in page.log


def files_in(folder: Path) -> set[Path]:
    # Unlike rglob, walk passes over folders that are deleted meanwhile.
    return {Path(root, name) for root, _, names in os.walk(folder) for name in names}


@pytest.mark.slow
def test_pending_requests_finish_before_shutdown(tmp_path: Path, photos: list[bytes]) -> None:
    with running_page(tmp_path) as page:
        expected = captions(page.address, photos[:10])

        async def shut_down() -> list[str]:
            async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
                events = [(await ask(client, photo))[1] for photo in photos[:10]]
                pending = [asyncio.create_task(answer(client, event)) for event in events]
                page.process.send_signal(signal.SIGTERM)
                while (health := await client.get("/healthz")).status_code == 200:
                    await asyncio.sleep(0.01)
                assert health.json() == {"status": "stopping"}
                status, refusal = await ask(client, photos[10])
                assert status == 503
                assert "Try again" in refusal
                refused = await client.post(CALL, json={"data": [None, {}]})
                assert refused.status_code == 503
                return await asyncio.gather(*pending)

        started = time.monotonic()
        # An open page does not delay the end.
        with httpx.stream("GET", f"{page.address}/gradio_api/heartbeat/me", timeout=60) as open_:
            assert open_.status_code == 200
            assert run(shut_down()) == expected
            assert page.process.wait(timeout=30) == 0
        assert time.monotonic() - started < 30
        assert not files_in(page.folder)
        assert "Traceback" not in page.log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_open_page_does_not_delay_shutdown(
    tmp_path: Path, photos: list[bytes], number: signal.Signals
) -> None:
    with running_page(tmp_path) as page:
        captions(page.address, photos[:1])
        session = httpx.stream("GET", f"{page.address}/gradio_api/heartbeat/me", timeout=60)
        with session as heartbeat:
            assert heartbeat.status_code == 200
            # The system may deliver it to any thread; Python handles it in the first one.
            threads = [int(path.name) for path in Path(f"/proc/{page.process.pid}/task").iterdir()]
            assert not ctypes.CDLL(None).tgkill(page.process.pid, max(threads), number)
            assert page.process.wait(timeout=30) == 0
        assert not files_in(page.folder)


@pytest.mark.slow
def test_second_signal_ends_at_once_and_leaves_no_file(tmp_path: Path, photos: list[bytes]) -> None:
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
        assert not files_in(page.folder)
        assert "Traceback" not in page.log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        (["--port", "70000", "--host", "::1"], "cannot listen on ::1, port 70000"),
        (["--port", "-1"], "cannot listen on 127.0.0.1, port -1"),
        (["--host", "192.0.2.77"], "cannot listen on 192.0.2.77"),
        (["--host", "no-such-host.invalid"], "cannot listen on no-such-host.invalid"),
        (["--host", "::zz"], "cannot listen on ::zz"),
        (["--host", "a..b"], "cannot listen on a..b"),
        (["--host", "http://127.0.0.1"], "cannot listen on http://127.0.0.1"),
        ([], "Address already in use"),
    ],
)
@pytest.mark.usefixtures("signal_handlers")
def test_unusable_address_is_one_line(
    page: Page,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_, **__: None)
    assert app.main(options or ["--port", page.address.rpartition(":")[2]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "choose another --host or --port" in line


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:"),
        ("localhost", "http://[::1]:"),
        ("0.0.0.0", "http://127.0.0.1:"),
        ("::1", "http://[::1]:"),
        ("[::1]", "http://[::1]:"),
        ("::", "http://[::1]:"),
    ],
)
def test_address_works_in_a_browser_when_localhost_is_only_ipv6(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, *rest, **named: look_up(
            "::1" if name == "localhost" else name, *rest, **named
        ),
    )
    sockets = server._listen(host, 0)
    try:
        own = server._own_address(sockets[0])
        assert own.startswith(address)
        parts = urlsplit(own)
        with socket.create_connection((parts.hostname, parts.port), timeout=5):
            pass
        if host == "::":  # all addresses of both kinds
            with socket.create_connection(("127.0.0.1", parts.port), timeout=5):
                pass
    finally:
        for listener in sockets:
            listener.close()


def test_malformed_port_setting_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADIO_SERVER_PORT", "http")
    code = Path(gradio_setup.__file__).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="GRADIO_SERVER_PORT is 'http'"):
        exec(compile(code, gradio_setup.__file__, "exec"), {"__name__": "gradio_setup"})


def test_default_port_is_the_next_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (taken,) = server._listen("127.0.0.1", 0)
    with taken:
        first = taken.getsockname()[1]
        monkeypatch.setattr("gradio.http_server.INITIAL_PORT_VALUE", first)
        (free,) = server._listen("127.0.0.1", None)
        with free:
            assert free.getsockname()[1] > first


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("All connection attempts failed"),
        ValueError("When localhost is not accessible\na link must be created"),
        Exception("Couldn't start the app"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_launch_failure_is_one_line_when_gradio_raises(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(app, "build_demo", lambda _: gr.Blocks(analytics_enabled=False))
    monkeypatch.setattr(viewer, "preview_picture", lambda _: b"")
    environment = gradio.routes.templates.env
    monkeypatch.setattr(environment, "loader", environment.loader)  # put back afterwards
    assert app.main(["--port", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("app.py: the page does not start: ")
    assert str(failure).splitlines()[0] in line


def test_temporary_folder_is_created_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "new"))
    with server.temporary_files() as folder:
        assert folder.parent == tmp_path / "new"
    assert not folder.exists()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/dev/null/nowhere")
    with (
        pytest.raises(WriteError, match="cannot write /dev/null/nowhere"),
        server.temporary_files(),
    ):
        pass
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/dev/null/nowhere"])
    with pytest.raises(WriteError, match="set TMPDIR"), server.temporary_files():
        pass


_FAST_CLEANUP = """
import sys, app
from captioner.web import server
server.CLEANUP_SECONDS, server.FILE_SECONDS = app.CLEANUP_SECONDS, app.FILE_SECONDS = 1, 2
drop = server.drop_stale_results
def drop_and_print(queue, unread):
    drop(queue, unread)
    print("kept", len(queue.pending_messages_per_session), flush=True)
server.drop_stale_results = drop_and_print
sys.exit(app.main())
"""


@pytest.mark.slow
def test_running_page_deletes_old_files_and_results(tmp_path: Path, photos: list[bytes]) -> None:
    with running_page(tmp_path, "-c", _FAST_CLEANUP) as page:
        (folder,) = page.folder.glob("captioner-*")
        own = files_in(folder)
        assert run(_post_call(page.address, photos[0]))  # nobody fetches its answer
        (path,) = upload(page.address, photos[0])
        address = f"{page.address}/gradio_api/file={path}"
        assert httpx.get(address).content == photos[0]
        deadline = time.monotonic() + 30
        while files_in(folder) != own or page.log.split()[-2:] != ["kept", "0"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.get(address).status_code in (403, 404)
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = httpx.post(page.address + CALL, json={"data": [file, {}]}).json()["event_id"]
        text = httpx.get(f"{page.address}{CALL}/{event}").text
        assert "event: error" in text
        assert "send the photo again" in text
        assert "Traceback" not in page.log


async def _post_call(address: str, photo: bytes) -> str:
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        status, event = await ask(client, photo)
        assert status == 200, event
        return event


def upload(address: str, data: bytes, field: str = "files", **more: Any) -> list[str]:
    """Upload a file; return the paths that the server names."""
    paths: list[str] = httpx.post(address + UPLOAD, files={field: ("p.jpg", data)}, **more).json()
    return paths


def test_results_are_dropped_once_fetched_or_stale(
    impatient: Impatient, photos: list[bytes]
) -> None:
    queue, uploads = impatient.demo._queue, gradio.routes.file_upload_statuses
    unread: set[str] = set()
    loop = impatient.demo.server.servers[0].get_loop()

    def drop() -> None:
        done = threading.Event()
        loop.call_soon_threadsafe(server.drop_stale_results, queue, unread)
        loop.call_soon_threadsafe(done.set)
        assert done.wait(10)

    drop()
    stale = run(_post_call(impatient.address, photos[0]))
    while queue.event_ids_to_events:
        time.sleep(0.02)
    drop()
    assert len(queue.pending_messages_per_session) == 1  # may still be fetched
    assert captions(impatient.address, photos[:2])
    upload(impatient.address, photos[0], params={"upload_id": "me"})
    assert uploads._statuses
    drop()
    assert not queue.pending_messages_per_session
    assert not queue.pending_event_ids_session
    assert not uploads._statuses
    assert not uploads._signals
    late = httpx.get(f"{impatient.address}{CALL}/{stale}")
    assert (late.status_code, "has expired" in late.json()["detail"]) == (404, True)


def test_old_files_are_deleted_but_not_the_examples(
    impatient: Impatient, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = impatient.folder
    (path,) = upload(impatient.address, photos[0])
    assert Path(path).read_bytes() == photos[0]
    before = files_in(folder)
    # Gradio's ``delete_cache`` does not know this one.
    assert upload(impatient.address, photos[1], field="x") == []
    assert len(files_in(folder) - before) == 1

    monkeypatch.setattr(server, "CLEANUP_SECONDS", 0.2)
    received: list[int] = []
    cleaning = threading.Thread(
        target=server._clean_up_until, args=(received, impatient.demo, folder)
    )
    cleaning.start()
    examples = _examples(impatient.address)
    own = {Path(example[kind]["path"]) for example in examples for kind in _EXAMPLE_FILES}
    assert len(own) > 6
    deadline = time.monotonic() + 15
    while files_in(folder) != own or Path(path).parent.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    received.append(signal.SIGTERM)
    cleaning.join(5)
    assert not cleaning.is_alive()
    assert not any(path in files for files in impatient.demo.temp_file_sets)
    for example in examples:
        for kind in _EXAMPLE_FILES:
            found = httpx.get(f"{impatient.address}/gradio_api/file={example[kind]['path']}")
            expected = "application/json" if kind == "answer" else "image/"
            assert found.headers["content-type"].startswith(expected)


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
def test_server_files_cannot_be_read(page: Page, route: str) -> None:
    (temporary,) = page.folder.glob("captioner-*")
    for secret in SECRETS:
        response = httpx.get(page.address + route.format(secret, temporary=temporary))
        assert response.status_code >= 400
        assert Path(secret).read_bytes()[:40] not in response.content


_BLOCKED = [
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
]


def test_unneeded_routes_are_blocked(page: Page) -> None:
    before = page.log
    for route in _BLOCKED:
        method, _, path = route.partition(" ")
        response = httpx.request(method, page.address + path)
        assert response.status_code == 404, route
        assert response.json() == {"detail": "There is nothing at this address."}
    assert page.log == before


def test_server_files_cannot_be_captioned(page: Page, example_photos: list[Path]) -> None:
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        call = httpx.post(
            page.address + CALL, json={"data": [{"path": str(example_photos[0]), **meta}, {}]}
        )
        if meta:
            assert call.status_code == 400
            assert call.json()["detail"].startswith("The photo was not uploaded")
            continue
        text = httpx.get(f"{page.address}{CALL}/{call.json()['event_id']}").text
        assert "event: error" in text
        assert "beams" not in text


def test_uploads_cannot_be_listed_or_guessed(
    page: Page, impatient: Impatient, photos: list[bytes]
) -> None:
    (path,) = upload(page.address, photos[0])
    for folder in (Path(path).parent, Path(path).parent.parent, page.folder):
        assert httpx.get(f"{page.address}/gradio_api/file={folder}").status_code >= 400
    # The folder's name is random, so that a path cannot be computed from a photo.
    with server.temporary_files() as folder:
        assert len({folder.name, Path(path).parent.parent.name}) == 2
    assert httpx.get(f"{impatient.address}/gradio_api/file={path}").status_code >= 400


class _Count(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.count += 1  # type: ignore[attr-defined]


def test_addresses_in_requests_are_not_fetched(page: Page, photos: list[bytes]) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), _Count) as inside:
        inside.count = 0  # type: ignore[attr-defined]
        threading.Thread(target=inside.serve_forever, daemon=True).start()
        addresses = [
            f"http://127.0.0.1:{inside.server_address[1]}/photo.jpg",
            "https://example.org/photo.jpg",
            "http://169.254.169.254/latest/meta-data",
        ]
        dependencies = httpx.get(f"{page.address}/config").json()["dependencies"]
        before = page.connections
        for address in addresses:
            for route, status in (("file=", 403), ("file/", 404), ("proxy=", 404)):
                response = httpx.get(f"{page.address}/gradio_api/{route}{address}")
                assert response.status_code == status
        with httpx.Client(base_url=page.address) as client:
            address = addresses[0]
            for file in (
                {"path": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "p", "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "/tmp/" + "p" * 300, "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": "\0", "url": address, "meta": {"_type": "gradio.FileData"}},
                {"path": None, "url": address},
                {"path": address},
                address,
            ):
                call = client.post(CALL, json={"data": [file, {}]})
                if call.status_code == 200:
                    text = client.get(f"{CALL}/{call.json()['event_id']}").text
                    assert "event: error" in text
                for event in dependencies:
                    joining = {"data": [file] * len(event["inputs"]), "fn_index": event["id"]}
                    client.post("/gradio_api/queue/join", json=joining | {"session_hash": "x"})
        # The queue works in order: after this all of them are done.
        assert captions(page.address, photos[:1])
        inside.shutdown()
        assert inside.count == 0  # type: ignore[attr-defined]
    assert "socket.connect" not in page.connections.removeprefix(before)


def test_nothing_outside_the_machine_is_looked_up(page: Page) -> None:
    assert "socket.connect" in page.connections  # Gradio requests its own page
    for line in page.connections.splitlines():
        assert "127.0.0.1" in line or "localhost" in line or "/" in line, line


def test_too_large_requests_are_refused(page: Page) -> None:
    for body in (b'{"data": ["' + bytes(3_000_000) + b'"]}', b"[" + b"[]," * 60_000 + b"0]"):
        assert httpx.post(page.address + CALL, content=body).status_code == 413
    named = httpx.post(page.address + CALL, json={"data": [None, {}], "session_hash": "x" * 101})
    assert (named.status_code, "too long" in named.text) == (400, True)
    progress = page.address + "/gradio_api/upload_progress"
    assert httpx.get(progress, params={"upload_id": "x" * 2000}).status_code == 414
    # Gradio would read a part without a file name into memory, whatever its size.
    for name in ("p.jpg", None):
        sent = httpx.post(page.address + UPLOAD, files={"files": (name, bytes(11_000_000))})
        assert sent.status_code == 413
    before = page.anonymous()
    large = (bytes(1_000_000) for _ in range(300))
    with contextlib.suppress(httpx.HTTPError):  # the connection may end before the answer is read
        assert httpx.post(page.address + UPLOAD, content=large).status_code == 413
    assert page.anonymous() - before < 100_000


def test_uploads_do_not_fill_the_disk(
    impatient: Impatient, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_MIN_FREE_DISK", 10**18)
    response = httpx.post(impatient.address + UPLOAD, files={"files": ("p.jpg", photos[0])})
    assert response.status_code == 503
    assert "disk is full" in response.json()["detail"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 200_000, b"null", b"[]", b""])
def test_malformed_json_is_refused_in_a_sentence(page: Page, body: bytes) -> None:
    before = page.log
    response = httpx.post(page.address + CALL, content=body)
    assert 400 <= response.status_code < 500
    assert response.json()["detail"]
    assert page.log == before


@pytest.mark.parametrize("place", ["/", "/config", "/healthz", "/gradio_api/file=/etc/passwd"])
def test_every_response_has_the_security_headers(page: Page, place: str) -> None:
    headers = httpx.get(page.address + place).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "default-src 'self'" in headers["content-security-policy"]
    # A Space is shown in a frame of its host's page.
    assert "x-frame-options" not in headers
    assert "frame-ancestors" not in headers["content-security-policy"]


def test_full_queue_is_reported(page: Page, photos: list[bytes]) -> None:
    async def many() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(base_url=page.address, timeout=60) as client:
            upload = await client.post(UPLOAD, files={"files": ("p.jpg", photos[0])})
            file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
            calls = await asyncio.gather(
                *(client.post(CALL, json={"data": [file, {}]}) for _ in range(3 * MAX_QUEUE))
            )
            events = [call.json()["event_id"] for call in calls if call.status_code == 200]
            for event in events:
                await answer(client, event)
            return [(call.status_code, call.text) for call in calls]

    response = run(many())
    assert {status for status, _ in response} == {200, 503}
    assert all("Queue is full" in text for status, text in response if status == 503)


@dataclasses.dataclass(frozen=True)
class Impatient:
    """The real page in this process, under /captions, with short deadlines.

    Attributes:
        address: without the root path, and without a slash at its end.
        requests: checks its requests.
        demo: the page.
        folder: of its files.
    """

    address: str
    requests: RequestFilter
    demo: gr.Blocks
    folder: Path

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        """Return a bare connection."""
        raw = socket.socket()
        if receive_bytes is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.settimeout(20)
        parts = urlsplit(self.address)
        raw.connect((parts.hostname, parts.port))
        return raw

    def start_upload(self, sent: int, length: int = 200_000) -> socket.socket:
        """Send the head of an upload and some of its bytes."""
        raw = self.connect()
        head = f"POST {UPLOAD} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n"
        raw.sendall(head.encode() + b"content-type: multipart/form-data; boundary=a\r\n\r\n")
        raw.sendall(bytes(sent))
        return raw


@pytest.fixture(scope="module")
def impatient(
    captioner: Captioner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Impatient]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("impatient").resolve()
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setattr(server._Server, "stall_seconds", 1.0)
        patch.setattr(RequestFilter, "stall_seconds", 0.6)
        patch.setattr(RequestFilter, "max_body_seconds", 2.0)
        patch.setattr(RequestFilter, "max_buffered", 1_000_000)
        for module in (app, server):
            patch.setattr(module, "CLEANUP_SECONDS", 1)
            patch.setattr(module, "FILE_SECONDS", 2)
        requests = RequestFilter()
        demo = app.build_demo(captioner).queue(max_size=MAX_QUEUE)
        sockets = server._listen("127.0.0.1", 0)
        options = server.launch_options(requests, "/captions/")
        address = server.launch(demo, sockets, options)
        patch.delenv("http_proxy")
        yield Impatient(address.rstrip("/"), requests, demo, folder)
        demo.server.max_connections = 0
        demo.close(verbose=False)


class _Proxy(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that serves the page under /captions, and keeps or strips that prefix."""

    page: str
    strips: bool

    def do_GET(self) -> None:
        """Forward a request and its answer."""
        assert self.path.startswith("/captions/")
        path = self.path.removeprefix("/captions") if self.strips else self.path
        response = httpx.request(
            self.command,
            self.page + path,
            content=self.rfile.read(int(self.headers.get("content-length", 0))),
            headers={
                "content-type": self.headers.get("content-type", "text/plain"),
                "x-forwarded-host": self.headers["host"],
            },
            timeout=60,
        )
        self.send_response(response.status_code)
        for name in ("content-type", "location"):
            if name in response.headers:
                self.send_header(name, response.headers[name])
        self.send_header("content-length", str(len(response.content)))
        self.end_headers()
        self.wfile.write(response.content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize("strips", [False, True], ids=["kept", "stripped"])
def test_page_works_behind_a_proxy_whose_prefix_is(
    impatient: Impatient, captioner: Captioner, photos: list[bytes], strips: bool
) -> None:
    proxy = type("Proxy", (_Proxy,), {"page": impatient.address, "strips": strips})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), proxy) as proxy_server:
        threading.Thread(target=proxy_server.serve_forever, daemon=True).start()
        public = f"http://127.0.0.1:{proxy_server.server_port}/captions"
        assert httpx.get(f"{public}/config").json()["root"] == public
        assert "<!doctype html>" in httpx.get(f"{public}/").text
        assert httpx.get(f"{public}/healthz").json() == {"status": "ready"}
        assert httpx.get(f"{public}/gradio_api/file=/etc/passwd").status_code == 403
        (caption,) = captions(public, photos[:1])
        assert json.loads(caption) == [captioner.caption(photos[0]).to_dict()]
        picture = _examples(public)[0]["photo"]["url"]
        assert picture.startswith(f"{public}/gradio_api/file=")
        assert httpx.get(picture).headers["content-type"].startswith("image/")
        proxy_server.shutdown()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/captions/", 200),
        ("/captions/healthz", 200),
        ("/captions/robots.txt", 200),
        ("/captions/gradio_api/info", 200),
        ("/captions", 307),
        ("/captionsx", 404),
        ("/captionsx/config", 404),
        ("/captions/captions/config", 404),
        ("/captions/captions", 404),
        ("//captions/config", 404),
        ("/captions//config", 404),
        ("/captions/../config", 404),
        ("/Captions/config", 404),
        ("/captions/gradio_api/proxy=http://127.0.0.1:9/x", 404),
        ("/captions/monitoring", 404),
        ("/gradio_api/file=/etc/passwd", 403),
        ("/captions/gradio_api/file=/etc/passwd", 403),
        ("/captions%2Fgradio_api%2Ffile=%2Fetc%2Fpasswd", 403),
        ("/captions//gradio_api/file=/etc/passwd", 404),
        ("/captions/captions/gradio_api/file=/etc/passwd", 404),
        ("/captions/static/../gradio_api/file=/etc/passwd", 403),
        ("/captions/static/" + "a" * 300, 404),
    ],
)
def test_routes_are_checked_under_a_root_path(
    impatient: Impatient, capfd: pytest.CaptureFixture[str], target: str, status: int
) -> None:
    host = urlsplit(impatient.address).netloc
    connection = http.client.HTTPConnection(host, timeout=20)
    for method in ("GET", "HEAD"):
        connection.request(method, target)
        response = connection.getresponse()
        response.read()
        assert response.status == status or (method, response.status) == ("HEAD", 405)
        if status == 307:
            assert response.headers["location"] == "/captions/"
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "Traceback" not in capfd.readouterr().err


def test_file_range_is_served_under_a_root_path(
    impatient: Impatient, photos: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    (path,) = httpx.post(
        f"{impatient.address}/captions{UPLOAD}", files={"files": ("p.jpg", photos[0])}
    ).json()
    address = f"{impatient.address}/captions/gradio_api/file={path}"
    part = httpx.get(address, headers={"range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, photos[0][2:6])
    for bad in ("bytes=0-1,3-4", "bytes=--1", "bytes=x", "lines=1-2"):  # to be ignored (RFC 9110)
        whole = httpx.get(address, headers={"range": bad})
        assert (whole.status_code, whole.content) == (200, photos[0])
    # An older protocol, and junk in what Gradio takes for its own front server.
    with impatient.connect() as raw:
        raw.sendall(b"GET /captions/config HTTP/1.0\r\nx-gradio-server: http://[::\r\n\r\n")
        response = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert response.startswith(b"HTTP/1.1 200 OK")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("", ""),
        ("/", ""),
        ("captions", "/captions"),
        ("/a/b/", "/a/b"),
        ("//a//b", "/a/b"),
        ("https://example.org/captions/", "https://example.org/captions"),
    ],
)
def test_root_path_is_cleaned(given: str, cleaned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", given)
    assert server.launch_options(RequestFilter())["root_path"] == cleaned


@pytest.mark.parametrize("given", ["/a?b", "/a#b", "ftp://a/b", "a b", "https:///a"])
def test_invalid_root_path_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="root path"):
        server.launch_options(RequestFilter(), given)


@pytest.mark.parametrize(
    ("root_path", "path", "seen"),
    [
        ("https://example.org/captions", "/captions/config", "/config"),
        ("https://example.org/captions", "/config", "/config"),
        ("https://example.org", "/config", "/config"),
        ("/two words", "/two words/config", "/config"),
        ("/two%20words", "/two words/config", "/config"),
        ("/config", "/config/config", "/config"),
        ("/gradio_api", "/gradio_api/gradio_api/info", "/gradio_api/info"),
    ],
)
def test_app_receives_a_path_without_the_root_path(root_path: str, path: str, seen: str) -> None:
    scopes: list[dict[str, Any]] = []

    async def inner(scope: Any, *_: object) -> None:
        scopes.append(scope)

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path}
    scope |= {"root_path": root_path, "query_string": b"", "headers": []}
    run(RequestFilter()(inner)(scope, None, None))  # type: ignore[arg-type]
    assert [(scope["path"], scope["root_path"]) for scope in scopes] == [(seen, "")]


def test_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/gradio_api/queue/join"}
    run(RequestFilter()(None)(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close"}]


def test_stalled_upload_is_dropped_and_a_slow_one_is_read(impatient: Impatient) -> None:
    with impatient.start_upload(100) as raw:
        response = b"".join(iter(lambda: raw.recv(65_536), b""))  # until it is closed
    assert response.startswith(b"HTTP/1.1 408")
    assert b"too slowly" in response
    head = b'--a\r\nContent-Disposition: form-data; name="files"; filename="p.jpg"\r\n\r\n'
    body = head + b"photo\r\n--a--\r\n"
    with impatient.start_upload(0, len(body)) as raw:
        step = -(-len(body) // 15)
        for start in range(0, len(body), step):
            time.sleep(0.08)  # twice the deadline in total
            raw.sendall(body[start : start + step])
        assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
    # A trickle ends, too.
    started = time.monotonic()
    with impatient.start_upload(0) as raw:
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 15:
                raw.sendall(b"x")
                time.sleep(0.2)
        assert 1.7 < time.monotonic() - started < 15
    assert impatient.requests._buffered == 0


def test_stalled_uploads_make_room_for_others(
    impatient: Impatient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stall_seconds", "max_body_seconds", "window_seconds"):
        monkeypatch.setattr(RequestFilter, name, 20.0)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(impatient.start_upload(198_000)) for _ in range(5)]
        deadline = time.monotonic() + 10
        while impatient.requests._buffered < 980_000:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # None counts as slow until its window is over.
        file = {"files": ("p.jpg", bytes(50_000))}
        assert httpx.post(impatient.address + UPLOAD, files=file).status_code == 503
        monkeypatch.setattr(RequestFilter, "window_seconds", 0.0)
        for _ in range(2):
            assert httpx.post(impatient.address + UPLOAD, files=file).status_code == 200
        assert held[0].recv(65_536).startswith(b"HTTP/1.1 408")
        held[4].settimeout(0.2)
        with pytest.raises(TimeoutError):
            held[4].recv(65_536)
    deadline = time.monotonic() + 10
    while impatient.requests._buffered:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stalled_connections_are_dropped(impatient: Impatient) -> None:
    (path,) = httpx.post(
        impatient.address + UPLOAD, files={"files": ("p.bin", bytes(9_000_000))}
    ).json()
    fetch = f"GET /gradio_api/file={path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        silent, headless, unread, page = (
            stack.enter_context(impatient.connect(4096)) for _ in range(4)
        )
        headless.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ")
        unread.sendall(fetch)
        page.sendall(b"GET /gradio_api/heartbeat/me HTTP/1.1\r\nhost: x\r\n\r\n")
        ends = [each.getsockname()[1] for each in (silent, headless, unread, page)]

        def still_open() -> list[int]:
            connections: list[Any] = [*impatient.demo.server.server_state.connections]
            peers = [each.client[1] for each in connections]
            return [number for number, end in enumerate(ends) if end in peers]

        deadline = time.monotonic() + 15
        while still_open() != [3]:
            headless_alive = 1 in still_open()
            assert time.monotonic() < deadline, still_open()
            if headless_alive:
                with contextlib.suppress(OSError):
                    headless.sendall(b"x")  # a byte now and then gains nothing
            time.sleep(0.2)
        assert b"ALIVE" in page.recv(65_536)  # an open page waits as long as it likes


def test_oldest_idle_connection_is_dropped_beyond_the_limit(
    impatient: Impatient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._Server, "stall_seconds", 20.0)
    monkeypatch.setattr(server._Server, "max_connections", 3)
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(impatient.connect())
        page.sendall(b"GET /gradio_api/heartbeat/me HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in page.recv(65_536)
        idle = []
        for _ in range(4):
            idle.append(stack.enter_context(impatient.connect()))
            time.sleep(0.25)
        for gone in idle[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert gone.recv(1) == b""
        for kept in (page, *idle[2:]):
            kept.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                assert kept.recv(65_536)


_EXAMPLE_FILES = ("photo", "thumbnail", "answer")


def _examples(address: str) -> list[dict[str, Any]]:
    """Return the examples of the page's first value."""
    values = [
        each["props"].get("value") for each in httpx.get(f"{address}/config").json()["components"]
    ]
    found: list[dict[str, Any]] = next(
        value["examples"] for value in values if isinstance(value, dict) and "examples" in value
    )
    return found


def test_links_to_the_page_have_their_own_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = gradio.routes.templates.env
    monkeypatch.setattr(environment, "loader", environment.loader)  # put back afterwards
    preview = LinkPreview('Cats & "dogs"', "One <sentence>.", b"a picture")
    with gr.Blocks(analytics_enabled=False) as demo:
        gr.Markdown("A page")
    options = server.launch_options(RequestFilter(), preview=preview)
    try:
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **options)
        head, _, _ = httpx.get(url).text.partition("</head>")
        picture = httpx.get(f"{url}preview.png")
    finally:
        demo.close()
        assert environment.cache is not None
        environment.cache.clear()
    tags = dict(
        re.findall(r'<meta (?:property|name)="((?:og|twitter):\w+)" content="([^"]*)"', head)
    )
    assert tags["og:title"] == tags["twitter:title"] == "Cats &amp; &quot;dogs&quot;"
    assert tags["og:description"] == tags["twitter:description"] == "One &lt;sentence&gt;."
    assert tags["og:image"] == tags["twitter:image"] == f"{url}preview.png"
    assert "Click to try out the app" not in head
    assert 'content="Gradio"' not in head
    assert (picture.content, picture.headers["content-type"]) == (b"a picture", "image/png")
