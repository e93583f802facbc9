"""Imports gradio so that no proxy or environment variable can make that fail.

Has to be imported before anything else that imports gradio.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping
from typing import Any

from captioner.errors import ConfigError


@contextlib.contextmanager
def overridden(mapping: MutableMapping[str, Any], **items: Any) -> Iterator[None]:
    """Set items of a mapping until the context ends."""
    before = {name: mapping[name] for name in items if name in mapping}
    mapping.update(items)
    try:
        yield
    finally:
        for name in items:
            mapping.pop(name, None)
        mapping.update(before)


def without_proxies() -> contextlib.AbstractContextManager[None]:
    """Make HTTP clients created in the context ignore all proxy settings.

    Creating a client fails for a SOCKS proxy without ``socksio`` and for a malformed address.
    """
    return overridden(os.environ, NO_PROXY="*", no_proxy="*")


for _name in ("GRADIO_SERVER_PORT", "GRADIO_NUM_PORTS"):  # gradio reads them on import
    if not os.environ.get(_name, "0").isdecimal():
        raise ConfigError(f"{_name} is {os.environ[_name]!r}: set a number")

with without_proxies():  # gradio creates a client on import
    import gradio  # noqa: F401
