"""How even the work of 8 pool ranks is at any moment: in lock step, staggered, with experts placed by load, and both.

python -m tests.benchmarks.load [--run DIR | --loads FILE...] [--recipe NAME] [--json]

Nothing is timed. Routing that was recorded from a model follows the schedules of 8 trunk and 8 pool ranks, with the
pool as 8 shards x 1 replica, 4 x 2 and 2 x 4.

The routing is recorded (`tests.benchmarks.record`) from a run of the recipe, which is trained first if it is missing,
or it is read from FILE: counts by (micro-batch, layer, global expert id), integers (N, L, M) as `numpy.save` writes
them. Several files are several seeds: each counts once, by the median of its blocks. The first half of the micro-
batches is used to place the experts (`pool.placement.balanced`, each time for what the schedule has in flight
together), and only the other half is measured, in blocks of one optimizer step. Within a block, each micro-batch of
each trunk rank is a different recorded one. Its forwards and backwards send the same rows to the same experts and count
alike. Weight gradients do not count, because nobody waits for them.

The **work in flight** of a pool rank is the rows that it receives in a window of requests. A lane sends its next
request only after all shards have answered its last one. A shard can therefore be ahead of another by at most one
request of every lane of every trunk rank of its replica: within that many requests a hot shard can catch up, beyond
them the others wait for it. This gives the windows:
- lock step: slot by slot, the trunk ranks that a replica serves, with one lane each, all in the same layer. A pool
  rank that has finished waits for the end of the slot, so windows do not overlap;
- staggered: the requests of a replica in the order of the recipe's schedule (`trainer.planning.schedule`), with a
  window of trunk ranks served x lanes that slides by one request.

The imbalance is the largest work of any shard, summed over a replica's windows, over the sum of the mean work. Replicas
wait for each other only at the end of an optimizer step, so the one with the largest sum counts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from pool.placement import Placement, balanced, contiguous, moments
from pool.schedule import RequestKey, Slot, lockstep_schedule
from pool.topology import Topology
from tests.benchmarks.report import print_report
from trainer.checkpoint import format as checkpoint
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.schedule import make_schedule

Counts = NDArray[np.int64]

RANKS = 8  # of either role
SHARDS = (8, 4, 2)
MICRO_BATCHES = 4  # of a trunk rank in an optimizer step: as the paper's smallest model has with 8 trunk ranks
MODES = ("lockstep", "staggered", "placed", "both")


def in_layout(recipe: Recipe, shards: int) -> Recipe:
    """The recipe on `RANKS` trunk and `RANKS` pool ranks, with the pool split into `shards`."""
    parallel = {"trunk_ranks": RANKS, "pool_ranks": RANKS, "expert_parallel": shards, "stagger": True}
    return recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update=parallel),
            "train": recipe.train.model_copy(update={"global_batch": RANKS * MICRO_BATCHES * recipe.train.micro_batch}),
        }
    )


def requests_of(replica: int, topology: Topology, slots: Iterable[Slot]) -> list[RequestKey]:
    """What the pool ranks of a replica serve, in order."""
    return [key for slot in slots for key in slot if key.trunk_rank % topology.replicas == replica]


def by_shard(load_NLM: Counts, placement: Placement) -> Counts:
    """Rows by (micro-batch, layer, shard), (N, L, S)."""
    N, L, _ = load_NLM.shape
    return load_NLM[:, :, list(placement.order)].reshape(N, L, placement.shards, -1).sum(-1)


def work_in_windows(requests: list[RequestKey], load_NLS: Counts, trunk_ranks: int, size: int, stride: int) -> Counts:
    """Rows that each shard receives in windows of `size` requests, `stride` requests apart, (windows, S).

    Args:
        load_NLS: Rows; micro-batch m of trunk rank t is entry m x trunk_ranks + t.
    """
    rows_QS = np.stack([load_NLS[key.micro_batch * trunk_ranks + key.trunk_rank, key.layer] for key in requests])
    windows_WSq = np.lib.stride_tricks.sliding_window_view(rows_QS, size, axis=0)[::stride]
    return windows_WSq.sum(-1)


def imbalance_in_flight(work_RWS: Counts) -> float:
    """Largest sum over a replica's windows of its busiest shard's work, over that of the mean work.

    Args:
        work_RWS: Rows by replica, window and shard.
    """
    return float(work_RWS.max(2).sum(1).max() / work_RWS.mean((0, 2)).sum())


def measure(recipe: Recipe, shards: int, load_NLM: Counts) -> dict[str, list[float]]:
    """Imbalance of every mode in one layout, block by block; `load_NLM` is the whole recording."""
    recipe = in_layout(recipe, shards)
    topology, layers = recipe.grid, recipe.model.layers
    served = RANKS // topology.replicas
    half, block = len(load_NLM) // 2, RANKS * MICRO_BATCHES
    load_LM = torch.from_numpy(load_NLM[:half].sum(0))
    lockstep = lockstep_schedule(RANKS, MICRO_BATCHES, layers).slots
    schedule = make_schedule(recipe)
    staggered, open_requests = schedule.step.slots, served * schedule.lanes
    naive = contiguous(recipe.pool.experts, recipe.model.groups, shards)
    placed, both = (
        balanced(load_LM, shards, recipe.model.groups, moments(slots, topology, layers))
        for slots in (lockstep, staggered)
    )
    modes = {
        "lockstep": (lockstep, served, served, naive),
        "staggered": (staggered, open_requests, 1, naive),
        "placed": (lockstep, served, served, placed),
        "both": (staggered, open_requests, 1, both),
    }
    results = {}
    for name, (slots, size, stride, placement) in modes.items():
        sequences = [requests_of(replica, topology, slots) for replica in range(topology.replicas)]
        load_NLS = by_shard(load_NLM[half:], placement)
        results[name] = [
            imbalance_in_flight(
                np.stack([work_in_windows(q, load_NLS[start : start + block], RANKS, size, stride) for q in sequences])
            )
            for start in range(0, len(load_NLS) - block + 1, block)
        ]
    return results


def read(path: Path, recipe: Recipe) -> Counts:
    """Read a recording (N, L, M).

    Raises:
        ValueError: The file is not a recording, is one of another model, or is too short to measure a block.
    """
    try:
        load_NLM: Counts = np.load(path)
    except (ValueError, EOFError):
        raise ValueError(f"{path}: not an array that numpy.save wrote") from None
    shape = ("N", recipe.model.layers, recipe.pool.experts)
    if load_NLM.ndim != 3 or load_NLM.shape[1:] != shape[1:] or not np.issubdtype(load_NLM.dtype, np.integer):
        wanted = f"integers of shape ({', '.join(map(str, shape))}), the recipe's layers and experts"
        raise ValueError(f"{path}: {load_NLM.dtype} of shape {load_NLM.shape}; must be {wanted}")
    if len(load_NLM) < 2 * RANKS * MICRO_BATCHES:
        raise ValueError(f"{path}: {len(load_NLM)} micro-batches; must be at least {2 * RANKS * MICRO_BATCHES}")
    return load_NLM.astype(np.int64)


def report(recipe: Recipe, recordings: list[Counts], command: str, as_json: bool) -> None:
    """Measure all layouts and print them, starting with the most even one."""
    layouts: dict[str, dict[str, list[float]]] = {}
    for shards in SHARDS:
        found = [measure(recipe, shards, load_NLM) for load_NLM in recordings]
        medians = {mode: [statistics.median(results[mode]) for results in found] for mode in MODES}
        layouts[f"{shards}x{RANKS // shards}"] = medians if len(recordings) > 1 else found[0]
    best = min(layouts, key=lambda layout: statistics.median(layouts[layout]["both"]))
    results = {f"imbalance_{mode}": layouts[best][mode] for mode in MODES}
    results |= {f"{layout}_{mode}": layouts[layout][mode] for layout in layouts for mode in MODES}
    N, L, M = recordings[0].shape
    fullest = ", ".join(f"{load.sum((0, 1)).max() * M / load.sum():.1f}" for load in recordings)
    notes = [
        f"the first four rows are of the layout that is most even with both: {best} (shards x replicas)",
        f"8 contiguous shards in lock step, for comparison: {statistics.median(layouts['8x1']['lockstep']):.2f}",
        f"{N} recorded micro-batches of {L} layers and {M} experts: the first half places the experts, the other is "
        f"measured in blocks of one optimizer step ({RANKS} trunk ranks x {MICRO_BATCHES} micro-batches)",
        f"{RANKS} trunk and {RANKS} pool ranks; staggered uses the recipe's lanes, lock step uses one",
        f"load of the fullest expert over the mean, by recording: {fullest}",
    ]
    if len(recordings) > 1:
        notes.append("rounds: recordings, each by the median of its blocks")
    print_report("Work in flight of the pool ranks, max / mean", command, results, notes, as_json)


def trained_run(recipe_name: str, run: Path) -> Path:
    """The folder of a finished run, which is trained now if it is missing."""
    if checkpoint.newest(run / "checkpoints") is None:
        arguments = [sys.executable, "-m", "trainer", "train", recipe_name, "--set", f"run.dir={run}"]
        subprocess.run(arguments, check=True, timeout=3600)
    return run


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path), help="A finished run; default: the recipe's, trained if missing."
)
@click.option(
    "--loads",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recorded counts by (micro-batch, layer, global expert id), saved by numpy; several for several seeds.",
)
@click.option("--recipe", "recipe_name", default="quickstart", show_default=True, help="Recipe of the model.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(run: Path | None, loads: tuple[Path, ...], recipe_name: str, as_json: bool) -> None:
    """Measure how even the work of the pool ranks is, on recorded routing.

    \b
    Example:
      python -m tests.benchmarks.load --json
    """
    recipe = load_recipe(recipe_name)
    command = f"python -m tests.benchmarks.load --recipe {recipe_name}"
    command += "".join(f" --loads {path.name}" for path in loads)
    try:
        if loads:
            recordings = [read(path, recipe) for path in loads]
        else:
            from tests.benchmarks.record import record

            recordings = [record(trained_run(recipe_name, run or Path(recipe.run.dir)), 256)]
        report(recipe, recordings, command, as_json)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


if __name__ == "__main__":
    main()
