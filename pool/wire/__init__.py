"""The wire: how tokens of one layer travel between a trunk rank and the shards of the pool.

A request consists of a header (kind, step, lane, micro-batch, layer, tokens of each expert of the shard) and a payload
to each shard. The answer is one payload with the same number of rows. Headers travel over a host group (gloo), so that
receive buffers are sized without touching the device. Payloads travel in the compute dtype over groups of their own; a
shard without tokens gets a header only. No other package passes tokens to process groups.

There is one contract (`pool.wire.contract`) and two transports: `pool.wire.host` for payloads in host memory, and
`pool.wire.device` for payloads on GPUs. `trunk_wire`, `pool_wire` and, for a rank that has both roles, `both_ends`
choose by the groups that they are given. What a rank sends to itself stays in the process (`pool.wire.loopback`).
Where ranks have both roles, GPUs exchange the messages of a slot together (`pool.wire.exchange`).

Every wait has a time limit, and every error names the ranks, the lane, the layer and the micro-batch. With
`WireSettings.check` both ends also check every message, and every answer has a header too (see `pool.wire.check`).
"""

from __future__ import annotations

from pool.wire.contract import Answer, Arrived, DeviceGroups, PoolWire, TrunkWire, WireError, WireGroups, WireSettings
from pool.wire.device import DevicePool, DeviceTrunk
from pool.wire.exchange import ExchangePool, ExchangeTrunk
from pool.wire.host import HostPool, HostTrunk
from pool.wire.loopback import Loopback

__all__ = [
    "Answer",
    "Arrived",
    "DeviceGroups",
    "PoolWire",
    "TrunkWire",
    "WireError",
    "WireGroups",
    "WireSettings",
    "both_ends",
    "pool_wire",
    "trunk_wire",
]


def trunk_wire(settings: WireSettings, groups: WireGroups) -> TrunkWire:
    """Return a trunk rank's end of the wire."""
    return DeviceTrunk(settings, groups) if groups.device else HostTrunk(settings, groups)


def pool_wire(settings: WireSettings, groups: WireGroups) -> PoolWire:
    """Return a pool rank's end of the wire."""
    return DevicePool(settings, groups) if groups.device else HostPool(settings, groups)


def both_ends(settings: WireSettings, groups: WireGroups) -> tuple[TrunkWire, PoolWire]:
    """Return both ends of the wire, for a rank that has both roles and uses them from one thread."""
    if groups.device:
        trunk = ExchangeTrunk(settings, groups)
        return trunk, ExchangePool(settings, groups, trunk)
    loopback = Loopback()
    return HostTrunk(settings, groups, loopback), HostPool(settings, groups, loopback)
