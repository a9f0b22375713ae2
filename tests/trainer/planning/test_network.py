"""What crosses links within a node and between nodes, what the hosts do, and the end of a step: by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pool.schedule_builder import build_training_schedule, staggered_starts
from pool.schedule_timing import time_schedule
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.hardware import DATA_SHEETS, Hardware, costs_in_seconds, request_bytes, with_network
from trainer.planning.lanes import accumulation_time, deferred_requests
from trainer.planning.model_costs import count_parameters
from trainer.planning.network.hosts import busiest_host, messages
from trainer.planning.network.links import Links, busiest_link
from trainer.planning.network.step_end import step_end
from trainer.planning.step_time import step_time

H100 = DATA_SHEETS["h100"]
NODES_OF_8 = Links(8, within=450e9, between=50e9)


def at_182m(trunk: int, pool: int, shards: int, *overrides: str) -> Recipe:
    """182m with 4 micro-batches on each trunk rank; `pool` is 0 where every rank has both roles."""
    layout = "dedicated" if pool else "every_rank"
    keys = {"layout": layout, "trunk_ranks": trunk, "pool_ranks": pool, "expert_parallel": shards}
    grid = [f"parallel.{key}={value}" for key, value in keys.items()]
    return load_recipe("unipool-182m", [*grid, f"train.global_batch={64 * trunk}", *overrides])


@pytest.mark.parametrize(
    ("trunk", "pool", "shards", "order", "role", "requests", "across"),
    [
        (16, 0, 8, "pool_last", "", 7 / 8, False),  # a replica fills a node
        (16, 0, 16, "pool_last", "", 8 / 16, True),  # half of a replica is on the other node
        (4, 4, 4, "pool_last", "pool", 1.0, False),
        (8, 8, 8, "pool_last", "pool", 1.0, True),  # trunk on one node, pool on the other
        (8, 8, 8, "interleaved", "pool", 4 / 8, True),  # each node has half of either
        (8, 16, 8, "pool_last", "trunk", 1.0, True),  # each of two replicas serves half of the trunk ranks
        (24, 8, 8, "pool_last", "pool", 3.0, True),
    ],
)
def test_links(trunk: int, pool: int, shards: int, order: str, role: str, requests: float, across: bool) -> None:
    link = busiest_link(at_182m(trunk, pool, shards, f"topology.order={order}"), NODES_OF_8)
    assert link is not None and (link.role, link.requests, link.across) == (role, requests, across)
    assert link.bandwidth == (50e9 if across else 450e9)


def test_the_slower_of_two_links_is_counted() -> None:
    """With 16 shards 7/16 of the rows stay in the node, but a network that is nearly as fast needs longer for 8/16."""
    recipe = at_182m(16, 0, 16)
    for between, across in ((50e9, True), (500e9, True), (520e9, False)):
        link = busiest_link(recipe, Links(8, 450e9, between))
        assert link is not None and link.across == across
    assert busiest_link(recipe, Links(0, 450e9, 1.0)) == busiest_link(recipe, Links(16, 450e9, 1.0)), "one node"
    alone = busiest_link(at_182m(1, 0, 1), NODES_OF_8)
    assert alone is None


def test_the_wire_across_nodes_by_hand() -> None:
    recipe = at_182m(8, 8, 8, "parallel.lanes=2")
    costs = costs_in_seconds(recipe, H100, lanes=2)
    assert costs.payload == pytest.approx(request_bytes(recipe) / 50e9)
    assert costs.transfer == pytest.approx(100e-6 + 7 * 15e-6 + costs.payload)
    every = costs_in_seconds(at_182m(16, 0, 16), H100, lanes=2)
    assert every.payload == pytest.approx(request_bytes(recipe) / 2 / 50e9)
    assert every.transfer == pytest.approx(100e-6 + 2 * 14 * 15e-6 + every.payload), "both ends handle 15 headers"
    slow = step_time(recipe, with_network(H100, 50))
    assert slow.wire is not None and slow.wire.binds and slow.wire.across
    assert slow.seconds - slow.step_end >= 2 * 12 * 4 * request_bytes(recipe) / 6.25e9
    scattered = step_time(recipe, replace(H100, node=1, network_bandwidth=6.25e9))
    assert slow.seconds - slow.step_end == pytest.approx(scattered.seconds - scattered.step_end)
    assert slow.step_end < scattered.step_end, "8 links of a node carry its rings"


def test_the_end_of_a_step_by_hand() -> None:
    """182m on two nodes: the trunk's rings use 8 links of a node, those of a shard's two replicas one."""
    recipe = at_182m(16, 0, 8)
    state, end = count_parameters(recipe), step_end(recipe, H100)
    trunk = 3 * 15 / 16 * 4 * state.trunk / (8 * 50e9)
    pool = 2 * 1 / 2 * 4 * state.pool / 8 / 50e9
    assert end.reductions == pytest.approx(trunk + pool)
    assert end.optimizer == pytest.approx(28 * (state.trunk / 16 + state.pool / 8) / H100.memory_bandwidth)
    assert end.hosts == pytest.approx(2 * 4 * 30e-6)
    assert end.seconds == end.reductions + end.optimizer + end.hosts
    one_node = step_end(recipe, replace(H100, node=0))
    assert one_node.reductions == pytest.approx((trunk * 400 + pool * 50) / 450)
    whole = ("parallel.trunk_zero=0", "parallel.pool_zero=0")
    adamw, muon = (step_end(at_182m(16, 0, 8, *whole, f"train.optimizer={name}"), H100) for name in ("adamw", "muon"))
    D, KV, F, products = 768, 256, 3072, 0
    for rows, columns, matrices in ((D, D, 24), (KV, D, 24), (D, F, 3 * 96 // 8)):
        products += matrices * 5 * (4 * rows * rows * columns + 2 * rows**3)
    rates = H100.rates("bf16")
    assert muon.optimizer - adamw.optimizer == pytest.approx(products / rates.flops / rates.experts)
    without = step_end(at_182m(16, 0, 8, "parallel.trunk_zero=0"), H100)
    assert without.reductions == pytest.approx(trunk * 2 / 3 + pool), "ZeRO 1 gathers the weights besides"


def test_messages_by_hand() -> None:
    """24 layers' forwards and backwards of 4 micro-batches, each a request to and an answer from every shard."""
    assert messages(at_182m(16, 8, 4)) == {"trunk": 96 * 2 * 4, "pool": 96 * 2 * 8}
    assert messages(at_182m(16, 0, 4)) == {"": 96 * 2 * (3 + 3)}
    recipe = at_182m(64, 0, 32)
    costs = costs_in_seconds(recipe, H100, lanes=2)
    role, busy = busiest_host(recipe, H100, costs)
    launching = 3 * 4 * (12 * costs.trunk_launch + costs.head_launch) + 96 * costs.slot_launch
    assert role == "" and busy == pytest.approx(launching + 96 * 4 * 31 * 15e-6)


def test_a_busy_host_limits_the_step() -> None:
    slow = replace(H100, message=1e-3, wire_latency=0.0)
    step = step_time(at_182m(16, 0, 16, "parallel.lanes=8"), slow)
    assert step.seconds - step.step_end >= 96 * 4 * 15 * 1e-3
    assert 0.5 < step.host_busy <= 1


@pytest.mark.parametrize(("trunk", "pool", "shards"), [(8, 4, 2), (6, 6, 2), (6, 4, 1)])
@pytest.mark.parametrize("stagger", ["true", "false"])
def test_a_replica_stands_for_all(trunk: int, pool: int, shards: int, stagger: str) -> None:
    """Replicas differ in when they start, so the time of a step is that of the last one; 6 do not divide by 4."""
    recipe = at_182m(trunk, pool, shards, "parallel.lanes=2", f"parallel.stagger={stagger}")
    costs, most = costs_in_seconds(recipe, H100, lanes=2), deferred_requests(recipe)
    schedule = build_training_schedule(recipe.grid, 12, 4, 2, stagger == "true", costs)
    starts_T = staggered_starts(recipe.grid, 12, costs) if stagger == "true" else None
    whole = time_schedule(schedule, recipe.grid, 12, costs, starts_T=starts_T, most_deferred=most)
    seconds, trunk_busy, pool_busy = accumulation_time(recipe, 2, costs)
    assert seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert (trunk_busy, pool_busy) == pytest.approx((whole.trunk_busy_T.mean(), whole.pool_busy_P.mean()), rel=1e-9)


@pytest.mark.parametrize("name", ["unipool-182m", "unipool-978m"])
def test_a_thousand_ranks_are_nearly_as_fast_each_as_sixteen(name: str) -> None:
    def tokens_per_rank(ranks: int, hardware: Hardware) -> float:
        keys = ("layout=every_rank", f"trunk_ranks={ranks}", "pool_ranks=0", "expert_parallel=8", "lanes=2")
        grid = [f"parallel.{key}" for key in keys]
        return (
            step_time(load_recipe(name, [*grid, f"train.global_batch={64 * ranks}"]), hardware).tokens_per_second
            / ranks
        )

    assert 0.9 < tokens_per_rank(1024, H100) / tokens_per_rank(16, H100) < 1
    assert tokens_per_rank(1024, with_network(H100, 50)) < 0.9 * tokens_per_rank(16, H100)
