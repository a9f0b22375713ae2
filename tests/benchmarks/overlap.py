"""Lanes compared with lock step: one trunk rank and one pool rank on a core each, in a job that alternates schedules.

python -m tests.benchmarks.overlap [--rounds 8] [--json]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import click
import torch

from pool.schedule import lockstep_schedule
from pool.schedule_timing import time_schedule
from tests.benchmarks.report import print_report, ratios
from tests.distributed import join, run_ranks
from tests.training import optimizer_step
from trainer.common.format import plural
from trainer.config.recipe import Recipe
from trainer.planning.schedule import ScheduleSpec, make_schedule

LANES = (1, 2, 4)
LOCK_STEP = 0
"""Stands for the lock-step schedule, which serves one micro-batch after the other and computes all weight gradients at
the end. One lane is faster, because its pool computes them while it waits."""
MICRO_BATCHES = 16
TOKENS = MICRO_BATCHES * 8 * 128


def recipe(precision: str, folder: str) -> Recipe:
    """8 layers, hidden 256 and one pool of 64 experts; with these sizes both roles take about equally long here."""
    return Recipe.model_validate(
        {
            "run": {"dir": folder},
            "model": {
                "layers": 8,
                "hidden": 256,
                "heads": 4,
                "kv_heads": 4,
                "ffn_hidden": 384,
                "vocab": 2048,
                "seq_len": 128,
            },
            "pool": {"experts": 64},
            "balance": {"pool": 1e-2, "scores": "normalized"},
            "train": {
                "steps": 1000,
                "global_batch": 8 * MICRO_BATCHES,
                "micro_batch": 8,
                "lr": 1e-4,
                "min_lr": 1e-5,
                "precision": precision,
            },
            "data": {"source": "unused", "tokenizer": "unused"},
            "parallel": {"pool_ranks": 1, "lanes": max(LANES), "trunk_zero": 0, "pool_zero": 0},
        }
    )


def measure(job_recipe: Recipe, rounds: int) -> dict[str, Any]:
    """On every rank, measure the seconds of a step with each schedule and the share spent waiting, round by round."""
    from tests.benchmarks.our_role import make_role

    job = join(job_recipe)
    role = make_role(job_recipe, job)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[job.rank % len(cores)]})  # this thread only: gloo's threads stay free
    costs, layers = make_schedule(job_recipe).costs, job_recipe.model.layers
    schedules = {lanes: ScheduleSpec(job_recipe, lanes, costs).step for lanes in LANES}
    schedules[LOCK_STEP] = lockstep_schedule(1, MICRO_BATCHES, layers)
    seconds: dict[int, list[float]] = {lanes: [] for lanes in schedules}
    waits: dict[int, list[float]] = {lanes: [] for lanes in schedules}
    step = 0
    for number in range(rounds + 1):
        for lanes, schedule in schedules.items():
            role.plan = schedule
            job.barrier()
            started, waited = time.perf_counter(), role.clock.total.waiting
            optimizer_step(job, role, step)
            step += 1
            took = time.perf_counter() - started
            if number:  # the first round warms up
                seconds[lanes].append(took)
                waits[lanes].append((role.clock.total.waiting - waited) / took)
    job.close()
    predicted = {
        lanes: time_schedule(schedule, job_recipe.grid, layers, costs).seconds for lanes, schedule in schedules.items()
    }
    return {"seconds": seconds, "waits": waits, "predicted": predicted}


@click.command()
@click.option("--rounds", default=8, show_default=True, help="Interleaved rounds; about 25 s each.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(rounds: int, as_json: bool) -> None:
    """Compare lanes with lock step in fp32 and bf16."""
    results: dict[str, list[float]] = {}
    notes = []
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            trunk, pool = run_ranks(2, measure, recipe(precision, folder), rounds, time_limit=3600.0)
        seconds, predicted = trunk["seconds"], trunk["predicted"]
        if precision == "fp32":
            results["lanes_over_lockstep"] = ratios(seconds[LOCK_STEP], seconds[max(LANES)])
        for lanes in LANES:
            results[f"lanes{lanes}_over_lockstep_{precision}"] = ratios(seconds[LOCK_STEP], seconds[lanes])
        for lanes in (LOCK_STEP, *LANES):
            idle = [statistics.median(side["waits"][lanes]) for side in (trunk, pool)]
            name = plural(lanes, "lane") if lanes else "lock step"
            notes.append(
                f"{precision}, {name}: {TOKENS / statistics.median(seconds[lanes]):,.0f} tokens/s, "
                f"trunk works {1 - idle[0]:.0%} of the step, pool {1 - idle[1]:.0%}; speed over one lane: predicted "
                f"from nominal costs {predicted[1] / predicted[lanes]:.2f}, measured "
                f"{statistics.median(ratios(seconds[1], seconds[lanes])):.2f}"
            )
    print_report(
        f"Lanes over lock step, 1 trunk + 1 pool rank, {MICRO_BATCHES} micro-batches per step",
        "python -m tests.benchmarks.overlap",
        results,
        notes,
        as_json,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
