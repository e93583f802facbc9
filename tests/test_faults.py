"""Kills and full disks at every moment that matters: the next start comes to the same result.

The real command lines run in processes of their own (see ``injector``).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest

from captioner.model import checkpoint as checkpoints
from tests.injector import Fault, fill, run
from tests.training.runs import assert_same_run

ROOT = Path(__file__).resolve().parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended, and before which change the fault struck it."""

    code: int
    out: str
    error: str
    struck: str


class Started:
    """A command that runs."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self._process, self._log = process, log
        process.start()

    def read_until(self, name: str, text: str) -> None:
        """Wait until ``text`` is in one of the process's files."""
        deadline = time.monotonic() + 120
        while not (path := self._log / name).exists() or text not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def send(self, signum: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def end(self) -> Ended:
        self._process.join(180)
        assert self._process.exitcode is not None, "it hangs"
        out, error, struck = (
            path.read_text() if (path := self._log / name).exists() else ""
            for name in ("out", "err", "struck")
        )
        return Ended(self._process.exitcode, out, error, struck)


Start = Callable[..., Started]
Kind = Literal["fill", "kill"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start(program, arguments, fault, settings)``: run it in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # so that two runs come to the same bits
        patch.setenv("PYTHONPATH", str(ROOT))
        _CONTEXT.set_forkserver_preload(["tests.injector"])
        multiprocessing.forkserver.ensure_running()

    begun: list[BaseProcess] = []

    def begin(
        program: str,
        arguments: list[str],
        fault: Fault | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Started:
        log = tmp_path_factory.mktemp("log")
        options = (program, arguments, log, fault, settings or {})
        begun.append(_CONTEXT.Process(target=run, args=options))
        return Started(begun[-1], log)

    yield begin
    for process in begun:
        process.kill()  # one that a test which failed left, perhaps held


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _told(ended: Ended, program: str) -> str:
    """Return the one line that says what went wrong, the last one of standard error."""
    lines = [line for line in ended.error.replace("\r", "\n").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(f"{program}: ")]
    assert told == lines[-1:], ended.error
    assert "Traceback" not in ended.error
    return told[0]


def _full(ended: Ended, program: str, disk: Path) -> None:
    """Check that a command said which disk is full, and make room there."""
    assert ended.code == 1, (ended.struck, ended.error)
    told = _told(ended, program)
    assert str(disk) in told
    assert "No space left on device" in told or "GB are free" in told
    (disk / "filler").unlink()


def _strike(
    start: Start,
    program: str,
    arguments: list[str],
    fault: Fault,
    *,
    progress: Callable[[], int] = lambda: 0,
    anew: str = "",
    settings: dict[str, Any] | None = None,
) -> list[str]:
    """Strike a command before its first change, start it again, strike before the second one, …

    Where there is progress it counts anew, from the first change on that names ``anew``: what
    every start does was struck by then. Return before which changes it was struck.
    """
    struck: list[str] = []
    reached, at = 0, 1
    while True:
        ended = start(program, arguments, dataclasses.replace(fault, at=at), settings).end()
        if ended.code == 0:
            return struck
        if fault.kind == "kill":
            assert ended.code == -signal.SIGKILL, ended.error
        else:
            _full(ended, program, fault.folder)
        struck.append(ended.struck)
        assert len(struck) < 100, struck
        at += 1
        if progress() != reached:
            reached = progress()
            at = 1 + next(number for number, change in enumerate(struck) if anew in change)


# Training


@pytest.fixture(scope="module")
def command(
    parquet_folder: Path, timm_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """``command(out, cache)``: a run of two epochs, the second one better, in a second."""
    cache = tmp_path_factory.mktemp("features")

    def make(out: Path, cache: Path = cache) -> list[str]:
        return f"""--data {parquet_folder} --encoder timm:test_resnet --recipe seed --epochs 2
            --encoder-weights {timm_weights} --out {out} --cache {cache} --batch-size 8
            --min-count 2 --device cpu --set learning_rate=0.02 --set model.hidden_size=32
            --set model.embedding_size=16 --set model.attention_size=16 --resume""".split()

    return make


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, start: Start, command: Callable[..., list[str]]
) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = start("train.py", command(out)).end()
    assert ended.code == 0, ended.error
    assert ended.out.count("best so far") == 2
    return out


def _epochs(out: Path) -> int:
    """Return how many epochs are saved, in the old state too, which the next start brings back."""
    paths = [out / name / "state.json" for name in ("state", ".state.old")]
    return max(
        (json.loads(path.read_text())["epoch"] for path in paths if path.exists()), default=0
    )


@pytest.mark.parametrize("kind", ["kill", "fill"])
def test_a_training_that_is_struck_before_each_change_comes_to_the_same_bits(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    start: Start,
    command: Callable[..., list[str]],
    whole: Path,
    kind: Kind,
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    out = folder / "run"

    def look() -> int:
        if (out / "checkpoint").exists():
            checkpoints.load(out / "checkpoint")
        return _epochs(out)

    struck = _strike(
        start, "train.py", command(out), Fault(kind, folder), progress=look, anew="checkpoint"
    )
    for name in ("model.safetensors", "config.json", "state.safetensors", "state.json"):
        assert sum(name in place for place in struck) >= 2, struck  # in both epochs
    for name in ("tensorboard", "metrics.csv", "curves.png", "run.json"):
        assert any(name in place for place in struck), struck
    assert_same_run(out, whole)


# Features


def _cache(folder: Path) -> dict[str, bytes]:
    """Return the files of a cache."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.fixture(scope="module")
def whole_cache(whole: Path, command: Callable[..., list[str]]) -> Path:
    arguments = command(whole)
    return Path(arguments[arguments.index("--cache") + 1])


@pytest.mark.parametrize("kind", ["kill", "fill"])
def test_features_that_are_struck_before_each_change_come_to_the_same_bytes(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    start: Start,
    command: Callable[..., list[str]],
    whole: Path,
    whole_cache: Path,
    kind: Kind,
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    cache, out = folder / "cache", tmp_path / "run"
    struck = _strike(start, "train.py", command(out, cache), Fault(kind, cache))
    assert any("features.npy" in place for place in struck)
    assert any("done.npy" in place for place in struck)
    assert _cache(cache) == _cache(whole_cache)
    assert_same_run(out, whole)


def test_features_for_which_no_room_was_taken_end_in_a_message_too(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    whole: Path,
    whole_cache: Path,
) -> None:
    # A cache that was copied without its holes, or begun by a version that left them.
    cache, out = small_disk / "cache", tmp_path / "run"
    shutil.copytree(whole_cache, cache)
    (array,) = cache.rglob("features.npy")
    size = array.stat().st_size
    os.truncate(array, 128)
    os.truncate(array, size)
    done = np.load(array.with_name("done.npy"), mmap_mode="r+")
    done[:] = 0
    fill(small_disk)
    _full(start("train.py", command(out, cache)).end(), "train.py", small_disk)
    assert start("train.py", command(out, cache)).end().code == 0
    assert _cache(cache) == _cache(whole_cache)
    assert_same_run(out, whole)


# Captions


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory, draw: Callable[..., bytes]) -> Path:
    folder = tmp_path_factory.mktemp("album")
    for number in range(4):
        (folder / f"{number}.png").write_bytes(draw(number))
    return folder


def _rows(output: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(output).to_pylist()
    for row in rows:
        row["log_probability"] = pytest.approx(row["log_probability"], abs=1e-3)
    return sorted(rows, key=lambda row: row["photo"])


@pytest.mark.parametrize("kind", ["kill", "fill"])
def test_captions_that_are_struck_before_each_change_come_to_the_same_rows(
    tmp_path: Path, request: pytest.FixtureRequest, start: Start, album: Path, kind: Kind
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    settings = {"captioner.inference.bulk._BATCH": 2, "captioner.inference.bulk._PART": 2}
    output, whole = folder / "captions", tmp_path / "whole"

    def arguments(output: Path) -> list[str]:
        return ["caption", str(album), "--output", str(output)]

    def files() -> int:
        assert kind == "kill" or not list(output.glob(".*.part"))
        return len(list(output.glob("*.parquet")))

    struck = _strike(
        start,
        "captioner",
        arguments(output),
        Fault(kind, folder),
        progress=files,
        anew=".part",
        settings=settings,
    )
    assert any("os.rename" in change for change in struck) or kind == "fill"
    assert start("captioner", arguments(whole), settings=settings).end().code == 0
    assert len(_rows(output)) == 4
    assert _rows(output) == _rows(whole)
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("what", ["--heatmaps", "--json", "--sheet"])
def test_what_does_not_fit_on_the_disk_is_named_and_written_the_next_time(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    parquet_folder: Path,
    timm_weights: Path,
    album: Path,
    whole: Path,
    what: str,
) -> None:
    def arguments(folder: Path) -> list[str]:
        if what == "--heatmaps":
            return ["caption", str(album / "0.png"), str(album / "1.png"), what, str(folder)]
        return f"""evaluate --data {parquet_folder} --encoder-weights {timm_weights} {what}
            {folder}/file --checkpoint {whole}/checkpoint --cache {tmp_path}/cache""".split()

    full, roomy = small_disk / "full", tmp_path / "roomy"
    assert start("captioner", arguments(roomy)).end().code == 0
    struck = _strike(start, "captioner", arguments(full), Fault("fill", small_disk))
    assert len(struck) == (2 if what == "--heatmaps" else 1)
    for path in roomy.iterdir():
        assert (full / path.name).read_bytes() == path.read_bytes()


# Two at once


@pytest.mark.parametrize("signum", [signal.SIGCONT, signal.SIGKILL])
def test_a_second_run_waits_for_the_features_of_the_first_whether_it_ends_or_is_killed(
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    whole: Path,
    whole_cache: Path,
    signum: signal.Signals,
) -> None:
    outs, cache = [tmp_path / name for name in ("one", "other")], tmp_path / "cache"
    first = start("train.py", command(outs[0], cache), Fault("stop", cache, 6))
    first.read_until("struck", "features.npy")  # begun, and about to be filled in
    second = start("train.py", command(outs[1], cache))
    second.read_until("err", "waiting for another process that makes")
    first.send(signum)
    ended = [first.end(), second.end()]
    assert [each.code for each in ended] == [0 if signum == signal.SIGCONT else -signum, 0]
    assert sum("features, timm:test_resnet" in each.error for each in ended) == 1
    assert _cache(cache) == _cache(whole_cache)
    assert_same_run(outs[1], whole)


def test_a_second_process_is_refused_the_folder_that_the_first_writes_into(
    tmp_path: Path, start: Start, command: Callable[..., list[str]], whole: Path, album: Path
) -> None:
    out, output = tmp_path / "run", tmp_path / "captions"
    caption = ["caption", str(album), "--output", str(output)]
    for program, arguments in (("train.py", command(out)), ("captioner", caption)):
        first = start(program, arguments, Fault("stop", tmp_path, 2))
        first.read_until("struck", "")
        second = start(program, arguments).end()
        assert second.code == 1
        assert "another process is writing to" in _told(second, program)
        first.send(signal.SIGCONT)
        assert first.end().code == 0
    assert_same_run(out, whole)
    assert len(_rows(output)) == 4


# Read-only


def test_what_cannot_be_written_is_named_and_a_whole_cache_need_not_be(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    whole: Path,
    whole_cache: Path,
    album: Path,
) -> None:
    shutil.copytree(whole_cache, small_disk / "cache")
    shutil.copytree(whole, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    maps = ["caption", str(album / "0.png"), "--heatmaps"]
    tried = [
        ("train.py", command(small_disk / "new")),
        ("train.py", command(small_disk / "run")),
        ("train.py", command(tmp_path / "run", small_disk / "more")),
        ("captioner", ["caption", str(album), "--output", str(small_disk / "captions")]),
        ("captioner", [*maps, str(small_disk / "maps")]),
    ]
    for program, arguments in tried:
        ended = start(program, arguments).end()
        assert ended.code == 1
        told = _told(ended, program)
        assert str(small_disk) in told
        assert "Read-only file system" in told
    assert start("train.py", command(tmp_path / "run", small_disk / "cache")).end().code == 0
    assert_same_run(tmp_path / "run", whole)
