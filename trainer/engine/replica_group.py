"""The group of an engine, as DeepSpeed asks for it."""

from __future__ import annotations

from typing import Any

import torch


class ReplicaGroup:
    """What DeepSpeed calls a model parallel unit: it names the ranks that average an engine's gradients.

    Each rank holds the whole of the engine's module, so there is no model parallelism: its group has no other ranks,
    for which ZeRO's `None` stands (`deepspeed.comm.pg_utils.is_parallel`).

    Args:
        group: A torch process group that this rank is in.
    """

    def __init__(self, group: Any):
        self._group = group

    def get_data_parallel_group(self) -> Any:
        """Return the ranks that hold the same weights."""
        return self._group

    def get_data_parallel_world_size(self) -> int:
        """Return the number of these ranks."""
        return torch.distributed.get_world_size(self._group)

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return torch.distributed.get_rank(self._group)

    def get_model_parallel_group(self) -> None:
        """Return nothing: no rank holds another part of the module."""
        return

    def get_model_parallel_world_size(self) -> int:
        """Return 1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Return 0."""
        return 0
