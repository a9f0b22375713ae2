"""Which launcher rank becomes which rank of the job: orders, `UNIPOOL_ROLE`, devices of several types, the roster."""

from __future__ import annotations

import pytest

from pool.topology import Topology
from trainer.cluster.rank_assignment import assign_ranks, number_of_ranks, payload_device, ranks_by_order, roster
from trainer.common.errors import UserError

GRIDS = [Topology(trunk, pool, max(1, pool)) for trunk in range(1, 10) for pool in range(18)]


def letters(grid: Topology) -> str:
    """The role of each launcher rank when interleaved."""
    return "".join("T" if grid.is_trunk(rank) else "P" for rank in ranks_by_order(grid, "interleaved"))


@pytest.mark.parametrize(
    ("trunk", "pool", "roles"),
    [
        (1, 1, "TP"),
        (2, 2, "TPTP"),
        (8, 16, "TPP" * 8),  # unipool-830m
        (3, 1, "TTTP"),
        (4, 2, "TTPTTP"),
        (2, 3, "TPTPP"),
        (2, 0, "TT"),
    ],
)
def test_known_orders(trunk: int, pool: int, roles: str) -> None:
    grid = Topology(trunk, pool, max(1, pool))
    assert letters(grid) == roles
    assert ranks_by_order(grid, "pool_last") == list(range(trunk + pool))


def test_interleaved_ranks_are_those_of_the_grid_in_order() -> None:
    for grid in GRIDS:
        ranks = ranks_by_order(grid, "interleaved")
        assert sorted(ranks) == list(range(grid.world_size))
        assert [r for r in ranks if grid.is_trunk(r)] == list(range(grid.trunk_ranks))
        assert [r for r in ranks if not grid.is_trunk(r)] == list(range(grid.trunk_ranks, grid.world_size))
        assert ranks[0] == 0


def test_interleaved_spreads_the_pool_evenly() -> None:
    """Over any consecutive ranks; so every node of equal slots holds both roles wherever that is possible."""
    for grid in GRIDS:
        roles, world = letters(grid), grid.world_size
        for slots in range(1, world + 1):
            counts = {roles[start : start + slots].count("P") for start in range(world - slots + 1)}
            assert counts <= {slots * grid.pool_ranks // world, -(-slots * grid.pool_ranks // world)}
            nodes = [roles[start : start + slots] for start in range(0, world, slots)]
            if world % slots == 0 and len(nodes) <= min(grid.trunk_ranks, grid.pool_ranks):
                assert all({"T", "P"} == set(node) for node in nodes), (grid, nodes)


def test_roles_go_before_the_order() -> None:
    grid = Topology(2, 3, 3)
    for order in ("pool_last", "interleaved"):
        assert assign_ranks(grid, order, ["pool", "trunk", "pool", "pool", "trunk"]) == [2, 0, 3, 4, 1]
    assert assign_ranks(grid, "interleaved", [""] * 5) == [0, 2, 1, 3, 4]
    assert assign_ranks(Topology(2, 0, 1), "pool_last", ["trunk", "trunk"]) == [0, 1]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["pool", "", "trunk", ""], "UNIPOOL_ROLE is set on 2 of 4 ranks, but not on launcher rank 1,3: set it on all"),
        (["trunk", "pool", "trunk", "experts"], "UNIPOOL_ROLE = 'experts' on launcher rank 3: must be trunk or pool"),
        (["pool", "trunk", "pool", "pool"], "1 trunk and 3 pool ranks, .*pool_ranks are 2 and 2: make them equal"),
    ],
)
def test_roles_that_do_not_fit(told: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        assign_ranks(Topology(2, 2, 2), "pool_last", told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "wire", "payloads"),
    [
        (["cuda"] * 4, "auto", "cuda"),
        (["cuda"] * 4, "gloo", "cpu"),
        (["cuda", "cuda", "cpu", "cpu"], "auto", "cpu"),
        (["cpu", "cpu", "cuda", "cuda"], "auto", "cpu"),
        (["cpu"] * 4, "auto", "cpu"),
        (["cuda", "cuda", "cuda", "cpu"], "auto", "cpu"),  # two shards, each a world of its own
    ],
)
def test_nccl_carries_tokens_only_between_gpus(devices: list[str], wire: str, payloads: str) -> None:
    assert payload_device(Topology(2, 2, 2), devices, wire, False) == payloads
    assert payload_device(Topology(2, 2, 2), devices, wire, True) == "cpu"


@pytest.mark.parametrize(
    ("grid", "devices", "message"),
    [
        (
            Topology(2, 2, 2),
            ["cuda", "cpu", "cpu", "cpu"],
            r"rank 0 \(trunk 0\) uses cuda, but rank 1 \(trunk 1\) uses cpu",
        ),
        (
            Topology(1, 4, 2),
            ["cuda", "cuda", "cpu", "cuda", "cuda"],
            r"rank 2 \(pool 1, shard 1\) uses cpu, but rank 4 \(pool 3, shard 1\) uses cuda",
        ),
    ],
)
def test_ranks_that_average_gradients_need_devices_of_one_type(
    grid: Topology, devices: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        payload_device(grid, devices, "auto", False)


def test_the_roster_names_ranks_by_host_and_devices_where_they_differ() -> None:
    grid = Topology(2, 3, 3)
    assert roster(grid, ["a", "b", "a", "b", "b"], ["cpu"] * 5) == "a: trunk 0, pool 0; b: trunk 1, pool 1-2"
    assert roster(grid, ["a", "a", "b", "c", "b"], ["cuda"] * 2 + ["cpu"] * 3) == (
        "a: trunk 0-1 on cuda; b: pool 0,2 on cpu; c: pool 1 on cpu"
    )


EVERY_RANK = Topology(4, 4, 2, every_rank=True)


def test_ranks_with_both_roles_are_numbered_as_the_launcher_does() -> None:
    for order in ("pool_last", "interleaved"):
        assert assign_ranks(EVERY_RANK, order, [""] * 4) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"UNIPOOL_ROLE is set on launcher rank 1,3, but .*every_rank") as caught:
        assign_ranks(EVERY_RANK, "pool_last", ["", "pool", "", "trunk"])
    assert "\n" not in str(caught.value)
    assert number_of_ranks(EVERY_RANK) == "parallel.trunk_ranks = 4"
    assert number_of_ranks(Topology(2, 4, 2)) == "parallel.trunk_ranks + parallel.pool_ranks = 2 + 4 = 6"


def test_ranks_with_both_roles_in_the_roster_and_on_devices() -> None:
    assert roster(EVERY_RANK, ["a", "a", "b", "b"], ["cpu"] * 4) == "a: rank 0-1; b: rank 2-3"
    assert payload_device(EVERY_RANK, ["cuda"] * 4, "auto", False) == "cuda"
    with pytest.raises(UserError, match=r"rank 2 \(trunk 2, shard 0\) uses cpu: all ranks need the same device type"):
        payload_device(EVERY_RANK, ["cuda", "cuda", "cpu", "cpu"], "auto", False)
