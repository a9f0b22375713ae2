"""Metrics before a rank has joined its job, and whom they are said to be of."""

from __future__ import annotations

import socket
import urllib.request
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.training import tiny
from trainer.cluster.launch import free_port
from trainer.cluster.rank_assignment import ROLE
from trainer.cluster.rendezvous import Launch
from trainer.common.errors import UserError
from trainer.common.gpus import Gpu
from trainer.telemetry import prometheus
from trainer.telemetry.catalogue import DEVICE_MEMORY
from trainer.telemetry.prometheus import MetricsServer, parse
from trainer.telemetry.serving import serve_early, serve_joined
from trainer.train import loop
from trainer.train.dry_run import job

FOUR = {"trunk_ranks": 2, "pool_ranks": 2}


def launched(rank: int, world_size: int = 4) -> Launch:
    return Launch(rank, world_size, rank % 2, 2, "localhost", 1)


def samples(server: MetricsServer) -> dict[str, list[tuple[dict[str, str], float]]]:
    page = urllib.request.urlopen(f"http://{server.address}/metrics", timeout=60).read().decode()
    return parse(page)


def joining(rank: int, gpus: tuple[Gpu, ...] = (), ordinal: int | None = None, unused: int = 0) -> Any:
    """A member of the job."""
    devices = SimpleNamespace(ordinals=[ordinal] * 4, names=[gpus[ordinal].name if ordinal is not None else "CPU"] * 4)
    sight = SimpleNamespace(gpus=gpus, unused=unused)
    return SimpleNamespace(rank=rank, local_rank=rank % 2, devices=devices, sight=sight, shared=MagicMock())


@pytest.mark.parametrize("module, run", [(loop, "train"), (job, "dry_run")])
def test_a_rank_that_cannot_serve_is_named(module: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, watch, recipe = ValueError("no port"), MagicMock(), tiny(parallel=FOUR)
    watch.fail.side_effect = SystemExit
    monkeypatch.setattr(module, "serve_early", MagicMock(side_effect=broken))
    monkeypatch.setattr(module, "FaultWatch", lambda rank, name: watch if (rank, name[:6]) == (2, "rank 2") else None)
    with pytest.raises(SystemExit):
        getattr(module, run)(*([recipe] * (1 + (run == "dry_run"))), launched(2))
    watch.fail.assert_called_once_with(broken)


def test_a_rank_serves_what_it_does_before_it_has_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the port of the rank that it will be: the launcher's last rank but one is the first of the pool."""
    monkeypatch.delenv(ROLE, raising=False)
    port = free_port()
    recipe = tiny(parallel=FOUR, metrics={"port": port - 2}, topology={"order": "pool_last"})
    early = serve_early(recipe, launched(2))
    assert early.address == f"127.0.0.1:{port}"
    found = samples(early)
    assert {labels["phase"]: on for labels, on in found["unipool_phase"]}["starting"] == 1
    assert sum(on for _, on in found["unipool_phase"]) == 1
    assert all(labels["role"] == "pool" and labels["rank"] == "2" for labels, _ in found["unipool_phase"])
    assert found["unipool_time_seconds_total"][0][1] > 0
    assert "unipool_rank_info" not in found
    early.time.enter("rendezvous")
    assert {labels["phase"]: on for labels, on in samples(early)["unipool_phase"]}["rendezvous"] == 1
    monkeypatch.setattr(prometheus, "peak_memory", lambda device: {"gpu": 10 * device})
    monkeypatch.setattr(prometheus, "device_memory", lambda device: (dict.fromkeys(DEVICE_MEMORY, device), 0))
    member = joining(2, (Gpu("A", "aa", "1"), Gpu("NVIDIA H100", "b0-1", "2")), 1)
    serve_joined(recipe, member, early)
    member.shared.put.assert_called_once_with("metrics", early.address)
    found = samples(early)
    ((labels, _),) = found["unipool_rank_info"]
    assert labels["gpu_uuid"] == "GPU-b0-1" and labels["local_rank"] == "0"
    assert [value for _, value in found["unipool_device_memory_bytes"]] == [1, 1, 1], "of its own GPU, the second"
    assert found["unipool_peak_memory_bytes"][0][1] == 10


def test_where_the_environment_has_the_roles_only_the_rendezvous_tells_the_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ROLE, "pool")
    port = free_port()
    recipe = tiny(parallel=FOUR, metrics={"port": port - 1, "port_by": "local_rank"})
    early = serve_early(recipe, launched(1))
    ((labels, _), *_) = samples(early)["unipool_time_seconds_total"]
    assert (labels["role"], labels["rank"]) == ("pool", "")
    by_rank = tiny(parallel=FOUR, metrics={"port": free_port() - 3})
    waits = serve_early(by_rank, launched(1))
    assert waits.address == "", "its port depends on its rank"
    serve_joined(by_rank, joining(3), waits)
    assert waits.address == f"127.0.0.1:{by_rank.metrics.port + 3}"
    ((labels, _),) = samples(waits)["unipool_rank_info"]
    assert (labels["role"], labels["rank"], labels["device"], labels["gpu_uuid"]) == ("pool", "3", "CPU", "")


def test_a_port_that_is_taken_is_tried_again_and_then_an_error() -> None:
    """The rank of an earlier attempt may just be ending; others learn that this one has no address."""
    port = free_port()  # not one that an outgoing connection may get once it is free again
    with socket.create_server(("127.0.0.1", port)):
        recipe = tiny(parallel=FOUR, metrics={"port": port})
        early, late = serve_early(recipe, launched(0)), serve_early(recipe, launched(0))
        assert early.address == ""
        member = joining(0)
        with pytest.raises(UserError, match=rf"metrics.port: rank 0 cannot listen on port {port} of 127.0.0.1 \("):
            serve_joined(recipe, member, early)
        member.shared.put.assert_called_once_with("metrics", "")
    serve_joined(recipe, joining(0), late)
    assert late.address == f"127.0.0.1:{port}"
