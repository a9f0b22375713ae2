"""Payloads on GPUs: the transport in which nothing is launched that waits for something not launched yet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pool.schedule import RequestKey
from pool.wire.contract import Answer, Arrived, End, WireGroups, WireSettings


class DeviceTrunk(End):
    """A trunk rank's end; see `pool.wire.contract.TrunkWire`."""

    def __init__(self, settings: WireSettings, groups: WireGroups):
        super().__init__(settings)

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> Answer:
        """See `TrunkWire.request`."""
        raise NotImplementedError

    def settle(self) -> None:
        """See `TrunkWire.settle`."""


class DevicePool(End):
    """A pool rank's end; see `pool.wire.contract.PoolWire`."""

    def __init__(self, settings: WireSettings, groups: WireGroups):
        super().__init__(settings)

    def receive(self, keys: Sequence[RequestKey], step: int) -> Arrived:
        """See `PoolWire.receive`."""
        raise NotImplementedError

    def answer(self, key: RequestKey, step: int, rows_ND: Tensor, served_e: Sequence[int]) -> None:
        """See `PoolWire.answer`."""

    def settle(self) -> None:
        """See `PoolWire.settle`."""
