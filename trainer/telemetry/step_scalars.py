"""The scalars of an optimizer step: one table, from which every output follows.

A field of `StepScalars` is a key of metrics.jsonl and a scalar of TensorBoard, CSV and Weights & Biases. Its metadata
names its Prometheus metric and its place in the progress line. A scalar that each micro-batch computes also needs an
entry in `trainer.model.micro_batch.MicroBatchResult.scalars`; all others are computed in `trainer.train.step_results`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A Prometheus metric.

    Attributes:
        name: The name without the `_total` that the exposition adds to counters.
        text: The help text.
        labels: The labels besides role and rank.
        by_rank: Whether it has the labels role and rank.
        needs_pool: Whether a dense model lacks it.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...] = ()
    by_rank: bool = True
    needs_pool: bool = False


def gauge(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    """Return a gauge `unipool_<name>`."""
    return Metric(f"unipool_{name}", "gauge", text, labels, by_rank)


def counter(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    """Return a counter `unipool_<name>`."""
    return Metric(f"unipool_{name}", "counter", text, labels, by_rank)


def _of_pool(name: str, text: str) -> Metric:
    return Metric(f"unipool_{name}", "gauge", text, needs_pool=True)


def _by_layer(name: str, text: str) -> Metric:
    return Metric(f"unipool_{name}", "gauge", text, ("layer",), by_rank=False, needs_pool=True)


def _scalar(metric: Metric | None = None, console: str = "", each: str = "") -> Any:
    """Describe a field of `StepScalars`.

    Args:
        metric: Its Prometheus metric, which rank 0 serves.
        console: Its part of the progress line, as a format.
        each: Prefix of its TensorBoard names, for a field with one value per layer.
    """
    return field(metadata={"metric": metric, "console": console, "each": each})


@dataclass(frozen=True)
class StepScalars:
    """What a trunk rank knows about an optimizer step. The metrics' texts say what each scalar is.

    Attributes:
        tokens: Tokens of the global batch.
        layer_imbalance: Mean of `layer_imbalances`.
        layer_gate, smallest_gate: Mean and minimum of `layer_gates`.
        pool_wait: Share of the step spent waiting for the pool.
        applied: Whether the optimizer step was applied rather than skipped.
    """

    loss: float = _scalar(gauge("loss_nats", "Mean cross-entropy of the last global batch."), "loss {:.4f}")
    balance_loss: float = _scalar(_of_pool("balance_loss", "Balance loss of the last global batch."))
    z_loss: float = _scalar(_of_pool("router_z_loss", "Router z-loss of the last global batch."))
    grad_norm: float = _scalar(gauge("gradient_norm", "Gradient norm over both roles, before clipping."))
    lr: float = _scalar(gauge("learning_rate", "Learning rate of the last step."))
    tokens: int = _scalar()
    seconds: float = _scalar(gauge("step_seconds", "Wall time of the last step."))
    tokens_per_second: float = _scalar(
        gauge("tokens_per_second", "Throughput of the whole job in the last step."), "{:,.0f} tokens/s"
    )
    load_imbalance: float = _scalar(
        _of_pool("load_imbalance_ratio", "Pool load of the last step, max / mean over experts."),
        "load imbalance {:.2f}",
    )
    shard_imbalance: float = _scalar(
        _of_pool("shard_load_imbalance_ratio", "Pool load of the last step, max / mean over shards.")
    )
    layer_imbalance: float = _scalar()
    layer_imbalances: tuple[float, ...] = _scalar(
        _by_layer("layer_load_imbalance_ratio", "Load of a layer in the last step, max / mean over experts."),
        each="layer_imbalance",
    )
    layer_gate: float = _scalar()
    smallest_gate: float = _scalar()
    layer_gates: tuple[float, ...] = _scalar(
        _by_layer("layer_gate", "Sum of a token's gate values, mean over the last step's tokens."), each="layer_gate"
    )
    dead_experts: int = _scalar(_of_pool("dead_experts", "Experts without a token in the last step."))
    effective_experts: float = _scalar(
        _of_pool("effective_experts", "exp of the entropy of the pool's load in the last step.")
    )
    distinct_experts: float = _scalar(
        _of_pool("distinct_experts_per_token", "Experts of the pool that a token meets over all layers, mean.")
    )
    specialisation: float = _scalar(
        _of_pool("specialisation_bits", "Difference of the layers' loads: mean Jensen-Shannon divergence, 0 to 1.")
    )
    nonfinite_router_tokens: int = _scalar(
        Metric(
            "unipool_nonfinite_router_tokens",
            "counter",
            "Tokens with router logits that were not finite, over all layers.",
            needs_pool=True,
        )
    )
    pool_wait: float = _scalar()
    applied: bool = _scalar()

    def metrics(self) -> Iterator[tuple[Metric, Any]]:
        """Yield the Prometheus metrics and their values; those by layer have a tuple."""
        for f in fields(self):
            if f.metadata["metric"]:
                yield f.metadata["metric"], getattr(self, f.name)

    def flat(self) -> dict[str, float]:
        """Return the scalars for TensorBoard and the other monitors: "train/loss", "layer_gate/07", ..."""
        flat: dict[str, float] = {}
        for f in fields(self):
            value, each = getattr(self, f.name), f.metadata["each"]
            if each:
                flat |= {f"{each}/{padded(layer, len(value))}": own for layer, own in enumerate(value)}
            else:
                flat[f"train/{f.name}"] = float(value)
        return flat

    def console(self) -> str:
        """Return the step's part of the progress line."""
        shown = [(f.metadata["console"], getattr(self, f.name)) for f in fields(self) if f.metadata["console"]]
        return ", ".join(form.format(value) for form, value in shown)


STEP_METRICS = tuple(f.metadata["metric"] for f in fields(StepScalars) if f.metadata["metric"])


def padded(number: int, total: int) -> str:
    """Return how metrics name the number of one of `total` experts or layers: "007"."""
    return f"{number:0{len(str(max(total - 1, 0)))}d}"
