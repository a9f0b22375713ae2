"""Prometheus metrics: each rank serves its own /metrics. The only file that imports prometheus_client.

The training thread only stores numbers; a page is made of them in the server's thread when somebody asks.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trainer.cluster.launch import restarts
from trainer.common.errors import UserError
from trainer.config.recipe import Metrics
from trainer.telemetry.time_breakdown import Usage

if TYPE_CHECKING:
    from pool.service import Served


@dataclass(frozen=True)
class Metric:
    """A metric as users see it.

    Attributes:
        name: of a counter without its `_total`.
        labels: besides role and rank; the loads of experts and layers have only these.
        by_rank: whether it has role and rank.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...] = ()
    by_rank: bool = True


def _gauge(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    return Metric(f"unipool_{name}", "gauge", text, labels, by_rank)


def _counter(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    return Metric(f"unipool_{name}", "counter", text, labels, by_rank)


CATALOGUE = (
    # every rank
    _gauge("build_info", "Versions; always 1.", "version", "torch", "deepspeed", "python"),
    _counter("restarts", "Times that the job has been started again after a fault."),
    _counter("steps", "Optimizer steps of this process."),
    _counter("activity_seconds", "Time of training steps by what the rank did.", "activity"),
    _counter("wire_sent_bytes", "Headers and payloads sent to the other role."),
    _counter("wire_received_bytes", "Headers and payloads received from the other role."),
    # every trunk rank
    _counter("tokens", "Tokens that this rank has trained on."),
    _gauge("pool_wait_ratio", "Share of the last step spent waiting for the pool."),
    # rank 0
    _gauge(
        "run_info",
        "What is trained; always 1.",
        *("run", "model", "layers", "experts", "top_k", "router"),
        *("trunk_ranks", "pool_ranks", "expert_parallel", "lanes", "precision"),
    ),
    _gauge("step", "Optimizer steps done, over all starts of the run."),
    _gauge("target_steps", "Optimizer steps of the whole run."),
    _gauge("loss_nats", "Mean cross-entropy of the last global batch."),
    _gauge("validation_loss_nats", "Mean cross-entropy of the last evaluation."),
    _gauge("balance_loss", "Balance loss of the last global batch."),
    _gauge("router_z_loss", "Router z-loss of the last global batch."),
    _gauge("gradient_norm", "Gradient norm over both roles before clipping."),
    _gauge("learning_rate", "Learning rate of the last step."),
    _gauge("tokens_per_second", "Throughput of the last step, whole job."),
    _gauge("step_seconds", "Wall time of the last step."),
    _counter("skipped_steps", "Steps skipped for gradients that were not finite."),
    _counter("nonfinite_router_tokens", "Tokens whose router logits were not all finite, over all layers."),
    _gauge("load_imbalance_ratio", "Pool load of the last step, max / mean over experts."),
    _gauge("shard_load_imbalance_ratio", "Pool load of the last step, max / mean over shards."),
    _gauge("layer_load_imbalance_ratio", "A layer's load of the last step, max / mean.", "layer", by_rank=False),
    _gauge("layer_gate", "Sum of a token's gate values, mean over the last step's.", "layer", by_rank=False),
    _gauge("dead_experts", "Experts without a token in the last step."),
    _gauge("effective_experts", "exp of the entropy of the pool's load of the last step."),
    _gauge("distinct_experts_per_token", "Experts of the pool that a token meets over all layers, mean."),
    _gauge("specialisation_bits", "How the layers' loads differ: mean Jensen-Shannon divergence over pairs, 0 to 1."),
    _gauge("random_routing_loss_nats", "Held-out loss that random experts in a layer add.", "layer", by_rank=False),
    _gauge("checkpoint_step", "Optimizer steps in the newest checkpoint."),
    _gauge("checkpoint_timestamp_seconds", "When it was complete, Unix time; before the first: the start."),
    _gauge("checkpoint_duration_seconds", "From its beginning until it was complete."),
    _gauge("checkpoint_stall_seconds", "For how long training stood still for it."),
    _gauge("checkpoint_interval_steps", "Steps between checkpoints; 0: only at the end."),
    _counter("checkpoint_failures", "Checkpoints that could not be saved."),
    # every pool rank; colocated: rank 0
    _counter("expert_tokens", "Token assignments served forward.", "expert", by_rank=False),
    _counter("expert_gradients", "Token assignments served backward.", "expert", by_rank=False),
    _counter("layer_expert_tokens", "Token assignments served forward.", "layer", "expert", by_rank=False),
    _counter("service_tokens", "Token assignments that this rank has served forward."),
    _gauge("service_queue_depth", "Slots received and not begun when one was done, mean over the last step."),
    _gauge("stash_bytes", "Largest stash of weight-gradient work in the last step."),
)

_METRICS = {metric.name: metric for metric in CATALOGUE}


@dataclass(frozen=True)
class StepScalars:
    """What a trunk rank knows of an optimizer step.

    loss in nats; grad_norm over both roles; tokens of the global batch; seconds of the step on this rank;
    load_imbalance of the pool (max / mean over experts), shard_imbalance over shards, layer_imbalances of each layer
    and layer_imbalance their mean; distinct_experts that a token meets; specialisation of the layers in bits (see
    `router.specialisation`); layer_gates the sums of a token's gate values in each layer, means over the tokens,
    layer_gate their mean and smallest_gate the smallest; nonfinite_router_tokens those whose router logits are not all
    finite, over all layers; pool_wait the share of the step spent waiting for the pool.
    """

    loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    tokens_per_second: float
    load_imbalance: float
    shard_imbalance: float
    layer_imbalance: float
    layer_imbalances: tuple[float, ...]
    layer_gate: float
    smallest_gate: float
    layer_gates: tuple[float, ...]
    dead_experts: int
    effective_experts: float
    distinct_experts: float
    specialisation: float
    nonfinite_router_tokens: int
    pool_wait: float
    applied: bool


class ExpertLoad:
    """Assignments by layer and expert as this rank serves them.

    Args:
        expert_ids: global ids of the experts.
        layers: L, if each layer's assignments are served too; else 0.
        total_experts: of the whole pool, for the width of the labels.
        backward: whether backwards are served too. Colocated, nothing travels and they are the forwards again: a page
            of all experts is half as large without.
    """

    def __init__(self, expert_ids: Sequence[int], total_experts: int, layers: int, backward: bool = True):
        self._backward = backward
        self._experts = [padded(expert, total_experts) for expert in expert_ids]
        self._layers = [padded(layer, layers) for layer in range(layers)]
        self._tokens_e = np.zeros(len(expert_ids), dtype=np.int64)
        self._gradients_e = np.zeros_like(self._tokens_e)
        self._tokens_Le = np.zeros((layers, len(expert_ids)), dtype=np.int64)

    def add(self, tokens_Le: NDArray[np.int64], gradients_e: NDArray[np.int64]) -> None:
        """Count assignments served forward and backward."""
        self._tokens_e = self._tokens_e + tokens_Le.sum(0)
        self._gradients_e = self._gradients_e + gradients_e
        if self._layers:
            self._tokens_Le = self._tokens_Le + tokens_Le

    def families(self) -> dict[str, Iterable[tuple[tuple[str, ...], float]]]:
        names = [(expert,) for expert in self._experts]
        pairs = [(layer, expert) for layer in self._layers for expert in self._experts]
        return {
            "unipool_expert_tokens": zip(names, self._tokens_e.tolist(), strict=True),
            "unipool_expert_gradients": zip(names, self._gradients_e.tolist(), strict=True) if self._backward else (),
            "unipool_layer_expert_tokens": zip(pairs, self._tokens_Le.flatten().tolist(), strict=True),
        }


class MetricsServer(Collector):
    """Serves one rank's metrics.

    Args:
        settings: where to listen.
        role, rank: of this process, as every metric is labelled.
        local_rank: its number on its machine.
        load: of the experts that this rank serves, or knows of when colocated.
    Attributes:
        address: host and port for whoever wants to read them.
    Raises:
        UserError: it cannot listen there.
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
                "0 picks free ones"
            ) from None
        self.address = f"{_reachable(settings.host)}:{server.server_port}"
        self.add("unipool_restarts", restarts())

    def set(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            self._values.setdefault(name, {})[labels] = value

    def add(self, name: str, amount: float, *labels: str) -> None:
        with self._lock:
            series = self._values.setdefault(name, {})
            series[labels] = series.get(labels, 0) + amount

    def info(self, name: str, labels: Mapping[str, object]) -> None:
        """A metric that is always 1 and says what it has to say in its labels."""
        self.set(name, 1, *(str(labels[label]) for label in _METRICS[name].labels))

    def collect(self) -> Iterable[Family]:
        """The page. Values are copied first: the training thread waits for that at most."""
        with self._lock:
            values: dict[str, Iterable[tuple[tuple[str, ...], float]]] = {
                name: list(series.items()) for name, series in self._values.items()
            }
            if self.expert_load:
                values |= self.expert_load.families()
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
        """A step is done; usage and bytes since the start."""
        self.add("unipool_steps", 1)
        for activity, seconds in asdict(usage).items():
            self.set("unipool_activity_seconds", seconds, activity)
        self.set("unipool_wire_sent_bytes", bytes_sent)
        self.set("unipool_wire_received_bytes", bytes_received)

    def trained(self, tokens: int, pool_wait: float) -> None:
        """A trunk rank's step: its own tokens, and the share of time that it waited."""
        self.add("unipool_tokens", tokens)
        self.set("unipool_pool_wait_ratio", pool_wait)

    def step(self, s: StepScalars, steps_done: int, has_pool: bool) -> None:
        """Rank 0: what is the same on all trunk ranks."""
        self.set("unipool_step", steps_done)
        self.set("unipool_loss_nats", s.loss)
        self.set("unipool_gradient_norm", s.grad_norm)
        self.set("unipool_learning_rate", s.lr)
        self.set("unipool_tokens_per_second", s.tokens_per_second)
        self.set("unipool_step_seconds", s.seconds)
        self.add("unipool_skipped_steps", int(not s.applied))
        if not has_pool:
            return
        self.set("unipool_balance_loss", s.balance_loss)
        self.set("unipool_router_z_loss", s.z_loss)
        self.set("unipool_load_imbalance_ratio", s.load_imbalance)
        self.set("unipool_shard_load_imbalance_ratio", s.shard_imbalance)
        for layer, (imbalance, gate) in enumerate(zip(s.layer_imbalances, s.layer_gates, strict=True)):
            name = padded(layer, len(s.layer_imbalances))
            # Of all digits of a float nobody has any use here, and a page of 48 layers is to stay small.
            self.set("unipool_layer_load_imbalance_ratio", round(imbalance, 4), name)
            self.set("unipool_layer_gate", round(gate, 4), name)
        self.set("unipool_dead_experts", s.dead_experts)
        self.set("unipool_effective_experts", s.effective_experts)
        self.set("unipool_distinct_experts_per_token", s.distinct_experts)
        self.set("unipool_specialisation_bits", s.specialisation)
        self.add("unipool_nonfinite_router_tokens", s.nonfinite_router_tokens)

    def checkpoints_from(self, step: int, interval: int) -> None:
        """Rank 0, at the start: the checkpoint it begins with, or none, and every how many steps there will be one."""
        self.set("unipool_checkpoint_step", step)
        self.set("unipool_checkpoint_timestamp_seconds", time.time())
        self.set("unipool_checkpoint_interval_steps", interval)
        self.add("unipool_checkpoint_failures", 0)

    def checkpoint_saved(self, step: int, seconds: float, stalled: float) -> None:
        """A checkpoint is complete: what it took, and for how long training stood still."""
        self.set("unipool_checkpoint_step", step)
        self.set("unipool_checkpoint_timestamp_seconds", time.time())
        self.set("unipool_checkpoint_duration_seconds", seconds)
        self.set("unipool_checkpoint_stall_seconds", stalled)

    def served(self, served: Served) -> None:
        """A pool rank's step."""
        self.count_load(served.tokens_Le.numpy(), served.gradients_e.numpy())
        self.add("unipool_service_tokens", int(served.tokens_Le.sum()))
        self.set("unipool_service_queue_depth", served.queue_depth)
        self.set("unipool_stash_bytes", served.stash_bytes)

    def count_load(self, tokens_Le: NDArray[np.int64], gradients_e: NDArray[np.int64]) -> None:
        """Assignments served forward and backward."""
        assert self.expert_load
        with self._lock:
            self.expert_load.add(tokens_Le, gradients_e)


def parse(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples of a page by name: (labels, value) each.

    Raises:
        ValueError: it is not a page of metrics.
    """
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def padded(number: int, total: int) -> str:
    """How metrics name the number of one of `total` experts or layers: "007"."""
    return f"{number:0{len(str(max(total - 1, 0)))}d}"


def _reachable(host: str) -> str:
    """How others name an address that a rank listens on."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
