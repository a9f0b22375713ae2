"""The rendezvous: the job does not depend on the launcher's order; ranks that do not fit or do not come are named."""

from __future__ import annotations

import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import trainer.cluster.liveness
from tests.distributed import TIME_LIMIT, run_ranks
from tests.trainer.forked import Fault, ForkedJob, Place, kill, stop
from tests.trainer.job import steps, write_recipe
from tests.training import tiny
from trainer.cluster.rendezvous import KeyValueStore, Launch, _take_device
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe

FOUR = ("parallel.trunk_ranks=2", "parallel.pool_ranks=2", "train.micro_batch=2", "checkpoint.every=2", "eval.every=0")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("rendezvous")))


def test_losses_do_not_depend_on_the_order_of_the_ranks(recipe_file: str, tmp_path: Path) -> None:
    """Pool last; pool first by `UNIPOOL_ROLE`, on new data; interleaved, from the first one's checkpoint."""
    orders: dict[str, tuple[str, tuple[str, ...]]] = {
        "pool_last": ("pool_last", ()),
        "pool_first": ("interleaved", ("pool", "pool", "trunk", "trunk")),
        "resumed": ("interleaved", ()),
    }
    for name, (order, roles) in orders.items():
        run_dir = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "pool_last", run_dir)
            shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
        sets = [*FOUR, f"run.dir={run_dir}", f"topology.order={order}"]
        if name == "pool_first":
            sets.append(f"data.dir={tmp_path / 'data'}")
        job = ForkedJob(load_recipe(recipe_file, sets), tmp_path, roles=roles)
        assert job.end(TIME_LIMIT) == [0] * 4, "".join(job.log(rank) for rank in range(4))
        first = 2 if name == "pool_first" else 0
        told = [job.log(rank) for rank in range(4)]
        assert re.search(r"^ranks by host: \S+: trunk 0-1, pool 0-1$", told[first], re.M)
        assert ["step 4/4" in log for log in told] == [rank == first for rank in range(4)]
        others = told[:first] + told[first + 1 :]
        assert not any("tokenising" in log or "waiting" in log for log in others), "one rank a machine speaks of data"
        assert steps(run_dir) == steps(tmp_path / "pool_last")
    assert "resuming after step 2" in told[0]
    assert 'differs from that of step_00000002: topology.order "pool_last" -> "interleaved"' in told[0]


def pair(recipe_file: str, folder: Path, *sets: str) -> Recipe:
    return load_recipe(recipe_file, [f"run.dir={folder / 'run'}", *sets])


MISFITS = {
    "some": (("trunk", ""), "error: UNIPOOL_ROLE is set on 1 of 2 ranks, but not on launcher rank 1: set it on all "),
    "counts": (("pool", "pool"), "error: UNIPOOL_ROLE names 0 trunk and 2 pool ranks, but parallel.trunk_ranks and "),
}
ABSENT = {"the store's host": 0, "another": 1}


@pytest.fixture(scope="module")
def at_the_door(recipe_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ForkedJob]:
    """Jobs that do not get past the meeting, all at once, for they mostly wait."""
    jobs = {}
    for name, (roles, _) in MISFITS.items():
        folder = tmp_path_factory.mktemp("misfit")
        jobs[name] = ForkedJob(pair(recipe_file, folder), folder, roles=roles)
    for name, rank in ABSENT.items():
        folder = tmp_path_factory.mktemp("absent")
        fault = Fault(rank, Place("trainer.train.start:rendezvous"), stop)
        recipe = pair(recipe_file, folder, "parallel.start_timeout_seconds=5")
        jobs[name] = ForkedJob(recipe, folder, fault, roles=("pool", "trunk"))
    return jobs


@pytest.mark.parametrize("name", MISFITS)
def test_roles_that_do_not_fit_end_every_rank_in_one_line(name: str, at_the_door: dict[str, ForkedJob]) -> None:
    job = at_the_door[name]
    assert job.end(TIME_LIMIT) == [2, 2], job.log(0) + job.log(1)
    assert job.log(0).startswith(MISFITS[name][1])
    assert len(job.log(0).splitlines()) == 1


@pytest.mark.parametrize("name", ABSENT)
def test_a_rank_that_never_comes_is_named_by_the_launchers_number(name: str, at_the_door: dict[str, ForkedJob]) -> None:
    """Its role it has told nobody."""
    job, absent = at_the_door[name], ABSENT[name]
    assert job.end(TIME_LIMIT, without=absent)[1 - absent] == 1
    wanted = rf"^unipool: launcher rank {1 - absent} failed during .*: PeerLost: .* rank {absent}.* has not joined"
    assert re.search(wanted, job.log(1 - absent), re.M), job.log(1 - absent)


class BrokenStore:
    """The store of a host whose process is gone: whatever one asks, the connection breaks."""

    def __getattr__(self, name: str) -> Any:
        def ask(*_: Any) -> None:
            raise torch.distributed.DistNetworkError("Connection reset by peer")

        return ask


def test_a_store_that_breaks_before_anybody_was_heard_of_names_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.cluster.liveness, "_SETTLE_SECONDS", 0.0)
    store = BrokenStore()
    liveness = trainer.cluster.liveness.Liveness(1, ["rank 0 (trunk 0)", "rank 1 (pool 0, shard 0)"], store, store)
    wanted = r"rank 0 \(trunk 0\), which hosts the job's store, is gone \(Connection reset by peer\)"
    with pytest.raises(trainer.cluster.liveness.PeerLost, match=wanted):
        liveness.meet(lambda: store.get("arrival/0"), timedelta(seconds=20))
    wanted = "rank 0, which hosts the job's store, is gone: Connection reset by peer"
    with pytest.raises(trainer.cluster.liveness.PeerLost, match=wanted):
        trainer.cluster.liveness.reach(lambda: store.get("anything"), "rank 0", timedelta(seconds=20))


def test_a_death_in_data_preparation_is_noticed_by_the_pool(recipe_file: str, tmp_path: Path) -> None:
    job = ForkedJob(pair(recipe_file, tmp_path), tmp_path, Fault(0, Place("trainer.train.start:prepare_for"), kill))
    assert job.end(TIME_LIMIT) == [-9, 1]
    wanted = r"^unipool: rank 1 \(pool 0, shard 0\) stopped during start-up: rank 0 \(trunk 0\) died first"
    assert re.search(wanted, job.log(1), re.M), job.log(1)


def test_ranks_of_different_recipes_do_not_start() -> None:
    message = "the ranks were started with different recipes: start all of them with the same recipe"
    assert run_ranks(2, _number_ranks_differently, tiny(parallel={"pool_ranks": 1})) == [message, message]


def _number_ranks_differently(recipe: Recipe) -> str:
    """Rank 1 numbers the ranks in another way."""
    from trainer.cluster.rendezvous import read_launch, rendezvous

    launch = read_launch()
    try:
        rendezvous(
            tiny(parallel={"pool_ranks": 1}, topology={"order": "interleaved"}) if launch.rank else recipe, launch
        )
    except UserError as error:
        return str(error)
    return ""


def test_only_ranks_on_the_cpu_limit_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(rank=3, world_size=4, local_rank=3, local_world_size=4, master_addr="", master_port=0)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("trainer.common.machine.usable_cores", lambda: 8)
    assert _take_device(1, launch) == torch.device("cuda", 1)
    assert threads == []
    assert _take_device(None, launch) == torch.device("cpu")
    assert threads == [2]


def test_a_broadcast_is_not_what_the_last_one_left() -> None:
    """Rank 1 comes first, and so waits for rank 0, each time."""

    class Store(dict[str, bytes]):
        def set(self, key: str, value: str) -> None:
            self[key] = value.encode()

        def get(self, key: str) -> bytes:  # type: ignore[override]
            if key not in self:
                ranks[0].broadcast("checkpoints", lambda: value)
            return self[key]

    class Liveness:
        def meet(self, call: Any, limit: timedelta) -> Any:
            return call()

    store: Any = Store()
    alive: Any = Liveness()
    ranks = [KeyValueStore(store, alive, rank, 2, timedelta(seconds=1)) for rank in (0, 1)]
    for value in ("old", "new"):
        assert ranks[1].broadcast("checkpoints", lambda: "unused") == value
