"""What a rank's hardware can do, from data sheets or measured profiles, and how long a recipe's work takes on it.

Seconds are FLOPs over (peak x share of the peak that such work reaches), and bytes over bandwidth. No torch here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pool.schedule_builder import Costs
from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.planning import kernels
from trainer.planning.model_costs import compute_bytes, count_flops, count_parameters, served_trunk_ranks
from trainer.planning.network.links import Links, busiest_link

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)


_SLOWEST, _FASTEST = 1e-3, 1e6
"""Gbit/s of links for which times can be predicted."""


@dataclass(frozen=True)
class Rates:
    """Speed of a rank's arithmetic in one precision.

    Attributes:
        flops: Peak of dense products, FLOP/s.
        trunk: Share of the peak that a trunk layer (attention, router, permutation, combine) reaches in training.
        head: The same for the head with embedding and loss.
        experts: The same for experts that have enough rows.
        products_only: Whether the shares are those of products alone. What else a GPU does is then counted by the bytes
            that it moves; measured shares include it.
    """

    __pydantic_config__ = _STRICT

    flops: Above0
    trunk: Share
    head: Share
    experts: Share
    products_only: bool = False


@dataclass(frozen=True)
class Hardware:
    """One rank of a job and its link.

    Attributes:
        memory: Bytes that a rank may fill.
        memory_bandwidth: Bytes/s, read or written.
        launch_latency: Seconds that a merged launch of the experts takes at least.
        wire_latency: Seconds from a request's rows to the launch of their transfer on both sides: events, threads and
            the header.
        wire_bandwidth: Bytes/s of a rank, each way.
        launch: Seconds of the host to launch a kernel; 0 if the host itself computes.
        kernel: Seconds of the device to run an empty kernel.
        message: Seconds of a rank's host to send or receive another message at the same time: a header, and its part of
            the transfer's launch.
        hop: Seconds that a small message takes from host to host.
        node: Ranks of a node, which `wire_bandwidth` joins; 0 if it joins all ranks.
        network_bandwidth: Bytes/s of a rank to ranks of other nodes, each way; 0 with node = 0.
        assumptions: Which numbers are neither measured nor from a data sheet, as sentences for people.
    """

    __pydantic_config__ = _STRICT

    name: str
    fp32: Rates
    bf16: Rates
    memory: Above0
    memory_bandwidth: Above0
    launch_latency: AtLeast0
    wire_latency: AtLeast0
    wire_bandwidth: Above0
    launch: AtLeast0 = 0.0
    kernel: AtLeast0 = 0.0
    message: AtLeast0 = 0.0
    hop: AtLeast0 = 0.0
    node: Annotated[int, Field(ge=0)] = 0
    network_bandwidth: AtLeast0 = 0.0
    assumptions: tuple[str, ...] = ()

    @property
    def links(self) -> Links:
        """The links of a rank."""
        return Links(self.node, self.wire_bandwidth, self.network_bandwidth)

    def rates(self, precision: Literal["fp32", "bf16"]) -> Rates:
        """Speed in one precision."""
        return self.fp32 if precision == "fp32" else self.bf16


@dataclass(frozen=True)
class Figure:
    """One measured number; `share` is what it makes up of the limit that `limit` names, if there is one."""

    __pydantic_config__ = _STRICT

    name: str
    precision: Literal["fp32", "bf16"] | None
    value: AtLeast0
    unit: str
    share: AtLeast0 | None
    limit: str | None


@dataclass(frozen=True)
class Profile:
    """What `bench` saves: the hardware, and the figures from which it was derived."""

    __pydantic_config__ = _STRICT

    hardware: Hardware
    figures: tuple[Figure, ...]

    def save(self, path: Path) -> None:
        """Write the profile as JSON; the file appears whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        text = dumps(asdict(self), indent=1) + "\n"
        try:
            atomic_write(path, lambda temporary: temporary.write_text(text))
        except OSError as error:
            raise UserError(f"profile {path}: cannot be written ({error.strerror})") from None


_PROFILE = TypeAdapter(Profile)


def load_profile(path: Path) -> Profile:
    """Read what `Profile.save` wrote.

    Raises:
        UserError: The file cannot be read, or one of its keys is wrong.
    """
    try:
        return _PROFILE.validate_json(read_text(path))
    except Unreadable as error:
        raise UserError(f"profile {path}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("Input should be", "must be")
        raise UserError(
            f"profile {path}: {where + ': ' if where else ''}{message}; make a new profile with `unipool bench`"
        ) from None


_PRODUCTS = 0.6
_MEMORY = 0.85
_LAUNCH, _KERNEL = 5e-6, 2e-6
_HAND_OVER, _MESSAGE, _HEADER = 20e-6, 15e-6, 30e-6
_WIRE_LATENCY = 2 * (_HAND_OVER + _MESSAGE) + _HEADER

_ASSUMED = (
    f"Assumed, not measured: products reach {_PRODUCTS:.0%} of the dense peak, all else {_MEMORY:.0%} of the memory's "
    "bandwidth.",
    f"Assumed, not measured: a kernel takes the host {_LAUNCH * 1e6:.0f} us to launch and the device at least "
    f"{_KERNEL * 1e6:.0f} us.",
    f"Assumed, not measured: a request takes {_WIRE_LATENCY * 1e6:.0f} us (on either side {_HAND_OVER * 1e6:.0f} us "
    f"from thread to thread and {_MESSAGE * 1e6:.0f} us to launch the transfer, {_HEADER * 1e6:.0f} us for the header) "
    f"plus the time for its bytes, and {_MESSAGE * 1e6:.0f} us of the host at either end for each further shard.",
    f"Assumed, not measured: {_HEADER * 1e6:.0f} us for each round in which the hosts add up numbers of a step.",
)
_NODE = 8


def _data_sheet(
    name: str, fp32: float, bf16: float, memory: float, memory_bandwidth: float, nvlink: float, network: float
) -> Hardware:
    rates = Rates(fp32, trunk=_PRODUCTS, head=_PRODUCTS, experts=_PRODUCTS, products_only=True)
    return Hardware(
        name,
        fp32=rates,
        bf16=replace(rates, flops=bf16),
        memory=memory,
        memory_bandwidth=_MEMORY * memory_bandwidth,
        launch_latency=0.0,
        wire_latency=_WIRE_LATENCY,
        wire_bandwidth=nvlink,
        launch=_LAUNCH,
        kernel=_KERNEL,
        message=_MESSAGE,
        hop=_HEADER,
        node=_NODE,
        network_bandwidth=network,
        assumptions=(
            f"{name}: dense peaks (fp32 without TF32), memory and NVLink are from NVIDIA's data sheets, and so are "
            f"nodes of {_NODE} devices, each of which has a link of {8e-9 * network:.0f} Gbit/s to other nodes.",
            *_ASSUMED,
        ),
    )


# Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM) and "A100 80GB" (SXM).
# bf16 is without sparsity; NVLink is half of the sheet's number, which counts both ways. Nodes are those of the data
# sheets "DGX H100" and "DGX H200" (8 GPUs, 8 ConnectX-7 of 400 Gbit/s) and "DGX A100" (8 GPUs, 8 ConnectX-6 of 200).
DATA_SHEETS = {
    "h100": _data_sheet("h100", 67e12, 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": _data_sheet("h200", 67e12, 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "a100": _data_sheet("a100", 19.5e12, 312e12, 80e9, 2.04e12, 300e9, 25e9),
}


# As other projects quote NVIDIA's data sheets; only those named above were read. B200's is that of a DGX, and bf16 is
# without sparsity. The first whose words are all in a device's name counts.
_PEAKS = (
    (("H200", "NVL"), {"fp32": 60e12, "bf16": 835e12}),
    (("H200",), {"fp32": 67e12, "bf16": 989e12}),
    (("H100", "NVL"), {"fp32": 60e12, "bf16": 835e12}),
    (("H100", "PCIe"), {"fp32": 51e12, "bf16": 756e12}),
    (("H100",), {"fp32": 67e12, "bf16": 989e12}),
    (("A100",), {"fp32": 19.5e12, "bf16": 312e12}),
    (("NVIDIA", "B200"), {"bf16": 2250e12}),
)


def device_peak(name: str, precision: Literal["fp32", "bf16"]) -> float | None:
    """Return the peak FLOP/s of a device by its name, as torch has it; None if it is not known, or a part of a GPU."""
    words = set(re.split(r"[ -]", name))
    if "MIG" in words:
        return None
    return next((peaks.get(precision) for wanted, peaks in _PEAKS if words.issuperset(wanted)), None)


def peak_flops(recipe: Recipe, devices: Sequence[str]) -> float | None:
    """Return the peak FLOP/s of all ranks together in `train.precision`; None if it is not known.

    Args:
        devices: The name of each rank's device; it counts unless the recipe says on which hardware it runs.
    """
    precision = recipe.train.precision
    if recipe.parallel.hardware:
        hardware = find_hardware(recipe.parallel.hardware, "parallel.hardware =")
        return recipe.grid.world_size * hardware.rates(precision).flops
    peaks = [device_peak(name, precision) for name in devices]
    known = [peak for peak in peaks if peak]
    return sum(known) if known and len(known) == len(peaks) else None


def find_hardware(name_or_path: str, key: str = "--hardware") -> Hardware:
    """Return the data sheet with a name, or the profile in a file; errors name the option or recipe `key`.

    Raises:
        UserError: It is neither.
    """
    if name_or_path in DATA_SHEETS:
        return DATA_SHEETS[name_or_path]
    path = Path(name_or_path)
    if not os.path.exists(path):  # returns False where Path.exists raises, as for a name that is too long
        known = ", ".join(DATA_SHEETS)
        close = difflib.get_close_matches(name_or_path, DATA_SHEETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {known}, or a profile made by `unipool bench`"
        raise UserError(f"{key} {name_or_path}: neither a known name nor a file; {hint}")
    return load_profile(path).hardware


def with_link(hardware: Hardware, gbit_per_s: float) -> Hardware:
    """Return the hardware with another speed of all links of a rank, in Gbit/s each way.

    Raises:
        UserError: The speed is not one that a link may have.
    """
    speed = _bytes_per_s("--interconnect", gbit_per_s)
    return replace(hardware, wire_bandwidth=speed, network_bandwidth=speed if hardware.node else 0.0)


def with_network(hardware: Hardware, gbit_per_s: float) -> Hardware:
    """Return the hardware with another speed of a rank's link to other nodes, in Gbit/s each way.

    Raises:
        UserError: The speed is not one that a link may have, or the hardware has no nodes.
    """
    if not hardware.node:
        raise UserError(f"--network {gbit_per_s:g}: the profile has one link for all ranks; use --interconnect")
    return replace(hardware, network_bandwidth=_bytes_per_s("--network", gbit_per_s))


def _bytes_per_s(option: str, gbit_per_s: float) -> float:
    if not _SLOWEST <= gbit_per_s <= _FASTEST:  # nor if it is NaN
        raise UserError(f"{option} {gbit_per_s:g}: must be a number of Gbit/s from {_SLOWEST:g} to {_FASTEST:,.0f}")
    return gbit_per_s * 1e9 / 8


def request_bytes(recipe: Recipe) -> float:
    """Bytes of one layer's tokens of one micro-batch, over all shards; the answer has as many."""
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    return tokens * recipe.router.top_k * recipe.model.hidden * compute_bytes(recipe)


def costs_in_seconds(recipe: Recipe, hardware: Hardware, lanes: int) -> Costs:
    """Compute how long the pieces of a micro-batch take, in seconds, at an even load over the shards.

    A transfer takes as long as the busiest link needs: a trunk rank sends to all shards at once, and a pool rank's
    links are shared by the trunk ranks that it serves. Where every rank has both roles, what is for its own shard
    stays. Before that the hosts handle one header after the other: those to all shards, and those of the answers of all
    shards or, where every rank has both roles, of the requests of all ranks.

    Args:
        lanes: Micro-batches in flight. A single one's requests need not be merged on a shard that serves no other rank.
    """
    flops, rates, topology = count_flops(recipe), hardware.rates(recipe.train.precision), recipe.grid
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    rows = tokens * recipe.router.top_k / topology.expert_parallel
    shard = count_parameters(recipe).pool / topology.expert_parallel
    link = busiest_link(recipe, hardware.links)
    payload = link.requests * request_bytes(recipe) / link.bandwidth if link else 0.0
    others = topology.expert_parallel - 1 if topology.dedicated else 2 * max(0, topology.expert_parallel - 2)
    compiled = kernels.is_compiled(recipe)
    layer, head = kernels.trunk_layer(recipe, compiled), kernels.head(recipe, compiled)
    experts = kernels.experts(recipe, merged=min(lanes, recipe.micro_batches) * served_trunk_ranks(recipe) > 1)
    beside = rates.products_only / hardware.memory_bandwidth  # seconds for a byte that the shares do not include

    def piece(number: float, flops: int, share: float, work: kernels.Kernels) -> float:
        launched = work.launches * hardware.kernel * rates.products_only
        return number * (flops / (rates.flops * share) + work.bytes * beside) + launched

    weights = shard * compute_bytes(recipe) / hardware.memory_bandwidth
    slot = experts.launches * hardware.kernel if hardware.launch else hardware.launch_latency + weights
    return Costs(
        trunk_layer=piece(tokens, flops.trunk_layer + flops.router, rates.trunk, layer),
        head=piece(tokens, flops.head, rates.head, head),
        pool_layer=piece(rows, flops.expert, rates.experts, replace(experts, launches=0)),
        slot=slot if shard else 0.0,
        transfer=hardware.wire_latency + others * hardware.message + payload if payload else 0.0,
        payload=payload,
        weights=weights if hardware.launch else 0.0,
        flush=kernels.flush_bytes(shard) * beside,
        trunk_launch=layer.launches * hardware.launch,
        head_launch=head.launches * hardware.launch,
        slot_launch=experts.launches * hardware.launch,
    )
