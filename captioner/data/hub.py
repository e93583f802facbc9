"""Data sets on the Hub: their names as people type or paste them, and their tables."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple, Self

import datasets
from datasets.naming import camelcase_to_snakecase, filenames_for_dataset_split
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.constants import ENDPOINT

from captioner.data.tables import (
    ACCEPTED,
    Tables,
    cannot_read,
    configurations,
    in_memory,
    open_builder,
)
from captioner.errors import DataError, hub_reason

log = logging.getLogger(__name__)


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


def open_hub(source: str) -> Tables:
    """Open a data set on the Hub.

    Raises:
        DataError: ``source`` is no id or address of one, or it cannot be loaded.
    """
    hub = HubId.parse(source)
    if hub is None and "://" in source:
        raise DataError(
            f"{source} is no address of a data set on the Hugging Face Hub: download it, and give "
            "the folder"
        )
    if hub is None:
        raise DataError(
            f"there is no folder or file {source}, and it is not a Hub id (owner/name, "
            "owner/name:configuration, owner/name@revision)"
        )
    files = None if hub.file is None else {"train": hub.file}

    def explain(error: BaseException) -> DataError:
        if names := configurations(error):
            reason = f"choose a configuration, as in {hub.id}:NAME, from {names}"
        else:
            reason = hub_reason(error, f"datasets/{hub.id}")
        return DataError(
            f"cannot load {source} from the Hugging Face Hub: {reason}. For local data, "
            f"give a local folder with --data: {ACCEPTED}"
        )

    revision = "" if hub.revision is None else f"@{hub.revision}"
    try:
        tables = open_builder(
            f"hf://datasets/{hub.id}{revision}",
            explain,
            lambda: datasets.load_dataset_builder(
                hub.id, hub.configuration, revision=hub.revision, data_files=files
            ),
        )
        if not isinstance(tables.builder, Cache):
            return tables
    except DataError as error:
        cause = error.__cause__
        is_offline = isinstance(cause, ConnectionError) or "Couldn't find cache" in str(cause)
        if not is_offline or not (cached := _open_cached(hub)):
            raise
        return cached
    return _open_cached(hub) or tables


def _open_cached(hub: HubId) -> Tables | None:
    """Return the splits that were loaded before, for want of a connection; None if none was.

    ``datasets`` finds whole data sets in its cache, but no single splits.
    """
    owner, _, name = hub.id.partition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}")
    folders = sorted(
        (path.parent for path in folder.glob("*/*/*/dataset_info.json")),
        key=lambda path: path.stat().st_mtime,
    )
    infos = [(folder, datasets.DatasetInfo.from_directory(str(folder))) for folder in folders]
    names = [info.config_name for _, info in infos]
    wanted = hub.configuration or ("default" if "default" in names else None)
    load = {}
    for folder, info in infos:  # the newest last
        # A folder is called after the commit; which one a tag stands for, only the Hub knows.
        if wanted in (None, info.config_name) and folder.name.startswith(hub.revision or ""):
            for split in (info.splits or {}).values():
                files = filenames_for_dataset_split(
                    str(folder), info.dataset_name, split.name, "arrow", split.shard_lengths
                )
                tables = [datasets.Dataset.from_file(file) for file in files]
                load[split.name] = in_memory(datasets.concatenate_datasets(tables))
    if not load:
        return None
    log.warning(
        "%s: the Hub cannot be reached; using what was loaded before: %s", hub, ", ".join(load)
    )
    return Tables(load, f"hf://datasets/{hub.id}", cannot_read(folder))
