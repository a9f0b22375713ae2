"""The grid of ranks, for every small combination of trunk ranks (T), pool ranks (P) and shards (EP)."""

from __future__ import annotations

import pytest

from pool.topology import Topology

DEDICATED = [Topology(t, p, ep) for t in range(1, 6) for p in range(1, 7) for ep in range(1, p + 1) if p % ep == 0]


def pool_ranks(topology: Topology) -> range:
    return range(topology.trunk_ranks, topology.world_size)


@pytest.mark.parametrize("topology", DEDICATED, ids=str)
def test_a_trunk_rank_has_one_replica_of_each_shard(topology: Topology) -> None:
    for trunk_rank in range(topology.trunk_ranks):
        ranks = [topology.pool_rank(shard, trunk_rank) for shard in range(topology.expert_parallel)]
        assert set(ranks) <= set(pool_ranks(topology))
        assert [topology.shard(rank) for rank in ranks] == list(range(topology.expert_parallel))
        assert len({topology.replica(rank) for rank in ranks}) == 1


@pytest.mark.parametrize("topology", DEDICATED, ids=str)
def test_served_trunk_ranks_is_the_inverse_of_pool_rank(topology: Topology) -> None:
    served = {(rank, t) for rank in pool_ranks(topology) for t in topology.served_trunk_ranks(rank)}
    asked = {
        (topology.pool_rank(shard, t), t)
        for shard in range(topology.expert_parallel)
        for t in range(topology.trunk_ranks)
    }
    assert served == asked
    for rank in pool_ranks(topology):
        ranks = topology.served_trunk_ranks(rank)
        assert list(ranks) == sorted(ranks)


@pytest.mark.parametrize("topology", DEDICATED, ids=str)
def test_trunk_ranks_spread_evenly_over_replicas(topology: Topology) -> None:
    loads = [len(topology.served_trunk_ranks(rank)) for rank in pool_ranks(topology)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("topology", DEDICATED, ids=str)
def test_every_shard_has_as_many_replicas(topology: Topology) -> None:
    assert not topology.colocated
    cells = [(topology.shard(rank), topology.replica(rank)) for rank in pool_ranks(topology)]
    assert sorted(cells) == [(s, r) for s in range(topology.expert_parallel) for r in range(topology.replicas)]


@pytest.mark.parametrize("topology", DEDICATED, ids=str)
def test_role_worlds(topology: Topology) -> None:
    """Every role-local world has the ranks 0 .. size - 1, in world order; its pool ranks hold one shard."""
    worlds: dict[str, list[tuple[int, int]]] = {}
    for rank in range(topology.world_size):
        name, role_rank, size = topology.role_world(rank)
        worlds.setdefault(name, []).append((role_rank, size))
        assert name == ("trunk" if rank < topology.trunk_ranks else f"pool{topology.shard(rank)}")
        assert topology.is_trunk(rank) == (name == "trunk")
    for members in worlds.values():
        assert members == [(i, len(members)) for i in range(len(members))]
    assert len(worlds) == 1 + topology.expert_parallel


def test_known_grid() -> None:
    """2 trunk ranks and 3 replicas of 2 shards, by hand: the last replica serves nobody."""
    topology = Topology(2, 6, 2)
    assert topology.world_size == 8
    assert topology.replicas == 3
    assert [[topology.pool_rank(s, t) for s in (0, 1)] for t in (0, 1)] == [[2, 3], [4, 5]]
    assert [topology.served_trunk_ranks(r) for r in range(2, 8)] == [(0,), (0,), (1,), (1,), (), ()]
    assert topology.role_world(5) == ("pool1", 1, 3)
    assert topology.describe(1) == "rank 1 (trunk 1)"
    assert topology.describe(5) == "rank 5 (pool 3, shard 1)"


@pytest.mark.parametrize("trunk_ranks", [1, 3])
def test_colocated(trunk_ranks: int) -> None:
    """Every trunk rank holds the whole pool: as many replicas as trunk ranks, one world."""
    topology = Topology(trunk_ranks, 0, 1)
    assert topology.colocated
    assert topology.world_size == topology.replicas == trunk_ranks
    worlds = [topology.role_world(rank) for rank in range(trunk_ranks)]
    assert worlds == [("trunk", rank, trunk_ranks) for rank in range(trunk_ranks)]
