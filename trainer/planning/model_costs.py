"""What a recipe's model costs: parameters, FLOPs per token, and bytes on a rank of each role.

Everything is computed from the recipe; torch and a device are not needed. A GEMM of I x O costs 2 I O FLOPs per token,
and a backward pass costs twice its forward.

Letters: T tokens, D hidden, F expert width, V vocabulary, L layers, M experts that a layer sees, K top-k, S sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from trainer.config.recipe import Recipe

FP32 = 4
ADAM_MOMENTS = 2 * FP32
ZERO3_LIVE_PARAMETERS = 10**9
"""Parameters that DeepSpeed's ZeRO-3 may keep gathered by default (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: The whole model.
        active: Those that one token uses, without the routers; this is the number in the recipes' names.
        trunk: Embedding, attention, norms, routers, head, and the FFNs of a dense model.
        pool: All experts.
        routers: The part of the trunk that routes.
    """

    total: int
    active: int
    trunk: int
    pool: int
    routers: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a role.

    Attributes:
        role: "trunk", "pool", or "trunk + pool" (colocated).
        ranks: Number of ranks with this role.
        parameters: Number of parameters that such a rank computes with.
        weights: fp32 weights; with ZeRO-3 the rank's part and what is gathered.
        compute_copies: bf16 copies of the weights, on the trunk only while a micro-batch is in flight.
        gradients: The fp32 accumulator.
        optimizer: AdamW's moments and, with ZeRO 1 to 3, DeepSpeed's fp32 master copy.
        activations: What the trunk keeps for the backward of the micro-batches in flight.
        logits: Peak during the loss of one micro-batch, whose backward follows at once.
        expert_activations: Tokens and hidden activations that the experts keep for backward.
        stash: Deferred weight gradients of the experts, at most `pool.stash_bytes`.
    """

    role: str
    ranks: int
    parameters: int
    weights: int
    compute_copies: int
    gradients: int
    optimizer: int
    activations: int = 0
    logits: int = 0
    expert_activations: int = 0
    stash: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in MEMORY_KINDS)


MEMORY_KINDS = tuple(f.name for f in fields(Memory))[3:]


@dataclass(frozen=True)
class Flops:
    """FLOPs per token.

    Attributes:
        trunk_layer: Attention of one layer, forward; in a dense model with the FFN.
        router: One router, forward.
        expert: One expert, forward; 0 in a dense model.
        head: Output projection, forward.
        trunk, pool: Everything that a token costs on either role, forward.
        forward: The sum of `trunk` and `pool`.
        training: Forward and backward.
    """

    trunk_layer: int
    router: int
    expert: int
    head: int
    trunk: int
    pool: int
    forward: int
    training: int


def _kv_hidden(recipe: Recipe) -> int:
    """Width of the keys (and of the values) over all KV heads."""
    m = recipe.model
    return m.kv_heads * (m.hidden // m.heads)


def _attention_weights(recipe: Recipe) -> int:
    """Query, key, value and output projections of one layer."""
    D = recipe.model.hidden
    return D * (D + 2 * _kv_hidden(recipe)) + D * D


def _ffn_weights(recipe: Recipe) -> int:
    """W1, W2 and W3 of one expert, or of one dense FFN."""
    return 3 * recipe.model.hidden * recipe.model.ffn_hidden


def count_parameters(recipe: Recipe) -> Parameters:
    """Count the parameters of `trainer.model.trunk.Trunk` and of all `pool.shard.ExpertShard`s together."""
    m = recipe.model
    backbone = 2 * m.vocab * m.hidden + m.layers * (_attention_weights(recipe) + 2 * m.hidden) + m.hidden
    if m.ffn == "dense":
        dense = backbone + m.layers * _ffn_weights(recipe)
        return Parameters(total=dense, active=dense, trunk=dense, pool=0, routers=0)
    sigma = 1 if recipe.router.kind == "norm" else 0
    routers = m.layers * (recipe.experts_per_layer * m.hidden + sigma)
    pool = recipe.pool.experts * _ffn_weights(recipe)
    active = backbone + m.layers * recipe.router.top_k * _ffn_weights(recipe)
    return Parameters(backbone + routers + pool, active, backbone + routers, pool, routers)


def count_flops(recipe: Recipe) -> Flops:
    """Count FLOPs per token. Causal attention costs 2 S D per layer, half of what it would cost without the mask."""
    m = recipe.model
    dense = m.ffn == "dense"
    ffn = 2 * _ffn_weights(recipe)
    layer = 2 * _attention_weights(recipe) + 2 * m.seq_len * m.hidden + (ffn if dense else 0)
    router = 2 * recipe.experts_per_layer * m.hidden
    head = 2 * m.vocab * m.hidden
    trunk = m.layers * (layer + router) + head
    pool = 0 if dense else m.layers * recipe.router.top_k * ffn
    forward = trunk + pool
    return Flops(layer, router, 0 if dense else ffn, head, trunk, pool, forward, 3 * forward)


def served_trunk_ranks(recipe: Recipe) -> int:
    """Number of trunk ranks that the busiest pool rank serves."""
    return math.ceil(recipe.grid.trunk_ranks / recipe.grid.replicas)


def compute_bytes(recipe: Recipe) -> int:
    """Bytes of a number in the precision of the computation."""
    return 2 if recipe.train.precision == "bf16" else FP32


def estimate_memory(recipe: Recipe, lanes: int) -> tuple[Memory, ...]:
    """Estimate the bytes on a rank of each role in the recipe's layout, with `lanes` micro-batches in flight."""
    in_flight = 1 if recipe.model.ffn == "dense" else min(lanes, recipe.micro_batches)
    trunk = _without_frozen(recipe, _trunk_memory(recipe, in_flight))
    if recipe.model.ffn == "dense":
        return (trunk,)
    pool = _without_frozen(recipe, _pool_memory(recipe, in_flight))
    if not recipe.grid.colocated:
        return trunk, pool
    both = {name: getattr(trunk, name) + getattr(pool, name) for name in ("parameters", *MEMORY_KINDS)}
    return (Memory(role="trunk + pool", ranks=trunk.ranks, **both),)


def fullest_rank(recipe: Recipe, lanes: int) -> int:
    """Estimate the bytes on the rank that needs most memory."""
    return max(memory.total for memory in estimate_memory(recipe, lanes))


def _without_frozen(recipe: Recipe, memory: Memory) -> Memory:
    """A frozen role has neither gradients nor an optimizer."""
    return replace(memory, gradients=0, optimizer=0, stash=0) if recipe.train.freeze == memory.role else memory


def _state(parameters: int, zero: int, ranks: int) -> tuple[int, int]:
    """Bytes of (weights, optimizer) on each of `ranks` ranks that hold the same parameters."""
    if zero == 0:
        return FP32 * parameters, ADAM_MOMENTS * parameters
    part = -(-parameters // ranks)
    gathered = FP32 * min(parameters, ZERO3_LIVE_PARAMETERS)
    return FP32 * part + gathered if zero == 3 else FP32 * parameters, (FP32 + ADAM_MOMENTS) * part


def _trunk_memory(recipe: Recipe, in_flight: int) -> Memory:
    m, p, compute = recipe.model, recipe.parallel, compute_bytes(recipe)
    parameters = count_parameters(recipe).trunk
    weights, optimizer = _state(parameters, p.trunk_zero, p.trunk_ranks)
    tokens = recipe.train.micro_batch * m.seq_len
    dense = m.ffn == "dense"
    layer_weights = _attention_weights(recipe) + (_ffn_weights(recipe) if dense else 0)
    if recipe.train.recompute and not dense:
        # A layer keeps its inputs, the residual stream and the experts' answer; one layer at a time is kept in full.
        inputs = (FP32 + compute * recipe.router.top_k) * m.hidden
        kept = in_flight * m.layers * inputs + _layer_activations(recipe)
        cast = max(layer_weights, m.vocab * m.hidden)
    else:
        kept = in_flight * (m.layers * _layer_activations(recipe) + (2 * FP32 + compute) * m.hidden)
        cast = in_flight * (m.layers * layer_weights + m.vocab * m.hidden)
    return Memory(
        role="trunk",
        ranks=p.trunk_ranks,
        parameters=parameters,
        weights=weights,
        compute_copies=compute * cast if compute != FP32 else 0,
        gradients=FP32 * parameters,
        optimizer=optimizer,
        activations=tokens * kept,
        # log-probabilities, their gradient and the logits' gradient
        logits=tokens * m.vocab * 3 * FP32,
    )


def _layer_activations(recipe: Recipe) -> int:
    """Bytes per token that one layer of the trunk keeps for backward."""
    m, compute = recipe.model, compute_bytes(recipe)
    D, KV, F, K, M = m.hidden, _kv_hidden(recipe), m.ffn_hidden, recipe.router.top_k, recipe.experts_per_layer
    # the input of qkv; q and k rotated; qkv, for v; attention's output, twice
    attention = compute * (5 * D + 3 * KV)
    # two norms: input and normalised input
    norms = FP32 * 4 * D
    if m.ffn == "dense":
        # the input, both halves of the hidden layer, silu of one, their product
        return attention + norms + compute * (D + 4 * F)
    scores = 1 if recipe.router.kind == "norm" else 3
    # the router's input and (T, M) tensors; dispatched rows; the answer, and in fp32 for the gate's gradient
    return attention + norms + FP32 * (D + scores * M) + K * D * (2 * compute + FP32)


def pool_row_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of a row that a pool rank keeps until its backward, and of one with deferred weight gradients."""
    D, F, compute = recipe.model.hidden, recipe.model.ffn_hidden, compute_bytes(recipe)
    # x and both halves of the hidden activations; x, dH, the activation and dy
    return compute * (D if recipe.pool.recompute else D + 2 * F), compute * (2 * D + 3 * F)


def _pool_memory(recipe: Recipe, in_flight: int) -> Memory:
    m, topology, compute = recipe.model, recipe.grid, compute_bytes(recipe)
    parameters = count_parameters(recipe).pool // topology.expert_parallel
    weights, optimizer = _state(parameters, recipe.parallel.pool_zero, topology.replicas)
    assignments = served_trunk_ranks(recipe) * recipe.train.micro_batch * m.seq_len * recipe.router.top_k * m.layers
    rows = -(-assignments // topology.expert_parallel)
    kept, deferred = pool_row_bytes(recipe)
    return Memory(
        role="pool",
        ranks=topology.pool_ranks,
        parameters=parameters,
        weights=weights,
        compute_copies=compute * parameters if compute != FP32 else 0,
        gradients=FP32 * parameters,
        optimizer=optimizer,
        expert_activations=in_flight * rows * kept,
        stash=min(recipe.stash_limit, rows * recipe.micro_batches * deferred),
    )
