"""What a rank's hardware can do, from data sheets or measured profiles, and how long a recipe's work takes on it.

Seconds are FLOPs over (peak x share of the peak that such work reaches), and bytes over bandwidth. No torch here.
"""

from __future__ import annotations

import difflib
import math
import os
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
from trainer.planning.model_costs import FP32, compute_bytes, count_flops, count_parameters, served_trunk_ranks

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)


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
    assumptions: tuple[str, ...] = ()

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
    "plus the time for its bytes.",
)


def _data_sheet(name: str, fp32: float, bf16: float, memory: float, memory_bandwidth: float, nvlink: float) -> Hardware:
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
        assumptions=(
            f"{name}: dense peaks (fp32 without TF32), memory and NVLink are from NVIDIA's data sheet.",
            *_ASSUMED,
        ),
    )


# Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM) and "A100 80GB" (SXM).
# bf16 is without sparsity; NVLink is half of the sheet's number, which counts both ways.
DATA_SHEETS = {
    "h100": _data_sheet("h100", 67e12, 989e12, 80e9, 3.35e12, 450e9),
    "h200": _data_sheet("h200", 67e12, 989e12, 141e9, 4.8e12, 450e9),
    "a100": _data_sheet("a100", 19.5e12, 312e12, 80e9, 2.04e12, 300e9),
}


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
    """Return the hardware with another speed of a rank's link, in Gbit/s each way.

    Raises:
        UserError: The speed is not a number above 0.
    """
    if not (math.isfinite(gbit_per_s) and gbit_per_s > 0):
        raise UserError(f"--interconnect {gbit_per_s:g}: must be a number of Gbit/s above 0")
    return replace(hardware, wire_bandwidth=gbit_per_s * 1e9 / 8)


def request_bytes(recipe: Recipe) -> float:
    """Bytes of one layer's tokens of one micro-batch, over all shards; the answer has as many."""
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    return tokens * recipe.router.top_k * recipe.model.hidden * compute_bytes(recipe)


def costs_in_seconds(recipe: Recipe, hardware: Hardware, lanes: int) -> Costs:
    """Compute how long the pieces of a micro-batch take, in seconds, at an even load over the shards.

    A transfer takes as long as the slower side needs: a trunk rank sends to all shards at once, and a pool rank's link
    is shared by the trunk ranks that it serves. Where every rank has both roles, what is for its own shard stays.

    Args:
        lanes: Micro-batches in flight. A single one's requests need not be merged on a shard that serves no other rank.
    """
    flops, rates, topology = count_flops(recipe), hardware.rates(recipe.train.precision), recipe.grid
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    rows = tokens * recipe.router.top_k / topology.expert_parallel
    shard = count_parameters(recipe).pool / topology.expert_parallel
    sent = request_bytes(recipe)
    slower_side = max(sent, sent / topology.expert_parallel * served_trunk_ranks(recipe))
    if not topology.dedicated:
        slower_side = sent * (topology.expert_parallel - 1) / topology.expert_parallel
    payload = slower_side / hardware.wire_bandwidth
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
        transfer=hardware.wire_latency + payload if payload else 0.0,
        payload=payload,
        weights=weights if hardware.launch else 0.0,
        flush=kernels.flush_bytes(shard) * beside,
        trunk_launch=layer.launches * hardware.launch,
        head_launch=head.launches * hardware.launch,
        slot_launch=experts.launches * hardware.launch,
    )


def step_end(recipe: Recipe, hardware: Hardware) -> float:
    """Compute the seconds from the last gradient to the new weights, on the slower role or for one after the other.

    A ring over a role's n ranks sends 2 (n - 1) / n of the fp32 gradients. AdamW reads the weight, the gradient and two
    moments and writes all but the gradient; with ZeRO 1 and above each rank updates its part.
    """
    parameters, topology, p = count_parameters(recipe), recipe.grid, recipe.parallel

    def role(parameters: float, ranks: int, zero: int) -> float:
        reduced = 2 * (ranks - 1) / ranks * FP32 * parameters / hardware.wire_bandwidth
        return reduced + 7 * FP32 * parameters / (ranks if zero else 1) / hardware.memory_bandwidth

    trunk = role(parameters.trunk, topology.trunk_ranks, p.trunk_zero)
    pool = role(parameters.pool / topology.expert_parallel, topology.replicas, p.pool_zero)
    return max(trunk, pool) if topology.dedicated else trunk + pool
