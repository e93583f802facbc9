"""The sources of a training run, their names and their shares of each epoch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from captioner.config import split_share
from captioner.data.hub import HubId
from captioner.data.readers import local_path
from captioner.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A source of a training run.

    Attributes:
        source: as for ``sources.open_source``.
        name: short and unique in the run: the last part of its path or Hub id, or more of them if
            that is the name of another source too.
        share: its share of each epoch, above 0 to 1; None if it has its part of the rest.
        is_local: whether it is a path of this machine.
    """

    source: str
    name: str
    share: float | None
    is_local: bool

    @property
    def portable(self) -> str:
        """The source with its share, without the path of this machine or the Hub's web address."""
        source = self.name if self.is_local else str(HubId.parse(self.source) or self.source)
        return source if self.share is None else f"{source}={self.share}"


def parse_sources(texts: Sequence[str]) -> list[DataSource]:
    """Parse the sources of a run, each with an optional share, as in "photos=0.3".

    Raises:
        ConfigError: a share is not above 0 and at most 1, the shares leave no or too much of the
            epoch, or a source is given twice.
    """
    parsed = [_parse_share(text) for text in texts]
    paths = [local_path(source) for source, _ in parsed]
    places = [
        path.resolve() if path else Path(str(HubId.parse(source) or source))
        for (source, _), path in zip(parsed, paths, strict=True)
    ]
    for number, (source, _) in enumerate(parsed):
        if places[number] in places[:number]:
            raise ConfigError(f"--data {source} is given twice: give each source once")
    _check_shares(parsed)
    names = next(
        names
        for depth in itertools.count(1)
        if len(set(names := ["/".join(place.parts[-depth:]) for place in places])) == len(places)
    )
    return [
        DataSource(source, name, share, path is not None)
        for (source, share), name, path in zip(parsed, names, paths, strict=True)
    ]


def _parse_share(text: str) -> tuple[str, float | None]:
    """Split "photos=0.3" into source and share, unless it is a path as a whole."""
    source, written = ("", "") if local_path(text) else split_share(text)
    if not written or "?" in source.rpartition("=")[2]:  # of a web address
        return text, None
    try:
        share = float(written)
    except ValueError:
        raise DataError(
            f"there is no {text}, and {written!r} is not a share of an epoch: write "
            f"--data {source} or --data {source}=0.5"
        ) from None
    if not 0 < share <= 1:
        raise ConfigError(
            f"the share of {source} is {written}; it must be a number above 0 and at most 1"
        )
    return source, share


def _check_shares(parsed: Sequence[tuple[str, float | None]]) -> None:
    """Raise ``ConfigError`` unless the shares leave a rest exactly if sources divide it."""
    total = sum(share or 0.0 for _, share in parsed)
    others = [source for source, share in parsed if share is None]
    is_whole = math.isclose(total, 1)
    if total > 1 and not is_whole:
        raise ConfigError(f"the shares of --data add up to {total:g}; they can be 1 at most")
    if others and is_whole:
        raise ConfigError(
            f"the shares of --data leave nothing for {', '.join(others)}: lower them, or leave it "
            "out"
        )
    if not others and not is_whole:
        raise ConfigError(
            f"the shares of --data add up to {total:g}: raise them to 1, or leave one source "
            "without a share, which then gets the rest"
        )
