"""Command lines: options made from the fields of a settings class, and one-sentence errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args, get_origin

from captioner.errors import ConfigError

_METAVARS = {
    int: "N",
    float: "X",
    bool: "{true,false}",
    bool | Literal["auto"]: "{true,false,auto}",
}


class OptionParser(argparse.ArgumentParser):
    """A parser that raises ``ConfigError`` instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        """Accept the arguments of ``ArgumentParser``; options cannot be abbreviated."""
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; unknown arguments are refused here, where ``prog`` names the subcommand."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unknown argument {name}{hint}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Raise ``ConfigError``."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_options(
    parser: argparse._ActionsContainer,
    settings: Any,
    defaults: Mapping[str, object],
    prefix: str = "",
) -> None:
    """Add options for the fields of a settings class; an omitted option parses to None.

    A field with several values is an option that can be repeated.

    Args:
        parser: a parser or an argument group.
        settings: a class of ``captioner.config``.
        defaults: the fields' names, and their defaults for ``--help``.
        prefix: put before option names and result keys.
    """
    for name, default in defaults.items():
        field = settings.__pydantic_fields__[name]
        kind = field.annotation
        metavar = f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else None
        parser.add_argument(
            f"--{prefix}{name}".replace("_", "-"),
            dest=f"{prefix}{name}",
            action="append" if get_origin(kind) is tuple else "store",
            type=functools.partial(_parse, kind),
            metavar=field.title or _METAVARS.get(kind, metavar),
            help=f"{field.description} Default: {show(default)}.".replace("%", "%%"),
        )


def show(value: object) -> str:
    """Return a value as it is written on the command line."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case None | "" | ():
            return "none"
        case tuple():
            return ", ".join(value)
    return str(value)


def _parse(kind: Any, text: str) -> object:
    """Return the value that ``text`` stands for.

    Invalid text is returned unchanged; the settings class then raises an error that names it.
    """
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    elif bool in (kind, *get_args(kind)):
        return {"true": True, "false": False}.get(text.lower(), text)
    return text
