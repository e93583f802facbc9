"""``app.py`` in a process of its own, and visitors who send it photos over HTTP."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
UPLOAD, CALL = "/gradio_api/upload", "/gradio_api/call/caption"

# Python runs this at its start; it records every address looked up or connected to.
_NOTE_CONNECTIONS = """
import sys
def note(event, values):
    if event in ("socket.connect", "socket.getaddrinfo"):
        place = values[1] if event == "socket.connect" else values[:2]
        with open({path!r}, "a") as file:
            print(event, place, file=file)
sys.addaudithook(note)
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """A running page.

    Attributes:
        address: without a trailing slash.
        process: ends with the context that started it.
        folder: of its temporary files.
        ready: seconds from its start to its first response.
    """

    address: str
    process: subprocess.Popen[str]
    folder: Path
    ready: float

    @property
    def connections(self) -> str:
        """Its connections and look-ups, one per line."""
        return (self.folder.parent / "connections").read_text()

    @property
    def log(self) -> str:
        """Its output."""
        return (self.folder.parent / "log").read_text()

    def anonymous(self) -> int:
        """Return its ``RssAnon``, in kB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1])


@contextlib.contextmanager
def running_page(
    home: Path,
    *command: str,
    root: Path = ROOT,
    python: str = sys.executable,
    host: str = "127.0.0.1",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Page]:
    """Start ``python app.py`` (or ``python *command``) in ``root``, with its files in ``home``.

    ``settings`` are added to the environment; the page is expected to listen on ``host``.
    """
    folder, noting = home / "temporary", home / "noting"
    for each in (folder, noting):
        each.mkdir(parents=True)
    (home / "connections").touch()
    (noting / "sitecustomize.py").write_text(
        _NOTE_CONNECTIONS.format(path=str(home / "connections"))
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as free:
        port = free.getsockname()[1]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(noting)}
    environment.pop("GRADIO_TEMP_DIR", None)
    environment |= settings or {}
    started = time.monotonic()
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [python, *(command or ("app.py",)), "--port", str(port)],
            cwd=root,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            # Under nohup the signal would be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
    try:
        while True:
            assert process.poll() is None, (home / "log").read_text()
            # It listens only once the model is loaded.
            with contextlib.suppress(httpx.TransportError):
                health = httpx.get(f"{address}/healthz")
                assert (health.status_code, health.json()) == (200, {"status": "ready"})
                break
            time.sleep(0.05)
        yield Page(address, process, folder, time.monotonic() - started)
    finally:
        process.kill()
        process.wait()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in another thread, as playwright's loop may run in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


async def ask(client: httpx.AsyncClient, photo: bytes) -> tuple[int, str]:
    """Upload a photo and request its caption; return the status and the event's id or the error."""
    upload = await client.post(UPLOAD, files={"files": ("photo.jpg", photo)})
    if upload.status_code != 200:
        return upload.status_code, upload.text
    file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
    call = await client.post(CALL, json={"data": [file, {}]})
    return call.status_code, call.json().get("event_id", call.text)


async def answer(client: httpx.AsyncClient, event: str) -> str:
    """Wait for the caption, as JSON."""
    text = (await client.get(f"{CALL}/{event}")).text
    assert text.startswith("event: complete"), text[-300:]
    return text.partition("data: ")[2].strip()


@dataclasses.dataclass
class Visits:
    """Results of simultaneous visits.

    Attributes:
        seconds: per caption, from the upload on.
        busy: number of refusals because the queue was full.
        mixed_up: captions of another visitor's photo.
        health: seconds per response of ``/healthz`` meanwhile.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    busy: int = 0
    mixed_up: list[str] = dataclasses.field(default_factory=list)
    health: list[float] = dataclasses.field(default_factory=list)


async def _visit(address: str, photo: bytes, expected: str, until: float, seen: Visits) -> None:
    """Request captions of one photo repeatedly."""
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        while time.monotonic() < until:
            started = time.monotonic()
            status, event = await ask(client, photo)
            if status == 503:
                assert "Queue is full" in event
                seen.busy += 1
                await asyncio.sleep(1)
                continue
            assert status == 200, event
            caption = await answer(client, event)
            seen.seconds.append(time.monotonic() - started)
            if caption != expected:
                seen.mixed_up.append(caption)


# In a process of its own, so that the visitors' busy loop is not measured.
_WATCH_HEALTH = """
import sys, time
from urllib.request import urlopen
while True:
    started = time.monotonic()
    assert urlopen(sys.argv[1] + "/healthz").read() == b'{"status":"ready"}'
    print(time.monotonic() - started, flush=True)
    time.sleep(0.1)
"""


def visits(
    address: str, photos: Sequence[bytes], expected: Sequence[str], seconds: float
) -> Visits:
    """Let one visitor per photo request captions at the same time, and check their answers."""
    seen = Visits()

    async def all_of_them() -> None:
        until = time.monotonic() + seconds
        visitors = [
            _visit(address, photo, caption, until, seen)
            for photo, caption in zip(photos, expected, strict=True)
        ]
        await asyncio.gather(*visitors)

    watch = subprocess.Popen(
        [sys.executable, "-c", _WATCH_HEALTH, address], stdout=subprocess.PIPE, text=True
    )
    try:
        run(all_of_them())
        assert watch.poll() is None
    finally:
        watch.terminate()
        lines, _ = watch.communicate()
    seen.health = [float(line) for line in lines.splitlines()]
    return seen


def captions(address: str, photos: Sequence[bytes]) -> list[str]:
    """Return the captions of photos that are sent one after another, as JSON."""

    async def one_by_one() -> list[str]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            written = []
            for photo in photos:
                status, event = await ask(client, photo)
                assert status == 200, event
                written.append(await answer(client, event))
            return written

    return run(one_by_one())
