"""Processes that train one module together.

Public names: Workers, ALONE.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """Processes that train one module together, each on its share of every batch's rows."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, rank: int, count: int, rendezvous: Path) -> "Workers":
        """`rendezvous`: a file that is not there yet, of which all of them know."""
        if count > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count
            )
        return cls(rank, count)

    def add_up(self, tensor: Tensor) -> None:
        """In place, to the sum over all workers, which is the same to the bit in each."""
        if self.count > 1:
            dist.all_reduce(tensor)


ALONE = Workers()
