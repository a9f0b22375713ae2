"""How much memory a rank of each role needs: the parts that the code and DeepSpeed allocate, added up. No torch here.

A rank is fullest either while it accumulates gradients, with micro-batches in flight, or at the step's end, when
DeepSpeed reduces the gradients through buffers. `tests/trainer/planning/test_memory.py` compares with real ranks.

Letters: T tokens of a micro-batch, D hidden, F expert width, K top-k, N = T * K assignments, P parameters of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from trainer.config.recipe import Recipe
from trainer.planning.model_costs import (
    FP32,
    attention_weights,
    compute_bytes,
    count_parameters,
    kv_hidden,
    private_weights,
    query_hidden,
    served_trunk_ranks,
)

FP64 = 8
MUON_AT_A_TIME = 2**24
"""Elements that Muon updates at once: `WEIGHTS_AT_A_TIME` of `trainer.engine.muon`."""
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once; at ZeRO 1 to 3 its buffer has as many, or P if that is less."""

CONTEXT = 700 * 10**6
"""Assumed: CUDA's context with the kernels of torch, NCCL and the compiler, and cuBLAS's workspaces of 32 MiB."""
CONNECTION = (4 << 20) + (512 << 10) + 8 * 8 * 120 * 640
"""Buffers of NCCL's three protocols for one channel and peer: the defaults in its init.cc."""
WIRE_CHANNELS = 8
"""Channels to each peer of the wire: `MAX_CTAS` of `pool.wire.nccl`."""
ROLE_CHANNELS = 24
"""Assumed channels of the rings and trees of a role's communicator."""
ROLE_PEERS = 3
"""Peers of a rank in a role's communicator: one in its ring, two in its tree."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a role.

    Attributes:
        role: "trunk", "pool", or "trunk + pool" (a rank with both).
        ranks: Number of ranks with this role.
        parameters: Number of parameters that such a rank computes with.
        host: Memory of the host, not of the device: the copy of the state while a checkpoint is written.
        weights: fp32 weights; with ZeRO-3 the rank's part and what is gathered.
        gradients: The fp32 accumulator; with ZeRO-3 also the rank's part and the buffer of the reduction.
        optimizer: The moments and, with ZeRO 1 to 3, DeepSpeed's fp32 master copy.
        device: The GPU's context and NCCL's communicators.
        compute_copies: bf16 copies of the weights, on the trunk only while a micro-batch is in flight.
        activations: What the trunk keeps for the backward of the micro-batches in flight.
        logits: Peak during the loss of one micro-batch, whose backward follows at once; see `train.loss_chunk`.
        messages: Requests and answers on their way.
        expert_activations: Tokens and hidden activations that the experts keep for backward.
        stash: Deferred weight gradients of the experts.
        working: What one trunk layer's backward, and one launch of the experts, need besides.
        step_end: Buffers for reducing gradients, for their norm and for Muon, when everything from `compute_copies` on
            is free.
    """

    role: str
    ranks: int
    parameters: int
    host: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    device: int = 0
    compute_copies: int = 0
    activations: int = 0
    logits: int = 0
    messages: int = 0
    expert_activations: int = 0
    stash: int = 0
    working: int = 0
    step_end: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the fullest moment: while gradients accumulate, or at the step's end."""
        accumulating: int = sum(getattr(self, kind) for kind in ACCUMULATING)
        return self.weights + self.gradients + self.optimizer + max(accumulating, self.step_end)

    @property
    def total(self) -> int:
        """Bytes on the device at the fullest moment."""
        return self.tensors + self.device


MEMORY_KINDS = tuple(f.name for f in fields(Memory))[4:]
"""The parts: first those that a rank always needs, then `ACCUMULATING`, then `step_end`."""
KIND_NAMES = {
    "stash": "deferred weight gradients",
    "working": "working memory of a layer",
    "step_end": "buffers at the step's end",
    "device": "context and communicators",
}
"""Kinds whose names do not say what they are."""
ACCUMULATING = ("compute_copies", "activations", "logits", "messages", "expert_activations", "stash", "working")


def estimate_memory(recipe: Recipe, lanes: int) -> tuple[Memory, ...]:
    """Estimate the bytes on a rank of each role in the recipe's layout, with `lanes` micro-batches in flight."""
    in_flight = 1 if recipe.model.ffn == "dense" else min(lanes, recipe.micro_batches)
    trunk = _without_frozen(recipe, _trunk_memory(recipe, in_flight))
    if recipe.model.ffn == "dense":
        return (trunk,)
    freed = trunk.activations if recipe.grid.colocated else 0
    pool = _without_frozen(recipe, _pool_memory(recipe, in_flight, freed))
    if recipe.grid.dedicated:
        return trunk, pool
    both = {kind: getattr(trunk, kind) + getattr(pool, kind) for kind in ("parameters", "host", *MEMORY_KINDS)}
    both["step_end"] = max(trunk.step_end, pool.step_end)  # one role after the other
    if recipe.grid.colocated:
        both["device"] = _device_memory((trunk.ranks,), wire_peers=0)
    else:
        both["device"] = _device_memory((trunk.ranks, recipe.grid.replicas), recipe.grid.expert_parallel - 1)
    return (Memory(role="trunk + pool", ranks=trunk.ranks, **both),)


def fullest_rank(recipe: Recipe, lanes: int) -> int:
    """Estimate the bytes on the rank that needs most memory."""
    return max(memory.total for memory in estimate_memory(recipe, lanes))


def _without_frozen(recipe: Recipe, memory: Memory) -> Memory:
    """A frozen role has neither gradients nor an optimizer."""
    frozen = recipe.train.freeze == memory.role
    return replace(memory, gradients=0, optimizer=0, stash=0, step_end=0, host=0) if frozen else memory


def _state(
    parameters: int, largest: int, zero: int, ranks: int, by_muon: int, in_place: bool = False
) -> dict[str, int]:
    """Bytes of the state on each of `ranks` ranks that hold the same parameters, and of buffers at the step's end.

    Args:
        largest: Elements of the largest parameter.
        in_place: Whether gradients are reduced where they are, at ZeRO 0.
        by_muon: Elements of the parameters that Muon updates, which have one moment.
    """
    whole, part = FP32 * parameters, FP32 * -(-parameters // ranks)
    bucket = FP32 * min(parameters, BUCKET)
    if zero == 0:
        # Gradients are concatenated up to the bucket's size, and reduced in that copy. One that is larger is its own.
        copy = 0 if in_place or ranks == 1 or largest > BUCKET else FP32 * min(parameters, BUCKET + largest)
        # Muon has the momentum ahead, the iteration's matrices before and after, and two of their products.
        working = 5 * FP32 * min(by_muon, MUON_AT_A_TIME)
        moments = 2 * whole - FP32 * by_muon
        state = {"weights": whole, "gradients": whole, "optimizer": moments, "host": whole + moments}
        return state | {"step_end": max(copy, working)}
    # For the norm each rank has its part of the gradients, and converts one after the other to fp64.
    norm = part + FP64 * min(largest, -(-parameters // ranks)) - whole
    state = {"optimizer": 3 * part, "host": whole + 3 * part}
    if zero == 3:
        gradients = whole + part + bucket
        return state | {"weights": part + whole, "gradients": gradients, "step_end": max(bucket // ranks, norm)}
    return state | {"weights": whole, "gradients": whole, "step_end": max(bucket, part, norm)}


def _trunk_memory(recipe: Recipe, in_flight: int) -> Memory:
    m, p, compute = recipe.model, recipe.parallel, compute_bytes(recipe)
    parameters, head = count_parameters(recipe).trunk, m.vocab * m.hidden
    tokens = recipe.train.micro_batch * m.seq_len
    dense = m.ffn == "dense"
    layer_weights = attention_weights(recipe) + private_weights(recipe)
    layer = _layer_activations(recipe)
    if recipe.train.recompute and not dense:
        # A layer keeps its inputs, the residual stream and the experts' answer; one layer at a time is kept in full.
        inputs = (FP32 + compute * recipe.router.top_k) * m.hidden
        kept = in_flight * m.layers * inputs + layer
        cast = max(layer_weights, head)
    else:
        kept = in_flight * (m.layers * layer + (2 * FP32 + compute) * m.hidden)
        cast = in_flight * m.layers * layer_weights + head
    matrices = m.layers * (layer_weights - (m.hidden if m.private_gate else 0))  # the gate is a vector to Muon
    # The gradient of the rows that was sent, the answer, and the gradient of the residual stream.
    between = 0 if dense else 2 * recipe.router.top_k * m.hidden * compute + FP32 * m.hidden
    return Memory(
        role="trunk",
        ranks=p.trunk_ranks,
        parameters=parameters,
        compute_copies=compute * cast if compute != FP32 else 0,
        activations=tokens * kept,
        logits=_loss_bytes(recipe),
        messages=in_flight * tokens * between,
        working=tokens * layer,
        device=_device_memory((p.trunk_ranks,), recipe.grid.expert_parallel),
        **_state(parameters, head, p.trunk_zero, p.trunk_ranks, matrices if recipe.train.optimizer == "muon" else 0),
    )


def _loss_bytes(recipe: Recipe) -> int:
    """Bytes of the loss of one micro-batch; see `trainer.model.loss`."""
    m, compute, chunk = recipe.model, compute_bytes(recipe), recipe.train.loss_chunk
    tokens = recipe.train.micro_batch * m.seq_len
    if tokens <= chunk:
        return tokens * m.vocab * 3 * FP32  # log-probabilities, their gradient and the logits' gradient
    # Two fp32 tensors of a chunk's size, or its gradient and the product that is added to the weight's gradient; then
    # that gradient, and the gradient of the hidden states, in chunks and as one.
    size = -(-tokens // -(-tokens // chunk))
    weights = m.vocab * m.hidden
    product = 0 if compute == FP32 else compute * weights
    whole = FP32 * weights + tokens * m.hidden * (2 * compute + FP32)
    return max(size * m.vocab * 2 * FP32, size * m.vocab * compute + product) + whole


def _layer_activations(recipe: Recipe) -> int:
    """Bytes per token that one layer of the trunk keeps for backward."""
    m, compute = recipe.model, compute_bytes(recipe)
    D, Q, KV = m.hidden, query_hidden(recipe), kv_hidden(recipe)
    F, K, M = m.ffn_hidden, recipe.router.top_k, recipe.experts_per_layer
    # the input of qkv; q and k rotated; qkv, for v; attention's output
    attention = compute * (D + 3 * Q + 3 * KV)
    if m.qk_norm != "none":  # the norms' input, which in fp32 is the projections' own output, and normalised input
        attention += FP32 * (2 * Q + (2 if compute != FP32 else 3) * KV)
    # two norms: input and normalised input
    norms = FP32 * 4 * D
    # both halves of the hidden layer, silu of one, their product, and the input
    if m.ffn == "dense":
        return attention + norms + compute * (4 * F + D)
    private = compute * 4 * m.private_ffn
    if m.private_ffn and compute != FP32:  # otherwise its input is the router's
        private += compute * D
    if m.private_gate:  # the expert's output, and the gate's input
        private += compute * (D if compute == FP32 else 2 * D)
    scores = 1 if recipe.router.has_norm else 3
    # the router's input and (T, M) tensors; dispatched rows; the answer, and in fp32 for the gate's gradient
    return attention + norms + private + FP32 * (D + scores * M) + K * D * (2 * compute + FP32)


def pool_row_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of a row that a pool rank keeps until its backward, and of one with deferred weight gradients."""
    D, F, compute = recipe.model.hidden, recipe.model.ffn_hidden, compute_bytes(recipe)
    # x and both halves of the hidden activations; x, dH, the activation and dy
    return compute * (D if recipe.pool.recompute else D + 2 * F), compute * (2 * D + 3 * F)


def _pool_memory(recipe: Recipe, in_flight: int, freed: int) -> Memory:
    """Estimate a pool rank's bytes.

    Args:
        freed: Bytes that a colocated trunk frees while the micro-batches go backward.
    """
    m, grid, compute = recipe.model, recipe.grid, compute_bytes(recipe)
    D, F = m.hidden, m.ffn_hidden
    parameters = count_parameters(recipe).pool // grid.expert_parallel
    of_muon = parameters if recipe.train.optimizer == "muon" else 0
    # W1 and W3 are one parameter.
    state = _state(parameters, parameters * 2 // 3, recipe.parallel.pool_zero, grid.replicas, of_muon, in_place=True)
    assignments = served_trunk_ranks(recipe) * recipe.train.micro_batch * m.seq_len * recipe.router.top_k
    launch = in_flight * -(-assignments // grid.expert_parallel)  # rows, if every lane asks at once
    kept, deferred = pool_row_bytes(recipe)
    keeping = launch * m.layers * kept
    # Work beyond the limit is done after the launch that exceeded it. While all lanes keep what they need, only earlier
    # micro-batches have deferred work; later, their own replaces what they kept.
    limit = recipe.stash_limit + launch * deferred
    all_of_step = launch * m.layers * recipe.micro_batches * deferred // in_flight
    earlier = all_of_step - launch * m.layers * deferred
    stash = max(min(limit, earlier), min(limit, all_of_step) - keeping - freed)
    # Rows merged, and put back into the requests' order, and what the products between need.
    if compute == FP32:  # expert by expert
        working = launch * compute * (5 * D + 3 * F)
    else:  # grouped products; later all deferred rows of dH merged, and with x as inputs of W1 and W3's gradients
        rows, product = stash // deferred, compute * parameters * 2 // 3
        weight_gradients = max(rows * compute * 4 * F, rows * compute * (2 * F + D) + product)
        working = max(launch * compute * (5 * D + 8 * F), weight_gradients)
    return Memory(
        role="pool",
        ranks=grid.pool_ranks,
        parameters=parameters,
        compute_copies=compute * parameters if compute != FP32 else 0,
        messages=0 if grid.colocated else launch * 2 * D * compute,
        expert_activations=keeping,
        stash=stash,
        working=working,
        device=_device_memory((grid.replicas,), served_trunk_ranks(recipe)),
        **state,
    )


def _device_memory(role_ranks: tuple[int, ...], wire_peers: int) -> int:
    """Bytes that a rank's GPU needs for its context, its roles' communicators, and the wire's two.

    Args:
        role_ranks: Number of ranks in each of these communicators; one with a single rank is never made.
        wire_peers: Ranks to which this one sends tokens.
    """
    roles = sum(ROLE_CHANNELS * ROLE_PEERS * CONNECTION for ranks in role_ranks if ranks > 1)
    return CONTEXT + roles + 2 * WIRE_CHANNELS * wire_peers * CONNECTION
