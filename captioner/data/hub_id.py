"""The name of a data set on the Hub, as people type or paste it."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from huggingface_hub.constants import ENDPOINT


class HubId(NamedTuple):
    """A data set on the Hub: owner/name, owner/name@revision, owner/name:configuration.

    Attributes:
        id: owner and name.
        revision: branch, tag or commit; None is the main branch.
        configuration: None is the default one.
        file: of the repository, None if it is not a single one.
    """

    id: str
    revision: str | None = None
    configuration: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse an id, or the web address of a data set; None if it is neither."""
        owner_and_name = r"[\w-][\w.-]*/[\w.-]+"
        site = rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)|{re.escape(ENDPOINT)}|hf:/"
        address = re.fullmatch(
            rf"(?:{site})/datasets/({owner_and_name})(?:@([^/]+))?(?:/(.*?))?/?(?:[?#].*)?",
            text,
            flags=re.ASCII,
        )
        if address:
            kind, _, rest = (address[3] or "").partition("/")
            revision, _, file = rest.partition("/")
            if kind == "viewer":
                return cls(address[1], None, revision or None)
            if kind == "tree" and revision:
                return cls(address[1], rest if rest.startswith("refs/") else revision)
            if kind in ("blob", "resolve") and file:
                return cls(address[1], revision, None, file)
            return cls(address[1], address[2])
        match = re.fullmatch(rf"({owner_and_name})((?:[@:][^@:]+)*)", text, flags=re.ASCII)
        if not match:
            return None
        parts = re.findall(r"([@:])([^@:]+)", match[2])
        named = dict(parts)
        if len(named) < len(parts):
            return None
        return cls(match[1], named.get("@"), named.get(":"))

    def __str__(self) -> str:
        """Return the id as it is written after --data."""
        revision = "" if self.revision is None else f"@{self.revision}"
        configuration = "" if self.configuration is None else f":{self.configuration}"
        return f"{self.id}{revision}{configuration}{'' if self.file is None else f'/{self.file}'}"
