"""Writable cache folders for libraries, and torch's process-wide defaults.

Hugging Face, torch, matplotlib and gensim derive their cache folders from the user's home when they
are imported.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.errors import WriteError, causes_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_HOME = "USERPROFILE" if os.name == "nt" else "HOME"
# Each names a cache folder.
_VARIABLES = ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE")
# Only writing fails with the first three.
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DENIED = (*_FULL_OR_READ_ONLY, errno.EACCES, errno.EPERM, errno.ENOTDIR)

# Removed when the process ends.
_temporary: tempfile.TemporaryDirectory[str] | None = None
_announced = False


def use_writable_caches() -> None:
    """Replace the home and each named cache folder by a temporary one, if it is not writable.

    Many containers have no home, or a read-only one. If all are writable, nothing changes.
    """
    # Without a home "~" stays as it is, and libraries fail, or create a folder of that name.
    home = os.path.expanduser("~")  # noqa: PTH111 -- Path raises
    named = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    unusable = [name for name, path in named.items() if not _is_writable(_expanded(path))]
    if not (os.path.isabs(home) and os.path.isdir(home) and _is_writable(Path(home))):  # noqa: PTH112, PTH117
        unusable.append(_HOME)
    if not unusable:
        return
    # Files in a read-only home or cache can still be read.
    caches = _expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    hugging_face = _expanded(os.environ.get("HF_HOME", str(caches / "huggingface")))
    for name, folder, is_written in (
        ("HF_HOME", hugging_face, True),
        ("HF_HUB_CACHE", hugging_face / "hub", False),
        ("HF_TOKEN_PATH", hugging_face / "token", False),
        ("TORCH_HOME", caches / "torch", False),
        ("RAY_AUTH_TOKEN_PATH", _expanded("~/.ray/auth_token"), False),
    ):
        exists = os.path.exists(folder)  # noqa: PTH110 -- Path raises
        if folder.is_absolute() and exists and (not is_written or _is_writable(folder)):
            os.environ.setdefault(name, str(folder))
    for name in unusable:
        os.environ[name] = _temporary_folder(name.lower())


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))  # noqa: PTH111 -- Path raises


def _is_writable(folder: Path) -> bool:
    """Return whether files can be created in ``folder``, or in its nearest existing parent."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary_folder(name: str) -> str:
    global _temporary
    if _temporary is None:
        _temporary = tempfile.TemporaryDirectory(prefix="captioner-", ignore_cleanup_errors=True)
    folder = Path(_temporary.name, name)
    folder.mkdir(exist_ok=True)
    return str(folder)


@contextlib.contextmanager
def cache_access() -> Iterator[None]:
    """Wrap calls that download or convert: warn once if the cache is temporary.

    Mutes the Hub's warnings about retries: if all fail, it raises an error.

    Raises:
        WriteError: the cache cannot be written, whatever error the library raised.
    """
    global _announced
    if _temporary is not None and not _announced:
        _announced = True
        log.warning(
            "no writable cache folder: downloads and converted data go to %s and are deleted at "
            "exit; set HF_HOME to keep them",
            _temporary.name,
        )
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        for cause in causes_of(error):
            if isinstance(cause, OSError) and (cache := _cache_of(cause)):
                variable, folder = cache
                raise WriteError(
                    f"cannot write the cache {cause.filename or folder}: "
                    f"{cause.strerror or cause}; make room, or set {variable} to another folder"
                ) from error
        raise
    finally:
        hub.setLevel(level)


def _cache_of(error: OSError) -> tuple[str, Path] | None:
    """Return the variable and folder of the cache that ``error`` concerns, or None."""
    from huggingface_hub import constants

    caches = {
        variable: _expanded(os.environ[variable])
        for variable in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HOME")
        if os.environ.get(variable)
    }
    caches.setdefault("HF_HOME", Path(constants.HF_HOME))
    for variable, folder in caches.items():
        if error.errno in _DENIED and folder in Path(str(error.filename)).parents:
            return variable, folder
    # Neither pyarrow nor datasets' check of free space names a file.
    if error.errno in _FULL_OR_READ_ONLY or "Not enough disk space" in str(error):
        return next(iter(caches.items()))
    return None


# The default dtype and the random state belong to the process: the first block to start saves them,
# and the last one to end restores them.
_lock = threading.Lock()
_blocks = 0
_saved: tuple[torch.dtype, torch.Tensor]


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Run a block in float32 on the CPU, with gradients and without autocast.

    Dtypes and devices that the block names explicitly are respected. Everything is restored
    afterwards, including the global random state. Blocks may nest, and run in several threads.
    """
    import torch

    global _blocks, _saved
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with _lock:
            if not _blocks:
                _saved = torch.get_default_dtype(), torch.get_rng_state()
                torch.set_default_dtype(torch.float32)
            _blocks += 1
        try:
            yield
        finally:
            with _lock:
                _blocks -= 1
                if not _blocks:
                    torch.set_default_dtype(_saved[0])
                    torch.set_rng_state(_saved[1])
