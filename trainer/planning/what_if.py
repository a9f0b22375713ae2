"""`plan --simulate`: a step in lock step and with lanes, at an even load or at one that was recorded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pool.placement import Placement, ShardSplit, balanced, contiguous, recommend_shards
from pool.schedule import PoolSchedule, lockstep_plan
from pool.schedule_builder import Costs
from pool.schedule_timing import Replay, replay, shard_loads
from trainer.checkpoint import format as checkpoint
from trainer.common.errors import UserError, os_reason
from trainer.common.safe_read import read_array
from trainer.config.recipe import Recipe
from trainer.planning.model_costs import estimate_memory, pool_row_bytes
from trainer.planning.schedule import ScheduleSpec

if TYPE_CHECKING:
    from rich.table import Table

LANES = (1, 2, 3, 4)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Prediction:
    """A step in one way of scheduling and of placing the experts.

    Attributes:
        way: "lock step", or the number of lanes.
        placed: whether the experts stand where the load wants them.
        seconds: of a step up to its last gradient, in the unit of the costs.
        slowdown: that, over the work of the busier side alone.
        trunk_busy, pool_busy: shares of the step in which either side works, the mean over its ranks.
        imbalance: work of the pool rank that has most, over the mean.
        requests_a_slot: requests that the pool serves in one launch, on average.
        trunk_bytes, pool_bytes: memory of the fullest rank of either role, estimated.
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


@dataclass(frozen=True)
class Simulation:
    """All predictions, the replay of the recipe's own schedule, and what the load says of the number of shards.

    Attributes:
        own_way: the `Prediction.way` of the recipe's own schedule.
        splits: none without a load.
    """

    predictions: tuple[Prediction, ...]
    own_way: str
    own: Replay
    splits: tuple[ShardSplit, ...]


def read_loads(path: Path, recipe: Recipe) -> Counts:
    """Assignments by layer and global expert (L, M): of a run's newest checkpoint, or of a .npy file.

    A file may have micro-batches in front, (N, L, M); they are summed.

    Raises:
        UserError: there are none, or they are another model's.
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
    whole = np.issubdtype(load.dtype, np.integer)
    if load.ndim not in (2, 3) or load.shape[-2:] != wanted or not whole or (load < 0).any():
        raise UserError(
            f"--loads {file}: {load.dtype} {load.shape}: must be counts from 0 by layer and expert, {wanted} for this "
            f"recipe"
        )
    load = load.astype(np.int64)
    return load if load.ndim == 2 else load.sum(0)


def simulate(schedule: ScheduleSpec, load_LM: Counts | None, ranks: tuple[int, ...] = ()) -> Simulation:
    """Follow the lock-step plan and those of 1 to 4 lanes, and of the recipe's own number.

    Args:
        schedule: of a layout with pool ranks.
        load_LM: as `read_loads` gives it; None is an even load.
        ranks: world ranks whose intervals the recipe's own replay is to have.
    """
    recipe = schedule.recipe
    topology, groups = recipe.grid, recipe.model.groups
    plans = {"lock step": _lockstep(schedule)}
    in_order = recipe.parallel.trunk_zero == 3 and topology.trunk_ranks > 1  # see trainer.config.recipe
    lanes = [n for n in LANES if n <= recipe.micro_batches and not in_order]
    plans |= {f"{n} lanes": replace(schedule, lanes=n).step for n in sorted({*lanes, schedule.lanes})}
    own_way = f"{schedule.lanes} lanes"
    placements = [contiguous(recipe.pool.experts, groups, topology.expert_parallel)]
    splits: tuple[ShardSplit, ...] = ()
    if load_LM is not None:
        import torch

        counts = torch.from_numpy(load_LM)
        placements.append(balanced(counts, topology.expert_parallel, groups))
        splits = tuple(recommend_shards(counts, topology.pool_ranks, groups))
    predictions = []
    own: Replay | None = None
    for placed, placement in enumerate(placements):
        for way, plan in plans.items():
            chosen = way == own_way and bool(placed) == (recipe.pool.placement == "auto" and len(placements) > 1)
            run = _follow(schedule, plan, load_LM, placement, ranks if chosen else ())
            own = run if chosen else own
            predictions.append(_prediction(recipe, way, bool(placed), plan, run))
    assert own is not None
    return Simulation(tuple(predictions), own_way, own, splits)


def _lockstep(schedule: ScheduleSpec) -> PoolSchedule:
    """One micro-batch after the other, all trunk ranks of a layer together, weight gradients at the end."""
    layers, ranks = schedule.recipe.model.layers, schedule.recipe.grid.trunk_ranks
    micro_batches = schedule.recipe.micro_batches
    lane_order = ((0,) * ((2 * layers + 1) * micro_batches),) * ranks
    return PoolSchedule(tuple(lockstep_plan(ranks, micro_batches, layers)), lane_order, 0.0, 0.0, 0.0)


def _follow(
    schedule: ScheduleSpec, plan: PoolSchedule, load_LM: Counts | None, placement: Placement, ranks: tuple[int, ...]
) -> Replay:
    load_LS = None if load_LM is None else shard_loads(load_LM, placement)
    costs: Costs = schedule.costs
    return replay(plan, schedule.recipe.grid, schedule.recipe.model.layers, costs, load_LS, ranks)


def _prediction(recipe: Recipe, way: str, placed: bool, plan: PoolSchedule, run: Replay) -> Prediction:
    trunk_busy, pool_busy = float(run.trunk_busy_T.mean()), float(run.pool_busy_P.mean())
    served = [len(slot) for slot in plan.slots if slot]
    trunk, pool = estimate_memory(recipe, int(run.peak_open_T.max()))
    kept, stashed = pool_row_bytes(recipe)
    rows = recipe.train.micro_batch * recipe.model.seq_len * recipe.router.top_k / recipe.grid.expert_parallel
    held = rows * kept * float(run.peak_kept_P.max())
    stash = min(recipe.pool.stash_bytes, rows * stashed * float(run.peak_stash_P.max()))
    return Prediction(
        way=way,
        placed=placed,
        seconds=run.seconds,
        slowdown=1 / max(trunk_busy, pool_busy),
        trunk_busy=trunk_busy,
        pool_busy=pool_busy,
        imbalance=run.imbalance,
        requests_a_slot=sum(served) / len(served),
        trunk_bytes=trunk.total,
        pool_bytes=round(pool.total - pool.expert_activations - pool.stash + held + stash),
    )


def print_simulation(s: Simulation, in_seconds: bool) -> None:
    """Tables on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_ways_table(s, in_seconds))
    if s.splits:
        console.print(_splits_table(s.splits))
    unit = "Costs in seconds from the hardware's figures" if in_seconds else "Nominal costs by FLOPs"
    load = "the recorded load" if s.splits else "an even load"
    for line in (
        f"{unit}, {load}; this recipe has {s.own_way}.",
        "Speed is over lock step; ideal is the busier side's work alone; memory is estimated.",
        "Two numbers: trunk, pool. max/mean: work of the pool ranks. launch: requests in one. GB: memory.",
    ):
        console.print(f"[dim]- {line}[/dim]")


def _ways_table(s: Simulation, in_seconds: bool) -> Table:
    from trainer.planning.report import human, new_table

    first = s.predictions[0]
    columns = ("seconds",) if in_seconds else ()
    ways = new_table("Simulated step", "", *columns, "speed", "over ideal", "busy", "max/mean", "launch", "GB")
    for p in s.predictions:
        ways.add_row(
            f"{p.way}, placed" if p.placed else p.way,
            *((human(p.seconds),) if in_seconds else ()),
            f"{first.seconds / p.seconds:.2f}x",
            f"{p.slowdown:.2f}",
            f"{p.trunk_busy:.0%}, {p.pool_busy:.0%}",
            f"{p.imbalance:.2f}",
            f"{p.requests_a_slot:.1f}",
            f"{p.trunk_bytes / 1e9:.1f}, {p.pool_bytes / 1e9:.1f}",
        )
    return ways


def _splits_table(splits: tuple[ShardSplit, ...]) -> Table:
    from trainer.planning.report import new_table

    rows = new_table(
        "Load of the shards, max/mean, experts placed", "shards x replicas", "layer by layer", "all layers"
    )
    for split in splits:
        rows.add_row(
            f"{split.shards} x {split.replicas}", f"{split.imbalance.lockstep:.2f}", f"{split.imbalance.mixed:.2f}"
        )
    return rows
