"""The package's errors. Every message names the cause and what to do next."""

from __future__ import annotations

import collections.abc
import contextlib
import itertools
import logging
import sys

_logger = logging.getLogger(__name__)

# Packages that pyproject.toml lists under an extra, by the name they are imported by.
_EXTRAS = {
    "gradio": "page",
    "skimage": "page",
    "gensim": "train",
    "sacrebleu": "train",
    "tensorboard": "train",
}


class CaptionerError(Exception):
    """Base of all errors that this package raises on purpose; its text can be shown to users.

    Attributes:
        exit_code: of the command line: 1, or 2 if the command's input is wrong.
    """

    exit_code = 1


class ConfigError(CaptionerError, ValueError):
    """A setting is out of range or conflicts with another."""

    exit_code = 2


class ImageError(CaptionerError):
    """A photo cannot be opened."""


class DataError(CaptionerError):
    """A dataset cannot be read, or lacks something that training or scoring needs."""

    exit_code = 2


class EncoderError(CaptionerError):
    """A backbone is unknown, or its weights are missing or do not fit."""

    exit_code = 2


class CheckpointError(CaptionerError):
    """A checkpoint is missing, damaged, or does not fit this version or its encoder."""

    exit_code = 2


class TrainingError(CaptionerError):
    """Training cannot continue."""


class WriteError(CaptionerError):
    """A file or folder cannot be written: the disk is full, or another process is writing it."""


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its type if it has no text, to quote in a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def report(program: str, error: BaseException) -> int:
    """Print an error in one line and return the exit code; the traceback goes to the log."""
    _logger.debug("%s ends", program, exc_info=error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, CaptionerError):
        sys.stderr.write(f"{program}: {error}\n")
        return error.exit_code
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
        sys.stderr.write(
            f"{program}: {package} is not installed: pip install -r requirements.txt, or install "
            f"the package with its extra: pip install '.[{_EXTRAS[package]}]'\n"
        )
        return 1
    sys.stderr.write(f"{program}: {type(error).__name__}: {first_line(error)}\n")
    return 1


@contextlib.contextmanager
def logging_to_stderr(prefix: str = "") -> collections.abc.Iterator[None]:
    """Print this package's warnings and reports on standard error, each once, for a command.

    Not for the root logger, because libraries print their own warnings. Only the first of the Hub's
    retries is printed; the final error names the cause.
    """
    logger, retries = (logging.getLogger(n) for n in ("captioner", "huggingface_hub.utils._http"))
    handler, numbers = logging.StreamHandler(), itertools.count()

    def is_first(_: logging.LogRecord) -> bool:
        return next(numbers) == 0

    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    retries.addFilter(is_first)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        retries.removeFilter(is_first)


def causes_of(error: BaseException) -> list[BaseException]:
    """Return an error and the chain of its causes, the root cause last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes


def hub_reason(error: BaseException, path: str) -> str:
    """Return why a request to the Hugging Face Hub failed, and the way out.

    Args:
        error: what the client raised; its causes are searched too.
        path: of the repository on the Hub: "user/name", or "datasets/user/name".
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    causes = causes_of(error)
    # datasets raises errors of its own, and not always from the client's.
    text = " ".join(f"{type(each).__name__} {each}" for each in causes)

    def is_due_to(kind: type[BaseException]) -> bool:
        return any(isinstance(each, kind) for each in causes)

    if is_due_to(hub.GatedRepoError) or "gated dataset" in text:
        return (
            f"it is gated: accept its terms on {constants.ENDPOINT}/{path}, then log in with "
            "`hf auth login`"
        )
    if is_due_to(hub.RevisionNotFoundError):
        return "the Hub has no such revision of it: check what stands after the @"
    if is_due_to(hub.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in text:
        return (
            "HF_HUB_OFFLINE is set, and the cache lacks it: unset it and use your internet "
            "connection, or give a local folder"
        )
    if is_due_to(hub.RepositoryNotFoundError) or "DatasetNotFoundError" in text:
        return (
            "the Hub has no repository of this name, or a private one: check the name, or log in "
            "with `hf auth login`"
        )
    for each in causes:
        if isinstance(each, hub.HfHubHTTPError):
            status = each.response.status_code
            if status in (401, 403):
                return f"the Hub refuses access ({status}): log in with `hf auth login`"
            return f"the Hub returned {status} ({first_line(each)[:160]}): try again later"
    if is_due_to(hub.LocalEntryNotFoundError) or any(
        type(each).__module__.startswith("httpx") for each in causes
    ):
        return (
            f"the Hub cannot be reached ({first_line(causes[-1])[:160]}): check your internet "
            "connection and proxy"
        )
    return (
        f"{type(error).__name__}: {first_line(error)[:160]}: check the name and your internet "
        "connection"
    )
