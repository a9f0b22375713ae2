"""Jobs of forked ranks, as `unipool train` runs them, into which a test injects one fault.

They start in about a second, where a launcher takes several. Nothing restarts them and no launcher ends them: what a
rank does about its peers, it does by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.distributed import TIME_LIMIT, context, job_environment
from trainer.cluster.rank_assignment import ROLE
from trainer.config.recipe import Recipe, load_recipe

POLL_SECONDS = 0.01

FAULT = "the fault of the test comes now"
"""A line of the log of the rank that has the fault."""

NAMES = ("rank 0 (trunk 0)", "rank 1 (pool 0, shard 0)")
TRUNK, POOL = 0, 1
"""The ranks of `saving_recipe`, and what they are called."""

BOTH_ROLES = {"parallel__layout": "every_rank", "parallel__trunk_ranks": 2, "parallel__pool_ranks": 0}
BOTH_NAMES = ("rank 0 (trunk 0, shard 0)", "rank 1 (trunk 1, shard 1)")
"""Keys for `saving_recipe` with which each of its two ranks has both roles, and what these are called."""


def saving_recipe(recipe_file: str, run_dir: Path, **keys: Any) -> Recipe:
    """The recipe of `write_recipe` with a checkpoint every other step, and with some keys set: `train__steps=9`.

    It has no TensorBoard, for which every evaluation would draw a picture, as long as the training takes.
    """
    sets = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return load_recipe(recipe_file, [f"run.dir={run_dir}", "checkpoint.every=2", "metrics.tensorboard=false", *sets])


def every_call(*_: Any, **__: Any) -> bool:
    return True


@dataclass(frozen=True)
class Place:
    """A call of the product: `module:Class.function`, the calls of it that count, and which of those is meant."""

    function: str
    counts: Callable[..., bool] = every_call
    number: int = 1


@dataclass(frozen=True)
class Fault:
    """`act` happens on `rank` when it comes to a place."""

    rank: int
    place: Place
    act: Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("this row is broken")


class ForkedJob:
    """A job under way; its launcher rank r writes to `r.log` in `folder`.

    Args:
        command: what each rank runs, behind `python -m trainer`; if empty it trains the recipe.
        roles: `UNIPOOL_ROLE` of each rank; "" leaves it out.
        apart: whether the ranks see nothing of each other's processes, as on machines of their own.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        fault: Fault | None = None,
        roles: Sequence[str] = (),
        apart: bool = False,
        command: Sequence[str] = (),
    ):
        world_size = recipe.grid.world_size
        environment = job_environment(world_size)
        environments = [environment | ({ROLE: role} if role else {}) for role in roles or [""] * world_size]
        self.logs = [folder / f"{rank}.log" for rank in range(world_size)]
        for log in self.logs:
            log.write_text("")  # an earlier job's, or none until the rank runs
        self._ranks = [
            context.Process(
                target=_rank, args=(rank, environments[rank], recipe, str(log), fault, apart, command), daemon=True
            )
            for rank, log in enumerate(self.logs)
        ]
        for rank in self._ranks:
            rank.start()

    @property
    def running(self) -> list[bool]:
        return [rank.is_alive() for rank in self._ranks]

    def wait_for_fault(self, rank: int) -> None:
        """Until the rank has come to the place of its fault, or has ended."""
        deadline = time.monotonic() + TIME_LIMIT
        while FAULT not in self.log(rank) and self.running[rank]:
            assert time.monotonic() < deadline, self.log(rank)
            time.sleep(POLL_SECONDS)

    def kill(self, rank: int) -> None:
        self._ranks[rank].kill()

    def terminate(self, rank: int) -> None:
        self._ranks[rank].terminate()

    def end(self, limit: float, without: int | None = None) -> list[int | None]:
        """Exit status of every rank, None where it had to be killed after `limit` seconds.

        Args:
            without: a rank that is not waited for.
        """
        deadline = time.monotonic() + limit
        while any(alive and rank != without for rank, alive in enumerate(self.running)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        statuses = [rank.exitcode for rank in self._ranks]  # a stopped rank has none
        for rank in self._ranks:
            rank.kill()
            rank.join()
        return statuses

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()


def train_as_forked(folder: Path, recipe: str, *sets: str) -> tuple[int | None, str]:
    """`train RECIPE --set ...` as a launcher's ranks run it: rank 0's exit status, and what it says."""
    command = ["train", recipe, *(word for value in sets for word in ("--set", value))]
    job = ForkedJob(load_recipe(recipe, sets), folder, command=command)
    return job.end(TIME_LIMIT)[0], job.log(0)


def _rank(
    rank: int,
    environment: dict[str, str],
    recipe: Recipe,
    log: str,
    fault: Fault | None,
    apart: bool,
    command: Sequence[str],
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    import torch

    from trainer.cli import main
    from trainer.cluster import fault_watch, liveness
    from trainer.cluster.rendezvous import read_launch
    from trainer.train.loop import train

    torch.set_num_threads(1)
    fault_watch._COURTESY_SECONDS = 0.0  # there is no launcher that should notice another rank first
    if apart:
        liveness._alive = lambda _: True
    if fault and fault.rank == rank:
        _put(fault)
    status: Any = 0
    if command:
        sys.argv[1:] = command
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    else:
        status = train(recipe, read_launch())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def _put(fault: Fault) -> None:
    module, _, path = fault.place.function.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        if fault.place.counts(*arguments, **keywords):
            calls += 1
            if calls == fault.place.number:
                os.write(2, f"{FAULT}\n".encode())
                fault.act()
        return original(*arguments, **keywords)

    setattr(owner, name, function)
