"""torch's defaults while something is loaded, scored or trained, whatever the caller has set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# The default dtype and the random numbers belong to the process: the first block saves them, and
# the last one to end restores them.
_lock = threading.Lock()
_blocks = 0
_saved: tuple[torch.dtype, Tensor]


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Run a block in float32 on the CPU, with gradients and without autocast.

    Dtypes and devices that the block names itself stand. Afterwards all is as it was, the global
    random numbers too. Blocks may nest, and run in several threads.
    """
    global _blocks, _saved
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with _lock:
            if not _blocks:
                _saved = torch.get_default_dtype(), torch.get_rng_state()
                torch.set_default_dtype(torch.float32)
            _blocks += 1
        try:
            yield
        finally:
            with _lock:
                _blocks -= 1
                if not _blocks:
                    torch.set_default_dtype(_saved[0])
                    torch.set_rng_state(_saved[1])
