"""Checks every request before Gradio sees it. Knows nothing of photos and captions."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import reprlib
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.data_classes import FileData
from gradio.queueing import Queue
from gradio.utils import get_upload_folder
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# All that the page, its API and a health check need. Gradio has many more routes, among them some
# that fetch addresses, run a function past the queue, or store a visitor's input on disk.
_ROUTES = {
    "GET": r"/(config|healthz|preview\.png|theme\.css|robots\.txt|favicon\.ico|manifest\.json)?|"
    r"/pwa_icon(/\w+)?|"
    r"/(static|assets|svelte)/.+|"
    r"/gradio_api/(info|openapi\.json|app_id|startup-events|queue/data|upload_progress)|"
    r"/gradio_api/(heartbeat/|call/|file=).+",
    "POST": r"/gradio_api/(upload|queue/join|cancel|reset|call/[^/]+)",
}
_ROUTES["HEAD"] = _ROUTES["GET"]

STALL_SECONDS = 30.0  # without progress before a request or a connection is dropped
_MAX_BODY_SECONDS = 600.0  # for a whole body
_WINDOW_BYTES = 65_536  # of a body, expected every second when others need its memory
_MAX_UPLOAD = 10_600_000  # bytes: a file of 10 MB and its multipart frame
_MAX_JSON = 2_000_000  # bytes; five beams with all their maps take 45,000
_MAX_JSON_PARTS = 50_000  # lists and objects; parsing them holds up all other requests
_MAX_ADDRESS = 2_000  # characters
_MAX_NAME = 100  # characters of a session or an event
_MAX_BUFFERED = 200_000_000  # bytes of all bodies together
_MIN_FREE_DISK = 200_000_000  # bytes; below it uploads are refused

_UPLOAD_HELP = (
    "Send a file to /gradio_api/upload first; then name it as "
    '{"path": …, "meta": {"_type": "gradio.FileData"}}, with the path that came back.'
)
_HEADERS = {
    # Gradio's page runs inline scripts, and builds functions from the viewer's script. Any page
    # may frame this one: a Space is framed by its host, a lesson by a school's page.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=(), payment=(), usb=()",
}


@dataclasses.dataclass(eq=False)
class _Body:
    """The body of a request while it arrives.

    Attributes:
        data: the bytes received so far.
        deadline: ends the reading.
        window_start: when the current window of ``_WINDOW_BYTES`` began, in the loop's seconds.
        window_offset: the length of ``data`` at that time.
        dropped: whether its memory was given to another request.
    """

    data: bytearray
    deadline: asyncio.Timeout
    window_start: float
    window_offset: int = 0
    dropped: bool = False


class RequestFilter:
    """ASGI middleware that refuses harmful requests, and new work once ``closed``; adds headers.

    Every check sees a path without the root path, whether the proxy in front keeps or strips it.

    Attributes:
        closed: whether the server is shutting down.
        stall_seconds: without a byte of a body before its request is dropped.
        max_body_seconds: for a whole body.
        window_seconds: for ``_WINDOW_BYTES`` of a body before others may take its memory.
        max_buffered: bytes of all bodies that are being received or answered.
    """

    stall_seconds = STALL_SECONDS
    max_body_seconds = _MAX_BODY_SECONDS
    window_seconds = 1.0
    max_buffered = _MAX_BUFFERED

    def __init__(self) -> None:
        """Accept requests; files may come from Gradio's upload folder, as it is set now."""
        self.closed = False
        self._folder = Path(get_upload_folder()).resolve()
        self._active = 0
        self._last_end = time.monotonic()
        self._buffered = 0
        self._arriving: set[_Body] = set()

    def __call__(self, app: ASGIApp) -> ASGIApp:
        """Wrap ``app``."""

        async def filtered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close"})
            elif scope["type"] == "http":
                await self._handle(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return filtered

    def idle_seconds(self) -> float:
        """Return for how long no request has been active; 0 if one is."""
        return 0.0 if self._active else time.monotonic() - self._last_end

    async def _handle(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        scope, redirect = _strip_root_path(scope)
        # A heartbeat stays open as long as the page and waits for nothing.
        counts = not scope["path"].startswith(("/gradio_api/heartbeat/", "/healthz"))
        self._active += counts
        body = bytearray()
        try:
            response = redirect or self.check_route(scope)
            if scope["method"] == "POST" and not response:
                response = await self._receive(scope, receive, body)
                receive = _replay(body, receive)
            await (response or app)(scope, receive, _with_headers(send))
        except ClientDisconnect:
            pass
        finally:
            self._buffered -= len(body)
            if counts:
                self._active -= 1
                self._last_end = time.monotonic()

    async def _receive(
        self, scope: Scope, receive: Receive, data: bytearray
    ) -> JSONResponse | None:
        """Append a request's body to ``data``; return an error response if it is not accepted."""
        is_upload = scope["path"] == "/gradio_api/upload"
        max_bytes = _MAX_UPLOAD if is_upload else _MAX_JSON
        now = asyncio.get_running_loop().time
        started = now()
        body = _Body(data, asyncio.timeout(self.stall_seconds), started)
        self._arriving.add(body)
        try:
            async with body.deadline:
                async for chunk in Request({"type": "http"}, receive).stream():
                    if body.dropped:
                        break
                    data.extend(chunk)
                    self._buffered += len(chunk)
                    if len(data) > max_bytes:
                        return _refuse(413, "The request is too large. Send a smaller file.")
                    if len(data) - body.window_offset >= _WINDOW_BYTES:
                        body.window_offset, body.window_start = len(data), now()
                    if not self._make_room(body, now()):
                        return _refuse(503, "The server is busy. Try again in a minute.")
                    body.deadline.reschedule(
                        min(now() + self.stall_seconds, started + self.max_body_seconds)
                    )
        except TimeoutError:
            body.dropped = True
        finally:
            self._arriving.discard(body)
        if body.dropped:  # nothing is kept open for the rest
            response = _refuse(408, "The request arrived too slowly. Send it again.")
            response.headers["connection"] = "close"
            return response
        return None if is_upload else self.check_body(data, scope)

    def _make_room(self, body: _Body, now: float) -> bool:
        """Drop the slowest other bodies until ``body`` fits; return whether it does."""
        while self._buffered > self.max_buffered:
            others = self._arriving - {body}
            slowest = min(others, key=lambda other: other.window_start, default=None)
            if slowest is None or now - slowest.window_start < self.window_seconds:
                return False
            slowest.dropped = True
            slowest.deadline.reschedule(now)
            self._arriving.remove(slowest)
            self._buffered -= len(slowest.data)
            slowest.data.clear()
        return True

    def check_route(self, scope: Scope) -> JSONResponse | None:
        """Return an error response if the route is blocked or the server is closing."""
        method, path, query = scope["method"], scope["path"], scope["query_string"]
        if len(path) + len(query) > _MAX_ADDRESS:
            return _refuse(414, "The address is too long.")
        known = method == "OPTIONS" or (method in _ROUTES and re.fullmatch(_ROUTES[method], path))
        if not known or any(len(name.encode()) > 255 for name in path.split("/")):
            return _refuse(404, "There is nothing at this address.")
        _, is_file, name = path.partition("/gradio_api/file=")
        if is_file and not self._is_own_file(name):
            return _refuse(403, "This server serves only the page's own files.")
        if method != "POST":
            blocks = getattr(scope.get("app"), "blocks", None)
            if blocks and not _has_answer(path, query, blocks._queue):
                return _refuse(404, "This answer was already fetched or has expired.")
            return None
        if self.closed:
            # Gradio's page reports a 503 as "busy".
            return _refuse(503, "The server is restarting. Try again in a minute.")
        if path.endswith("/upload") and shutil.disk_usage(self._folder).free < _MIN_FREE_DISK:
            return _refuse(503, "The server's disk is full. Try again in an hour.")
        return None

    def check_body(self, body: bytearray, scope: Scope) -> JSONResponse | None:
        """Return an error response if JSON is malformed or fits no event of the page."""
        if body.count(b"[") + body.count(b"{") > _MAX_JSON_PARTS:
            return _refuse(413, "The request has too many parts.")
        try:
            # FastAPI parses it once more, as it takes only bytes: 0.6 ms for five beams.
            request = json.loads(body) if body else {}
            has_foreign_file = self._has_foreign_file(request)
        except (ValueError, RecursionError):
            return _refuse(400, "The request is not valid JSON.")
        names = request.values() if isinstance(request, dict) else ()
        if any(isinstance(name, str) and len(name) > _MAX_NAME for name in names):
            return _refuse(400, "A name in the request is too long.")
        if has_foreign_file:
            return _refuse(400, f"The photo was not uploaded. {_UPLOAD_HELP}")
        blocks = getattr(scope.get("app"), "blocks", None)
        return check_call(scope["path"], request, blocks) if blocks else None

    def _is_own_file(self, path: object) -> bool:
        """Return whether a path leads into the upload folder; a URL does not."""
        try:
            return Path(str(path)).resolve().is_relative_to(self._folder)
        except (OSError, ValueError):  # not a possible file name
            return False

    def _has_foreign_file(self, value: Any) -> bool:
        """Return whether a request names a file that nobody uploaded: Gradio would fetch a URL."""
        if isinstance(value, list):
            return any(map(self._has_foreign_file, value))
        if not isinstance(value, dict):
            return False
        if "meta" in value:
            try:
                FileData.model_validate(value)
            except ValidationError:
                return True
            if not self._is_own_file(value["path"]):
                return True
        return any(map(self._has_foreign_file, value.values()))


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def _strip_root_path(scope: Scope) -> tuple[Scope, Response | None]:
    """Return a scope without the root path, or a redirect from "/captions" to "/captions/".

    The router strips nothing more: the root path may be a whole address, or come twice.
    """
    prefix = unquote(urlsplit(scope.get("root_path", "")).path).rstrip("/")
    path, redirect = scope["path"], None
    if prefix and path == prefix and scope["method"] in ("GET", "HEAD"):
        query = scope["query_string"].decode("latin-1")
        redirect = RedirectResponse(f"{prefix}/" + (f"?{query}" if query else ""))
    if prefix and path.startswith(prefix + "/"):
        path = path.removeprefix(prefix)
    headers = [
        (name, value)
        for name, value in scope["headers"]
        # Gradio fails on these; all ranges but single ones may be ignored.
        if name != b"x-gradio-server"
        and (name != b"range" or re.fullmatch(rb"bytes=(\d+-\d*|-\d+)", value))
    ]
    return {**scope, "path": path, "root_path": "", "headers": headers}, redirect


def _replay(body: bytearray, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the whole body first."""
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _has_answer(path: str, query: bytes, queue: Queue) -> bool:
    """Return whether the queue has, or will have, an answer; Gradio fails with a traceback."""
    sessions, ids = queue.pending_messages_per_session, queue.pending_event_ids_session
    if path == "/gradio_api/queue/data":
        session = QueryParams(query).get("session_hash")
        return session is None or session in sessions
    if path.startswith("/gradio_api/call/"):
        event = path.rpartition("/")[2]
        return event in sessions or any(event in events for events in ids.values())
    return True


def check_call(path: str, request: Any, blocks: gr.Blocks) -> JSONResponse | None:
    """Return an error response if a call names no function or has the wrong values."""
    _, is_call, name = path.partition("/gradio_api/call/")
    if not is_call and path != "/gradio_api/queue/join":
        return None
    if not isinstance(request, dict) or not isinstance(request.get("data"), list):
        return _refuse(400, f'Send {{"data": [...]}}, a list of values. {_UPLOAD_HELP}')
    session = request.get("session_hash")
    may_lack_session = is_call and session is None  # Gradio makes one
    if not may_lack_session and not (isinstance(session, str) and session):
        return _refuse(400, 'The request needs a "session_hash": any text of your own.')
    wanted = name if is_call else request.get("fn_index")
    functions = [fn for fn in blocks.fns.values() if fn.fn]
    function = next(
        (fn for fn in functions if (fn.api_name if is_call else fn._id) == wanted), None
    )
    if function is None:
        return _refuse(404, f"There is no function {reprlib.repr(wanted)}.")
    labels = [getattr(component, "label", None) or "value" for component in function.inputs]
    if len(request["data"]) != len(labels):
        sentence = f'"data" has {len(request["data"])} values and needs {len(labels)}'
        expected = f" ({', '.join(labels)}). {_UPLOAD_HELP}" if labels else "."
        return _refuse(400, sentence + expected)
    return None


async def explain_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Return FastAPI's validation errors as a sentence."""
    assert isinstance(error, RequestValidationError)
    faults = (
        f"{'.'.join(map(str, fault['loc'][1:])) or 'the body'}: {fault['msg']}"
        for fault in error.errors()
    )
    return _refuse(400, f"The request is not valid: {'; '.join(faults)}.")
