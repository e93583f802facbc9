"""Serves the page: launch, health checks and shutdown. Knows nothing of photos and captions."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import gradio.http_server
import gradio.routes
import uvicorn
from fastapi.exceptions import RequestValidationError
from gradio.queueing import Queue
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from captioner.errors import CaptionerError, ConfigError, WriteError, first_line
from captioner.files import reraise_os_errors
from captioner.web.gradio_setup import overridden, without_proxies
from captioner.web.link_preview import LinkPreview
from captioner.web.middleware import STALL_SECONDS, RequestFilter, explain_validation_error

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

MAX_QUEUE = 20  # pending requests; later visitors are asked to retry
# For ``gr.Blocks(delete_cache=…)``: once a minute it deletes visitors' files older than an hour.
CLEANUP_SECONDS, FILE_SECONDS = 60, 3600
_MAX_FILE = "10mb"
_MAX_CONNECTIONS = 500
_DRAIN_SECONDS = 20  # with the rest under the 30 seconds that Kubernetes allows
_POLL_SECONDS = 0.05  # shutdown polling interval
_IDLE_SECONDS = 1  # idle time before the server counts as drained


def launch_options(
    requests: RequestFilter, root_path: str | None = None, *, preview: LinkPreview | None = None
) -> dict[str, Any]:
    """Return the arguments of ``Blocks.launch``.

    Args:
        requests: checks every request.
        root_path: under which a proxy serves the page; None is ``GRADIO_ROOT_PATH``.
        preview: of links to the page.

    Raises:
        ConfigError: the root path is invalid.
    """
    if root_path is None:
        root_path = os.environ.get("GRADIO_ROOT_PATH", "")

    def health(_: object) -> JSONResponse:
        # The server starts once the model has been loaded and has captioned the examples.
        if requests.closed:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

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
        "max_file_size": _MAX_FILE,
        # By default Gradio stores visitors' runs in their browser and serves a monitoring page.
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        # A session holds its last answer, and every request over HTTP has a session of its own.
        # Gradio would keep 10,000 of them, and nothing here needs any.
        "state_session_capacity": 64,
        "app_kwargs": {
            "routes": routes,
            "exception_handlers": {RequestValidationError: explain_validation_error},
            "middleware": [Middleware(lambda app: requests(app))],
        },
    }


def _clean_root_path(value: str) -> str:
    """Return a root path as ``/captions``, as a whole address, or "" if empty.

    Raises:
        ConfigError: it is neither.
    """
    value = value.strip()
    address = urlsplit(value)
    is_address = address.scheme in ("http", "https") and bool(address.netloc)
    if any(part in value for part in "?#\\ ") or ("://" in value and not is_address):
        raise ConfigError(
            f"the root path is {value!r}: give a path such as /captions, or a whole address"
        )
    if is_address:
        return value.rstrip("/")
    return "".join(f"/{part}" for part in value.split("/") if part)


@contextlib.contextmanager
def temporary_files() -> Iterator[Path]:
    """Give Gradio a folder of its own, deleted with all that visitors sent when the context ends.

    Has to be entered before the page is built.

    Raises:
        WriteError: the folder cannot be created.
    """
    try:
        parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WriteError(
            f"{first_line(error)}: set TMPDIR to a folder that can be written"
        ) from error
    with reraise_os_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix="captioner-", dir=parent, ignore_cleanup_errors=True
        )
    with folder as name, overridden(os.environ, GRADIO_TEMP_DIR=name):
        yield Path(name)


def serve(
    build: Callable[[], gr.Blocks],
    host: str | None = None,
    port: int | None = None,
    root_path: str | None = None,
    *,
    preview: Callable[[], LinkPreview] | None = None,
) -> None:
    """Serve a page until a signal; then finish pending requests and delete temporary files.

    The signals are SIGTERM, SIGINT (Ctrl-C) and SIGHUP; a second one exits immediately.

    Args:
        build: makes the page.
        host: address to listen on; None is this machine only, or ``GRADIO_SERVER_NAME``.
        port: 0 is any free one; None is the first free one from 7860 on.
        root_path: see ``launch_options``.
        preview: makes the preview of links to the page.

    Raises:
        CaptionerError: Gradio does not start.
        ConfigError: the address cannot be used, the port is taken, or the root path is invalid.
        WriteError: no folder for temporary files can be created.
    """
    received: list[int] = []
    handled_signals = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # by nohup
        handled_signals.append(hangup)
    for number in handled_signals:
        signal.signal(number, lambda number, _: received.append(number))
    sockets = _listen(host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", port)
    sys.setswitchinterval(0.001)  # the model's threads let the server's have a turn sooner
    _claim_zero_gpu()
    with temporary_files() as folder:
        # Gradio creates this one too, which fails where /tmp/gradio is another user's.
        gradio.routes.DEFAULT_TEMP_DIR = str(folder)  # type: ignore[attr-defined]
        requests = RequestFilter()
        options = launch_options(requests, root_path, preview=preview and preview())
        demo = build().queue(max_size=MAX_QUEUE, api_open=False)
        print(f"* Running on local URL:  {launch(demo, sockets, options)}", flush=True)  # noqa: T201
        _clean_up_until(received, demo, folder)
        for number in handled_signals:
            signal.signal(number, signal.default_int_handler)
        try:
            drained = _drain(requests)
        except KeyboardInterrupt:
            drained = False
        demo.server.max_connections = 0  # ends open pages, which wait for nothing
        demo.close(verbose=False)
    if not drained:
        sys.stdout.flush()
        os._exit(0)  # Python's own exit would abort the model's running threads


def _clean_up_until(received: list[int], demo: gr.Blocks, folder: Path) -> None:
    """Remove stale data every minute until a signal was received."""
    loop = demo.server.servers[0].get_loop()
    unread: set[str] = set()
    last = time.monotonic()
    while not received:
        # Short sleeps: a signal may go to another thread, which does not wake this one.
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - last >= CLEANUP_SECONDS:
            _delete_stray_files(folder)
            loop.call_soon_threadsafe(drop_stale_results, demo._queue, unread)
            last = time.monotonic()


def _delete_stray_files(folder: Path) -> None:
    """Delete old files that ``delete_cache`` does not know, and empty folders.

    Gradio knows only files that were uploaded under the form field "files", and moves them into
    folders. Those of any other field stay directly in ``folder``.
    """
    for path in folder.glob("*"):  # nothing if somebody deleted it
        with contextlib.suppress(OSError):  # a folder that is not empty
            if path.lstat().st_ctime < time.time() - FILE_SECONDS:
                path.rmdir() if path.is_dir() else path.unlink()


def drop_stale_results(queue: Queue, unread: set[str]) -> None:
    """Drop answers that were fetched, or that nobody fetched since the last call.

    Also the progress of uploads. Gradio would keep all of it. Has to run in the server's loop, so
    that nothing changes meanwhile.

    Args:
        queue: Gradio's.
        unread: sessions with an unfetched answer at the last call; is updated.
    """
    messages, events = queue.pending_messages_per_session, queue.pending_event_ids_session
    still_unread = set()
    for session in {*messages, *events}:
        ids = events.get(session, ())
        if any(event in queue.event_ids_to_events for event in ids):
            continue  # pending, or in the model
        has_answer = session in messages and messages[session].qsize() > 0
        if has_answer and ids and session not in unread:
            still_unread.add(session)
        elif has_answer or not ids or session not in messages:
            messages.pop(session, None)
            events.pop(session, None)
        # Else the answer is being sent.
    unread.clear()
    unread.update(still_unread)
    uploads = gradio.routes.file_upload_statuses
    uploads._signals.clear()
    uploads._statuses.clear()


def _drain(requests: RequestFilter) -> bool:
    """Refuse new work and wait for pending requests; return False after 20 seconds."""
    requests.closed = True
    end = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < end:
        if requests.idle_seconds() > _IDLE_SECONDS:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _listen(host: str, port: int | None) -> list[socket.socket]:
    """Return a listening socket for each address of a host, all on the same port.

    Args:
        host: a name or an address; an IPv6 address may be in brackets.
        port: 0 is any free one; None is the first free one from ``GRADIO_SERVER_PORT`` on.

    Raises:
        ConfigError: the address cannot be used.
    """
    first = gradio.http_server.INITIAL_PORT_VALUE
    last = first + max(1, gradio.http_server.TRY_NUM_PORTS)
    host = host.removeprefix("[").removesuffix("]")
    for candidate in range(first, last) if port is None else [port]:
        try:
            if not 0 <= candidate <= 65535:
                raise ValueError("a port is a number from 0 to 65535")
            return _listen_on(host, candidate)
        except (OSError, ValueError) as error:  # ValueError: not a possible host name
            number = getattr(error, "errno", None) or 0
            if port is None and candidate < last - 1 and number == errno.EADDRINUSE:
                continue
            # Errors of names are below 0. ``create_server`` adds the address to the other texts.
            reason = os.strerror(number) if number > 0 else getattr(error, "strerror", "") or error
            raise ConfigError(
                f"cannot listen on {host}, port {candidate} ({reason}): choose another --host or "
                "--port"
            ) from error
    raise AssertionError  # the last port returns or raises


def _listen_on(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    failure = OSError("it has no address")
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            try:
                listener = socket.create_server(
                    (address[0], port, *address[2:]),
                    family=family,
                    dualstack_ipv6=address[0] == "::" and socket.has_dualstack_ipv6(),
                )
            except OSError as error:
                # "localhost" may include ::1 where the system has no IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                failure = error
            else:
                sockets.append(stack.enter_context(listener))
                port = listener.getsockname()[1]
        if not sockets:
            raise failure
        stack.pop_all()
        return sockets


def _own_address(listener: socket.socket) -> str:
    """Return the address of a server for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _Server(gradio.http_server.Server):
    """Serves on sockets that listen already; drops stalled connections.

    uvicorn limits only the time between two requests (``timeout_keep_alive``). Its
    ``limit_concurrency`` refuses new connections, so that 500 silent ones would lock visitors out.

    Attributes:
        stall_seconds: for the head of a request, and without progress of a response that the
            client does not read.
        max_connections: open at once; idle ones make room for new ones, then the oldest pages.
    """

    stall_seconds = STALL_SECONDS
    max_connections = _MAX_CONNECTIONS

    def __init__(self, config: uvicorn.Config, sockets: Sequence[socket.socket]) -> None:
        """Serve on ``sockets``."""
        super().__init__(config)
        self._sockets = list(sockets)
        self._idle: dict[Any, tuple[object, float]] = {}  # connection -> its state, since when

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until ``close``."""
        super().run(sockets or self._sockets)

    async def on_tick(self, counter: int) -> bool:
        """Drop stalled connections; called ten times a second."""
        self._drop_stalled(time.monotonic())
        return await super().on_tick(counter)

    def _drop_stalled(self, now: float) -> None:
        """Drop connections that wait too long for their client, and those over the limit."""
        connections: set[Any] = {*self.server_state.connections}
        idle: dict[Any, tuple[object, float]] = {}
        pages = set()
        for connection in connections:
            cycle = connection.cycle
            unsent = connection.transport.get_write_buffer_size()
            state: object = (cycle, unsent)
            pending = cycle is not None and not cycle.response_complete
            if pending and not unsent:
                if "/gradio_api/heartbeat/" not in cycle.scope["path"]:
                    continue  # the app is working, or reads the body, which has its own deadline
                pages.add(connection)
            before, since = self._idle.get(connection, (None, now))
            idle[connection] = (state, since if before == state else now)
        self._idle = idle
        oldest_first = sorted(idle, key=lambda each: (each in pages, idle[each][1]))
        surplus = len(connections) - self.max_connections
        for index, connection in enumerate(oldest_first):
            stalled = connection not in pages and now - idle[connection][1] > self.stall_seconds
            if stalled or index < surplus:
                connection.transport.abort()


def launch(demo: gr.Blocks, sockets: Sequence[socket.socket], options: dict[str, Any]) -> str:
    """Serve a page in a thread; return its address for a browser on this machine.

    Args:
        demo: the page.
        sockets: listening sockets.
        options: from ``launch_options``.

    Raises:
        CaptionerError: Gradio does not start.
    """
    address = _own_address(sockets[0])

    def start(app: ASGIApp, **_: object) -> tuple[str, int, str, _Server]:
        # Gradio's own function takes one IPv4 address, and connects to it to see whether it runs.
        config = uvicorn.Config(app, log_level="warning", http="h11", ws="none")
        server = _Server(config, sockets)
        server.run_in_thread()  # type: ignore[no-untyped-call]
        host, port = sockets[0].getsockname()[:2]
        return host, port, address, server

    try:
        # Gradio requests its own page over HTTP to see whether it runs.
        with without_proxies(), overridden(vars(gradio.http_server), start_server=start):
            demo.launch(prevent_thread_lock=True, quiet=True, **options)
    except Exception as error:
        raise CaptionerError(f"the page does not start: {first_line(error)}") from error
    return address


def _claim_zero_gpu() -> None:
    """Let a Space on ZeroGPU start, which fails unless some function claims its GPU.

    The function is never called: two cores caption a photo sooner than a GPU is assigned, and
    the visitor's GPU quota is not spent.
    """
    try:
        import spaces
    except ImportError:
        return
    spaces.GPU(_claim_zero_gpu)
