"""The scalars of an optimizer step: two tables, from which every output follows.

A field of `StepScalars` or `Efficiency` is a key of metrics.jsonl and a scalar of TensorBoard, CSV and Weights &
Biases. Its metadata names its Prometheus metric and its place in the progress line. A scalar that each micro-batch
computes also needs an entry in `trainer.model.micro_batch.MicroBatchResult.scalars`; all others of `StepScalars` are
computed in `trainer.train.step_results`, and those of `Efficiency` in `trainer.train.reporter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from trainer.common.format import percent, quantity, size
from trainer.common.strict_json import loads

_LARGEST = 2.0**128
"""All metrics are smaller, as fp32 is; sums of such numbers do not overflow in fp64."""
_LAST_STEP = 2**53


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
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    by_rank: bool = True
    needs_pool: bool = False

    @property
    def samples(self) -> tuple[str, ...]:
        """The names under which a page has its numbers."""
        endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(self.name + ending for ending in endings[self.kind])


def gauge(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    """Return a gauge `unipool_<name>`."""
    return Metric(f"unipool_{name}", "gauge", text, labels, by_rank)


def counter(name: str, text: str, *labels: str, by_rank: bool = True) -> Metric:
    """Return a counter `unipool_<name>`."""
    return Metric(f"unipool_{name}", "counter", text, labels, by_rank)


def histogram(name: str, text: str) -> Metric:
    """Return a histogram `unipool_<name>`."""
    return Metric(f"unipool_{name}", "histogram", text)


def _of_pool(name: str, text: str) -> Metric:
    return Metric(f"unipool_{name}", "gauge", text, needs_pool=True)


def _by_layer(name: str, text: str) -> Metric:
    return Metric(f"unipool_{name}", "gauge", text, ("layer",), by_rank=False, needs_pool=True)


def _scalar(metric: Metric | None = None, console: str | Callable[[Any], str] = "", each: str = "") -> Any:
    """Describe a field of a table of scalars.

    Args:
        metric: Its Prometheus metric, which rank 0 serves.
        console: Its part of the progress line, as a format or a function of the value.
        each: Prefix of its TensorBoard names, for a field with one value per layer.
    """
    show = console.format if isinstance(console, str) and console else console or None
    return field(metadata={"metric": metric, "console": show, "each": each})


def _optional(metric: Metric | None = None, each: str = "") -> Any:
    """Describe a field that is None unless it applies to the run."""
    return field(default=None, metadata=_scalar(metric, each=each).metadata)


class Scalars:
    """A table of scalars, a frozen dataclass. A field that is None does not apply to the run, and is left out."""

    def metrics(self) -> Iterator[tuple[Metric, Any]]:
        """Yield the Prometheus metrics and their values; those by layer have a tuple."""
        for f, value in self._known():
            if f.metadata["metric"]:
                yield f.metadata["metric"], value

    def flat(self) -> dict[str, float]:
        """Return the scalars for TensorBoard and the other monitors: "train/loss", "layer_gate/07", ..."""
        flat: dict[str, float] = {}
        for f, value in self._known():
            if each := f.metadata["each"]:
                flat |= {f"{each}/{padded(layer, len(value))}": own for layer, own in enumerate(value)}
            else:
                flat[f"train/{f.name}"] = float(value)
        return flat

    def record(self) -> dict[str, Any]:
        """Return the scalars for metrics.jsonl."""
        return {f.name: value for f, value in self._known()}

    def console(self, has_pool: bool = True) -> str:
        """Return the table's part of the progress line; a dense model has no pool."""
        shown = ((f.metadata["metric"], f.metadata["console"], value) for f, value in self._known())
        return ", ".join(
            show(value) for metric, show, value in shown if show and (has_pool or not (metric and metric.needs_pool))
        )

    def _known(self) -> Iterator[tuple[Field[Any], Any]]:
        for f in fields(self):  # type: ignore[arg-type]  # a subclass is a dataclass
            if (value := getattr(self, f.name)) is not None:
                yield f, value


@dataclass(frozen=True)
class StepScalars(Scalars):
    """What a trunk rank knows about an optimizer step. The metrics' texts say what each scalar is.

    Attributes:
        tokens: Tokens of the global batch.
        tokens_per_second: Throughput of the whole job.
        layer_imbalance: Mean of `layer_imbalances`.
        layer_gate, smallest_gate: Mean and minimum of `layer_gates`.
        pool_wait: Share of the step spent waiting for the pool.
        applied: Whether the optimizer step was applied rather than skipped.
        entropy_loss, lock_stage: In a run with a lock.
        own_share, layer_own_shares: After the assignment; the first is the mean of the second.
        foreign_assignments: Once locked.
    """

    loss: float = _scalar(gauge("loss_nats", "Mean cross-entropy of the last global batch."), "loss {:.4f}")
    balance_loss: float = _scalar(_of_pool("balance_loss", "Balance loss of the last global batch."))
    z_loss: float = _scalar(_of_pool("router_z_loss", "Router z-loss of the last global batch."))
    grad_norm: float = _scalar(gauge("gradient_norm", "Gradient norm over both roles, before clipping."))
    lr: float = _scalar(gauge("learning_rate", "Learning rate of the last step."))
    tokens: int = _scalar()
    seconds: float = _scalar(gauge("step_seconds", "Wall time of the last step."))
    tokens_per_second: float = _scalar(console="{:,.0f} tokens/s")
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
    entropy_loss: float | None = _optional(_of_pool("entropy_loss", "Entropy loss of the last global batch."))
    lock_stage: int | None = _optional(
        _of_pool("lock_stage", "Stage of the lock in the last step: 0 the whole pool, 1 annealing, 2 locked.")
    )
    own_share: float | None = _optional()
    layer_own_shares: tuple[float, ...] | None = _optional(
        _by_layer("layer_own_share_ratio", "Share of a layer's load of the last step on experts that it owns."),
        each="layer_own_share",
    )
    foreign_assignments: int | None = _optional(
        _of_pool("foreign_assignments", "Assignments of the last step to experts of other layers, once locked: 0.")
    )


@dataclass(frozen=True)
class Efficiency(Scalars):
    """How well a step has used the machines, and the run its time. `docs/operations/watching.md` defines the values.

    Attributes:
        mfu: None if the peak of the ranks' arithmetic is not known.
        trunk_memory, pool_memory: The role's rank with the most. None where no rank has the role alone.
    """

    flops_per_second: float = _scalar(
        gauge(
            "rank_flops_per_second", "FLOP/s of the model that a rank has done in the last step, mean over the ranks."
        ),
        lambda flops: f"{quantity(flops, 'FLOP/s')} per rank",
    )
    mfu: float | None = _scalar(
        gauge("model_flops_utilisation_ratio", "These FLOP/s as a share of a rank's peak."),
        lambda share: f"MFU {share:.1%}",
    )
    trunk_memory: float = _scalar(console=size)
    pool_memory: float | None = _scalar(console=lambda size_: f"{size(size_)} (pool)")
    goodput: float = _scalar(
        gauge("goodput_ratio", "Share of the time since the run's first start that went into steps that count."),
        lambda share: f"goodput {percent(share)}",
    )


STEP_METRICS = tuple(
    f.metadata["metric"] for table in (StepScalars, Efficiency) for f in fields(table) if f.metadata["metric"]
)


def padded(number: int, total: int) -> str:
    """Return how metrics name the number of one of `total` experts or layers: "007"."""
    return f"{number:0{len(str(max(total - 1, 0)))}d}"


def parse_record(line: bytes | str) -> tuple[int, dict[str, Any]] | None:
    """Return the step and the values of a line of metrics.jsonl; None if it is damaged.

    A line is damaged if it is not a whole record, or if a number is one that no run records: a number that was not
    finite is recorded as null.
    """
    if line[-1:] not in (b"\n", "\n"):
        return None  # it is still being written, or the run was killed while it was
    try:
        record = loads(line)
        step = int(record["step"])
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
    own = {key: value for key, value in record.items() if key != "tasks"}  # a task's perplexity may be any number
    return (step, record) if 0 <= step <= _LAST_STEP and _possible(own) else None


def _possible(value: Any) -> bool:
    if isinstance(value, float | int):
        return -_LARGEST < value < _LARGEST
    if isinstance(value, dict):
        return all(map(_possible, value.values()))
    return all(map(_possible, value)) if isinstance(value, list) else True
