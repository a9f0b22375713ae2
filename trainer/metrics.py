"""Prometheus metrics: each rank serves its own /metrics. The only file that imports prometheus_client."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from trainer.errors import UserError
from trainer.launch import restarts


@dataclass(frozen=True)
class StepScalars:
    """What a trunk rank knows of an optimizer step.

    loss in nats; grad_norm over both roles; tokens of the global batch; load_imbalance of the pool (max / mean);
    layer_imbalance the mean over layers of max / mean; pool_wait the share of the step spent waiting for the pool.
    """

    loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    load_imbalance: float
    layer_imbalance: float
    dead_experts: int
    pool_wait: float
    applied: bool


class MetricsServer:
    """Serves one rank's metrics on localhost.

    Args:
        port: port to listen on; 0 picks a free one.
        labels: role and rank of this process.
        experts: global ids of the experts whose load this rank knows.
        total_experts: experts of the whole pool, for the width of the label.
    Attributes:
        port: where it listens.
    Raises:
        UserError: the port is taken.
    """

    def __init__(self, port: int, role: str, rank: int, experts: tuple[int, ...], total_experts: int):
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._labels = {"role": role, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        width = len(str(max(total_experts - 1, 0)))
        served = Counter(
            "unipool_expert_tokens", "Token assignments served, by expert.", ["expert"], registry=self._registry
        )
        self._experts = [served.labels(expert=f"{e:0{width}d}") for e in experts]
        try:
            server, _ = start_http_server(port, addr="127.0.0.1", registry=self._registry)
        except OSError as error:
            raise UserError(
                f"metrics.port: rank {rank} cannot listen on port {port} ({error.strerror}); 0 picks free ones"
            ) from None
        self.port = int(server.server_port)
        self.count("unipool_restarts", "Times that the job has been started again after a fault.", restarts())

    def step(self, s: StepScalars, steps_done: int) -> None:
        """A trunk rank's step."""
        self.gauge("unipool_loss_nats", "Mean cross-entropy of the last global batch.", s.loss)
        self.gauge("unipool_balance_loss", "Balance loss of the last global batch.", s.balance_loss)
        self.gauge("unipool_router_z_loss", "Router z-loss of the last global batch.", s.z_loss)
        self.gauge("unipool_gradient_norm", "Gradient norm over both roles before clipping.", s.grad_norm)
        self.gauge("unipool_learning_rate", "Learning rate of the last step.", s.lr)
        self.gauge("unipool_tokens_per_second", "Throughput of the last step, whole job.", s.tokens_per_second)
        self.gauge("unipool_load_imbalance_ratio", "Pool load of the last step, max / mean.", s.load_imbalance)
        self.gauge(
            "unipool_layer_load_imbalance_ratio", "Mean over layers of a layer's load, max / mean.", s.layer_imbalance
        )
        self.gauge("unipool_dead_experts", "Experts without a token in the last step.", s.dead_experts)
        self.gauge("unipool_pool_wait_ratio", "Share of the last step spent waiting for the pool.", s.pool_wait)
        self.gauge("unipool_step", "Optimizer steps done, over all starts of the run.", steps_done)
        self.count("unipool_steps", "Optimizer steps of this process.", 1)
        self.count("unipool_tokens", "Tokens trained on by the whole job since this process started.", s.tokens)
        self.count("unipool_skipped_steps", "Steps skipped for gradients that were not finite.", int(not s.applied))

    def checkpoint_saved(self, step: int, seconds: float, stalled: float) -> None:
        """A checkpoint is complete: what it took, and for how long training stood still."""
        self.gauge("unipool_checkpoint_step", "Optimizer steps in the newest checkpoint of this process.", step)
        self.gauge("unipool_checkpoint_timestamp_seconds", "When that checkpoint was complete, Unix time.", time.time())
        self.gauge("unipool_checkpoint_duration_seconds", "From its beginning until it was complete.", seconds)
        self.gauge("unipool_checkpoint_stall_seconds", "For how long training stood still for it.", stalled)

    def checkpoint_failures(self, amount: int) -> None:
        """Checkpoints that could not be saved; 0 makes the counter appear."""
        self.count("unipool_checkpoint_failures", "Checkpoints that could not be saved.", amount)

    def service(self, tokens_e: Tensor, seconds_waiting: float, seconds_busy: float) -> None:
        """A pool rank's step: load of its experts, and seconds since the last call."""
        self.load(tokens_e)
        self.count("unipool_service_waiting_seconds", "Pool rank: time waiting for requests.", seconds_waiting)
        self.count("unipool_service_busy_seconds", "Pool rank: time serving requests.", seconds_busy)
        self.count("unipool_steps", "Optimizer steps of this process.", 1)

    def load(self, tokens_e: Tensor) -> None:
        """Assignments served since the last call, by the experts given at the start."""
        for counter, tokens in zip(self._experts, tokens_e.tolist(), strict=True):
            counter.inc(tokens)

    def gauge(self, name: str, text: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, list(self._labels), registry=self._registry)
        self._gauges[name].labels(**self._labels).set(value)

    def count(self, name: str, text: str, amount: float) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(name, text, list(self._labels), registry=self._registry)
        self._counters[name].labels(**self._labels).inc(amount)


def parse(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """(labels, value) of a scraped page by sample name.

    Raises:
        ValueError: the text is no page of metrics.
    """
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples
