"""Commands that are killed, or whose disk runs full, before each change: a restart repairs it.

The real command lines run in processes of their own (see ``command_process``).
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
from tests.fault_injection import Fault, fill
from tests.training.runs import assert_same_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a process ended; ``change`` is the one that the fault preceded."""

    code: int
    out: str
    error: str
    change: str


class RunningCommand:
    """A command in its process."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self._process, self._log = process, log
        process.start()

    def read_until(self, name: str, text: str) -> None:
        """Wait until ``text`` is in a file of the process's log."""
        deadline = time.monotonic() + 120
        while not (path := self._log / name).exists() or text not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def send(self, signum: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def wait(self) -> Result:
        self._process.join(180)
        assert self._process.exitcode is not None, "it hangs"
        out, error, change = (
            path.read_text() if (path := self._log / name).exists() else ""
            for name in ("out", "err", "change")
        )
        return Result(self._process.exitcode, out, error, change)


Start = Callable[..., RunningCommand]
Kind = Literal["fill", "kill"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start(program, arguments, fault, settings)``: run a command in its own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # makes two runs equal to the last bit
        patch.setenv("PYTHONPATH", str(ROOT))
        _CONTEXT.set_forkserver_preload(["tests.command_process"])
        multiprocessing.forkserver.ensure_running()

    from tests.command_process import run  # not at the top: it imports every library

    processes: list[BaseProcess] = []

    def begin(
        program: str,
        arguments: list[str],
        fault: Fault | None = None,
        settings: dict[str, Any] | None = None,
    ) -> RunningCommand:
        log = tmp_path_factory.mktemp("log")
        options = (program, arguments, log, fault, settings or {})
        processes.append(_CONTEXT.Process(target=run, args=options))
        return RunningCommand(processes[-1], log)

    yield begin
    for process in processes:
        process.kill()  # a failed test may have left one, perhaps stopped


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


def _error_line(result: Result, program: str) -> str:
    """Return the only error message, the last line of standard error."""
    lines = [line for line in result.error.replace("\r", "\n").splitlines() if line.strip()]
    # What is taken of the data is logged, too.
    logged = [line for line in lines if line.startswith(f"{program}: ")]
    errors = [line for line in logged if ": photos from " not in line]
    assert errors == lines[-1:], result.error
    assert "Traceback" not in result.error
    return errors[0]


def _assert_disk_full(result: Result, program: str, disk: Path) -> None:
    """Check that the command named the full disk, and make room there."""
    assert result.code == 1, (result.change, result.error)
    error = _error_line(result, program)
    assert str(disk) in error
    assert "No space left on device" in error or "GB are free" in error
    (disk / "filler").unlink()


def _interrupt_at_each_change(
    start: Start,
    program: str,
    arguments: list[str],
    fault: Fault,
    *,
    progress: Callable[[], int] = lambda: 0,
    first_change: str = "",
    settings: dict[str, Any] | None = None,
) -> list[str]:
    """Restart a command until it succeeds, with the fault before its first, second, … change.

    After progress the count restarts at the first change whose name holds ``first_change``; the
    changes of every start have been tried by then. Return the changes.
    """
    changes: list[str] = []
    reached, at = 0, 1
    while True:
        result = start(program, arguments, dataclasses.replace(fault, at=at), settings).wait()
        if result.code == 0:
            return changes
        if fault.kind == "kill":
            assert result.code == -signal.SIGKILL, result.error
        else:
            _assert_disk_full(result, program, fault.folder)
        changes.append(result.change)
        assert len(changes) < 100, changes
        at += 1
        if progress() != reached:
            reached = progress()
            at = 1 + next(index for index, change in enumerate(changes) if first_change in change)


# Training


@pytest.fixture(scope="module")
def command(
    parquet_folder: Path, timm_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """``command(out, cache)``: a run of a second, with two epochs, the second one better."""
    cache = tmp_path_factory.mktemp("features")

    def make(out: Path, cache: Path = cache) -> list[str]:
        return f"""--data {parquet_folder} --encoder timm:test_resnet --recipe seed --epochs 2
            --encoder-weights {timm_weights} --out {out} --cache {cache} --batch-size 8
            --min-count 2 --device cpu --learning-rate 0.02 --model.hidden-size 32
            --model.embedding-size 16 --model.attention-size 16 --resume""".split()

    return make


@pytest.fixture(scope="module")
def undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, start: Start, command: Callable[..., list[str]]
) -> Path:
    """A run without faults."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    result = start("train.py", command(out)).wait()
    assert result.code == 0, result.error
    assert result.out.count("best so far") == 2
    return out


def _epochs(out: Path) -> int:
    """Return how many epochs are saved, also in an old state that the next start would recover."""
    paths = [out / name / "state.json" for name in ("state", ".state.old")]
    return max(
        (json.loads(path.read_text())["epoch"] for path in paths if path.exists()), default=0
    )


@pytest.mark.parametrize("kind", ["kill", "fill"])
def test_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    kind: Kind,
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    out = folder / "run"

    def saved_epochs() -> int:
        if (out / "checkpoint").exists():
            checkpoints.load(out / "checkpoint")
        return _epochs(out)

    changes = _interrupt_at_each_change(
        start,
        "train.py",
        command(out),
        Fault(kind, folder),
        progress=saved_epochs,
        first_change="checkpoint",
    )
    for name in ("model.safetensors", "config.json", "state.safetensors", "state.json"):
        assert sum(name in change for change in changes) >= 2, changes  # in both epochs
    for name in ("tensorboard", "metrics.csv", "curves.png", "run.json"):
        assert any(name in change for change in changes), changes
    assert_same_run(out, undisturbed_run)


# Features


def _cache(folder: Path) -> dict[str, bytes]:
    """Return the files of a cache."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.fixture(scope="module")
def undisturbed_cache(undisturbed_run: Path, command: Callable[..., list[str]]) -> Path:
    arguments = command(undisturbed_run)
    return Path(arguments[arguments.index("--cache") + 1])


@pytest.mark.parametrize("kind", ["kill", "fill"])
def test_interrupted_features_end_with_the_same_bytes(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    undisturbed_cache: Path,
    kind: Kind,
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    cache, out = folder / "cache", tmp_path / "run"
    changes = _interrupt_at_each_change(start, "train.py", command(out, cache), Fault(kind, cache))
    assert any("features.npy" in change for change in changes)
    assert any("done.npy" in change for change in changes)
    assert _cache(cache) == _cache(undisturbed_cache)
    assert_same_run(out, undisturbed_run)


def test_full_disk_is_reported_for_a_sparse_cache(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    undisturbed_cache: Path,
) -> None:
    # As of a cache that was copied without its holes.
    cache, out = small_disk / "cache", tmp_path / "run"
    shutil.copytree(undisturbed_cache, cache)
    (array,) = cache.rglob("features.npy")
    size = array.stat().st_size
    os.truncate(array, 128)
    os.truncate(array, size)
    done = np.load(array.with_name("done.npy"), mmap_mode="r+")
    done[:] = 0
    fill(small_disk)
    _assert_disk_full(start("train.py", command(out, cache)).wait(), "train.py", small_disk)
    assert start("train.py", command(out, cache)).wait().code == 0
    assert _cache(cache) == _cache(undisturbed_cache)
    assert_same_run(out, undisturbed_run)


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
def test_interrupted_captions_end_with_the_same_rows(
    tmp_path: Path, request: pytest.FixtureRequest, start: Start, album: Path, kind: Kind
) -> None:
    folder: Path = request.getfixturevalue("small_disk") if kind == "fill" else tmp_path
    settings = {"captioner.inference.bulk._BATCH": 2, "captioner.inference.bulk._PART": 2}
    output, complete = folder / "captions", tmp_path / "complete"

    def arguments(output: Path) -> list[str]:
        return ["caption", str(album), "--output", str(output)]

    def files() -> int:
        assert kind == "kill" or not list(output.glob(".*.part"))
        return len(list(output.glob("*.parquet")))

    changes = _interrupt_at_each_change(
        start,
        "captioner",
        arguments(output),
        Fault(kind, folder),
        progress=files,
        first_change=".part",
        settings=settings,
    )
    assert any("os.rename" in change for change in changes) or kind == "fill"
    assert start("captioner", arguments(complete), settings=settings).wait().code == 0
    assert len(_rows(output)) == 4
    assert _rows(output) == _rows(complete)
    assert {path.name for path in output.iterdir()} == {path.name for path in complete.iterdir()}


@pytest.mark.parametrize("option", ["--heatmaps", "--json", "--sheet"])
def test_output_on_a_full_disk_is_named_and_written_later(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    parquet_folder: Path,
    timm_weights: Path,
    album: Path,
    undisturbed_run: Path,
    option: str,
) -> None:
    def arguments(folder: Path) -> list[str]:
        if option == "--heatmaps":
            return ["caption", str(album / "0.png"), str(album / "1.png"), option, str(folder)]
        return f"""evaluate --data {parquet_folder} --encoder-weights {timm_weights}
            --checkpoint {undisturbed_run}/checkpoint --cache {tmp_path}/cache
            {option} {folder}/file""".split()

    full, roomy = small_disk / "full", tmp_path / "roomy"
    assert start("captioner", arguments(roomy)).wait().code == 0
    changes = _interrupt_at_each_change(
        start, "captioner", arguments(full), Fault("fill", small_disk)
    )
    assert len(changes) == (2 if option == "--heatmaps" else 1)
    for path in roomy.iterdir():
        assert (full / path.name).read_bytes() == path.read_bytes()


# Two at once


@pytest.mark.parametrize("signum", [signal.SIGCONT, signal.SIGKILL])
def test_second_run_waits_for_the_features_of_the_first(
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    undisturbed_cache: Path,
    signum: signal.Signals,
) -> None:
    outs, cache = [tmp_path / name for name in ("one", "other")], tmp_path / "cache"
    first = start("train.py", command(outs[0], cache), Fault("stop", cache, 6))
    first.read_until("change", "features.npy")  # begun, and about to be filled in
    second = start("train.py", command(outs[1], cache))
    second.read_until("err", "waiting for another process")
    first.send(signum)
    results = [first.wait(), second.wait()]
    assert [result.code for result in results] == [0 if signum == signal.SIGCONT else -signum, 0]
    assert sum("features, timm:test_resnet" in result.error for result in results) == 1
    assert _cache(cache) == _cache(undisturbed_cache)
    assert_same_run(outs[1], undisturbed_run)


def test_second_process_is_refused_the_same_folder(
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    album: Path,
) -> None:
    out, output = tmp_path / "run", tmp_path / "captions"
    caption = ["caption", str(album), "--output", str(output)]
    for program, arguments in (("train.py", command(out)), ("captioner", caption)):
        first = start(program, arguments, Fault("stop", tmp_path, 2))
        first.read_until("change", "")
        second = start(program, arguments).wait()
        assert second.code == 1
        assert "another process is writing to" in _error_line(second, program)
        first.send(signal.SIGCONT)
        assert first.wait().code == 0
    assert_same_run(out, undisturbed_run)
    assert len(_rows(output)) == 4


# Read-only


def test_read_only_folder_is_named_and_a_full_cache_needs_no_writing(
    small_disk: Path,
    tmp_path: Path,
    start: Start,
    command: Callable[..., list[str]],
    undisturbed_run: Path,
    undisturbed_cache: Path,
    album: Path,
) -> None:
    shutil.copytree(undisturbed_cache, small_disk / "cache")
    shutil.copytree(undisturbed_run, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    maps = ["caption", str(album / "0.png"), "--heatmaps"]
    commands = [
        ("train.py", command(small_disk / "new")),
        ("train.py", command(small_disk / "run")),
        ("train.py", command(tmp_path / "run", small_disk / "more")),
        ("captioner", ["caption", str(album), "--output", str(small_disk / "captions")]),
        ("captioner", [*maps, str(small_disk / "maps")]),
    ]
    for program, arguments in commands:
        result = start(program, arguments).wait()
        assert result.code == 1
        error = _error_line(result, program)
        assert str(small_disk) in error
        assert "Read-only file system" in error
    assert start("train.py", command(tmp_path / "run", small_disk / "cache")).wait().code == 0
    assert_same_run(tmp_path / "run", undisturbed_run)
