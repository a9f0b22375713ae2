"""How a step changes with its schedule and with the placement of the experts, at an even or at a recorded load."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pool.placement import Placement, ShardSplit, balanced, contiguous, moments, recommend_shards
from pool.schedule import PoolSchedule, lockstep_schedule
from pool.schedule_timing import StepTiming, shard_loads, time_schedule
from trainer.checkpoint import format as checkpoint
from trainer.common.errors import UserError, os_reason
from trainer.common.format import percent, plural, seconds
from trainer.common.safe_read import read_array
from trainer.common.tables import new_table, print_tables
from trainer.config.recipe import Recipe
from trainer.planning.lanes import deferred_requests, runs_in_order
from trainer.planning.memory import estimate_memory, pool_row_bytes
from trainer.planning.schedule import ScheduleSpec

LANES = (1, 2, 3, 4)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """A step with one schedule and one placement of the experts.

    Attributes:
        way: "lock step", or the number of lanes.
        placed: Whether the experts are placed for the load.
        seconds: Time of a step up to its last gradient, in the unit of the costs.
        slowdown: That time over the work of the busier role alone, or of both where every rank has both.
        trunk_busy, pool_busy: Shares of the step during which each role works, as means over its ranks.
        imbalance: Work of the busiest pool rank over the mean.
        requests_a_slot: Mean number of requests that the pool serves in one launch.
        trunk_bytes, pool_bytes: Estimated memory of the fullest rank of each role; equal where every rank has both.
    """

    way: str
    placed: bool
    seconds: float
    slowdown: float
    trunk_busy: float
    pool_busy: float
    imbalance: float
    requests_a_slot: float
    trunk_bytes: int
    pool_bytes: int


def read_loads(path: Path, recipe: Recipe) -> Counts:
    """Read assignments by layer and global expert (L, M) from a run's newest checkpoint, or from a .npy file.

    A file may have micro-batches as its first dimension, (N, L, M); they are summed.

    Raises:
        UserError: There are none, or they are those of another model.
    """
    file = path
    if os.path.isdir(path):
        found = checkpoint.newest(path / "checkpoints")
        if found is None:
            raise UserError(f"--loads {path}: has no checkpoint in {path / 'checkpoints'}")
        file = found[1] / checkpoint.LOAD_FILE
    try:
        load: Counts = read_array(file)
    except OSError as error:
        raise UserError(f"--loads {file}: cannot be read ({os_reason(error)})") from None
    except ValueError as error:
        raise UserError(f"--loads {file}: not a .npy file of counts ({error})") from None
    wanted = (recipe.model.layers, recipe.pool.experts)
    integers = np.issubdtype(load.dtype, np.integer)
    if load.ndim not in (2, 3) or load.shape[-2:] != wanted or not integers or (load < 0).any():
        raise UserError(
            f"--loads {file}: {load.dtype} {load.shape}: must be non-negative integers by layer and expert, {wanted} "
            f"for this recipe"
        )
    load = load.astype(np.int64)
    return load if load.ndim == 2 else load.sum(0)


def what_if(spec: ScheduleSpec, load_LM: Counts | None) -> list[Variant]:
    """Time a step in lock step, with 1 to 4 lanes, and with the recipe's own lanes.

    Args:
        spec: The recipe's schedule, of a layout with pool ranks.
        load_LM: Counts from `read_loads`; the variants are then repeated with the experts placed for them. None is an
            even load.
    """
    recipe, topology = spec.recipe, spec.recipe.grid
    lanes = {n for n in LANES if n <= recipe.micro_batches and not runs_in_order(recipe)} | {spec.lanes}
    shape = topology.trunk_ranks, recipe.micro_batches, recipe.model.layers
    schedules = {"lock step": lockstep_schedule(*shape, every_rank=topology.every_rank)}
    schedules |= {plural(n, "lane"): replace(spec, lanes=n).step for n in sorted(lanes)}
    return [
        _variant(recipe, way, bool(placed), schedule, _time(spec, schedule, load_LM, placement))
        for placed, placement in enumerate(_placements(spec, load_LM))
        for way, schedule in schedules.items()
    ]


def record_own_step(spec: ScheduleSpec, load_LM: Counts | None) -> StepTiming:
    """Time the recipe's own schedule and placement, and record what each rank does."""
    placements = _placements(spec, load_LM)
    placement = placements[-1] if spec.recipe.pool.placement == "auto" else placements[0]
    return _time(spec, spec.step, load_LM, placement, record=True)


def recommend_splits(recipe: Recipe, load_LM: Counts | None) -> list[ShardSplit]:
    """Imbalance of the load by number of shards, with the experts placed for it; empty for an even load."""
    if load_LM is None:
        return []
    import torch

    return recommend_shards(torch.from_numpy(load_LM), recipe.grid.pool_ranks, recipe.model.groups)


def _placements(spec: ScheduleSpec, load_LM: Counts | None) -> list[Placement]:
    """The contiguous placement and, with a load, the one that balances it in the recipe's own schedule."""
    recipe, grid = spec.recipe, spec.recipe.grid
    groups, shards = recipe.model.groups, grid.expert_parallel
    placements = [contiguous(recipe.pool.experts, groups, shards)]
    if load_LM is not None:
        import torch

        moments_WL = moments(spec.step.slots, grid, recipe.model.layers)
        placements.append(balanced(torch.from_numpy(load_LM), shards, groups, moments_WL))
    return placements


def _time(
    spec: ScheduleSpec, schedule: PoolSchedule, load_LM: Counts | None, placement: Placement, record: bool = False
) -> StepTiming:
    load_LS = None if load_LM is None else shard_loads(load_LM, placement)
    recipe = spec.recipe
    most = deferred_requests(recipe)
    return time_schedule(schedule, recipe.grid, recipe.model.layers, spec.costs, load_LS, record, most_deferred=most)


def _variant(recipe: Recipe, way: str, placed: bool, schedule: PoolSchedule, step: StepTiming) -> Variant:
    trunk_busy, pool_busy = float(step.trunk_busy_T.mean()), float(step.pool_busy_P.mean())
    served = [len(slot) for slot in schedule.slots if slot]
    trunk, pool = (estimate_memory(recipe, int(step.peak_open_T.max())) * 2)[:2]
    kept_bytes, deferred_bytes = pool_row_bytes(recipe)
    rows = recipe.train.micro_batch * recipe.model.seq_len * recipe.router.top_k / recipe.grid.expert_parallel
    kept = rows * kept_bytes * float(step.peak_kept_P.max())
    deferred = min(pool.stash, rows * deferred_bytes * float(step.peak_deferred_P.max()))
    pool = replace(pool, expert_activations=round(kept), stash=round(deferred))
    both = recipe.grid.every_rank
    return Variant(
        way=way,
        placed=placed,
        seconds=step.seconds,
        slowdown=1 / (trunk_busy + pool_busy if both else max(trunk_busy, pool_busy)),
        trunk_busy=trunk_busy,
        pool_busy=pool_busy,
        imbalance=step.imbalance,
        requests_a_slot=sum(served) / len(served),
        trunk_bytes=pool.total if both else trunk.total,
        pool_bytes=pool.total,
    )


def print_what_if(spec: ScheduleSpec, variants: list[Variant], splits: list[ShardSplit]) -> None:
    """Print the variants, and the imbalance of other numbers of shards, as tables."""
    in_seconds, lockstep = spec.recipe.parallel.hardware is not None, variants[0]
    both = spec.recipe.grid.every_rank
    time = ["time"] if in_seconds else []
    table = new_table("Simulated step", "", *time, "speed", "over ideal", "busy", "max/mean", "per launch", "GB")
    for v in variants:
        table.add_row(
            f"{v.way}, placed" if v.placed else v.way,
            *((seconds(v.seconds),) if in_seconds else ()),
            f"{lockstep.seconds / v.seconds:.2f}x",
            f"{v.slowdown:.2f}",
            f"{percent(v.trunk_busy)}, {percent(v.pool_busy)}",
            f"{v.imbalance:.2f}",
            f"{v.requests_a_slot:.1f}",
            f"{v.pool_bytes / 1e9:.1f}" if both else f"{v.trunk_bytes / 1e9:.1f}, {v.pool_bytes / 1e9:.1f}",
        )
    tables = [table]
    if splits:
        columns = ("shards x replicas", "each layer alone", "all layers together")
        tables.append(new_table("Load of the shards (max/mean) with the experts placed", *columns))
        for split in splits:
            alone, together = split.imbalance.lockstep, split.imbalance.mixed
            tables[-1].add_row(f"{split.shards} x {split.replicas}", f"{alone:.2f}", f"{together:.2f}")
    unit = "Costs are in seconds, from the hardware's figures" if in_seconds else "Costs are nominal, in FLOPs"
    load = "the recorded one" if splits else "even"
    print_tables(
        *tables,
        notes=(
            f"{unit}; the load is {load}. This recipe uses {plural(spec.lanes, 'lane')}.",
            "speed: relative to lock step. over ideal: time of the step over the work of "
            + ("a rank alone." if both else "the busier role alone."),
            f"busy{'' if both else ' and GB'}: of trunk, pool. GB is the estimated memory of the fullest rank.",
            "max/mean: work of the busiest shard over the mean. per launch: requests that the pool serves at once.",
        ),
    )
