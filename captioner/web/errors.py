"""Errors, shown in the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gradio as gr

from captioner.errors import CaptionerError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def show_errors(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Show a ``CaptionerError`` to the visitor as one sentence instead of a traceback."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except CaptionerError as error:
            text = str(error)
            message = f"{text[:1].upper()}{text[1:]}{'' if text.endswith('?') else '.'}"
            raise gr.Error(message, duration=30, print_exception=False) from error

    return call
