"""What a recipe's model costs: parameters and FLOPs per token.

Everything is computed from the recipe; torch and a device are not needed. A GEMM of I x O costs 2 I O FLOPs per token,
and a backward pass costs twice its forward, or once if the weights are frozen (`train.freeze`).

Letters: T tokens, D hidden, F expert width, V vocabulary, L layers, M experts that a layer sees, K top-k, S sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.recipe import Recipe

FP32 = 4


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


def kv_hidden(recipe: Recipe) -> int:
    """Width of the keys (and of the values) over all KV heads."""
    return recipe.model.kv_heads * recipe.model.head_size


def query_hidden(recipe: Recipe) -> int:
    """Width of the queries over all heads."""
    return recipe.model.heads * recipe.model.head_size


def attention_weights(recipe: Recipe) -> int:
    """Query, key, value and output projections of one layer."""
    return 2 * recipe.model.hidden * (query_hidden(recipe) + kv_hidden(recipe))


def attention_vectors(recipe: Recipe) -> int:
    """Biases of the projections, and weights of the norms of queries and keys, of one layer."""
    m, Q, KV = recipe.model, query_hidden(recipe), kv_hidden(recipe)
    norms = {"none": 0, "head": 2 * m.head_size, "all": Q + KV}[m.qk_norm]
    return norms + (Q + 2 * KV if m.qkv_bias else 0)


def ffn_weights(recipe: Recipe) -> int:
    """W1, W2 and W3 of one expert, or of one dense FFN."""
    return 3 * recipe.model.hidden * recipe.model.ffn_hidden


def private_weights(recipe: Recipe) -> int:
    """W1, W2 and W3 of what a layer computes for every token: the dense FFN, or an expert of its own, with its gate."""
    m = recipe.model
    return 3 * m.hidden * (m.ffn_hidden if m.ffn == "dense" else m.private_ffn) + (m.hidden if m.private_gate else 0)


def count_parameters(recipe: Recipe) -> Parameters:
    """Count the parameters of `trainer.model.trunk.Trunk` and of all `pool.shard.ExpertShard`s together."""
    m = recipe.model
    layer = attention_weights(recipe) + attention_vectors(recipe) + private_weights(recipe) + 2 * m.hidden
    backbone = 2 * m.vocab * m.hidden + m.layers * layer + m.hidden
    if m.ffn == "dense":
        return Parameters(total=backbone, active=backbone, trunk=backbone, pool=0, routers=0)
    vector = recipe.experts_per_layer if recipe.router.logit_bias else 1 if recipe.router.has_norm else 0
    routers = m.layers * (recipe.experts_per_layer * m.hidden + vector)
    pool = recipe.pool.experts * ffn_weights(recipe)
    active = backbone + m.layers * recipe.router.top_k * ffn_weights(recipe)
    return Parameters(backbone + routers + pool, active, backbone + routers, pool, routers)


def count_flops(recipe: Recipe) -> Flops:
    """Count FLOPs per token. Causal attention costs 2 S Q per layer, half of what it would cost without the mask.

    Q is the width of the queries over all heads.
    """
    m = recipe.model
    dense = m.ffn == "dense"
    ffn, attention = 2 * ffn_weights(recipe), 2 * m.seq_len * query_hidden(recipe)
    layer = 2 * attention_weights(recipe) + attention + 2 * private_weights(recipe)
    router = 2 * recipe.experts_per_layer * m.hidden
    head = 2 * m.vocab * m.hidden
    trunk = m.layers * (layer + router) + head
    pool = 0 if dense else m.layers * recipe.router.top_k * ffn
    forward = trunk + pool
    frozen = {"none": 0, "trunk": trunk - m.layers * attention, "pool": pool}[recipe.train.freeze]
    return Flops(layer, router, 0 if dense else ffn, head, trunk, pool, forward, 3 * forward - frozen)


def muon_flops(recipe: Recipe) -> tuple[int, int]:
    """FLOPs of one Muon update of the trunk's matrices, and of all experts': five iterations of three products each."""
    m = recipe.model

    def update(rows: int, columns: int) -> int:
        small, large = sorted((rows, columns))
        return 5 * (4 * small * small * large + 2 * small**3)

    attention = 2 * update(m.hidden, query_hidden(recipe)) + 2 * update(m.hidden, kv_hidden(recipe))
    width = m.ffn_hidden if m.ffn == "dense" else m.private_ffn
    expert = 3 * update(m.hidden, m.ffn_hidden)
    return m.layers * (attention + 3 * update(m.hidden, width)), recipe.pool.experts * expert


def served_trunk_ranks(recipe: Recipe) -> int:
    """Number of trunk ranks that the busiest pool rank serves."""
    return math.ceil(recipe.grid.trunk_ranks / recipe.grid.replicas)


def compute_bytes(recipe: Recipe) -> int:
    """Bytes of a number in the precision of the computation."""
    return 2 if recipe.train.precision == "bf16" else FP32
