"""Faults: whichever rank dies, hangs or raises, and wherever, the job ends in time and names it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pool.schedule import Kind, RequestKey
from tests.trainer.forked import (
    BOTH_NAMES,
    BOTH_ROLES,
    NAMES,
    POOL,
    TRUNK,
    Fault,
    ForkedJob,
    Place,
    fail,
    kill,
    saving_recipe,
    stop,
)
from tests.trainer.job import write_recipe
from trainer.checkpoint.format import newest
from trainer.config.recipe import Recipe

pytestmark = pytest.mark.slow

GRACE = 90.0
"""Seconds that a rank has, beyond the configured limit, to find out about a fault and to end."""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def recipe(recipe_file: str) -> Callable[..., Recipe]:
    """Makes the tiny recipe with some keys set; its data is prepared once."""
    return partial(saving_recipe, recipe_file)


def requested(kind: Kind, _wire: Any, key: RequestKey, step: int, *_: Any) -> bool:
    """Whether a trunk rank asks for this in step 1: not its first request, so the pool is there too."""
    return key.kind == kind and step >= 1 and key.layer == 1


def served(kind: Kind, _service: Any, served_kind: Kind, keys: list[RequestKey], _requests: Any, step: int) -> bool:
    """Whether a pool rank serves this in step 1."""
    return served_kind == kind and step >= 1 and bool(keys)


def of_last_save(path: Path, _write: Any) -> bool:
    """Whether a file of the checkpoint after the last step is written."""
    return "step_00000004" in str(path)


START_UP = "start-up"
STEP = r"[a-z ]*step [01]"
WHILE_SAVING = r"(the (checkpoint|evaluation|probe) after step [24]|[a-z ]*step [23])"
"""The other rank goes on while a checkpoint is written."""
LAST_SAVE = Place("trainer.train.ends.ending:Ending.finish_saving")
PLACES = {
    "start-up": (START_UP, [Place("trainer.cluster.process_groups:Job._cross_group")] * 2),
    # The other rank may have its engine already, and wait for rank 0's list of checkpoints.
    "engines": (f"({START_UP}|reading checkpoints)", [Place("trainer.engine.role_engine:RoleEngine.__init__")] * 2),
    "forward": (
        STEP,
        [
            Place("pool.wire.host:HostTrunk.request", partial(requested, Kind.FORWARD)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.FORWARD)),
        ],
    ),
    "backward": (
        STEP,
        [
            Place("pool.wire.host:HostTrunk.request", partial(requested, Kind.BACKWARD)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.BACKWARD)),
        ],
    ),
    "step": (STEP, [Place("trainer.engine.role_engine:RoleEngine.step")] * 2),
    "evaluation": (
        "the evaluation after step 2",
        [
            Place("pool.wire.host:HostTrunk.request", partial(requested, Kind.FORWARD_ONLY)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.FORWARD_ONLY)),
        ],
    ),
    "copying for a save": (WHILE_SAVING, [Place("trainer.engine.role_engine:RoleEngine.save")] * 2),
    "writing a save": (WHILE_SAVING, [Place("trainer.checkpoint.save:_write", number=2)] * 2),
    "last save": ("the (last checkpoint|evaluation after step 4|probe after step 4)", [LAST_SAVE] * 2),
}
"""Where a fault happens: the phase in which the other rank then is, and the place on a trunk and on a pool rank."""


def assert_named(log: str, phase: str, victim: int, fate: str, names: tuple[str, str] = NAMES) -> None:
    """The rank that wrote `log` says in which phase it stopped, and why."""
    blamed = rf"(PeerLost: )?{re.escape(names[victim])},?( which hosts the job's store,)? {fate}"  # and nobody else
    wanted = rf"^unipool: rank {1 - victim}.* (stopped|failed) during {phase}[^:]*: {blamed}"
    assert re.search(wanted, log, re.M), f"no {wanted!r} in:\n{log}"


@pytest.mark.parametrize("victim", [TRUNK, POOL])
@pytest.mark.parametrize("phase", PLACES)
def test_a_killed_rank_is_named(phase: str, victim: int, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """All limits are long here: a death is noticed at once."""
    others_phase, places = PLACES[phase]
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, places[victim], kill))
    statuses = job.end(GRACE)
    assert statuses[victim] == -9
    assert statuses[1 - victim] == 1, job.log(1 - victim)
    assert_named(job.log(1 - victim), others_phase, victim, "died")


@pytest.mark.parametrize(("phase", "side"), [("forward", POOL), ("backward", TRUNK)])
def test_a_killed_rank_with_both_roles_is_named(
    phase: str, side: int, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """It dies while it serves, or while it asks."""
    others_phase, places = PLACES[phase]
    job = ForkedJob(recipe(tmp_path / "run", **BOTH_ROLES), tmp_path, Fault(1, places[side], kill))
    assert job.end(GRACE) == [1, -9], job.log(0)
    assert_named(job.log(0), others_phase, 1, "died", BOTH_NAMES)


@pytest.mark.parametrize("victim", [TRUNK, POOL])
def test_a_rank_killed_on_another_machine_is_named(victim: int, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """All limits are long here: its connections break, and it is known by its heartbeats. Rank 0 holds the store."""
    others_phase, places = PLACES["forward"]
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, places[victim], kill), apart=True)
    assert job.end(GRACE)[1 - victim] == 1, job.log(1 - victim)
    assert_named(job.log(1 - victim), others_phase, victim, "does not respond")


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (TRUNK, Place("trainer.data.batches:SequenceStream.micro_batches", number=2)),
        (POOL, Place("pool.shard:ExpertServer.forward", number=5)),
    ],
)
def test_an_exception_is_named_by_both(
    victim: int, place: Place, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """User data that raises in its second step, and experts that do."""
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, place, fail))
    assert job.end(GRACE) == [1, 1]
    wanted = rf"^unipool: {re.escape(NAMES[victim])} failed during {STEP}.*: ValueError: this row is broken"
    assert re.search(wanted, job.log(victim), re.M), job.log(victim)
    assert "Traceback" in job.log(victim)
    assert_named(job.log(1 - victim), STEP, victim, "died")


STOPPED_REPLICA, STUCK_REPLICA = IN_DEEPSPEED = "gradients of replicas", "gradients of replicas, stuck"
"""The stops in which both ranks wait for each other in DeepSpeed only."""

# Long enough that only the stopped rank is late, on a busy machine too.
LIMIT = 8.0
START_LIMIT = 12.0
SAVE_LIMIT = 25.0
STOPS = {
    "before the store is there": (
        TRUNK,
        START_UP,
        Place("trainer.train.start:rendezvous"),
        START_LIMIT,
        "has not joined",
    ),
    "before the exchange of arrivals": (
        POOL,
        START_UP,
        Place("trainer.train.start:rendezvous"),
        START_LIMIT,
        "has not joined",
    ),
    "start-up, trunk": (TRUNK, START_UP, PLACES["start-up"][1][TRUNK], START_LIMIT, "does not respond"),
    "start-up, pool": (POOL, START_UP, PLACES["start-up"][1][POOL], START_LIMIT, "does not respond"),
    "forward": (POOL, STEP, PLACES["forward"][1][POOL], LIMIT, "does not respond"),
    "step": (TRUNK, STEP, PLACES["step"][1][TRUNK], LIMIT, "does not respond"),
    STOPPED_REPLICA: (
        1,
        STEP,
        Place("trainer.train.trunk_rank:TrunkRank.accumulate", number=2),
        LIMIT,
        "does not respond",
    ),
    STUCK_REPLICA: (
        1,
        STEP,
        Place("trainer.train.trunk_rank:sequences", number=2),
        LIMIT,
        "has not reached this point",
    ),
    "evaluation": (POOL, PLACES["evaluation"][0], PLACES["evaluation"][1][POOL], LIMIT, "does not respond"),
    "last save": (TRUNK, "the last checkpoint", LAST_SAVE, SAVE_LIMIT, "does not respond"),
    "writing the last save": (
        POOL,
        "the last checkpoint",
        Place("trainer.checkpoint.save:_write", of_last_save),
        SAVE_LIMIT,
        "has not reached this point",
    ),
    "shutdown": (POOL, "shutdown", Place("trainer.cluster.process_groups:Job.close"), SAVE_LIMIT, "does not respond"),
}
STUCK = {STUCK_REPLICA, "writing the last save"}
"""Those in which the rank is alive, and sends heartbeats."""
STOPPED_WITH_BOTH_ROLES = "forward"
"""The one of them in which every rank has both roles."""
REPLICAS = {"parallel__trunk_ranks": 2, "parallel__pool_ranks": 0}
REPLICA_NAMES = ("rank 0 (trunk 0)", "rank 1 (trunk 1)")


@pytest.fixture(scope="module")
def stopped(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ForkedJob]:
    """All jobs with a stopped rank, for they mostly wait; each starts when the one before has come to its stop."""
    jobs = {}
    for name, (victim, _, place, limit, _) in STOPS.items():
        folder = tmp_path_factory.mktemp("stopped")
        limits: dict[str, Any] = {"parallel__timeout_seconds": LIMIT}
        if name == STOPPED_WITH_BOTH_ROLES:
            limits |= BOTH_ROLES
        if name in IN_DEEPSPEED:
            limits |= REPLICAS
        if limit != LIMIT:
            limits["parallel__start_timeout_seconds"] = limit
        act = get_stuck if name in STUCK else stop
        jobs[name] = ForkedJob(recipe(folder / "run", **limits), folder, Fault(victim, place, act))
        jobs[name].wait_for_fault(victim)
    return jobs


def get_stuck() -> None:
    """As on a file system that hangs."""
    time.sleep(3600)


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_rank_is_named(name: str, stopped: dict[str, ForkedJob]) -> None:
    """SIGSTOP, or a wait without end: nothing is closed, only time tells."""
    victim, phase, _, limit, fate = STOPS[name]
    job = stopped[name]
    statuses = job.end(limit + GRACE, without=victim)
    # A rank that is alive learns of the other's end, and may end before it.
    assert statuses[victim] in ((None, 1) if name in STUCK else (None,)), job.log(victim)
    assert statuses[1 - victim] == 1, job.log(1 - victim)
    names = {STOPPED_WITH_BOTH_ROLES: BOTH_NAMES, **dict.fromkeys(IN_DEEPSPEED, REPLICA_NAMES)}.get(name, NAMES)
    assert_named(job.log(1 - victim), phase, victim, fate, names)


def test_too_many_skipped_steps_end_the_job_and_name_their_data(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Weights that a huge rate has blown up: three steps in a row are skipped, no checkpoint is lost."""
    blown_up = {"train__lr": 1e20, "train__min_lr": 1e20, "train__max_skipped_steps": 3, "train__steps": 20}
    job = ForkedJob(recipe(tmp_path / "run", **blown_up), tmp_path)
    assert job.end(GRACE) == [1, 1], job.log(0)
    log = job.log(0)
    assert re.search(
        r"^unipool: step 4 on .*train.arrow: rank 0 \(trunk 0\): micro-batch 0 has loss nan \(rows \d+, ", log, re.M
    )
    assert "unipool: 3 steps in a row, up to step 4, were skipped because gradients were not finite" in log
    assert "Traceback" not in log + job.log(1)
    assert newest(tmp_path / "run" / "checkpoints") == (2, tmp_path / "run" / "checkpoints" / "step_00000002")
