"""Prometheus metrics: each rank serves its own /metrics. Only this file imports prometheus_client.

The training thread only stores numbers. The server's thread renders a page from them on request.
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trainer import __version__
from trainer.cluster.launch import restart_limit, restarts
from trainer.common.errors import UserError
from trainer.config.recipe import Metrics
from trainer.telemetry.catalogue import CATALOGUE, DEVICE_MEMORY, STEP_SECONDS
from trainer.telemetry.measured import DiskSpace, Place, device_memory, peak_memory, process_age
from trainer.telemetry.over_steps import Spikes
from trainer.telemetry.rank_time import PHASES, RankTime
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
    """Serves the metrics of one rank, from its first second on.

    Args:
        role: The role of this process, "" while it is not known.
        rank: Its rank in the job, None while it is not known.

    Attributes:
        address: Host and port of the page; "" while it is not served.
        expert_load: The load of the experts that this rank serves.
        time: What the rank is doing, and what its time went into.
        disk: The disk with the run's folder, on rank 0.
    """

    def __init__(self, role: str = "", rank: int | None = None):
        self.address = ""
        self.expert_load: ExpertLoad | None = None
        self.time = RankTime(process_age())
        self.disk: DiskSpace | None = None
        self._role, self._rank = role, rank
        self._device: int | None = None
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._steps = Histogram("seconds", "Time of a step.", buckets=STEP_SECONDS, registry=None)
        self._spikes = {name: Spikes() for name in ("loss", "gradient_norm")}
        self._lock = threading.Lock()
        self.add("unipool_restarts", restarts())
        if (limit := restart_limit()) is not None:
            self.set("unipool_max_restarts", limit)

    def listen(self, settings: Metrics, local_rank: int) -> None:
        """Serve the page, unless it is served already or its port depends on a rank that is not known yet.

        Args:
            settings: Where to listen.
            local_rank: The rank's number on its machine.

        Raises:
            UserError: It cannot listen there.
        """
        number = self._rank if settings.port_by == "rank" else local_rank
        if self.address or (settings.port and number is None):
            return
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        port = settings.port and settings.port + (number or 0)
        try:
            server, _ = start_http_server(port, addr=settings.host, registry=registry)
        except OSError as error:
            raise UserError(
                f"metrics.port: rank {self._rank} cannot listen on port {port} of {settings.host} ({error.strerror}); "
                "choose another port, or 0 for free ones"
            ) from None
        self.address = f"{_reachable(settings.host)}:{server.server_port}"

    def joined(self, role: str, rank: int, where: Place) -> None:
        """Serve the rank's place in the job, and what it runs."""
        self._role, self._rank, self._device = role, rank, where.ordinal
        versions = {name: version(name) for name in ("torch", "deepspeed")}
        build = {"version": __version__, "python": platform.python_version(), **versions, "device": where.device}
        self.info("unipool_build_info", build)
        self.info("unipool_rank_info", asdict(where))
        self.set("unipool_unused_gpus", where.unused_gpus)

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
            (steps,) = self._steps.collect()
        values |= self._measured()
        by_rank = (self._role, "" if self._rank is None else str(self._rank))
        for metric in CATALOGUE:
            own = ("role", "rank") if metric.by_rank else ()
            if metric.kind == "histogram":
                buckets = [(sample.labels["le"], sample.value) for sample in steps.samples if "le" in sample.labels]
                (total,) = (sample.value for sample in steps.samples if sample.name == "seconds_sum")
                if buckets[-1][1]:
                    histogram = HistogramMetricFamily(metric.name, metric.text, labels=own)
                    histogram.add_metric(by_rank, buckets, total)
                    yield histogram
            elif metric.name in values:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = make(metric.name, metric.text, labels=own + metric.labels)
                for labels, value in values[metric.name]:
                    family.add_metric((by_rank if metric.by_rank else ()) + labels, value)
                if family.samples:
                    yield family

    def _measured(self) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        """Measure what nobody has to count."""
        seconds, phase = self.time.seconds(), self.time.phase
        found: dict[str, list[tuple[tuple[str, ...], float]]] = {
            "unipool_phase": [((name,), float(name == phase)) for name in PHASES],
            "unipool_time_seconds": [((cause,), spent) for cause, spent in seconds.items()],
            "unipool_peak_memory_bytes": [((where,), size) for where, size in peak_memory(self._device).items()],
        }
        if self._device is not None:
            memory, retries = device_memory(self._device)
            found["unipool_device_memory_bytes"] = [((kind,), memory[kind]) for kind in DEVICE_MEMORY]
            found["unipool_device_allocation_retries"] = [((), retries)]
        if self.disk and (free := self.disk.free()) is not None:
            found["unipool_disk_free_bytes"] = [((), free)]
        return found

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

    def efficiency(self, efficiency: Efficiency, flops: float) -> None:
        """Serve how well the last step has used the machines, and count its FLOPs. Rank 0 calls it."""
        self.add("unipool_model_flops", flops)
        for metric, value in efficiency.metrics():
            self.set(metric.name, value)

    def step(self, scalars: StepScalars, steps_done: int, has_pool: bool) -> None:
        """Serve what is the same on all trunk ranks. Rank 0 calls it."""
        self.set("unipool_step", steps_done)
        self.add("unipool_skipped_steps", int(not scalars.applied))
        for name, value in (("loss", scalars.loss), ("gradient_norm", scalars.grad_norm)):
            self.add(f"unipool_{name}_spikes", int(self._spikes[name].add(value) is not None))
        with self._lock:
            self._steps.observe(scalars.seconds)
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

    def checkpoint_saved(self, step: int, seconds: float, stalled: float, size: int) -> None:
        """Serve a complete checkpoint: its duration, for how long training stopped, in seconds, and its bytes."""
        self.set("unipool_checkpoint_step", step)
        self.set("unipool_checkpoint_timestamp_seconds", time.time())
        self.set("unipool_checkpoint_duration_seconds", seconds)
        self.set("unipool_checkpoint_stall_seconds", stalled)
        self.set("unipool_checkpoint_bytes", size)

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


def _reachable(host: str) -> str:
    """Return how other machines name an address that a rank listens on."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
