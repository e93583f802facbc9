"""What can go wrong, as a small tree. Every message names the cause and the way out."""


class CaptionerError(Exception):
    """Base of all errors that this package raises on purpose; its text is fit to show a user."""


class ConfigError(CaptionerError, ValueError):
    """A setting is out of range or does not fit another one."""


class ImageError(CaptionerError):
    """A photo cannot be opened."""


class DataError(CaptionerError):
    """A data set cannot be read, or lacks what training or scoring needs."""


class EncoderError(CaptionerError):
    """A backbone is unknown, or its weights are missing or do not fit."""


class CheckpointError(CaptionerError):
    """A checkpoint is missing, damaged, or does not fit this version or its encoder."""


class TrainingError(CaptionerError):
    """Training cannot go on."""


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its kind where it has no text, to quote in a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
