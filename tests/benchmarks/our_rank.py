"""A rank of our own trainer as a contender: `python -m tests.benchmarks.our_rank RECIPE.yaml`, started by `step`."""

from __future__ import annotations

import sys

from tests.benchmarks.our_role import make_role
from tests.benchmarks.peer_protocol import pin, serve, take_stdout
from tests.training import optimizer_step
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import read_launch, rendezvous
from trainer.config.recipe import load_recipe
from trainer.engine.deterministic import use_deterministic_kernels
from trainer.planning.schedule import make_schedule


def main(path: str) -> None:
    """Take optimizer steps on request."""
    answer = take_stdout()
    use_deterministic_kernels()  # their cost is part of a step
    recipe = load_recipe(path)
    job = Job(recipe, rendezvous(recipe, read_launch()), make_schedule(recipe).lanes)
    role = make_role(recipe, job)
    if job.topology.world_size > 1:
        pin(job.rank)
    done = 0

    def step(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            optimizer_step(job, role, done)
            done += 1

    job.barrier()
    serve(answer, step)


if __name__ == "__main__":
    main(sys.argv[1])
