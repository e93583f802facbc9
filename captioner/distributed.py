"""One of several training processes, as torchrun starts them; alone, nothing is sent to anybody.

Knows nothing of training: what all of them have to agree on goes through here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from captioner.errors import ConfigError

# The others wait while the first one scores an epoch, or extracts what they have done already.
_COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)


class DistributedContext:
    """All processes of a run, seen from one of them.

    Attributes:
        rank: which of them this one is, from 0 on; 0 writes all files.
        world_size: how many there are.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        """Describe one of ``world_size`` processes, which ``process_group`` has connected."""
        self.rank, self.world_size = rank, world_size

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sums of all processes' values."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def barrier(self) -> None:
        """Wait until all have come here."""
        self.all_reduce_sum(0)

    def broadcast(self, value: Any) -> Any:
        """Return the first one's ``value`` in all of them."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box)
            (value,) = box
        return value

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Return ``model`` so that its gradients are the means over all processes."""
        return DistributedDataParallel(model) if self.world_size > 1 else model


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, until the block ends.

    Each takes the GPU of its own number where ``device`` is "cuda".

    Raises:
        ConfigError: there is no GPU for each, or the device is one that processes can't share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistributedContext()
        return
    backend, own = "gloo", int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if own >= torch.cuda.device_count():
            raise ConfigError(
                f"there are {torch.cuda.device_count()} GPUs here: start at most one process for "
                "each, or use --device cpu"
            )
        torch.cuda.set_device(own)
        # What is said goes by gloo; gradients go by NCCL.
        backend = "cpu:gloo,cuda:nccl"
    elif device.type != "cpu":
        raise ConfigError(f"several processes do not train on {device.type}: use --device cpu")
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
