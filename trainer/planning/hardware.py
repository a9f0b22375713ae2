"""What a rank can do: data sheets and measured profiles, and what a recipe's work lasts on it. No torch here.

Seconds are FLOPs over (peak x share of the peak that such work reaches), and bytes over bandwidth.
"""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pool.schedule_builder import Costs
from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.planning.model_costs import FP32, count_flops, count_parameters

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Rates:
    """Arithmetic of one rank in one precision.

    Attributes:
        flops: peak of dense products, FLOP/s.
        trunk, head, experts: share of the peak that a trunk layer (attention, router, permutation, combine), the head
            (with loss and embedding), and experts with rows enough reach, forward and backward.
    """

    __pydantic_config__ = _STRICT

    flops: Above0
    trunk: Share
    head: Share
    experts: Share


@dataclass(frozen=True)
class Hardware:
    """One rank of a job and its link.

    Attributes:
        memory: bytes that a rank may fill.
        memory_bandwidth: bytes/s, read or written.
        launch_latency: seconds of a merged launch of the experts, however small.
        wire_latency: seconds of an empty request's way, one way.
        wire_bandwidth: bytes/s of a rank, each way.
        assumptions: what here is not measured and not from a data sheet, for people.
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
    assumptions: tuple[str, ...] = ()

    def rates(self, precision: Literal["fp32", "bf16"]) -> Rates:
        return self.fp32 if precision == "fp32" else self.bf16


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        precision: None where it does not matter.
        share: of the limit that `limit` names; None where there is none.
    """

    __pydantic_config__ = _STRICT

    name: str
    precision: Literal["fp32", "bf16"] | None
    value: AtLeast0
    unit: str
    share: AtLeast0 | None
    limit: str | None


@dataclass(frozen=True)
class Profile:
    """What `bench` saves: the hardware, and the figures that it follows from."""

    __pydantic_config__ = _STRICT

    hardware: Hardware
    figures: tuple[Figure, ...]

    def save(self, path: Path) -> None:
        """Write JSON; the file appears whole or not at all.

        Raises:
            UserError: it cannot be written.
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
        UserError: no such file, or a key in it is wrong.
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
            f"profile {path}: {where + ': ' if where else ''}{message}; `unipool bench` makes one"
        ) from None


_ASSUMED = (
    "Assumed, not measured: a trunk layer and the head reach 50% of the dense peak, experts 70%.",
    "Assumed, not measured: 50 us a launch of the experts, 100 us a request's way besides its bytes.",
)


def _data_sheet(name: str, fp32: float, bf16: float, memory: float, memory_bandwidth: float, nvlink: float) -> Hardware:
    def rates(flops: float) -> Rates:
        return Rates(flops, trunk=0.5, head=0.5, experts=0.7)

    return Hardware(
        name,
        fp32=rates(fp32),
        bf16=rates(bf16),
        memory=memory,
        memory_bandwidth=memory_bandwidth,
        launch_latency=50e-6,
        wire_latency=100e-6,
        wire_bandwidth=nvlink,
        assumptions=(f"{name}: peaks, memory and NVLink of NVIDIA's data sheet, dense, fp32 without TF32.", *_ASSUMED),
    )


# Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM) and "A100 80GB" (SXM).
# bf16 is without sparsity; NVLink is half of the sheet's number, which counts both ways.
DATA_SHEETS = {
    "h100": _data_sheet("h100", 67e12, 989e12, 80e9, 3.35e12, 450e9),
    "h200": _data_sheet("h200", 67e12, 989e12, 141e9, 4.8e12, 450e9),
    "a100": _data_sheet("a100", 19.5e12, 312e12, 80e9, 2.04e12, 300e9),
}


def find_hardware(name_or_path: str, key: str = "--hardware") -> Hardware:
    """A data sheet by name, or the profile in a file.

    Args:
        key: who asks, for the error.

    Raises:
        UserError: neither.
    """
    if name_or_path in DATA_SHEETS:
        return DATA_SHEETS[name_or_path]
    path = Path(name_or_path)
    if not os.path.exists(path):  # which says no where Path.exists would raise, as for a name that is too long
        known = ", ".join(DATA_SHEETS)
        close = difflib.get_close_matches(name_or_path, DATA_SHEETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {known}, or a file that `unipool bench` made"
        raise UserError(f"{key} {name_or_path}: neither a known name nor a file; {hint}")
    return load_profile(path).hardware


def request_bytes(recipe: Recipe) -> float:
    """Bytes of the tokens of one layer of one micro-batch, over all shards; its answer has as many."""
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    return tokens * recipe.router.top_k * recipe.model.hidden * _bytes_a_number(recipe)


def _bytes_a_number(recipe: Recipe) -> int:
    return 2 if recipe.train.precision == "bf16" else FP32


def served_by_a_pool_rank(recipe: Recipe) -> int:
    """Trunk ranks that the busiest pool rank serves."""
    return -(-recipe.grid.trunk_ranks // recipe.grid.replicas)


def seconds(recipe: Recipe, hardware: Hardware, interconnect: float | None = None) -> Costs:
    """Costs of one micro-batch's pieces in seconds, at an even load over the shards.

    A transfer goes at the speed of the slower side: the trunk rank sends to all shards at once, and a pool rank's link
    is shared by the trunk ranks that it serves.

    Args:
        interconnect: bytes/s of a rank each way; None: the hardware's own.
    """
    flops, rates, topology = count_flops(recipe), hardware.rates(recipe.train.precision), recipe.grid
    tokens = recipe.train.micro_batch * recipe.model.seq_len
    if recipe.model.ffn == "dense":
        trunk_layer = tokens * flops.trunk_layer / (rates.flops * rates.trunk)
        return Costs(trunk_layer, _head(recipe, hardware), pool_layer=0.0, slot=0.0, transfer=0.0)
    shard_bytes = count_parameters(recipe).pool / topology.expert_parallel * _bytes_a_number(recipe)
    sent = request_bytes(recipe)
    slower_side = max(sent, sent / topology.expert_parallel * served_by_a_pool_rank(recipe))
    transfer = hardware.wire_latency + slower_side / (interconnect or hardware.wire_bandwidth)
    return Costs(
        trunk_layer=tokens * (flops.trunk_layer + flops.router) / (rates.flops * rates.trunk),
        head=_head(recipe, hardware),
        pool_layer=tokens
        * recipe.router.top_k
        * flops.expert
        / topology.expert_parallel
        / (rates.flops * rates.experts),
        slot=hardware.launch_latency + shard_bytes / hardware.memory_bandwidth,
        transfer=0.0 if topology.colocated else transfer,
    )


def _head(recipe: Recipe, hardware: Hardware) -> float:
    rates = hardware.rates(recipe.train.precision)
    return recipe.train.micro_batch * recipe.model.seq_len * count_flops(recipe).head / (rates.flops * rates.head)


def step_end(recipe: Recipe, hardware: Hardware, interconnect: float | None = None) -> float:
    """Seconds from the last gradient to the new weights, of the slower role.

    A ring over a role's n ranks sends 2 (n - 1) / n of the fp32 gradients; AdamW reads weight, gradient and two moments
    and writes all but the gradient. At ZeRO 1 and above each rank updates its part.
    """
    parameters, topology, p = count_parameters(recipe), recipe.grid, recipe.parallel
    bandwidth = interconnect or hardware.wire_bandwidth

    def role(parameters: float, ranks: int, zero: int) -> float:
        reduced = 2 * (ranks - 1) / ranks * FP32 * parameters / bandwidth
        return reduced + 7 * FP32 * parameters / (ranks if zero else 1) / hardware.memory_bandwidth

    trunk = role(parameters.trunk, topology.trunk_ranks, p.trunk_zero)
    pool = role(parameters.pool / topology.expert_parallel, topology.replicas, p.pool_zero)
    return trunk + pool if topology.colocated else max(trunk, pool)


def bytes_a_second(gbit_per_s: float) -> float:
    """A link's speed as sold, in bytes/s.

    Raises:
        UserError: it is not a number above 0.
    """
    if not (math.isfinite(gbit_per_s) and gbit_per_s > 0):
        raise UserError(f"--interconnect {gbit_per_s:g}: must be a number of Gbit/s above 0")
    return gbit_per_s * 1e9 / 8
