"""Runs in a new process of a user without a home; imports captioner after HOME is removed."""

from __future__ import annotations

import os
import pickle
import pwd
from pathlib import Path


def _no_entry(uid: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def use_everything(pickled: bytes, photo: str, expected: str, data: str, folder: str) -> None:
    """Caption with a captioner from another process, then run the commands, in ``folder``."""
    pwd.getpwuid = _no_entry
    for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "GRADIO_TEMP_DIR"):
        os.environ.pop(name, None)
    os.chdir(folder)

    captioner = pickle.loads(pickled)
    assert captioner.caption(photo).text == expected

    import torch

    import train
    from captioner.__main__ import main

    assert main(["caption", photo, "--output", "captions.parquet"]) == 0
    assert main(["evaluate", "--data", data, "--limit", "2"]) == 0
    torch.set_default_dtype(torch.float64)  # a run does not depend on it either
    options = "--encoder efficientnet_lite2 --limit 10 --epochs 1 --min-count 1"
    assert train.main(["--data", data, *options.split()]) == 0
    assert torch.get_default_dtype() == torch.float64
    assert sorted(path.name for path in Path().iterdir()) == ["captions.parquet", "runs"]
