"""What ranks serve: names, labels, sizes, and who may read it."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import torch

from pool.service import Served
from pool.wire.clock import HostClock, Waits
from trainer.cluster.launch import free_port
from trainer.common.errors import UserError
from trainer.common.machine import usable_memory
from trainer.config.job_sections import Metrics
from trainer.telemetry.catalogue import CATALOGUE, STEP_SECONDS
from trainer.telemetry.prometheus import ExpertLoad, MetricsServer, parse
from trainer.telemetry.step_scalars import Efficiency, StepScalars
from trainer.telemetry.time_breakdown import Serving, Usage, UsageClock, shares

LAYERS, EXPERTS = 48, 384
"""Of unipool-830m."""


def scalars(**values: Any) -> StepScalars:
    return StepScalars(
        **{
            **dict.fromkeys(("loss", "balance_loss", "z_loss", "grad_norm", "lr", "seconds"), 1.2345678901234567),
            **dict.fromkeys(("tokens_per_second", "load_imbalance", "shard_imbalance"), 1.2345678901234567),
            **dict.fromkeys(("layer_imbalance", "effective_experts", "distinct_experts"), 0.123456789),
            **dict.fromkeys(("specialisation", "pool_wait"), 0.123456789),
            "layer_imbalances": tuple(1 + 1 / (3 + layer) for layer in range(LAYERS)),
            **dict.fromkeys(("layer_gate", "smallest_gate"), 0.123456789),
            "layer_gates": tuple(1 / (3 + layer) for layer in range(LAYERS)),
            "tokens": 262144,
            "dead_experts": 3,
            "nonfinite_router_tokens": 0,
            "applied": True,
            **values,
        }
    )


def page_of(server: MetricsServer, host: str = "") -> str:
    address = server.address if not host else f"{host}:{server.address.rsplit(':', 1)[1]}"
    return str(urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode())


def served(
    role: str, rank: int, load: ExpertLoad | None = None, settings: Metrics | None = None, local_rank: int = 0
) -> MetricsServer:
    """A rank's metrics, served."""
    server = MetricsServer(role, rank)
    server.expert_load = load
    server.listen(settings or Metrics(), local_rank)
    return server


def full(load: ExpertLoad, steps: int) -> MetricsServer:
    """The only rank of a colocated run, `steps` steps of 830m's into it."""
    server = served("trunk", 0, load)
    tokens_LM = np.full((LAYERS, EXPERTS), steps * 262144 // EXPERTS + 12345, dtype=np.int64)
    server.used(Usage(1e5 / 3, 1e5 / 7, 1e5 / 9, 1e5 / 11), 123456789012345, 123456789012345)
    server.trained(262144, 0.123456789)
    server.step(scalars(), steps, has_pool=True)
    server.checkpoints_from(steps, 1000)
    server.checkpoint_saved(steps, 1 / 3, 1 / 7, 12345678901)
    server.count_load(tokens_LM, tokens_LM.sum(0))
    return server


def test_the_histogram_of_steps_counts_what_is_not_above_a_bound() -> None:
    values = [0.001, 0.01, 0.011, 0.7, 3.0, 3.5, 699.0, 700.0, 701.0, 1e6]
    server = served("trunk", 0)
    assert "unipool_step_duration_seconds" not in page_of(server)
    for steps, value in enumerate(values, 1):
        server.step(scalars(seconds=value), steps, has_pool=True)
    samples = {
        name: parse(page_of(server))[f"unipool_step_duration_seconds_{name}"] for name in ("bucket", "count", "sum")
    }
    own = {"role": "trunk", "rank": "0"}
    assert samples["count"] == [(own, len(values))] and samples["sum"] == [(own, sum(values))]
    expected = [(str(float(bound)), sum(value <= bound for value in values)) for bound in STEP_SECONDS]
    assert samples["bucket"] == [(own | {"le": le}, count) for le, count in [*expected, ("+Inf", len(values))]]


def test_names_follow_the_conventions() -> None:
    """Base units, no unit twice, `_total` left to the exposition, and nothing is there twice."""
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert metric.name.startswith("unipool_") and not metric.name.endswith("_total")
        assert not any(unit in metric.name for unit in ("milli", "_ms", "_kb", "_mb", "percent")), metric.name
        assert metric.text.endswith(".") and len(metric.text) < 90


def test_counters_gauges_and_labels() -> None:
    load = ExpertLoad([10, 3], 12, layers=0)
    server = served("pool", 7, load)
    tokens_Le = np.array([[1, 2], [30, 0], [0, 5]])
    server.count_load(tokens_Le, np.array([9, 8]))
    server.count_load(tokens_Le, np.array([9, 8]))
    server.set("unipool_loss_nats", float("nan"))
    page = page_of(server)
    samples = parse(page)
    assert samples["unipool_expert_tokens_total"] == [({"expert": "10"}, 62.0), ({"expert": "03"}, 14.0)]
    assert samples["unipool_expert_gradients_total"] == [({"expert": "10"}, 18.0), ({"expert": "03"}, 16.0)]
    assert samples["unipool_restarts_total"] == [({"role": "pool", "rank": "7"}, 0.0)]
    assert "unipool_layer_expert_tokens_total" not in samples
    assert 'unipool_loss_nats{rank="7",role="pool"} NaN' in page.splitlines()
    assert "_created" not in page
    assert samples["process_resident_memory_bytes"][0][1] > 1e6


def test_layers_by_experts_on_request() -> None:
    load = ExpertLoad([10, 3], 12, layers=3)
    server = served("pool", 7, load)
    server.count_load(np.array([[1, 2], [30, 0], [0, 5]]), np.array([31, 7]))
    got = {
        (labels["layer"], labels["expert"]): value
        for labels, value in parse(page_of(server))["unipool_layer_expert_tokens_total"]
    }
    assert got == {("0", "10"): 1, ("0", "03"): 2, ("1", "10"): 30, ("1", "03"): 0, ("2", "10"): 0, ("2", "03"): 5}


def test_a_page_stays_small() -> None:
    """All of 830m's experts on one pool rank, or in a single process, 100,000 steps into a run: below 52 kB."""
    pool = served("pool", 1, ExpertLoad(range(EXPERTS), EXPERTS, 0))
    pool.used(Usage(1e5 / 3, 1e5 / 7, 1e5 / 9, 1e5 / 11), 123456789012345, 123456789012345)
    tokens_e = torch.full((EXPERTS,), 3_276_800_123)
    pool.served(Served(tokens_e.expand(LAYERS, -1) // LAYERS, tokens_e, 4 / 3, 123456789))
    colocated = full(ExpertLoad(range(EXPERTS), EXPERTS, 0, backward=False), 100_000)
    for server, series in ((pool, 2 * EXPERTS), (colocated, EXPERTS)):
        page = page_of(server)
        assert page.count("\nunipool_expert_") == series
        assert len(page) < 52_000
    assert parse(page)["unipool_layer_gate"][47] == ({"layer": "47"}, 0.02)


def test_a_dense_model_has_no_pool() -> None:
    server = served("trunk", 0)
    server.step(scalars(), 5, has_pool=False)
    samples = parse(page_of(server))
    assert samples["unipool_step"][0][1] == 5
    assert not [name for name in samples if "expert" in name or "balance" in name or "gate" in name]
    assert scalars(loss=2.5, tokens_per_second=1e3).console(has_pool=False) == "loss 2.5000, 1,000 tokens/s"
    assert scalars(load_imbalance=1.5).console().endswith("tokens/s, load imbalance 1.50")


def test_efficiency() -> None:
    """What is not known is left out; memory is this process's own, on the host."""
    known = Efficiency(1.5e12, 0.25, 3e9, None, 0.875)
    assert known.console() == "1.5 TFLOP/s per rank, MFU 25.0%, 3 GB, goodput 88%"
    unknown = Efficiency(1.5e12, None, 3e9, 2e9, 1.0)
    assert unknown.console() == "1.5 TFLOP/s per rank, 3 GB, 2 GB (pool), goodput 100%"
    assert unknown.record() == {"flops_per_second": 1.5e12, "trunk_memory": 3e9, "pool_memory": 2e9, "goodput": 1.0}
    assert unknown.flat().keys() == {f"train/{name}" for name in unknown.record()}
    server = served("trunk", 0)
    server.efficiency(unknown, 2e15)
    server.efficiency(unknown, 1e15)
    samples = parse(page_of(server))
    assert samples["unipool_rank_flops_per_second"][0][1] == 1.5e12 and samples["unipool_goodput_ratio"][0][1] == 1
    assert samples["unipool_model_flops_total"][0][1] == 3e15
    assert "unipool_model_flops_utilisation_ratio" not in samples
    ((labels, peak),) = samples["unipool_peak_memory_bytes"]
    assert labels == {"role": "trunk", "rank": "0", "where": "host"}
    assert samples["process_resident_memory_bytes"][0][1] * 0.5 < peak < usable_memory()


def test_only_this_machine_reads_unless_asked() -> None:
    """The default answers on the loopback address and on no other; 0.0.0.0 on all, and names the machine."""
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    outward = next((str(address) for address in others if not str(address).startswith("127.")), "127.0.0.2")
    private = served("trunk", 0)
    assert private.address.startswith("127.0.0.1:")
    with pytest.raises(urllib.error.URLError, match="refused"):
        page_of(private, outward)
    public = served("trunk", 0, settings=Metrics(host="0.0.0.0"))
    assert "unipool_restarts_total" in page_of(public, outward)
    assert public.address.startswith(socket.gethostname() + ":")


def test_ports_by_rank_or_by_local_rank() -> None:
    port = free_port()
    by_rank = served("pool", 5, settings=Metrics(port=port - 5), local_rank=1)
    assert by_rank.address == f"127.0.0.1:{port}"
    port = free_port()
    by_place = Metrics(port=port - 1, port_by="local_rank")
    server = served("pool", 5, settings=by_place, local_rank=1)
    assert server.address == f"127.0.0.1:{port}"
    with pytest.raises(UserError, match=rf"metrics.port: rank 6 cannot listen on port {port} of 127.0.0.1"):
        served("pool", 6, settings=by_place, local_rank=1)
    with pytest.raises(UserError, match="cannot listen on port 0 of 203.0.113.1"):
        served("pool", 6, settings=Metrics(host="203.0.113.1"))


def test_usage_adds_up_to_the_time_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 50.0, 100.0, 107.0, 110.0, 111.5, 170.0, 200.0, 201.0, 204.0, 204.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    waits = Waits(HostClock())
    waits.waited(since=-5.0, headers=-2.0)
    clock = UsageClock(waits)
    clock.begin()
    waits.waited(since=103.0, headers=106.0)
    clock.computed()
    clock.stepped()
    first = clock.total
    assert first == Usage(computing=6.0, waiting=3.0, wire=1.0, optimizer=1.5)
    waits.waited(since=120.0)  # in an evaluation
    clock.begin()
    waits.waited(since=200.0)
    clock.computed()
    clock.stepped()
    assert clock.total.since(first) == Usage(computing=3.0, waiting=1.0, wire=0.0, optimizer=0.5)


def test_usage_of_a_rank_with_both_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 s it serves for 4: 1 of these it waits, half a second is the wire's. As a trunk rank it waits for 2."""
    now = iter([0.0, 100.0, 102.0, 104.0, 106.0, 110.0, 113.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    waits, serving = Waits(HostClock()), Serving(Waits(HostClock()), Waits(HostClock()))
    clock = UsageClock(waits, serving)
    clock.begin()
    waits.waited(since=100.0)
    serving.waits.waited(since=102.5, headers=103.5)
    serving.spans.waited(since=102.0)
    clock.computed()
    clock.stepped()
    assert clock.total == Usage(computing=4.0, waiting=2.0, wire=0.0, optimizer=3.0)
    assert clock.served == Usage(computing=2.5, waiting=1.0, wire=0.5)


def test_shares() -> None:
    assert shares([6, 3, 0, 3]) == {"computing": 0.5, "waiting": 0.25, "wire": 0.0, "optimizer": 0.25}
    assert shares([0, 0, 0, 0]) == dict.fromkeys(("computing", "waiting", "wire", "optimizer"), 0.0)
