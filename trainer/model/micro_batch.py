"""A micro-batch as a coroutine: its tokens' path through the trunk, and the gradients' path back.

Between its L + 1 segments a micro-batch needs the pool. It is therefore a generator that yields a `Request` and is
resumed with the pool's answer:

    segment 0    embed -> attention_0 -> router_0 -> permute           => request (layer 0)
    segment l    combine_(l-1) -> attention_l -> router_l -> permute   => request (layer l)
    segment L    combine_(L-1) -> norm -> head -> loss

Forward segments run on detached leaves. Backward runs them in reverse order, and the pool answers with the gradients
of the dispatched tokens. The caller, `trainer.model.pool_client`, decides where the pool is and how many micro-batches
are in flight.

Letters: B batch, S sequence, T tokens, D hidden, K top-k, N = T * K assignments, L layers, M experts a layer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pool.schedule import Kind
from router import Reach, Routing, distinct_experts
from trainer.model.segments import Dispatch, Opened, Roots, Seen, Surroundings, combined, dense_layer, dispatched, route
from trainer.model.trunk import Trunk

R = TypeVar("R", bound=tuple[Tensor | None, ...])
Found = TypeVar("Found")


@dataclass(frozen=True)
class Request:
    """What a micro-batch requests from the pool.

    Attributes:
        kind, micro_batch, layer: What identifies the request.
        rows_ND: Tokens (forward) or gradients of the experts' outputs (backward), expert-major, in compute dtype.
        tokens_per_expert: Rows of each expert of the whole pool, in shard-major order (int64, on the compute device).
    """

    kind: Kind
    micro_batch: int
    layer: int
    rows_ND: Tensor
    tokens_per_expert: Tensor


@dataclass(frozen=True)
class PoolMap:
    """Where the experts of a layer are in the pool.

    Attributes:
        position_M: Position of every global expert in shard-major order (int64, on the compute device).
        experts_per_layer: Number of experts that a layer sees.
        layers_per_group: Number of adjacent layers that share a sub-pool.
        reaches: What each layer reaches of its experts, with a lock or forced routing; None: all, as it prefers.
    """

    position_M: Tensor
    experts_per_layer: int
    layers_per_group: int
    reaches: Sequence[Reach] | None = None

    def first_expert(self, layer: int) -> int:
        """Return the global id of the layer's expert 0."""
        return (layer // self.layers_per_group) * self.experts_per_layer

    def first_of(self, layer: int) -> Tensor:
        """Return the same as a scalar on the device, for compiled segments: a number would be part of the graph."""
        return self._firsts[layer // self.layers_per_group]

    def seen_by(self, layer: int) -> Seen:
        """Return what the layer sees of the pool."""
        return Seen(self.first_of(layer), self.reaches[layer] if self.reaches else None)

    @cached_property
    def _firsts(self) -> tuple[Tensor, ...]:
        firsts = torch.arange(0, self.position_M.numel(), self.experts_per_layer, device=self.position_M.device)
        # Each of its own memory: compiled segments would copy a part of a tensor that is not aligned at every call.
        return tuple(first.clone() for first in firsts)


@dataclass(frozen=True)
class MicroBatchResult:
    """What a micro-batch reports, on the compute device.

    Attributes:
        scalars: fp32 scalars by their names in `trainer.telemetry.step_scalars.StepScalars`; a step's value is the mean
            over its micro-batches. "loss" is the mean cross-entropy in nats, without balance losses.
        gates_L: Sum of a token's gate values in each layer, mean over the tokens (fp32).
        nonfinite_router_tokens: Tokens with a router logit that is not finite, over all layers (int64).
        tokens_per_expert_LM: Load by layer and the experts that it sees (int64).
    """

    scalars: dict[str, Tensor]
    gates_L: Tensor
    nonfinite_router_tokens: Tensor
    tokens_per_expert_LM: Tensor


class _Segment(Generic[R, Found]):
    """A piece of the trunk between two calls of the pool, run on detached leaves.

    `function(again, *leaves)` returns the segment's roots, to which gradients belong later, and what else it found,
    without gradient. With `recompute` only the leaves are kept, and the function runs `again` in backward.
    """

    def __init__(self, function: Callable[..., tuple[R, Found]], inputs: tuple[Tensor, ...], recompute: bool):
        self._function = function
        self._recompute = recompute
        self._leaves = tuple(t.detach().requires_grad_() for t in inputs)
        self._roots: R | None
        with torch.set_grad_enabled(not recompute):
            self._roots, self.found = function(False, *self._leaves)

    def take_roots(self) -> R:
        """Return the roots. With `recompute` the segment does not keep them."""
        roots = self._roots
        assert roots is not None
        if self._recompute:
            self._roots = None
        return roots

    def backward(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Add the parameters' gradients, and return those of the inputs.

        Args:
            gradients: The gradients of the roots. Roots with None are left out, and so are roots that depend on nothing
                that learns, as in the first segment of a frozen trunk.
        """
        if self._recompute:
            self._roots, _ = self._function(True, *self._leaves)
        assert self._roots is not None
        pairs = [
            (root, g)
            for root, g in zip(self._roots, gradients, strict=True)
            if g is not None and root is not None and root.requires_grad
        ]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs])
        leaves, self._leaves, self._roots = self._leaves, (), None
        return tuple(_gradient(leaf) for leaf in leaves)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@dataclass(frozen=True)
class Objective:
    """What a micro-batch's backward starts from.

    Attributes:
        scale: Weight of this micro-batch in its trunk rank's mean: 1 / micro-batches.
        coefficients: Maps the micro-batch's own tokens_per_expert_LM to coeffs_LM (`router.balance_coefficients`), or
            to None while there is no balance loss. Called once, between forward and backward.
        z_loss: Coefficient of the router z-loss; with 0 the routers do not compute it.
        recompute: Whether to run the segments again in backward instead of keeping their activations.
        entropy: Maps the micro-batch's own mean scores (L, M) to the entropy loss and its gradient
            (`router.entropy_loss`), in a run with a lock.
    """

    scale: float
    coefficients: Callable[[Tensor], Tensor | None]
    z_loss: float
    recompute: bool
    entropy: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def train_micro_batch(
    trunk: Trunk, pool_map: PoolMap, sequences_BS1: Tensor, index: int, objective: Objective
) -> Generator[Request, Tensor, MicroBatchResult]:
    """Run forward and backward of one micro-batch, and add gradients to the trunk's parameters.

    Args:
        sequences_BS1: Token ids (int64), one more per sequence than there are predictions.
        index: The micro-batch's number within the step, for its requests.
    """
    tokens_BS, targets_BS = sequences_BS1[:, :-1], sequences_BS1[:, 1:]
    around = trunk.surroundings(tokens_BS, pool_map.position_M)
    layers: list[_Segment[Roots, Opened]] = []
    inputs: tuple[Tensor, ...] = ()
    scores: list[Tensor] = []
    z_losses: list[Tensor] = []
    for layer in range(len(trunk.blocks)):
        before = layers[-1].found.dispatch if layers else None
        function = _to_request(trunk, pool_map, layer, around, tokens_BS, before)
        segment = _Segment(function, inputs, objective.recompute)
        h_BSD, rows_ND, topk_scores_TK, mean_scores_M, z_loss = segment.take_roots()
        layers.append(segment)
        scores.append(mean_scores_M.detach())
        if z_loss is not None:
            z_losses.append(z_loss.detach())
        y_ND = yield _request(Kind.FORWARD, index, layer, rows_ND.detach(), segment.found.dispatch)
        inputs = (h_BSD, y_ND, topk_scores_TK)
    loss_of = _to_loss(trunk, targets_BS, layers[-1].found.dispatch)
    last = _Segment(loss_of, inputs, recompute=False)  # backward is next
    (loss,) = (root.detach() for root in last.take_roots())
    dispatches = [segment.found.dispatch for segment in layers]
    load_LM = torch.stack([dispatch.tokens_per_expert_M for dispatch in dispatches])
    coefficients_LM = objective.coefficients(load_LM)
    d_means_LM, entropies = coefficients_LM, {}
    if objective.entropy:
        entropies["entropy_loss"], d_entropy_LM = objective.entropy(torch.stack(scores))
        d_means_LM = d_entropy_LM if coefficients_LM is None else coefficients_LM + d_entropy_LM

    scale = torch.full((), objective.scale, device=loss.device)
    dz = scale * objective.z_loss if objective.z_loss else None
    dh, dy, dscores = last.backward((scale,))
    dmeans = [None] * len(layers) if d_means_LM is None else (d_means_LM * scale).unbind()
    for layer, segment in reversed(list(enumerate(layers))):
        dx = yield _request(Kind.BACKWARD, index, layer, dy, segment.found.dispatch)
        gradients = segment.backward((dh, dx, dscores, dmeans[layer], dz))
        if layer:
            dh, dy, dscores = gradients
    balance_loss = torch.zeros_like(loss)
    if coefficients_LM is not None:
        balance_loss = (coefficients_LM * torch.stack(scores)).sum()
    distinct = distinct_experts(torch.stack([dispatch.expert_ids_TK for dispatch in dispatches]))
    z_loss = objective.z_loss * torch.stack(z_losses).sum() if z_losses else torch.zeros_like(loss)
    scalars = {"loss": loss, "balance_loss": balance_loss, "z_loss": z_loss, "distinct_experts": distinct, **entropies}
    gates, nonfinite = zip(*(segment.found.health for segment in layers), strict=True)
    return MicroBatchResult(scalars, torch.stack(gates), torch.stack(nonfinite).sum(), load_LM)


def train_dense_micro_batch(
    trunk: Trunk, sequences_BS1: Tensor, objective: Objective
) -> Generator[Request, Tensor, MicroBatchResult]:
    """Run forward and backward of one micro-batch of the dense baseline, which has no requests for the pool."""
    yield from ()
    h_BSD = _dense_hidden(trunk, sequences_BS1[:, :-1], trunk.segments.dense_layer)
    with trunk.autocast():
        loss = trunk.loss(h_BSD, sequences_BS1[:, 1:])
    (loss * objective.scale).backward()
    zero, layers = torch.zeros_like(loss), len(trunk.blocks)
    scalars = {"loss": loss.detach(), "balance_loss": zero, "z_loss": zero, "distinct_experts": zero}
    no_load_L1 = torch.zeros(layers, 1, dtype=torch.int64, device=loss.device)
    return MicroBatchResult(scalars, zero.expand(layers), zero.long(), no_load_L1)


Reroute = Callable[[int, Routing], Routing]
"""Replaces the routing of a layer: maps (layer, the router's decision) to the routing that is used."""


@torch.no_grad()
def hidden_states(
    trunk: Trunk, pool_map: PoolMap | None, tokens_BS: Tensor, index: int, reroute: Reroute | None = None
) -> Generator[Request, Tensor, tuple[Tensor, Tensor | None]]:
    """Run the forward only, for evaluation, generation and probes.

    Returns:
        h_BSD before the head, and tokens_per_expert_LM; None for a dense model.
    """
    if pool_map is None:
        return _dense_hidden(trunk, tokens_BS, dense_layer), None
    around = trunk.surroundings(tokens_BS, pool_map.position_M)
    h_BSD = trunk.embedding(tokens_BS)
    loads: list[Tensor] = []
    for layer, block in enumerate(trunk.blocks):
        seen = pool_map.seen_by(layer)
        h_BSD, x_TD, routing = route(block, around, seen, h_BSD)  # type: ignore[arg-type]
        if reroute:
            routing = reroute(layer, routing)
        rows_ND, dispatch = dispatched(around, seen, x_TD, routing)
        y_ND = yield _request(Kind.FORWARD_ONLY, index, layer, rows_ND, dispatch)
        h_BSD = combined(dispatch, h_BSD, y_ND, routing.topk_scores_TK)
        loads.append(dispatch.tokens_per_expert_M)
    return h_BSD, torch.stack(loads)


def _dense_hidden(trunk: Trunk, tokens_BS: Tensor, layer: Callable[..., Tensor]) -> Tensor:
    h_BSD, around = trunk.embedding(tokens_BS), trunk.surroundings(tokens_BS, None)
    for block in trunk.blocks:
        h_BSD = layer(block, around, h_BSD)
    return h_BSD  # type: ignore[no-any-return]


def _to_request(
    trunk: Trunk, pool_map: PoolMap, layer: int, around: Surroundings, tokens_BS: Tensor, before: Dispatch | None
) -> Callable[..., tuple[Roots, Opened]]:
    """Return segment `layer`: from the previous layer's answer (or the tokens) to this layer's request."""
    block, seen = trunk.blocks[layer], pool_map.seen_by(layer)

    def run(again: bool, *leaves: Tensor) -> tuple[Roots, Opened]:
        if before is None:
            return trunk.segments.embed_to_request(trunk.embedding, block, around, seen, again, tokens_BS)
        return trunk.segments.combine_to_request(block, around, seen, again, before, *leaves)

    return run


def _to_loss(trunk: Trunk, targets_BS: Tensor, before: Dispatch) -> Callable[..., tuple[tuple[Tensor], None]]:
    """Return segment L: from the last layer's answer to the loss."""

    def run(again: bool, *leaves: Tensor) -> tuple[tuple[Tensor], None]:
        h_BSD = trunk.segments.combined(before, *leaves)
        with trunk.autocast():
            return (trunk.loss(h_BSD, targets_BS),), None

    return run


def _request(kind: Kind, index: int, layer: int, rows_ND: Tensor, dispatch: Dispatch) -> Request:
    return Request(kind, index, layer, rows_ND, dispatch.permutation.tokens_per_expert_M)
