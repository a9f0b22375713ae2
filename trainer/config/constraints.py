"""Constraints between keys of a recipe that the type of one key cannot express."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe


def check_constraints(recipe: Recipe) -> None:
    """Check all constraints between keys.

    Raises:
        ValueError: A constraint does not hold; the message names the key, its value and what is allowed.
    """
    _check_model(recipe)
    _check_data(recipe)
    if recipe.model.ffn == "dense":
        _check_dense(recipe)
    else:
        _check_pool(recipe)
    _check_balance(recipe)
    if recipe.lock is not None:
        _check_lock(recipe)
    if recipe.router.force is not None:
        _check_forced(recipe)
    _check_probe(recipe)
    _check_eval(recipe)
    _check_profile(recipe)
    _check_layout(recipe)


def show(value: object) -> str:
    """A value as error messages show it: on one line, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sources_or_list(key: str, value: Any) -> Any:
    """Check that a value is a text or a list of mappings; the mappings themselves are checked later."""
    listed = value if isinstance(value, list | tuple) else ()
    of_a_kind = value is None or isinstance(value, str | list | tuple)
    if not of_a_kind or any(source is None or isinstance(source, str | int | float | list) for source in listed):
        allowed = "must be a name in quotes, or a list such as [{source: a, weight: 2}, {source: b}]"
        raise ValueError(f"{key} = {show(value)}: {allowed}")
    return value


def _require(holds: bool, recipe: Recipe, key: str, allowed: str) -> None:
    if not holds:
        value = attrgetter(key)(recipe)
        raise ValueError(f"{key} = {show(list(value) if isinstance(value, tuple) else value)}: {allowed}")


def _check_model(r: Recipe) -> None:
    m = r.model
    if m.head_dim is None:
        _require(m.hidden % m.heads == 0, r, "model.heads", f"must divide model.hidden ({m.hidden})")
        even = m.hidden // m.heads % 2 == 0
        _require(even, r, "model.heads", "model.hidden / model.heads must be even (rotary embeddings)")
    _require(m.head_size % 2 == 0, r, "model.head_dim", "must be even (rotary embeddings)")
    _require(m.heads % m.kv_heads == 0, r, "model.kv_heads", f"must divide model.heads ({m.heads})")
    t = r.train
    _require(t.min_lr <= t.lr, r, "train.min_lr", f"must be at most train.lr ({t.lr})")
    fits = t.schedule != "wsd" or t.warmup_fraction + t.decay_fraction <= 1
    allowed = f"must be at most 1 - train.warmup_fraction ({1 - t.warmup_fraction:g})"
    _require(fits, r, "train.decay_fraction", allowed)


def _check_data(r: Recipe) -> None:
    d = r.data
    _require(bool(d.source), r, "data.source", "must name at least one source")
    _require(d.validation is None or bool(d.validation), r, "data.validation", "must name at least one source")
    _require(d.split[0] > 0, r, "data.split", "the first part (training) must be above 0")
    allowed = "the second part (validation) must be above 0, or data.validation must name held-out text"
    _require(d.split[1] > 0 or d.validation is not None, r, "data.split", allowed)
    if d.stream_window is not None:
        key = "data.stream_window"
        _require(isinstance(d.source, str), r, key, "must be left out with several sources")
        _require(d.validation is not None, r, key, "needs data.validation, held-out text that is prepared first")
    started = r.train.freeze == "none" or r.train.init_from is not None
    _require(started, r, "train.freeze", "needs train.init_from, which provides the trained weights to freeze")


def _check_dense(r: Recipe) -> None:
    with_dense = "with model.ffn = dense"
    _require(r.train.freeze == "none", r, "train.freeze", f"must be none {with_dense}")
    _require(r.model.private_ffn == 0, r, "model.private_ffn", f"must be 0 {with_dense}, whose FFN is all of a layer")
    _require(not r.model.private_gate, r, "model.private_gate", f"must be false {with_dense}")
    _require(r.pool.experts == 0, r, "pool.experts", f"must be 0 {with_dense}")
    _require(r.parallel.pool_ranks == 0, r, "parallel.pool_ranks", f"must be 0 {with_dense}")
    _require(r.parallel.layout in (None, "colocated"), r, "parallel.layout", f"must be left out {with_dense}")
    _require(not r.train.recompute, r, "train.recompute", f"must be false {with_dense}")
    _require(r.probe.every == 0, r, "probe.every", f"must be 0 {with_dense}, which has no routing")


def _check_pool(r: Recipe) -> None:
    m, experts = r.model, r.pool.experts
    for key, width in (("model.hidden", m.hidden), ("model.ffn_hidden", m.ffn_hidden)):
        fits = r.train.precision != "bf16" or width % 8 == 0
        allowed = "must be a multiple of 8 with train.precision = bf16 (needed by the grouped product on a GPU)"
        _require(fits, r, key, allowed)
    _require(experts > 0, r, "pool.experts", "must be at least 1 with model.ffn = pool")
    _require(m.layers % m.groups == 0, r, "model.groups", f"must divide model.layers ({m.layers})")
    _require(experts % m.groups == 0, r, "pool.experts", f"must be divisible by model.groups ({m.groups})")
    allowed = f"must be at most the experts a layer sees ({r.experts_per_layer})"
    _require(r.router.top_k <= r.experts_per_layer, r, "router.top_k", allowed)
    allowed = f"must be 1 with router.kind = {r.router.kind}; only NormRouter has a constant"
    _require(r.router.has_norm or r.router.constant_factor == 1, r, "router.constant_factor", allowed)
    softmax = r.router.kind == "softmax"
    for key, value in (("router.renormalize", r.router.renormalize), ("router.logit_bias", r.router.logit_bias)):
        _require(softmax or not value, r, key, f"must be false with router.kind = {r.router.kind}; only softmax has it")
    allowed = "must be false with router.top_k = 1, where each gate value would be 1 and routers would learn nothing"
    _require(r.router.top_k > 1 or not r.router.renormalize, r, "router.renormalize", allowed)
    allowed = "must be false with model.private_ffn = 0: there is no private expert"
    _require(m.private_ffn > 0 or not m.private_gate, r, "model.private_gate", allowed)


def _check_forced(r: Recipe) -> None:
    _require(r.model.ffn == "pool", r, "router.force", "must be left out with model.ffn = dense, which has no routing")
    _require(r.lock is None, r, "router.force", "must be left out with a section lock, in which layers own experts")
    _require(r.probe.every == 0, r, "router.force", "must be left out with probe.every above 0, which probes routing")


def _check_balance(r: Recipe) -> None:
    allowed = "must be at least 1 with balance.scope = global_batch"
    _require(r.balance.scope != "global_batch" or r.balance.delay > 0, r, "balance.delay", allowed)


def _check_lock(r: Recipe) -> None:
    assert r.lock
    m, with_lock = r.model, "with a section lock"
    _require(m.ffn == "pool", r, "model.ffn", f"must be pool {with_lock}, which gives experts to layers")
    _require(m.groups == 1, r, "model.groups", f"must be 1 {with_lock}: layers choose from the whole pool first")
    allowed = f"must be norm {with_lock}; the other routers have no locked form"
    _require(r.router.kind == "norm", r, "router.kind", allowed)
    allowed = f"must be a multiple of model.layers ({m.layers}) {with_lock}, so that every layer owns equally many"
    _require(r.pool.experts % m.layers == 0, r, "pool.experts", allowed)
    allowed = f"must be at most the experts that a layer owns {with_lock} ({r.pool.experts // m.layers})"
    _require(r.router.top_k <= r.pool.experts // m.layers, r, "router.top_k", allowed)
    fits = r.lock.full_fraction + r.lock.anneal_fraction <= 1
    _require(fits, r, "lock.anneal_fraction", f"must be at most 1 - lock.full_fraction ({1 - r.lock.full_fraction:g})")


def _check_probe(r: Recipe) -> None:
    if r.probe.every:
        layers = r.probed_layers
        holds = bool(layers) and max(layers) < r.model.layers and len(set(layers)) == len(layers)
        allowed = f"must be different numbers from 0 to {r.model.layers - 1} (model.layers - 1)"
        _require(holds, r, "probe.layers", allowed)


def _check_eval(r: Recipe) -> None:
    for key in ("eval.patience", "eval.stop_below"):
        _require(r.eval.every > 0 or attrgetter(key)(r) is None, r, key, "needs eval.every above 0")


def _check_profile(r: Recipe) -> None:
    if r.profile.steps:
        first, last = r.profile.steps
        allowed = f"must be a first and a last step, from 1 to {r.train.steps} (train.steps)"
        _require(first <= last <= r.train.steps, r, "profile.steps", allowed)


def _check_layout(r: Recipe) -> None:
    p, micro_batch = r.parallel, r.train.micro_batch
    allowed = f"must be divisible by train.micro_batch x parallel.trunk_ranks ({micro_batch} x {p.trunk_ranks})"
    _require(r.train.global_batch % (micro_batch * p.trunk_ranks) == 0, r, "train.global_batch", allowed)
    if p.layout == "dedicated":
        _require(p.pool_ranks > 0, r, "parallel.pool_ranks", "must be at least 1 with parallel.layout = dedicated")
    elif p.layout is not None:
        allowed = f"must be 0 or left out with parallel.layout = {p.layout}"
        _require(p.pool_ranks == 0, r, "parallel.pool_ranks", allowed)
    one_shard = not r.grid.colocated or p.expert_parallel in (None, 1)
    _require(one_shard, r, "parallel.expert_parallel", "must be 1 or left out in the colocated layout")
    allowed = "must be false in the colocated layout, where nothing travels"
    _require(not r.grid.colocated or not p.check, r, "parallel.check", allowed)
    shards = r.grid.expert_parallel
    ranks = "parallel.trunk_ranks" if r.grid.every_rank else "parallel.pool_ranks"
    allowed = f"must divide {ranks} ({r.grid.pool_ranks})"
    _require(r.grid.pool_ranks % shards == 0, r, "parallel.expert_parallel", allowed)
    allowed = f"must be divisible by the shards of the pool ({shards})"
    _require(r.pool.experts % shards == 0, r, "pool.experts", allowed)
    lockstep = p.lanes == 1 and (r.grid.every_rank or not p.stagger)
    in_order = p.trunk_zero < 3 or r.grid.colocated or p.trunk_ranks == 1 or lockstep
    needed = "parallel.lanes=1" if r.grid.every_rank else "parallel.lanes=1 and parallel.stagger=false"
    allowed = f"needs {needed}, because ZeRO-3 gathers weights in program order"
    _require(in_order, r, "parallel.trunk_zero", allowed)
    allowed = "must be false or left out with parallel.trunk_zero = 3, which gathers weights while modules are called"
    _require(p.trunk_zero < 3 or not r.train.compile, r, "train.compile", allowed)
    allowed = "must be 0 with train.optimizer = muon, which needs whole matrices and not ZeRO's parts of them"
    has_pool = r.model.ffn == "pool"
    for key, stage in (("parallel.trunk_zero", p.trunk_zero), ("parallel.pool_zero", p.pool_zero if has_pool else 0)):
        _require(r.train.optimizer != "muon" or stage == 0, r, key, allowed)
    last_port = r.metrics.port + r.grid.world_size - 1
    allowed = f"port + rank must stay below 65536; the last would be {last_port}"
    _require(r.metrics.port == 0 or last_port <= 65535, r, "metrics.port", allowed)
