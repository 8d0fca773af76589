"""The processes of a training, as `torchrun` starts them; one alone without it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from deploykit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Crew:
    """This process among all."""

    rank: int = 0
    size: int = 1

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of a batch that is this process's. Raises UsageError: it cannot be shared."""
        if len(rows) % self.size:
            raise UsageError(
                f"a batch of {len(rows)} cannot be shared by {self.size} processes",
                hint=f"give a --batch-size that is a multiple of {self.size}",
            )
        return rows[self.rank :: self.size]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def told(self, value: V) -> V:
        """What the first process has."""
        import torch.distributed as dist

        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def together(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients become the mean over all processes."""
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module) if self.size > 1 else module


@contextmanager
def joined() -> Iterator[Crew]:
    """Join the processes that the environment tells of (WORLD_SIZE, RANK, ...: `torchrun`).

    They talk over gloo. A group that the caller has joined already is used, and left as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Crew()
        return
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo")
    try:
        yield Crew(dist.get_rank(), dist.get_world_size())
    finally:
        if own:
            gc.collect()  # a module in a cycle keeps the group's threads to the end, which aborts
            dist.destroy_process_group()
