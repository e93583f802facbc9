"""What went wrong, said in the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gradio as gr

from captioner.errors import CaptionerError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def told(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a ``CaptionerError`` reach the visitor as one sentence, not as a trace."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except CaptionerError as error:
            text = str(error)
            message = f"{text[:1].upper()}{text[1:]}."
            raise gr.Error(message, duration=30, print_exception=False) from error

    return call
