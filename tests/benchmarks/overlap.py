"""Lanes against lock step: one trunk rank and one pool rank, a core each, the same job going to and fro between plans.

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

from tests.benchmarks.report import print_report, ratios
from tests.distributed import run_ranks
from tests.training import tokens
from trainer.config import Recipe
from trainer.schedule import Schedule

LANES = (1, 2, 4)
STEPS_A_ROUND = 2


def recipe(precision: str, folder: str) -> Recipe:
    """8 layers, hidden 256, one pool of 64 experts, whose sizes make both sides about equally long here."""
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
                "global_batch": 64,
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
    """On every rank: seconds of a step under each plan, and the share of it spent waiting, round by round."""
    from trainer.data.batches import SequenceStream
    from trainer.job import Job, read_launch
    from trainer.pool_rank import PoolRank
    from trainer.train import agreed_placement, optimizer_step
    from trainer.trunk_rank import TrunkRank

    job = Job(job_recipe, read_launch())
    data = tokens(job_recipe)
    placement = agreed_placement(job, job_recipe, None)
    assert placement
    role: TrunkRank | PoolRank
    if job.is_trunk:
        role = TrunkRank(job_recipe, job, placement, SequenceStream(data, 0), SequenceStream(data, None))
    else:
        role = PoolRank(job_recipe, job, placement)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[job.rank % len(cores)]})  # this thread only: gloo's threads stay free
    plans = {lanes: Schedule(_staggered(job_recipe, lanes > 1), lanes, job.schedule.costs).step for lanes in LANES}
    seconds: dict[int, list[float]] = {lanes: [] for lanes in LANES}
    waits: dict[int, list[float]] = {lanes: [] for lanes in LANES}
    step = 0
    for number in range(rounds + 1):
        for lanes in LANES:
            role.plan = plans[lanes]
            job.barrier()
            started, waited = time.perf_counter(), role.seconds_waiting
            for _ in range(STEPS_A_ROUND):
                optimizer_step(job, role, step)
                step += 1
            took = time.perf_counter() - started
            if number:  # the first round warms up
                seconds[lanes].append(took)
                waits[lanes].append((role.seconds_waiting - waited) / took)
    job.close()
    predicted = {lanes: (plan.seconds, plan.pool_busy) for lanes, plan in plans.items()}
    return {"seconds": seconds, "waits": waits, "predicted": predicted}


def _staggered(job_recipe: Recipe, stagger: bool) -> Recipe:
    parallel = job_recipe.parallel.model_copy(update={"stagger": stagger})
    return job_recipe.model_copy(update={"parallel": parallel})


@click.command()
@click.option("--rounds", default=8, show_default=True, help="Interleaved rounds; about 25 s each.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def main(rounds: int, as_json: bool) -> None:
    """Measure lanes against lock step in fp32 and bf16."""
    results: dict[str, list[float]] = {}
    notes = []
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            trunk, pool = run_ranks(2, measure, recipe(precision, folder), rounds, time_limit=3600.0)
        seconds = trunk["seconds"]
        for lanes in LANES[1:]:
            name = (
                "lanes_over_lockstep"
                if (precision, lanes) == ("fp32", 2)
                else f"lanes{lanes}_over_lockstep_{precision}"
            )
            results[name] = ratios(seconds[1], seconds[lanes])
        for lanes in LANES:
            tokens_a_second = 64 * 128 * STEPS_A_ROUND / statistics.median(seconds[lanes])
            predicted = trunk["predicted"][1][0] / trunk["predicted"][lanes][0]
            idle = [statistics.median(side["waits"][lanes]) for side in (trunk, pool)]
            notes.append(
                f"{precision}, {lanes} lanes: {tokens_a_second:,.0f} tokens/s, "
                f"trunk waits {idle[0]:.0%} of the step, pool {idle[1]:.0%}; "
                f"the simulator predicted {predicted:.2f} times lock step from nominal costs"
            )
    print_report(
        "Lanes over lock step, 1 trunk + 1 pool rank", "python -m tests.benchmarks.overlap", results, notes, as_json
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
