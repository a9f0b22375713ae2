"""Relations between keys of a recipe that one key's own type cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe


def check_relations(recipe: Recipe) -> None:
    """Raises ValueError, which names key, value and what is allowed, at the first relation that does not hold."""
    _check_model(recipe)
    _check_data(recipe)
    _check_pool(recipe)
    _check_balance(recipe)
    _check_probe(recipe)
    _check_layout(recipe)


def show(value: object) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sources_or_list(key: str, value: Any) -> Any:
    """The value, which must be a text or a list of mappings; what these hold is checked later."""
    listed = value if isinstance(value, list | tuple) else ()
    of_a_kind = value is None or isinstance(value, str | list | tuple)
    if not of_a_kind or any(source is None or isinstance(source, str | int | float | list) for source in listed):
        raise _Relation(key, value, "must be a name in quotes, or a list as [{source: a, weight: 2}, {source: b}]")
    return value


class _Relation(ValueError):
    """A relation between keys that does not hold."""

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"{key} = {show(value)}: {allowed}")


def _check_model(r: Recipe) -> None:
    m = r.model
    if m.hidden % m.heads:
        raise _Relation("model.heads", m.heads, f"must divide model.hidden ({m.hidden})")
    if (m.hidden // m.heads) % 2:
        raise _Relation("model.heads", m.heads, "model.hidden / model.heads must be even (rotary embeddings)")
    if m.heads % m.kv_heads:
        raise _Relation("model.kv_heads", m.kv_heads, f"must divide model.heads ({m.heads})")
    if r.train.min_lr > r.train.lr:
        raise _Relation("train.min_lr", r.train.min_lr, f"must be at most train.lr ({r.train.lr})")


def _check_data(r: Recipe) -> None:
    d = r.data
    for key, sources in (("data.source", d.source), ("data.validation", d.validation)):
        if sources is not None and not sources:
            raise _Relation(key, list(sources), "must name at least one source")
    if d.split[0] == 0:
        raise _Relation("data.split", list(d.split), "the first part (training) must be above 0")
    if d.split[1] == 0 and d.validation is None:
        allowed = "the second part (validation) must be above 0, or data.validation must name held-out text"
        raise _Relation("data.split", list(d.split), allowed)


def _check_pool(r: Recipe) -> None:
    m, experts = r.model, r.pool.experts
    if r.train.freeze != "none" and r.train.init_from is None:
        raise _Relation("train.freeze", r.train.freeze, "needs train.init_from: what is frozen must have been trained")
    if m.ffn == "dense":
        if r.train.freeze != "none":
            raise _Relation("train.freeze", r.train.freeze, "must be none with model.ffn = dense")
        if experts:
            raise _Relation("pool.experts", experts, "must be 0 with model.ffn = dense")
        if r.parallel.pool_ranks:
            raise _Relation("parallel.pool_ranks", r.parallel.pool_ranks, "must be 0 with model.ffn = dense")
        if r.train.recompute:
            raise _Relation("train.recompute", True, "must be false with model.ffn = dense")
        return
    for key, width in (("model.hidden", m.hidden), ("model.ffn_hidden", m.ffn_hidden)):
        if r.train.precision == "bf16" and width % 8:
            raise _Relation(
                key, width, "must be a multiple of 8 with train.precision = bf16 (the GPU's grouped product)"
            )
    if experts == 0:
        raise _Relation("pool.experts", 0, "must be at least 1 with model.ffn = pool")
    if m.layers % m.groups:
        raise _Relation("model.groups", m.groups, f"must divide model.layers ({m.layers})")
    if experts % m.groups:
        raise _Relation("pool.experts", experts, f"must be divisible by model.groups ({m.groups})")
    if r.router.top_k > r.experts_per_layer:
        raise _Relation(
            "router.top_k", r.router.top_k, f"must be at most the experts a layer sees ({r.experts_per_layer})"
        )
    if r.router.kind != "norm" and r.router.constant_factor != 1:
        allowed = f"must be 1 with router.kind = {r.router.kind}: c is NormRouter's"
        raise _Relation("router.constant_factor", r.router.constant_factor, allowed)


def _check_balance(r: Recipe) -> None:
    if r.balance.scope == "global_batch" and r.balance.delay == 0:
        raise _Relation("balance.delay", 0, "must be at least 1 with balance.scope = global_batch")


def _check_probe(r: Recipe) -> None:
    if not r.probe.every:
        return
    if r.model.ffn == "dense":
        raise _Relation("probe.every", r.probe.every, "must be 0 with model.ffn = dense, which routes nothing")
    layers = r.probed_layers
    if not layers or max(layers) >= r.model.layers or len(set(layers)) < len(layers):
        allowed = f"must be different numbers from 0 to {r.model.layers - 1} (model.layers - 1)"
        raise _Relation("probe.layers", list(layers), allowed)


def _check_layout(r: Recipe) -> None:
    p = r.parallel
    per_step = r.train.micro_batch * p.trunk_ranks
    if r.train.global_batch % per_step:
        allowed = (
            f"must be divisible by train.micro_batch x parallel.trunk_ranks ({r.train.micro_batch} x {p.trunk_ranks})"
        )
        raise _Relation("train.global_batch", r.train.global_batch, allowed)
    if p.expert_parallel is not None and p.pool_ranks == 0 and p.expert_parallel != 1:
        raise _Relation(
            "parallel.expert_parallel", p.expert_parallel, "must be 1 or left out with parallel.pool_ranks = 0"
        )
    if p.check and p.pool_ranks == 0:
        raise _Relation("parallel.check", True, "must be false with parallel.pool_ranks = 0: nothing travels")
    shards = r.grid.expert_parallel
    if p.pool_ranks and p.pool_ranks % shards:
        raise _Relation("parallel.expert_parallel", shards, f"must divide parallel.pool_ranks ({p.pool_ranks})")
    if r.pool.experts % shards:
        raise _Relation("pool.experts", r.pool.experts, f"must be divisible by the shards of the pool ({shards})")
    if p.trunk_zero == 3 and p.pool_ranks and p.trunk_ranks > 1 and (p.lanes != 1 or p.stagger):
        allowed = "gathers weights by collectives in program order: set parallel.lanes=1 and parallel.stagger=false too"
        raise _Relation("parallel.trunk_zero", 3, allowed)
    last_port = r.metrics.port + p.trunk_ranks + p.pool_ranks - 1
    if r.metrics.port and last_port > 65535:
        raise _Relation(
            "metrics.port", r.metrics.port, f"port + rank must stay below 65536, the last would be {last_port}"
        )
