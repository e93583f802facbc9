"""Communication between the processes that torchrun starts; a single process sends nothing.

Knows nothing of training.
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

# The others wait while the main process evaluates an epoch or finishes its features.
_COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)


class DistributedContext:
    """This process among all processes of a run.

    Attributes:
        rank: of this process, 0 to ``world_size`` - 1.
        world_size: the number of processes.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        """Describe one of ``world_size`` connected processes (see ``process_group``)."""
        self.rank, self.world_size = rank, world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that prints and writes all files."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.all_reduce_sum(0)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's ``value`` in all processes."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box)
            (value,) = box
        return value

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap ``model`` so that its gradients are means over all processes."""
        return DistributedDataParallel(model) if self.world_size > 1 else model


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[DistributedContext]:
    """Connect the processes that torchrun started, until the block ends.

    On "cuda" each process uses the GPU of its local rank.

    Raises:
        ConfigError: there are fewer GPUs than processes, or processes cannot share the device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistributedContext()
        return
    backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"this machine has {torch.cuda.device_count()} GPUs: start at most one process per "
                "GPU, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        # Values and objects by gloo, gradients by NCCL.
        backend = "cpu:gloo,cuda:nccl"
    elif device.type != "cpu":
        raise ConfigError(f"several processes cannot share {device.type}: use --device cpu")
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
