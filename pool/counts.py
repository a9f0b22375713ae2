"""How many rows the experts of a shard get: known on the device, and often on the host too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """Rows of each expert of a shard, in the order of its experts.

    A pool rank knows them on the host, from a request's header. In the colocated layout they are known on the device
    only, and nothing needs them on the host: how many rows there are together follows from the shapes.

    Attributes:
        rows_e: The counts, int64, on the shard's device.
        host: The same on the host, where they are known without waiting for the device: always if that is a CPU.
    """

    rows_e: Tensor
    host: list[int] | None = None

    def __post_init__(self) -> None:
        if self.host is None and self.rows_e.device.type == "cpu":
            object.__setattr__(self, "host", self.rows_e.tolist())

    @classmethod
    def of(cls, host: list[int], device: torch.device | str = "cpu") -> Counts:
        """Return counts that are known on the host."""
        return cls(torch.tensor(host, dtype=torch.int64, device=device), host)

    @cached_property
    def listed(self) -> list[int]:
        """The counts on the host. If they are not known there, a GPU is waited for."""
        return self.rows_e.tolist() if self.host is None else self.host

    @cached_property
    def ends_e(self) -> Tensor:
        """Where the rows of each expert end, int32, on the device."""
        return self.rows_e.cumsum(0, dtype=torch.int32)


def total(batches: Sequence[Counts]) -> Counts:
    """Return the rows of each expert in several requests together."""
    if len(batches) == 1:
        return batches[0]
    known = all(counts.host is not None for counts in batches)
    host = [sum(rows) for rows in zip(*(counts.listed for counts in batches), strict=True)] if known else None
    return Counts(torch.stack([counts.rows_e for counts in batches]).sum(0), host)
