"""How the page is served: what ``launch`` gets, what is refused, and how it ends.

Knows nothing of photos and captions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.routes
from gradio.queueing import Queue
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner.errors import ConfigError, first_line
from captioner.files import writing

# The default theme's soft text is 1.91 to 1 on white; these reach 4.5 to 1 in light and dark.
# System fonts have all weights, and the glyphs of the visitor's script; Gradio's have 55 glyphs.
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"]).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)

# Narrow margins, and headings of the model card that are not larger than the page's.
_STYLE = """
.gradio-container .app { padding: 12px 16px !important; }
.gradio-container .html-container { padding: 0 !important; }
#title .prose { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.75rem; }
#title :is(h1, p) { margin: 0; } #title h1 { font-size: 1.4rem; }
#card h1 { font-size: 1.2rem; } #card h2 { font-size: 1.05rem; }
"""

# All that the page, its API and a health check ask for. Gradio has many more, among them some that
# fetch addresses, run a function past the queue, or keep on the disk what a visitor typed.
_ROUTES = {
    "GET": r"/(config|healthz|theme\.css|robots\.txt|favicon\.ico|manifest\.json|pwa_icon(/\w+)?)?|"
    r"/(static|assets|svelte)/.+|"
    r"/gradio_api/(info|openapi\.json|app_id|startup-events|queue/data|upload_progress)|"
    r"/gradio_api/(heartbeat/|call/|file=).+",
    "POST": r"/gradio_api/(upload|queue/join|cancel|reset|call/[^/]+)",
}
_ROUTES["HEAD"] = _ROUTES["GET"]

KEPT_SECONDS = 3600  # that a visitor's file lies there
SWEEP_SECONDS = 60  # between two looks at them
MAX_WAITING = 20  # visitors; the next one is told to try again
_LARGEST_FILE = "10mb"
_LARGEST_UPLOAD = 10_600_000  # bytes: such a file and what stands around it
_LARGEST_BODY = 2_000_000  # of JSON; ten beams with all their maps have a quarter
_LONGEST_ADDRESS = 2_000  # characters
_LONGEST_NAME = 100  # characters, of a session or an event
_MOST_PARTS = 50_000  # lists and objects of JSON, which hold up all others while they are read
_MOST_HELD = 200_000_000  # bytes of all requests that are being read
_SPARE_BYTES = 200_000_000  # of the disk that uploads may not fill
_DRAIN_SECONDS = 20  # with the rest under the 30 seconds that Kubernetes gives
_NAP_SECONDS = 0.05  # between two looks whether it shall end, or can
_QUIET_SECONDS = 1  # so long after the last request nobody waits any more

_HEADERS = {
    # Gradio's page runs inline scripts, and builds functions from the viewer's script. Who may
    # frame it is left open: a Space is framed by its host's page, a lesson by a school's.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=(), payment=(), usb=()",
}


class Gate:
    """ASGI middleware: refuses what could harm, and new work once ``closed``; adds headers.

    Attributes:
        closed: whether the server is about to end.
    """

    def __init__(self) -> None:
        """Start open, with nobody inside; files come from Gradio's folder, as it is now."""
        self.closed = False
        self._folder = Path(get_upload_folder()).resolve()
        self._inside = 0
        self._held = 0
        self._last = time.monotonic()

    def __call__(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` behind this gate."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    there = {name for name, _ in message["headers"]}
                    message["headers"] = [
                        *message["headers"],
                        *(
                            (name.encode(), value.encode())
                            for name, value in _HEADERS.items()
                            if name.encode() not in there
                        ),
                    ]
                await send(message)

            body, unread = bytearray(), scope["method"] == "POST"

            async def read(most: int) -> JSONResponse | None:
                """Take the whole body in, or return why not."""
                async for more in Request(scope, receive).stream():
                    body.extend(more)
                    self._held += len(more)
                    if len(body) > most:
                        return _refuse(413, "The request is too large: send a smaller file.")
                    if self._held > _MOST_HELD:
                        return _refuse(503, "The server is busy: try again in a minute.")
                return None

            async def replay() -> Message:
                nonlocal unread
                if not unread:
                    return await receive()
                unread = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            # A heartbeat is open as long as the page is, and asks for nothing.
            counts = "/heartbeat/" not in scope["path"] and scope["path"] != "/healthz"
            self._inside += counts
            try:
                refusal = self._look(scope["method"], scope["path"], scope["query_string"])
                if unread and not refusal:
                    upload = scope["path"].endswith("/upload")
                    refusal = await read(_LARGEST_UPLOAD if upload else _LARGEST_BODY)
                    if not upload:
                        refusal = refusal or self._look_into(body)
                await (refusal or app)(scope, replay, send_with_headers)
            except ClientDisconnect:
                pass
            finally:
                self._held -= len(body)
                if counts:
                    self._inside -= 1
                    self._last = time.monotonic()

        return guarded

    def _look(self, method: str, path: str, query: bytes) -> JSONResponse | None:
        """Return a refusal of what is not open, or not now."""
        if len(path) + len(query) > _LONGEST_ADDRESS:
            return _refuse(414, "The address is too long.")
        if method != "OPTIONS" and not re.fullmatch(_ROUTES.get(method, ""), path):
            return _refuse(404, "There is nothing at this address.")
        _, is_file, name = path.partition("/gradio_api/file=")
        if is_file and not self._is_from_here(name):
            return _refuse(403, "This server hands out only its page's files.")
        if method != "POST":
            return None
        if self.closed:
            # Gradio's page says of 503 that the application is busy.
            return _refuse(503, "The server is restarting: try again in a minute.")
        if path.endswith("/upload") and (
            shutil.disk_usage(self._folder.parent).free < _SPARE_BYTES
        ):
            return _refuse(503, "The server's disk is full: try again in an hour.")
        return None

    def _look_into(self, body: bytearray) -> JSONResponse | None:
        """Return a refusal of JSON that is none, or names a file that no visitor sent."""
        if body.count(b"[") + body.count(b"{") > _MOST_PARTS:
            return _refuse(413, "The request has too many parts.")
        try:
            request = json.loads(body) if body else {}
            foreign = self._names_foreign_file(request)
        except (ValueError, RecursionError):
            return _refuse(400, "The request is no JSON that can be read.")
        names = request.values() if isinstance(request, dict) else ()
        if any(isinstance(name, str) and len(name) > _LONGEST_NAME for name in names):
            return _refuse(400, "A name in the request is too long.")
        if foreign:
            sentence = "The photo was not uploaded: send the file first, not its address or place."
            return _refuse(400, sentence)
        return None

    def _is_from_here(self, path: object) -> bool:
        """Say whether a path leads into the folder; an address does not."""
        try:
            return Path(str(path)).resolve().is_relative_to(self._folder)
        except (OSError, ValueError):  # no name that a file could have
            return False

    def _names_foreign_file(self, value: Any) -> bool:
        """Say whether a request holds a file that no visitor sent: Gradio would fetch an URL."""
        if isinstance(value, list):
            return any(map(self._names_foreign_file, value))
        if not isinstance(value, dict):
            return False
        if "meta" in value and not (
            isinstance(value["meta"], dict) and self._is_from_here(value.get("path"))
        ):
            return True
        return any(map(self._names_foreign_file, value.values()))

    def drain(self) -> bool:
        """Close, and say when nobody has waited for a second; False after twenty."""
        self.closed = True
        end = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < end:
            if not self._inside and time.monotonic() - self._last > _QUIET_SECONDS:
                return True
            time.sleep(_NAP_SECONDS)
        return False


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def launch_options(gate: Gate) -> dict[str, Any]:
    """Return what ``Blocks.launch`` gets."""

    def health(_: object) -> JSONResponse:
        # The server starts when the model has been loaded and has captioned the examples.
        return JSONResponse(
            {"status": "stopping" if gate.closed else "ready"}, 503 if gate.closed else 200
        )

    return {
        "theme": _THEME,
        "css": _STYLE,
        "footer_links": ["api"],
        "max_file_size": _LARGEST_FILE,
        # A visitor's runs are not kept in the browser, nor shown on a monitoring page.
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        # A session holds its last answer, and every request over HTTP is one of its own: gradio
        # would keep 10,000 of them. Nothing here needs what a session knew.
        "state_session_capacity": 64,
        "app_kwargs": {
            "routes": [Route("/healthz", health)],
            "middleware": [Middleware(lambda app: gate(app))],
        },
    }


@contextlib.contextmanager
def temporary_files() -> Iterator[Path]:
    """Give Gradio a folder of its own, which is gone afterwards with all that visitors sent.

    To be entered before the page is built.
    """
    earlier = os.environ.get("GRADIO_TEMP_DIR")
    place = Path(earlier or tempfile.gettempdir())
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix="captioner-", dir=place, ignore_cleanup_errors=True
        )
    with folder as name:
        os.environ["GRADIO_TEMP_DIR"] = name
        try:
            yield Path(name)
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if earlier is not None:
                os.environ["GRADIO_TEMP_DIR"] = earlier


def serve(build: Callable[[], gr.Blocks], host: str | None = None, port: int | None = None) -> None:
    """Serve a page until a signal asks to end; then answer who waits, and leave no file behind.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP ask; a second one does not wait.

    Args:
        build: makes the page.
        host: address to listen on; None is this machine only, or ``GRADIO_SERVER_NAME``.
        port: None is the first free one from 7860 on.

    Raises:
        ConfigError: there is no such address here, or the port is taken.
        WriteError: there is no place for temporary files.
    """
    asked: list[int] = []
    heard = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # by nohup
        heard.append(hangup)
    for number in heard:
        signal.signal(number, lambda number, _: asked.append(number))
    _try_to_listen(host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", port or 0)
    sys.setswitchinterval(0.001)  # the model's threads let the server's have a turn sooner
    _claim_zero_gpu()
    with temporary_files() as folder:
        # Gradio makes a folder there, also where another user owns /tmp/gradio.
        gradio.routes.DEFAULT_TEMP_DIR = str(folder)  # type: ignore[attr-defined]
        gate = Gate()
        demo = build().queue(max_size=MAX_WAITING, api_open=False)
        own = set(folder.rglob("*"))
        try:
            demo.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, **launch_options(gate)
            )
        except OSError as error:
            raise ConfigError(f"{first_line(error)}: choose another --port") from error
        loop = demo.server.servers[0].get_loop()
        unread: set[str] = set()
        swept = time.monotonic()
        while not asked:
            # In short naps: the signal may come to another thread, which wakes nobody here.
            time.sleep(_NAP_SECONDS)
            if time.monotonic() - swept >= SWEEP_SECONDS:
                _sweep(folder, own, demo.temp_file_sets)
                loop.call_soon_threadsafe(_forget, demo._queue, unread)
                swept = time.monotonic()
        for number in heard:
            signal.signal(number, signal.default_int_handler)
        try:
            idle = gate.drain()
        except KeyboardInterrupt:
            idle = False
        demo.close(verbose=False)
    if not idle:
        sys.stdout.flush()
        os._exit(0)  # the model is at work, whose threads Python's own end would abort


def _try_to_listen(host: str, port: int) -> None:
    """Raise ``ConfigError`` where that cannot be: Gradio would try for minutes."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        place = f"{host}, port {port}" if port else host
        raise ConfigError(
            f"cannot listen on {place} ({getattr(error, 'strerror', None) or error}): choose "
            "another --host or --port"
        ) from error


def _sweep(folder: Path, own: set[Path], known: list[set[str]]) -> None:
    """Delete what visitors sent and got an hour ago, and the folders that this leaves empty.

    Args:
        folder: where all of it lies.
        own: what lay there before the first visitor came.
        known: Gradio's lists of files, which it would only make longer.
    """
    oldest = time.time() - KEPT_SECONDS
    for place, folders, files in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in (*files, *folders)):
            with contextlib.suppress(OSError):  # a folder that is not empty, a file that is gone
                if path not in own and path.lstat().st_ctime < oldest:
                    path.rmdir() if path.is_dir() else path.unlink()
                    for paths in known:
                        paths.discard(str(path))


def _forget(queue: Queue, unread: set[str]) -> None:
    """Drop what is left of answers that were fetched, or that nobody has fetched since last time.

    And of uploads whose progress was asked for. Gradio would keep all that for ever. To be run in
    the server's loop, where nothing changes meanwhile.

    Args:
        queue: Gradio's.
        unread: the sessions with an answer that nobody had fetched last time; is brought up to
            date.
    """
    messages, events = queue.pending_messages_per_session, queue.pending_event_ids_session
    late = set()
    for session in {*messages, *events}:
        ids = events.get(session, ())
        if any(event in queue.event_ids_to_events for event in ids):
            continue  # it waits, or the model is at work on it
        waits = session in messages and messages[session].qsize() > 0
        if waits and ids and session not in unread:
            late.add(session)
        elif waits or not ids or session not in messages:
            messages.pop(session, None)
            events.pop(session, None)
        # Else the answer is being sent.
    unread.clear()
    unread.update(late)
    uploads = gradio.routes.file_upload_statuses
    uploads._signals.clear()
    uploads._statuses.clear()


def _claim_zero_gpu() -> None:
    """Let a Space on ZeroGPU start, which ends where no function has asked for its GPU.

    None is called: two cores caption a photo sooner than a GPU is lent, and without taking from
    the visitor's share of it.
    """
    try:
        import spaces
    except ImportError:
        return
    spaces.GPU(_claim_zero_gpu)
