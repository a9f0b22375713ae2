"""Run a function on every rank of a job, in processes of this machine, with gloo.

Processes are forked from a server that has imported the heavy modules once, so that a job starts in a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.cluster.launch import free_port
from trainer.config.recipe import Recipe

TIME_LIMIT = 240.0
"""Seconds for whatever takes moments or seconds; only a machine that does much else too needs them."""

context = multiprocessing.get_context("forkserver")
# What comes after the loop, deepspeed, the datasets and the tests' own modules would import in every rank, in seconds.
context.set_forkserver_preload(
    [
        *("torch", "deepspeed", "trainer.train.loop", "datasets", "torch._dynamo", "torch.utils.tensorboard"),
        *("deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
        *("ds_configs", "encodings.idna", "trainer.telemetry.expert_heatmap", "pytest", "tests.training"),
        "tests.frozen",
    ]
)


class RankFailed(AssertionError):
    """A rank raised, died, or did not end in time."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, time_limit: float = TIME_LIMIT
) -> list[Any]:
    """`function(*arguments)` on every rank, with a launcher's environment set. Returns each rank's value, by rank."""
    environment = job_environment(world_size)
    with tempfile.TemporaryDirectory() as folder:
        outcome = [Path(folder) / f"rank{rank}" for rank in range(world_size)]
        processes = [
            context.Process(
                target=_rank, args=(rank, environment, str(outcome[rank]), function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, time_limit)
        return [_value(path, rank, processes[rank].exitcode) for rank, path in enumerate(outcome)]


@contextmanager
def fork_rank(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """`function(*arguments)` as a job of one rank in a process of its own, killed at the end if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rank0")
        process = context.Process(target=_rank, args=(0, job_environment(1), path, function, arguments), daemon=True)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()


def join(recipe: Recipe) -> Any:
    """This rank's `Job`, with nothing done between its two parts."""
    from trainer.cluster.process_groups import Job
    from trainer.cluster.rendezvous import read_launch, rendezvous
    from trainer.planning.schedule import make_schedule

    return Job(recipe, rendezvous(recipe, read_launch()), make_schedule(recipe).lanes)


def job_environment(world_size: int) -> dict[str, str]:
    """What a launcher sets on every rank of a job on this machine."""
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def _wait(processes: list[Any], time_limit: float) -> None:
    """Until all have ended, one has failed (the others get some seconds to say why too), or the time is up."""
    deadline = time.monotonic() + time_limit
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _rank(rank: int, environment: dict[str, str], outcome: str, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    try:
        value = (True, function(*arguments))
    except BaseException:
        value = (False, traceback.format_exc())
    Path(outcome).write_bytes(pickle.dumps(value))
    os._exit(0 if value[0] else 1)


def _value(path: Path, rank: int, status: int | None) -> Any:
    if not path.exists():
        raise RankFailed(f"rank {rank} ended with status {status} and no result")
    ok, value = pickle.loads(path.read_bytes())
    if not ok:
        raise RankFailed(f"rank {rank}:\n{value}")
    return value
