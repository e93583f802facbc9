"""How the page is served: what ``launch`` gets, what is refused, and how it ends.

Knows nothing of photos and captions.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import html
import json
import os
import re
import reprlib
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jinja2
import uvicorn
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner.errors import CaptionerError, ConfigError, WriteError, first_line
from captioner.files import reraise_os_errors


@contextlib.contextmanager
def _replaced(values: Any, **new: Any) -> Iterator[None]:
    """Set items of a mapping for a while."""
    old = {name: values[name] for name in new if name in values}
    values.update(new)
    try:
        yield
    finally:
        for name in new:
            values.pop(name, None)
        values.update(old)


def without_proxies() -> contextlib.AbstractContextManager[None]:
    """Let HTTP clients that are made meanwhile ignore the proxies of the environment and system.

    Even to build a client fails for a SOCKS proxy without ``socksio``, or for a malformed address.
    """
    return _replaced(os.environ, NO_PROXY="*", no_proxy="*")


for _name in ("GRADIO_SERVER_PORT", "GRADIO_NUM_PORTS"):  # gradio reads them when it is imported
    if not os.environ.get(_name, "0").isdecimal():
        raise ConfigError(f"{_name} is {os.environ[_name]!r}: set a number")

with without_proxies():  # gradio makes a client when it is imported
    import gradio as gr
    import gradio.http_server
    import gradio.routes
    from gradio.data_classes import FileData
    from gradio.queueing import Queue
    from gradio.utils import get_upload_folder

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
    "GET": r"/(config|healthz|preview\.png|theme\.css|robots\.txt|favicon\.ico|manifest\.json)?|"
    r"/pwa_icon(/\w+)?|"
    r"/(static|assets|svelte)/.+|"
    r"/gradio_api/(info|openapi\.json|app_id|startup-events|queue/data|upload_progress)|"
    r"/gradio_api/(heartbeat/|call/|file=).+",
    "POST": r"/gradio_api/(upload|queue/join|cancel|reset|call/[^/]+)",
}
_ROUTES["HEAD"] = _ROUTES["GET"]

_STALLED_SECONDS = 30.0  # without progress, after which a request or a connection is given up
_SLOWEST_SECONDS = 600.0  # for a whole body, however slowly it comes
_STEP_BYTES = 65_536  # of a body, that have to come within a second if others need its memory
_MOST_CONNECTIONS = 500  # open at once; idle ones make room for new ones, then the oldest pages
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

_TEMPLATE = "frontend/index.html"  # Gradio's page
_PREVIEW_TAG = re.compile(
    r'<meta\s+(?:property|name)="(?:og|twitter|description)[^"]*"\s+content="[^"]*"\s*/>'
)
_HOW_TO_SEND_A_FILE = (
    "Send a file to /gradio_api/upload first; then name it as "
    '{"path": …, "meta": {"_type": "gradio.FileData"}}, with the path that came back.'
)
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


@dataclasses.dataclass(frozen=True)
class LinkPreview:
    """What chats and social networks show of a link to the page.

    Attributes:
        title: of the page.
        description: one sentence.
        picture: PNG.
    """

    title: str
    description: str
    picture: bytes

    def install(self) -> None:
        """Put the preview into the head of Gradio's page, which has one about Gradio itself."""
        loader = gradio.routes.templates.env.loader
        assert loader is not None
        source, _, _ = loader.get_source(gradio.routes.templates.env, _TEMPLATE)
        source = _PREVIEW_TAG.sub("", source)
        tags = {
            "og:type": "website",
            "og:title": self.title,
            "og:description": self.description,
            "og:url": "{{ config.root }}",
            "og:image": "{{ config.root }}/preview.png",
            "twitter:card": "summary_large_image",
            "twitter:title": self.title,
            "twitter:description": self.description,
            "twitter:image": "{{ config.root }}/preview.png",
        }
        head = f'<meta name="description" content="{html.escape(self.description)}" />'
        for name, content in tags.items():
            kind = "property" if name.startswith("og:") else "name"
            head += f'<meta {kind}="{name}" content="{html.escape(content)}" />'
        changed = jinja2.DictLoader({_TEMPLATE: source.replace("</head>", f"{head}</head>", 1)})
        gradio.routes.templates.env.loader = jinja2.ChoiceLoader([changed, loader])
        cache = gradio.routes.templates.env.cache
        if cache is not None:
            cache.clear()


@dataclasses.dataclass(eq=False)
class _Upload:
    """The body of a request while it is being read.

    Attributes:
        data: what has come.
        deadline: ends the reading.
        mark: how much of ``data`` had come at ``marked``.
        marked: when the last ``_STEP_BYTES`` were complete, in the event loop's seconds.
        dropped: whether its memory was given to another request.
    """

    data: bytearray
    deadline: asyncio.Timeout
    marked: float
    mark: int = 0
    dropped: bool = False


class RequestFilter:
    """ASGI middleware: refuses what could harm, and new work once ``closed``; adds headers.

    Every check sees a path without the root path, whether the proxy in front keeps or strips it.

    Attributes:
        closed: whether the server is about to end.
        stalled_seconds: without a byte of a body, after which its request is given up.
        slowest_seconds: for a whole body.
        step_seconds: for a part of a body, after which others may have its memory.
        most_held: bytes of all bodies that are being read or worked on.
    """

    stalled_seconds = _STALLED_SECONDS
    slowest_seconds = _SLOWEST_SECONDS
    step_seconds = 1.0
    most_held = _MOST_HELD

    def __init__(self) -> None:
        """Start open, with nobody inside; files come from Gradio's folder, as it is now."""
        self.closed = False
        self._folder = Path(get_upload_folder()).resolve()
        self._inside = 0
        self._held = 0
        self._uploads: set[_Upload] = set()  # that are still coming
        self._last = time.monotonic()

    def __call__(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` behind this gate."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close"})
                return
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

            async def replay() -> Message:
                nonlocal unread
                if not unread:
                    return await receive()
                unread = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            prefix = unquote(urlsplit(scope.get("root_path", "")).path).rstrip("/")
            path = whole_path = scope["path"]
            if prefix and path.startswith(prefix + "/"):
                path = path.removeprefix(prefix)
            # The router strips nothing more: the root path may be a whole address, or come twice.
            scope = {**scope, "path": path, "root_path": "", "headers": _sane(scope["headers"])}
            # A heartbeat is open as long as the page is, and asks for nothing.
            counts = not path.startswith("/gradio_api/heartbeat/") and path != "/healthz"
            self._inside += counts
            try:
                refusal: Response | None = None
                if prefix and whole_path == prefix and scope["method"] in ("GET", "HEAD"):
                    query = scope["query_string"].decode("latin-1")
                    refusal = RedirectResponse(f"{prefix}/" + (f"?{query}" if query else ""))
                refusal = refusal or self._look(scope)
                if unread and not refusal:
                    upload = path == "/gradio_api/upload"
                    refusal = await self._read(
                        receive, body, _LARGEST_UPLOAD if upload else _LARGEST_BODY
                    )
                    if not upload:
                        refusal = refusal or self._look_into(body, scope)
                await (refusal or app)(scope, replay, send_with_headers)
            except ClientDisconnect:
                pass
            finally:
                self._held -= len(body)
                if counts:
                    self._inside -= 1
                    self._last = time.monotonic()

        return guarded

    async def _read(self, receive: Receive, body: bytearray, most: int) -> JSONResponse | None:
        """Append the whole body of a request, or return why not."""
        now = asyncio.get_running_loop().time
        started = now()
        deadline = asyncio.timeout(self.stalled_seconds)
        upload = _Upload(body, deadline, started)
        self._uploads.add(upload)
        try:
            async with deadline:
                async for more in Request({"type": "http"}, receive).stream():
                    if upload.dropped:
                        break
                    body.extend(more)
                    self._held += len(more)
                    if len(body) > most:
                        return _refuse(413, "The request is too large: send a smaller file.")
                    if len(body) - upload.mark >= _STEP_BYTES:
                        upload.mark, upload.marked = len(body), now()
                    if not self._make_room(upload, now()):
                        return _refuse(503, "The server is busy: try again in a minute.")
                    end = min(now() + self.stalled_seconds, started + self.slowest_seconds)
                    deadline.reschedule(end)
        except TimeoutError:
            return _give_up()
        finally:
            self._uploads.discard(upload)
        return _give_up() if upload.dropped else None

    def _make_room(self, upload: _Upload, now: float) -> bool:
        """Drop uploads that hardly move until another one has room; say whether it has."""
        while self._held > self.most_held:
            slowest = min(self._uploads - {upload}, key=lambda each: each.marked, default=upload)
            if slowest is upload or now - slowest.marked < self.step_seconds:
                return False
            slowest.dropped = True
            slowest.deadline.reschedule(now)
            self._uploads.remove(slowest)
            self._held -= len(slowest.data)
            slowest.data.clear()
        return True

    def _look(self, scope: Scope) -> JSONResponse | None:
        """Return an error response if the route is blocked, or the server is closing."""
        method, path, query = scope["method"], scope["path"], scope["query_string"]
        if len(path) + len(query) > _LONGEST_ADDRESS:
            return _refuse(414, "The address is too long.")
        known = method == "OPTIONS" or (method in _ROUTES and re.fullmatch(_ROUTES[method], path))
        if not known or any(len(name.encode()) > 255 for name in path.split("/")):
            return _refuse(404, "There is nothing at this address.")
        _, is_file, name = path.partition("/gradio_api/file=")
        if is_file and not self._is_from_here(name):
            return _refuse(403, "This server hands out only its page's files.")
        if method != "POST":
            blocks = getattr(scope.get("app"), "blocks", None)
            if blocks and not _has_answer(path, query, blocks._queue):
                return _refuse(404, "There is no answer here: it was fetched, or came too late.")
            return None
        if self.closed:
            # Gradio's page says of 503 that the application is busy.
            return _refuse(503, "The server is restarting: try again in a minute.")
        if path.endswith("/upload") and (
            shutil.disk_usage(self._folder.parent).free < _SPARE_BYTES
        ):
            return _refuse(503, "The server's disk is full: try again in an hour.")
        return None

    def _look_into(self, body: bytearray, scope: Scope) -> JSONResponse | None:
        """Return an error response if JSON is malformed, or fits no event of the page."""
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
            return _refuse(400, f"The photo was not uploaded. {_HOW_TO_SEND_A_FILE}")
        blocks = getattr(scope.get("app"), "blocks", None)
        return _check_call(scope["path"], request, blocks) if blocks else None

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
        if "meta" in value:
            try:
                FileData.model_validate(value)
            except ValidationError:
                return True
            if not self._is_from_here(value["path"]):
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


def _give_up() -> JSONResponse:
    """Answer a peer that stopped sending, and keep nothing open for the rest."""
    sentence = "The request came too slowly: send it again."
    return JSONResponse({"detail": sentence}, 408, headers={"connection": "close"})


def _sane(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop headers on which Gradio fails: of ranges all but single ones may be ignored."""
    return [
        (name, value)
        for name, value in headers
        if name != b"x-gradio-server"
        and (name != b"range" or re.fullmatch(rb"bytes=(\d+-\d*|-\d+)", value))
    ]


def _has_answer(path: str, query: bytes, queue: Queue) -> bool:
    """Say whether there is, or will be, what a path asks for; Gradio breaks off with a trace."""
    sessions, ids = queue.pending_messages_per_session, queue.pending_event_ids_session
    if path == "/gradio_api/queue/data":
        session = QueryParams(query).get("session_hash")
        return session is None or session in sessions
    if path.startswith("/gradio_api/call/"):
        event = path.rpartition("/")[2]
        return event in sessions or any(event in events for events in ids.values())
    return True


def _check_call(path: str, request: Any, blocks: gr.Blocks) -> JSONResponse | None:
    """Return an error response if a call names no function, or brings it the wrong values."""
    _, is_call, name = path.partition("/gradio_api/call/")
    if not is_call and path != "/gradio_api/queue/join":
        return None
    if not isinstance(request, dict) or not isinstance(request.get("data"), list):
        return _refuse(400, f'Send {{"data": [...]}}, a list of values. {_HOW_TO_SEND_A_FILE}')
    session = request.get("session_hash")
    without = is_call and session is None  # it gets one of its own
    if not without and not (isinstance(session, str) and session):
        return _refuse(400, 'The request needs a "session_hash": any text of your own.')
    number = request.get("fn_index")
    function = next(
        (
            each
            for each in blocks.fns.values()
            if each.fn and (each.api_name == name if is_call else each._id == number)
        ),
        None,
    )
    if function is None:
        return _refuse(404, f"There is no function {reprlib.repr(name if is_call else number)}.")
    labels = [getattr(each, "label", None) or "value" for each in function.inputs]
    if len(request["data"]) != len(labels):
        sentence = f'"data" has {len(request["data"])} values and needs {len(labels)}'
        labelled = f" ({', '.join(labels)}). {_HOW_TO_SEND_A_FILE}" if labels else "."
        return _refuse(400, sentence + labelled)
    return None


async def _explain(_: Request, error: Exception) -> JSONResponse:
    """Return what Gradio found wrong with a request, as a sentence."""
    assert isinstance(error, RequestValidationError)
    faults = (
        f"{'.'.join(map(str, fault['loc'][1:])) or 'the body'}: {fault['msg']}"
        for fault in error.errors()
    )
    return _refuse(400, f"The request cannot be read: {'; '.join(faults)}.")


def _clean_root_path(value: str) -> str:
    """Return a root path as ``/captions``, or as a whole address; "" for none.

    Raises:
        ConfigError: it is neither.
    """
    value = value.strip()
    address = urlsplit(value)
    whole = address.scheme in ("http", "https") and bool(address.netloc)
    if any(part in value for part in "?#\\ ") or ("://" in value and not whole):
        raise ConfigError(
            f"the root path is {value!r}: give a path such as /captions, or a whole address"
        )
    if whole:
        return value.rstrip("/")
    parts = [part for part in value.split("/") if part]
    return "".join(f"/{part}" for part in parts)


def launch_options(
    gate: RequestFilter, root_path: str | None = None, *, preview: LinkPreview | None = None
) -> dict[str, Any]:
    """Return what ``Blocks.launch`` gets.

    Args:
        gate: looks at every request.
        root_path: under which a proxy serves the page; None is ``GRADIO_ROOT_PATH``.
        preview: of links to the page.

    Raises:
        ConfigError: the root path is none.
    """
    if root_path is None:
        root_path = os.environ.get("GRADIO_ROOT_PATH", "")

    def health(_: object) -> JSONResponse:
        # The server starts when the model has been loaded and has captioned the examples.
        return JSONResponse(
            {"status": "stopping" if gate.closed else "ready"}, 503 if gate.closed else 200
        )

    routes = [Route("/healthz", health)]
    if preview is not None:
        preview.install()
        picture = Response(preview.picture, media_type="image/png")
        routes.append(Route("/preview.png", lambda _: picture))
    return {
        "root_path": _clean_root_path(root_path),
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
            "routes": routes,
            "exception_handlers": {RequestValidationError: _explain},
            "middleware": [Middleware(lambda app: gate(app))],
        },
    }


@contextlib.contextmanager
def temporary_files() -> Iterator[Path]:
    """Give Gradio a folder of its own, which is gone afterwards with all that visitors sent.

    To be entered before the page is built.
    """
    earlier = os.environ.get("GRADIO_TEMP_DIR")
    try:
        place = Path(earlier or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WriteError(
            f"{first_line(error)}: set TMPDIR to a folder that can be written"
        ) from error
    with reraise_os_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix="captioner-", dir=place, ignore_cleanup_errors=True
        )
    with folder as name, _replaced(os.environ, GRADIO_TEMP_DIR=name):
        yield Path(name)


def serve(
    build: Callable[[], gr.Blocks],
    host: str | None = None,
    port: int | None = None,
    root_path: str | None = None,
    *,
    preview: Callable[[], LinkPreview] | None = None,
) -> None:
    """Serve a page until a signal asks to end; then answer who waits, and leave no file behind.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP ask; a second one does not wait.

    Args:
        build: makes the page.
        host: address to listen on; None is this machine only, or ``GRADIO_SERVER_NAME``.
        port: 0 is any free one; None is the first free one from 7860 on.
        root_path: see ``launch_options``.
        preview: makes that of links to the page.

    Raises:
        CaptionerError: Gradio does not start.
        ConfigError: there is no such address here, the port is taken, or the root path is wrong.
        WriteError: there is no place for temporary files.
    """
    asked: list[int] = []
    heard = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # by nohup
        heard.append(hangup)
    for number in heard:
        signal.signal(number, lambda number, _: asked.append(number))
    sockets = _listen(host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", port)
    sys.setswitchinterval(0.001)  # the model's threads let the server's have a turn sooner
    _claim_zero_gpu()
    with temporary_files() as folder:
        # Gradio makes a folder there, also where another user owns /tmp/gradio.
        gradio.routes.DEFAULT_TEMP_DIR = str(folder)  # type: ignore[attr-defined]
        gate = RequestFilter()
        options = launch_options(gate, root_path, preview=preview and preview())
        demo = build().queue(max_size=MAX_WAITING, api_open=False)
        own = set(folder.rglob("*"))
        print(f"* Running on local URL:  {launch(demo, sockets, options)}", flush=True)  # noqa: T201
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


def _listen(host: str, port: int | None) -> list[socket.socket]:
    """Return a socket that listens for each address of a host, all on the same port.

    Args:
        host: a name or an address; that of IPv6 may stand in brackets.
        port: 0 is any free one; None is the first free one from ``GRADIO_SERVER_PORT`` on.

    Raises:
        ConfigError: it cannot be.
    """
    first = gradio.http_server.INITIAL_PORT_VALUE
    last = first + max(1, gradio.http_server.TRY_NUM_PORTS)
    ports = range(first, last) if port is None else [port]
    host = host.removeprefix("[").removesuffix("]")
    for each in ports:
        try:
            if not 0 <= each <= 65535:
                raise ValueError("a port is a number from 0 to 65535")
            return _listen_on(host, each)
        except (OSError, ValueError) as error:  # ValueError: no name that a host could have
            if each != ports[-1] and getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            number = getattr(error, "errno", None) or 0
            # Those of names are below 0. ``create_server`` adds the address to the others' text.
            reason = os.strerror(number) if number > 0 else getattr(error, "strerror", "") or error
            raise ConfigError(
                f"cannot listen on {host}, port {each} ({reason}): choose another --host or --port"
            ) from error
    raise AssertionError  # the last port returns or raises


def _listen_on(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in dict.fromkeys((each[0], each[4]) for each in found):
        try:
            sockets.append(
                socket.create_server(
                    (address[0], port, *address[2:]),
                    family=family,
                    dualstack_ipv6=address[0] == "::" and socket.has_dualstack_ipv6(),
                )
            )
            port = sockets[0].getsockname()[1]
        except OSError as error:
            failure = error
            # "localhost" may be ::1, too, where the system has no IPv6.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for each in sockets:
                    each.close()
                raise
    if not sockets:
        raise failure or OSError("it has no address")
    return sockets


def _own_address(listener: socket.socket) -> str:
    """Return the address of a server for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _Server(gradio.http_server.Server):
    """A server on sockets that listen already; drops connections on which nothing moves.

    uvicorn itself has a deadline only for a connection that is idle between two requests.

    Attributes:
        stalled_seconds: for the head of a request, and without progress of a response that the
            peer does not read.
        most_connections: that are open at once.
    """

    stalled_seconds = _STALLED_SECONDS
    most_connections = _MOST_CONNECTIONS

    def __init__(self, config: uvicorn.Config, sockets: Sequence[socket.socket]) -> None:
        """Serve on ``sockets``."""
        super().__init__(config)
        self._sockets = list(sockets)
        self._waiting: dict[Any, tuple[object, float]] = {}  # connection -> its state, since when

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until ``close``."""
        super().run(sockets or self._sockets)

    async def on_tick(self, counter: int) -> bool:
        """Do what is due ten times a second; say whether to end."""
        self._drop_stalled(time.monotonic())
        return await super().on_tick(counter)

    def _drop_stalled(self, now: float) -> None:
        """Drop connections that wait for their peer too long, or that are too many."""
        connections: set[Any] = {*self.server_state.connections}
        waiting: dict[Any, tuple[object, float]] = {}
        pages = set()
        for connection in connections:
            cycle = connection.cycle
            unsent = connection.transport.get_write_buffer_size()
            state: object = (cycle, unsent)
            pending = cycle is not None and not cycle.response_complete
            if pending and not unsent and "/gradio_api/heartbeat/" not in cycle.scope["path"]:
                continue  # the app is at work, or reads the body, for which it has its deadline
            before, since = self._waiting.get(connection, (None, now))
            waiting[connection] = (state, since if before == state else now)
            if pending and not unsent:
                pages.add(connection)
        self._waiting = waiting
        order = sorted(waiting, key=lambda each: (each in pages, waiting[each][1]))
        surplus = len(connections) - self.most_connections
        for number, connection in enumerate(order):
            late = connection not in pages and now - waiting[connection][1] > self.stalled_seconds
            if late or number < surplus:
                connection.transport.abort()


def launch(demo: gr.Blocks, sockets: Sequence[socket.socket], options: dict[str, Any]) -> str:
    """Serve a page in a thread; return its address for a browser on this machine.

    Args:
        demo: the page.
        sockets: listen already.
        options: from ``launch_options``.

    Raises:
        CaptionerError: Gradio does not start.
    """
    address = _own_address(sockets[0])

    def start(app: ASGIApp, **_: object) -> tuple[str, int, str, _Server]:
        # Gradio's own takes one address of IPv4, and cannot ask itself on all that it listens on.
        config = uvicorn.Config(app, log_level="warning", http="h11", ws="none")
        server = _Server(config, sockets)
        server.run_in_thread()  # type: ignore[no-untyped-call]
        host, port = sockets[0].getsockname()[:2]
        return host, port, address, server

    try:
        # Gradio asks itself over HTTP whether it runs, which is no matter of a proxy.
        with without_proxies(), _replaced(vars(gradio.http_server), start_server=start):
            demo.launch(prevent_thread_lock=True, quiet=True, **options)
    except Exception as error:
        raise CaptionerError(f"the page does not start: {first_line(error)}") from error
    return address


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
