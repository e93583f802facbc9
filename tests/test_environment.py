"""Caches of libraries where the home is missing, unknown or read-only, and full ones."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import pwd
from pathlib import Path
from typing import Any

import datasets
import pytest

import train
from captioner import Captioner
from captioner import environment as caches
from captioner.data.sources import load_captions
from captioner.errors import DataError, WriteError
from tests.no_home_process import use_everything

_NAMES = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "HOME"),
    *("XDG_CACHE_HOME", "TORCH_HOME", "RAY_AUTH_TOKEN_PATH"),
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """``os.environ`` without those variables but a usable home; restored afterwards."""
    for name in _NAMES:
        # Set first, so that a variable that is new is deleted afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(caches, "_temporary", None)
    monkeypatch.setattr(caches, "_announced", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return os.environ  # type: ignore[return-value]


def _changed(environment: dict[str, str]) -> set[str]:
    before = dict(environment)
    caches.use_writable_caches()
    return {name for name in environment if environment[name] != before.get(name)}


def test_usable_home_changes_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    environment["XDG_CACHE_HOME"] = str(tmp_path / "new" / "cache")
    environment["HF_HOME"] = "~/hugging"
    assert _changed(environment) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]


@pytest.mark.parametrize("home", ["/proc/nowhere", "/proc", "~", "relative", "file", "file/home"])
def test_unusable_home_is_replaced(home: str, environment: dict[str, str], tmp_path: Path) -> None:
    environment["HOME"] = str(tmp_path / home) if home.startswith("file") else home
    assert _changed(environment) == {"HOME"}
    (Path.home() / "new").mkdir()
    assert Path(environment["HOME"]).is_absolute()


def test_unknown_user_without_home_gets_one(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    del environment["HOME"]
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    assert _changed(environment) == {"HOME"}
    assert Path("~").expanduser().is_dir()


@pytest.mark.parametrize("name", ["HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"])
def test_unwritable_named_cache_is_replaced(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    environment[name] = str(tmp_path / "file" / "cache")
    assert _changed(environment) == {name}
    assert Path(environment[name]).is_dir()


def test_read_only_cache_is_still_read(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(environment["HOME"], ".cache")
    for name in ("huggingface/hub", "torch"):
        (cache / name).mkdir(parents=True)
    home = Path(environment["HOME"])
    # Root, as whom CI runs, can write into every folder.
    monkeypatch.setattr(caches, "_is_writable", lambda path: home not in (path, *path.parents))
    assert _changed(environment) == {"HOME", "HF_HUB_CACHE", "TORCH_HOME"}
    assert environment["HF_HUB_CACHE"] == str(cache / "huggingface" / "hub")
    assert environment["TORCH_HOME"] == str(cache / "torch")


def test_tilde_in_an_option_is_the_home(environment: dict[str, str]) -> None:
    options = train.build_parser().parse_args(["--out=~/run", "--cache=~/features"])
    assert options.out == Path(environment["HOME"], "run")
    assert options.cache == Path(environment["HOME"], "features")


def test_temporary_cache_is_announced_once_when_used(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environment["HOME"] = "/proc/nowhere"
    caches.use_writable_caches()
    assert caplog.messages == []
    for _ in range(2):
        with caches.cache_access():
            pass
    (message,) = caplog.messages
    assert "set HF_HOME" in message


def test_hub_retries_are_quiet() -> None:
    log = logging.getLogger("huggingface_hub.utils._http")
    with caches.cache_access():
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_full_cache_is_not_blamed_on_the_data(
    code: int, parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["HF_DATASETS_CACHE"], "parquet", "part.arrow")

    def load_dataset(*_: Any, **__: Any) -> None:
        try:
            raise OSError(code, os.strerror(code), str(cache))
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset)
    with pytest.raises(WriteError, match=rf"cache {cache}.*HF_DATASETS_CACHE") as raised:
        load_captions(str(parquet_folder))
    assert os.strerror(code) in str(raised.value)


def test_unreadable_data_is_not_blamed_on_the_cache(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(parquet_folder / "a.parquet"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset)
    with pytest.raises(DataError, match="Permission denied"):
        load_captions(str(parquet_folder))


@pytest.mark.slow
def test_everything_runs_without_home_in_a_spawned_process(
    captioner: Captioner,
    example_photos: list[Path],
    parquet_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    photo = str(example_photos[0])
    arguments = (
        pickle.dumps(captioner),
        photo,
        captioner.caption(photo).text,
        str(parquet_folder),
        str(tmp_path),
    )
    process = multiprocessing.get_context("spawn").Process(target=use_everything, args=arguments)
    process.start()
    process.join(300)
    output = capfd.readouterr()
    assert process.exitcode == 0, output.err
    assert output.err.count("set HF_HOME") == 1
