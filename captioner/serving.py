"""How the page is served: what ``launch`` gets, what is refused, and how it ends.

Knows nothing of photos and captions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The default theme's soft text is 1.91 to 1 on white; these reach 4.5 to 1 in light and dark.
_THEME = gr.themes.Default().set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)

# Wide: photo and tools beside the viewer. Narrow: photo, viewer, tools; the examples as a strip.
_STYLE = """
#page { display: grid; gap: var(--layout-gap); }
#page { grid-template: "bring look" auto "tools look" 1fr / 2fr 5fr; }
#bring { grid-area: bring } #look { grid-area: look } #tools { grid-area: tools }
#page > * { min-width: 0 !important }
/* An answer mostly comes before the fading has begun. */
#look .pending { transition: opacity 0.2s 0.4s; }
@media (max-width: 760px) {
    #page { grid-template: "bring" auto "look" auto "tools" auto / 100%; }
    #examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
    #examples .gallery-item { flex: none; }
}
"""

# Seconds between two looks at the visitors' files, and how old one gets before it is deleted.
DELETE_CACHE = (60, 3600)
MAX_WAITING = 20  # visitors; the next one is told to try again
_LARGEST_FILE = "10mb"
_LARGEST_BODY = 16_000_000  # bytes of JSON: a photo of 10 MB in base64, and a caption
_SPARE_BYTES = 200_000_000  # of the disk that uploads may not fill
_DRAIN_SECONDS = 20  # a container is killed 30 seconds after it was asked to stop
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

            # A heartbeat is open as long as the page is, and asks for nothing.
            counts = "/heartbeat/" not in scope["path"] and scope["path"] != "/healthz"
            self._inside += counts
            try:
                refusal, receive = await self._look(scope, receive)
                await (refusal or app)(scope, receive, send_with_headers)
            finally:
                if counts:
                    self._inside -= 1
                    self._last = time.monotonic()

        return guarded

    async def _look(self, scope: Scope, receive: Receive) -> tuple[JSONResponse | None, Receive]:
        """Return a refusal, or None; and the request, which was read if it is JSON."""
        path = scope["path"]
        target = path.partition("/gradio_api/")[2]
        if target.startswith("proxy=") or (
            target.startswith("file=") and is_http_url_like(target.removeprefix("file="))
        ):
            return _refuse(403, "This server fetches nothing from elsewhere."), receive
        if scope["method"] != "POST":
            return None, receive
        if self.closed:
            # Gradio's page says of 503 that the application is busy.
            return _refuse(503, "The server is restarting: try again in a minute."), receive
        if target.startswith("upload"):  # its size is Gradio's to look at
            if shutil.disk_usage(self._folder.parent).free < _SPARE_BYTES:
                return _refuse(503, "The server's disk is full: try again in an hour."), receive
            return None, receive
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > _LARGEST_BODY:
                return _refuse(413, "The request is too large: send the photo as a file."), receive
            if not message.get("more_body"):
                break
        try:
            asked = json.loads(body) if body else None
            foreign = self._names_foreign_file(asked)
        except (ValueError, RecursionError):
            return _refuse(400, "The request is no JSON that can be read."), receive
        if foreign:
            sentence = "The photo was not uploaded: send the file first, not its address or place."
            return _refuse(400, sentence), receive
        unread = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            message = next(unread, None)
            return await receive() if message is None else message

        return None, replay

    def _names_foreign_file(self, value: Any) -> bool:
        """Say whether a request holds a file that no visitor sent: Gradio would fetch an URL."""
        if isinstance(value, list):
            return any(map(self._names_foreign_file, value))
        if not isinstance(value, dict):
            return False
        path = value.get("path")
        if "meta" in value and isinstance(path, str):
            try:
                return not Path(path).resolve().is_relative_to(self._folder)
            except (OSError, ValueError):  # no name that a file could have
                return True
        return any(map(self._names_foreign_file, value.values()))

    def drain(self) -> None:
        """Close, and return when nobody has waited for a second, or after twenty."""
        self.closed = True
        end = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < end:
            if not self._inside and time.monotonic() - self._last > _QUIET_SECONDS:
                return
            time.sleep(0.05)


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
    with tempfile.TemporaryDirectory(
        prefix="captioner-", dir=earlier, ignore_cleanup_errors=True
    ) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if earlier is not None:
                os.environ["GRADIO_TEMP_DIR"] = earlier


def serve(build: Callable[[], gr.Blocks], host: str | None = None, port: int | None = None) -> None:
    """Serve a page until SIGTERM or Ctrl-C; then answer who waits, and leave no file behind.

    Args:
        build: makes the page.
        host: address to listen on; None is this machine only, or ``GRADIO_SERVER_NAME``.
        port: None is the first free one from 7860 on.

    Raises:
        OSError: no port is free.
    """
    asked = threading.Event()
    sys.setswitchinterval(0.001)  # the model's threads let the server's have a turn sooner
    _claim_zero_gpu()
    with temporary_files():
        gate = Gate()
        demo = build().queue(max_size=MAX_WAITING)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.set())
        demo.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, **launch_options(gate)
        )
        asked.wait()
        # A second signal ends it at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        gate.drain()
        demo.close(verbose=False)


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
