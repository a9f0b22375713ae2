"""A rank that takes steps on made-up tokens: python -m tests.gpu.rank FILE.json [profile|""] RECIPE KEY=VALUE ...

It writes the time and loss of each step and the memory it took, and if asked to, a picture of one more step.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.our_role import make_role
from tests.gpu.timeline import draw_step
from tests.training import optimizer_step
from trainer.bench.wire import synchronize
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import read_launch, rendezvous
from trainer.common.atomic import atomic_write
from trainer.common.gpus import load_kernels_at_start, use_many_queues
from trainer.common.strict_json import dumps
from trainer.config.recipe import load_recipe
from trainer.engine.deterministic import use_deterministic_kernels
from trainer.planning.schedule import make_schedule

ENVIRONMENT = ("CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_MAX_P2P_NCHANNELS", "PYTORCH_ALLOC_CONF")
"""Variables that decide how a rank uses its GPU."""


def main(file: Path, profile: bool, name: str, sets: list[str]) -> None:
    """Take the recipe's steps."""
    recipe = load_recipe(name, sets)
    use_deterministic_kernels()  # this and the next as `train` does: its cost is part of a step
    if not recipe.grid.colocated:
        load_kernels_at_start()
        use_many_queues()
    member = rendezvous(recipe, read_launch())
    for line in member.devices.lines if member.rank == 0 else ():
        print(line, flush=True)
    job = Job(recipe, member, make_schedule(recipe).lanes)
    role = make_role(recipe, job)
    job.barrier()
    role.warm_up(job.start_timeout)
    found: dict[str, Any] = {"rank": job.name, "device": member.devices.names[job.rank], "seconds": [], "losses": []}
    found["environment"] = {variable: os.environ.get(variable) for variable in ENVIRONMENT}
    for step in range(recipe.train.steps):
        started = time.perf_counter()
        scalars = optimizer_step(job, role, step)
        synchronize(job.device)
        found["seconds"].append(time.perf_counter() - started)
        found["losses"].append(None if scalars is None else scalars.loss)
        found |= _memory(job.device)
        _write(file, found)
    if profile:
        picture = file.with_suffix(".png")
        found["profile"] = draw_step(lambda: optimizer_step(job, role, recipe.train.steps), job.device, picture)
        _write(file, found)
    job.close()


def _write(file: Path, found: dict[str, Any]) -> None:
    text = dumps(found)
    atomic_write(file, lambda path: path.write_text(text))


def _memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes that this process has had: of tensors, of the allocator, of the whole device."""
    if device.type == "cpu":
        return {"peak_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_tensors": torch.cuda.max_memory_allocated(device),
        "peak_allocator": torch.cuda.max_memory_reserved(device),
        "device_in_use": total - free,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "profile", sys.argv[3], sys.argv[4:])
