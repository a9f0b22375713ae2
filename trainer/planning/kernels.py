"""How many kernels the trainer launches on a GPU, and how many bytes those that are not products move. No torch here.

The numbers are those of bf16. Without the compiler every operation reads its inputs and writes its result; tests count
them in the code. For compiled regions they are what inductor's scheduler counts for the kernels that it fuses for an
H100; the 22 R were counted when rotary embeddings copied more, and are now some 8 R too many. Products are counted by
their FLOPs elsewhere.

Letters: D hidden, F expert width, V vocabulary, M experts that a layer sees, K top-k, R width of queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Kernels:
    """A piece of work on a GPU, apart from its products.

    Attributes:
        launches: Kernels that the host launches, products included.
        bytes: Bytes read and written by what is not a product.
    """

    launches: float
    bytes: float


def is_compiled(recipe: Recipe) -> bool:
    """Whether a run on a GPU compiles the trunk's segments; see `train.compile`."""
    return recipe.parallel.trunk_zero < 3 if recipe.train.compile is None else recipe.train.compile


def trunk_layer(recipe: Recipe, compiled: bool) -> Kernels:
    """A third of a trunk segment's forward and backward; bytes per token."""
    m = recipe.model
    D, K, M = m.hidden, recipe.router.top_k, recipe.experts_per_layer
    R = (m.heads + m.kv_heads) * m.head_size
    if m.ffn == "dense":  # no router, no permutation, but SwiGLU; estimated, not counted
        F = m.ffn_hidden
        return (
            Kernels(20, (40 * D + 22 * R + 18 * F) / 3) if compiled else Kernels(50, (140 * D + 116 * R + 40 * F) / 3)
        )
    P, own = m.private_ffn, 9 if m.private_ffn else 0  # estimated, as for a dense model
    if compiled:
        return Kernels((25 + 45 + own) / 3, (65 * D + 24 * K * D + 22 * R + 20 * M + 18 * P) / 3)
    return Kernels((70 + 107 + 2 * own) / 3, (170 * D + 56 * K * D + 116 * R + 80 * M + 40 * P) / 3)


def head(recipe: Recipe, compiled: bool) -> Kernels:
    """A third of the forward and backward of the head and the loss; bytes per token."""
    m, chunk = recipe.model, recipe.train.loss_chunk
    chunks = math.ceil(recipe.train.micro_batch * m.seq_len / chunk)
    # Each chunk's product is added to the gradient of the weight.
    adding = 12 * m.vocab * m.hidden / chunk if chunks > 1 else 0
    if compiled:
        return Kernels((20 + 6 * chunks) / 3, (22 * m.hidden + 10 * m.vocab + adding) / 3)
    return Kernels((40 + 12 * chunks) / 3, (60 * m.hidden + 28 * m.vocab + adding) / 3)


def experts(recipe: Recipe, merged: bool) -> Kernels:
    """A third of a row's forward, backward and weight gradients, in bytes; launches for the requests of one kind.

    Args:
        merged: Whether rows of several requests are merged, and the answers divided again.
    """
    if recipe.model.ffn == "dense":
        return Kernels(0, 0)
    D, F = recipe.model.hidden, recipe.model.ffn_hidden
    # SwiGLU is two fused kernels, also where a trunk at ZeRO-3 is not compiled; otherwise two forward, ten backward.
    swiglu, more = (68 * F, 5) if recipe.train.compile is False else (6 * F + 12 * F, 0)
    alone = swiglu + 8 * (2 * D + 3 * F)
    return Kernels(30 + more, (alone + 24 * D + 24 * F) / 3) if merged else Kernels(8 + more, alone / 3)


def flush_bytes(weights: float) -> float:
    """Bytes that a launch of weight gradients moves for a shard's weights.

    The bf16 product is written, cleared where an expert has no rows, and added to the fp32 gradients.
    """
    return (2 + 4 + 10) * weights
