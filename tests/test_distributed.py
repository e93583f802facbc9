"""Training with two processes: torchrun on one machine, over gloo."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from captioner.distributed import DistributedContext, process_group
from captioner.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, hub_row: MakeRow, write_parquet: Write) -> Path:
    """21 readable photos: the last batch of 4 holds one, fewer than there are processes."""
    rows = [hub_row(number) for number in range(22)]
    rows[3]["image"]["bytes"] = b"broken"
    for row in rows[::3]:  # the processes' shares differ in tokens
        row["alt_text"] = row["alt_text"][:1]
    folder = tmp_path_factory.mktemp("distributed") / "data"
    return write_parquet(folder, {"train": rows, "validation": [hub_row(n) for n in range(32, 40)]})


@pytest.fixture
def command(data: Path, timm_weights: Path) -> Callable[..., list[str]]:
    """``command(out, processes)``: a small run without dropout, which differs between processes."""

    def make(out: Path, processes: int, *extra: str) -> list[str]:
        start = [sys.executable, "train.py"]
        if processes > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc-per-node={processes}", "train.py"]
        options = f"""--data {data} --encoder timm:test_resnet --encoder-weights {timm_weights}
            --recipe best --out {out} --cache {out}-features --epochs 3 --reward-epochs 0
            --batch-size 4 --min-count 2 --device cpu --model.dropout 0
            --model.feature-dropout 0 --learning-rate 0.002 --bfloat16 false"""
        return [*start, *options.split(), *extra]

    return make


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _losses(out: Path) -> list[list[float]]:
    """Return the training and validation loss of each epoch."""
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return [[float(row["train_loss"]), float(row["val_loss"])] for row in csv.DictReader(file)]


def _assert_close(one: Path, other: Path) -> None:
    """Compare two runs up to rounding."""
    assert np.allclose(_losses(one), _losses(other), atol=2e-4)
    for name in ("checkpoint/model.safetensors", "state/state.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key in left:
            if not key.startswith("optimizer"):
                assert torch.allclose(left[key].float(), right[key].float(), atol=5e-3), key


@pytest.mark.slow
def test_two_processes_match_a_single_process(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    short = ["--epochs", "1"]
    assert train.main(command(alone, 1, *short)[2:]) == 0
    output = _run(command(both, 2, *short))
    _assert_close(alone, both)
    assert output.count("Epoch 01 |") == 1
    assert output.count("precision    ") == 1
    assert json.loads((both / "run.json").read_text())["processes"] == 2
    assert {path.name for path in alone.iterdir()} == {path.name for path in both.iterdir()}
    # Each process extracted a part of the features.
    for one in (tmp_path / "alone-features").iterdir():
        two = tmp_path / "both-features" / one.name
        assert np.array_equal(np.load(one / "done.npy"), np.load(two / "done.npy"))
        left, right = np.load(one / "features.npy"), np.load(two / "features.npy")
        assert np.abs(left - right).max() <= 0.01
        assert np.abs(left).max() > 0.1


@pytest.mark.slow
def test_run_resumes_with_another_number_of_processes(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _run(command(whole, 1))
    process = subprocess.Popen(
        command(stopped, 2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("Epoch 01"):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "all saved: continue with --resume" in error
    state = json.loads((stopped / "state" / "state.json").read_text())
    assert (state["epoch"], state["step"]) < (3, 0)
    _run(command(stopped, 1, "--resume"))
    _assert_close(whole, stopped)
    # A run of one process resumes with two.
    (stopped / "metrics.csv").unlink()
    assert "Epoch" not in _run(command(stopped, 2, "--resume"))  # it is finished


@pytest.mark.slow
def test_two_processes_train_on_rewards(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    out = tmp_path / "rewards"
    output = _run(command(out, 2, "--reward-epochs", "1", "--reward-batch-size", "8"))
    assert output.count("reward=") == 1
    rows = json.loads((out / "run.json").read_text())["epochs"]
    assert [("reward" in row) for row in rows] == [False, False, False, True]
    assert 0 <= rows[-1]["reward"] <= 10


@pytest.mark.slow
def test_error_in_one_process_ends_all(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "something").touch()
    started = time.monotonic()
    done = subprocess.run(
        command(out, 2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "is not empty: choose another --out" in done.stderr
    assert time.monotonic() - started < 60
    assert [path.name for path in out.iterdir()] == ["something"]


def test_single_process_needs_no_group() -> None:
    with process_group(torch.device("cpu")) as processes:
        assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
        assert processes.all_reduce_sum(2, 3.5) == [2, 3.5]
        assert processes.broadcast("x") == "x"
        model = torch.nn.Linear(2, 2)
        assert processes.wrap_ddp(model) is model
        processes.barrier()
    assert not torch.distributed.is_initialized()
    assert DistributedContext(1, 2).is_main is False


def test_process_group_refuses_devices_it_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    for device, reason in (("mps", "cannot share mps"), ("cuda", "at most one process per GPU")):
        with (
            pytest.raises(ConfigError, match=f"{reason}.* --device cpu"),
            process_group(torch.device(device)),
        ):
            pass
