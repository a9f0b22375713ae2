"""Prometheus metrics: each rank serves its own /metrics. Only this file imports prometheus_client.

The training thread only stores numbers. The server's thread renders a page from them on request.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trainer.cluster.launch import restarts
from trainer.common.errors import UserError
from trainer.common.machine import peak_resident_memory
from trainer.config.recipe import Metrics
from trainer.telemetry.catalogue import CATALOGUE
from trainer.telemetry.step_scalars import Efficiency, StepScalars, padded
from trainer.telemetry.time_breakdown import Usage

if TYPE_CHECKING:
    from pool.service import Served

_METRICS = {metric.name: metric for metric in CATALOGUE}


class ExpertLoad:
    """Token assignments of this rank's experts, as metrics by layer and expert.

    Args:
        expert_ids: Global ids of the experts.
        total_experts: Experts of the whole pool, which determine the width of the labels.
        layers: L if the assignments of each layer are served too, else 0.
        backward: Whether backwards are served too. In the colocated layout they equal the forwards, and a page without
            them is half as large.
    """

    def __init__(self, expert_ids: Sequence[int], total_experts: int, layers: int, backward: bool = True):
        self._backward = backward
        self._experts = [padded(expert, total_experts) for expert in expert_ids]
        self._layers = [padded(layer, layers) for layer in range(layers)]
        self._tokens_e = np.zeros(len(expert_ids), dtype=np.int64)
        self._gradients_e = np.zeros_like(self._tokens_e)
        self._tokens_Le = np.zeros((layers, len(expert_ids)), dtype=np.int64)

    def add(self, tokens_Le: NDArray[np.int64], gradients_e: NDArray[np.int64]) -> None:
        """Add assignments served forward and backward."""
        self._tokens_e = self._tokens_e + tokens_Le.sum(0)
        self._gradients_e = self._gradients_e + gradients_e
        if self._layers:
            self._tokens_Le = self._tokens_Le + tokens_Le

    def families(self) -> dict[str, Iterable[tuple[tuple[str, ...], float]]]:
        """Return the samples of each metric: label values and number."""
        names = [(expert,) for expert in self._experts]
        pairs = [(layer, expert) for layer in self._layers for expert in self._experts]
        return {
            "unipool_expert_tokens": zip(names, self._tokens_e.tolist(), strict=True),
            "unipool_expert_gradients": zip(names, self._gradients_e.tolist(), strict=True) if self._backward else (),
            "unipool_layer_expert_tokens": zip(pairs, self._tokens_Le.flatten().tolist(), strict=True),
        }


class MetricsServer(Collector):
    """Serves the metrics of one rank.

    Args:
        settings: Where to listen.
        role, rank: The role and rank of this process, for the labels.
        local_rank: The rank's number on its machine.
        load: The load of the experts that this rank serves.

    Attributes:
        address: Host and port of the page.

    Raises:
        UserError: It cannot listen there.
    """

    def __init__(self, settings: Metrics, role: str, rank: int, local_rank: int, load: ExpertLoad | None = None):
        self._by_rank = (role, str(rank))
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()
        self.expert_load = load
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        port = settings.port and settings.port + (rank if settings.port_by == "rank" else local_rank)
        try:
            server, _ = start_http_server(port, addr=settings.host, registry=registry)
        except OSError as error:
            raise UserError(
                f"metrics.port: rank {rank} cannot listen on port {port} of {settings.host} ({error.strerror}); "
                "choose another port, or 0 for free ones"
            ) from None
        self.address = f"{_reachable(settings.host)}:{server.server_port}"
        self.add("unipool_restarts", restarts())

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a metric."""
        with self._lock:
            self._values.setdefault(name, {})[labels] = value

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Increase a counter."""
        with self._lock:
            series = self._values.setdefault(name, {})
            series[labels] = series.get(labels, 0) + amount

    def info(self, name: str, labels: Mapping[str, object]) -> None:
        """Set a metric that is always 1 and carries its information in its labels."""
        self.set(name, 1, *(str(labels[label]) for label in _METRICS[name].labels))

    def collect(self) -> Iterable[Family]:
        """Render the page. The training thread waits at most while values are copied."""
        with self._lock:
            values: dict[str, Iterable[tuple[tuple[str, ...], float]]] = {
                name: list(series.items()) for name, series in self._values.items()
            }
            if self.expert_load:
                values |= self.expert_load.families()
        values["unipool_peak_memory_bytes"] = [((where,), size) for where, size in peak_memory().items()]
        for metric in CATALOGUE:
            if metric.name in values:
                own = ("role", "rank") if metric.by_rank else ()
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = make(metric.name, metric.text, labels=own + metric.labels)
                for labels, value in values[metric.name]:
                    family.add_metric((self._by_rank if metric.by_rank else ()) + labels, value)
                if family.samples:
                    yield family

    def used(self, usage: Usage, bytes_sent: int, bytes_received: int) -> None:
        """Count a step, and set usage and bytes since the start."""
        self.add("unipool_steps", 1)
        for activity, seconds in asdict(usage).items():
            self.set("unipool_activity_seconds", seconds, activity)
        self.set("unipool_wire_sent_bytes", bytes_sent)
        self.set("unipool_wire_received_bytes", bytes_received)

    def trained(self, tokens: int, pool_wait: float) -> None:
        """Serve a trunk rank's step: its own tokens, and its share of time spent waiting for the pool."""
        self.add("unipool_tokens", tokens)
        self.set("unipool_pool_wait_ratio", pool_wait)

    def efficiency(self, efficiency: Efficiency) -> None:
        """Serve how well the last step has used the machines. Rank 0 calls it."""
        for metric, value in efficiency.metrics():
            self.set(metric.name, value)

    def step(self, scalars: StepScalars, steps_done: int, has_pool: bool) -> None:
        """Serve what is the same on all trunk ranks. Rank 0 calls it."""
        self.set("unipool_step", steps_done)
        self.add("unipool_skipped_steps", int(not scalars.applied))
        for metric, value in scalars.metrics():
            if metric.needs_pool and not has_pool:
                continue
            if metric.labels:
                for layer, own in enumerate(value):  # four decimals keep a page of 48 layers small
                    self.set(metric.name, round(own, 4), padded(layer, len(value)))
            else:
                (self.add if metric.kind == "counter" else self.set)(metric.name, value)

    def checkpoints_from(self, step: int, interval: int) -> None:
        """Serve the checkpoint that the run starts from (0: none), and the interval. Rank 0 calls it at the start."""
        self.set("unipool_checkpoint_step", step)
        self.set("unipool_checkpoint_timestamp_seconds", time.time())
        self.set("unipool_checkpoint_interval_steps", interval)
        self.add("unipool_checkpoint_failures", 0)

    def checkpoint_saved(self, step: int, seconds: float, stalled: float) -> None:
        """Serve a complete checkpoint: its duration, and for how long training stopped, seconds."""
        self.set("unipool_checkpoint_step", step)
        self.set("unipool_checkpoint_timestamp_seconds", time.time())
        self.set("unipool_checkpoint_duration_seconds", seconds)
        self.set("unipool_checkpoint_stall_seconds", stalled)

    def served(self, served: Served) -> None:
        """Serve a pool rank's step."""
        self.count_load(served.tokens_Le.numpy(), served.gradients_e.numpy())
        self.add("unipool_service_tokens", int(served.tokens_Le.sum()))
        self.set("unipool_service_queue_depth", served.queue_depth)
        self.set("unipool_stash_bytes", served.deferred_bytes)

    def count_load(self, tokens_Le: NDArray[np.int64], gradients_e: NDArray[np.int64]) -> None:
        """Add assignments served forward (layers by experts) and backward."""
        assert self.expert_load
        with self._lock:
            self.expert_load.add(tokens_Le, gradients_e)


def parse(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Parse a page of metrics into samples by name, each (labels, value).

    Raises:
        ValueError: It is not a page of metrics.
    """
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process has had so far: on the "host", and on the "gpu" if it uses one."""
    torch = sys.modules.get("torch")
    peak = {"host": peak_resident_memory()}
    if torch and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _reachable(host: str) -> str:
    """Return how other machines name an address that a rank listens on."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
