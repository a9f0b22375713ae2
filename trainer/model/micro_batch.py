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

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pool.permute import Permutation, combine, permutation, permute
from pool.schedule import Kind
from router import Routing, distinct_experts
from trainer.model.trunk import Trunk


@dataclass(frozen=True)
class Request:
    """What a micro-batch requests from the pool.

    Attributes:
        kind, micro_batch, layer: What identifies the request.
        rows_ND: Tokens (forward) or gradients of the experts' outputs (backward), expert-major, in compute dtype.
        tokens_per_expert: Rows of each expert of the whole pool, in shard-major order (int64, host).
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
    """

    position_M: Tensor
    experts_per_layer: int
    layers_per_group: int

    def first_expert(self, layer: int) -> int:
        """Return the global id of the layer's expert 0."""
        return (layer // self.layers_per_group) * self.experts_per_layer


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


@dataclass(frozen=True)
class _Dispatch:
    """How a layer's tokens were dispatched: what `combine` and the request's header need. Carries no gradient."""

    permutation: Permutation
    expert_ids_TK: Tensor
    tokens_per_position: Tensor
    tokens_per_expert_M: Tensor


class _Segment:
    """A piece of the trunk between two calls of the pool, run on detached leaves.

    `function(*leaves)` returns the segment's roots, to which gradients belong later, and how its tokens were dispatched
    (None at the end). With `recompute` only the leaves are kept, and the function runs again in backward.
    """

    def __init__(
        self,
        function: Callable[..., tuple[tuple[Tensor, ...], Any]],
        inputs: tuple[Tensor, ...],
        recompute: bool,
    ):
        self._function = function
        self._recompute = recompute
        self._leaves = tuple(t.detach().requires_grad_() for t in inputs)
        with torch.set_grad_enabled(not recompute):
            self._roots, self.dispatch = function(*self._leaves)

    def take_roots(self) -> tuple[Tensor, ...]:
        """Return the roots. With `recompute` the segment does not keep them."""
        roots = self._roots
        if self._recompute:
            self._roots = ()
        return roots

    def backward(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Add the parameters' gradients, and return those of the inputs.

        Args:
            gradients: The gradients of the roots. Roots with None are left out, and so are roots that depend on nothing
                that learns, as in the first segment of a frozen trunk.
        """
        if self._recompute:
            self._roots, _ = self._function(*self._leaves)
        pairs = [
            (root, g) for root, g in zip(self._roots, gradients, strict=True) if g is not None and root.requires_grad
        ]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs])
        leaves, self._leaves, self._roots = self._leaves, (), ()
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
    """

    scale: float
    coefficients: Callable[[Tensor], Tensor | None]
    z_loss: float
    recompute: bool


def train_micro_batch(
    trunk: Trunk, pool_map: PoolMap, sequences_BS1: Tensor, index: int, objective: Objective
) -> Generator[Request, Tensor, MicroBatchResult]:
    """Run forward and backward of one micro-batch, and add gradients to the trunk's parameters.

    Args:
        sequences_BS1: Token ids (int64), one more per sequence than there are predictions.
        index: The micro-batch's number within the step, for its requests.
    """
    tokens_BS, targets_BS = sequences_BS1[:, :-1], sequences_BS1[:, 1:]
    mask_B1SS = trunk.mask(tokens_BS)
    layers: list[_Segment] = []
    inputs: tuple[Tensor, ...] = ()
    scores: list[Tensor] = []
    z_losses: list[Tensor] = []
    gates: list[Tensor] = []
    nonfinite: list[Tensor] = []
    for layer in range(len(trunk.blocks)):
        before = layers[-1].dispatch if layers else None
        segment = _Segment(
            _to_request(trunk, pool_map, layer, tokens_BS, mask_B1SS, before), inputs, objective.recompute
        )
        h_BSD, rows_ND, topk_scores_TK, mean_scores_M, z_loss = segment.take_roots()
        layers.append(segment)
        scores.append(mean_scores_M.detach())
        z_losses.append(z_loss.detach())
        gates_T = topk_scores_TK.detach().sum(dim=-1)
        gates.append(gates_T.mean())
        nonfinite.append(gates_T.isfinite().logical_not_().sum())
        y_ND = yield _request(Kind.FORWARD, index, layer, rows_ND.detach(), segment.dispatch)
        inputs = (h_BSD, y_ND, topk_scores_TK)
    last = _Segment(_to_loss(trunk, targets_BS, layers[-1].dispatch), inputs, recompute=False)  # backward is next
    (loss,) = (root.detach() for root in last.take_roots())
    load_LM = torch.stack([segment.dispatch.tokens_per_expert_M for segment in layers])
    coefficients_LM = objective.coefficients(load_LM)

    scale = torch.tensor(objective.scale, device=loss.device)
    dz = scale * objective.z_loss if objective.z_loss else None
    dh, dy, dscores = last.backward((scale,))
    for layer, segment in reversed(list(enumerate(layers))):
        dx = yield _request(Kind.BACKWARD, index, layer, dy, segment.dispatch)
        dmean = None if coefficients_LM is None else coefficients_LM[layer] * scale
        gradients = segment.backward((dh, dx, dscores, dmean, dz))
        if layer:
            dh, dy, dscores = gradients
    balance_loss = torch.zeros_like(loss)
    if coefficients_LM is not None:
        balance_loss = (coefficients_LM * torch.stack(scores)).sum()
    distinct = distinct_experts(torch.stack([segment.dispatch.expert_ids_TK for segment in layers]))
    z_loss = objective.z_loss * torch.stack(z_losses).sum()
    scalars = {"loss": loss, "balance_loss": balance_loss, "z_loss": z_loss, "distinct_experts": distinct}
    return MicroBatchResult(scalars, torch.stack(gates), torch.stack(nonfinite).sum(), load_LM)


def train_dense_micro_batch(
    trunk: Trunk, sequences_BS1: Tensor, objective: Objective
) -> Generator[Request, Tensor, MicroBatchResult]:
    """Run forward and backward of one micro-batch of the dense baseline, which has no requests for the pool."""
    yield from ()
    with trunk.autocast():
        loss = trunk.loss(_dense_hidden(trunk, sequences_BS1[:, :-1]), sequences_BS1[:, 1:])
    (loss * objective.scale).backward()
    zero, layers = torch.zeros_like(loss), len(trunk.blocks)
    scalars = {"loss": loss.detach(), "balance_loss": zero, "z_loss": zero, "distinct_experts": zero}
    no_load_L1 = torch.zeros(layers, 1, dtype=torch.int64)
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
        with trunk.autocast():
            return _dense_hidden(trunk, tokens_BS), None
    mask_B1SS = trunk.mask(tokens_BS)
    with trunk.autocast():
        h_BSD = trunk.embedding(tokens_BS)
    loads: list[Tensor] = []
    for layer in range(len(trunk.blocks)):
        h_BSD, rows_ND, topk_scores_TK, _, dispatch = _dispatch(trunk, pool_map, layer, h_BSD, mask_B1SS, reroute)
        y_ND = yield _request(Kind.FORWARD_ONLY, index, layer, rows_ND, dispatch)
        h_BSD = _combine(dispatch, h_BSD, y_ND, topk_scores_TK)
        loads.append(dispatch.tokens_per_expert_M)
    return h_BSD, torch.stack(loads)


def _dense_hidden(trunk: Trunk, tokens_BS: Tensor) -> Tensor:
    h_BSD, mask_B1SS = trunk.embedding(tokens_BS), trunk.mask(tokens_BS)
    for block in trunk.blocks:
        h_BSD = block.dense(block.attend(h_BSD, trunk.rope, mask_B1SS))  # type: ignore[operator]
    return h_BSD  # type: ignore[no-any-return]


def _to_request(
    trunk: Trunk,
    pool_map: PoolMap,
    layer: int,
    tokens_BS: Tensor,
    mask_B1SS: Tensor | None,
    before: _Dispatch | None,
) -> Callable[..., tuple[tuple[Tensor, ...], _Dispatch]]:
    """Return segment `layer`: from the previous layer's answer (or the tokens) to this layer's request."""

    def run(*leaves: Tensor) -> tuple[tuple[Tensor, ...], _Dispatch]:
        h_BSD = trunk.embedding(tokens_BS) if before is None else _combine(before, *leaves)
        h_BSD, rows_ND, topk_scores_TK, routing, dispatch = _dispatch(trunk, pool_map, layer, h_BSD, mask_B1SS)
        return (h_BSD, rows_ND, topk_scores_TK, routing.mean_scores_M, routing.z_loss), dispatch

    return run


def _to_loss(trunk: Trunk, targets_BS: Tensor, before: _Dispatch) -> Callable[..., tuple[tuple[Tensor, ...], None]]:
    """Return segment L: from the last layer's answer to the loss."""

    def run(*leaves: Tensor) -> tuple[tuple[Tensor, ...], None]:
        with trunk.autocast():
            return (trunk.loss(_combine(before, *leaves), targets_BS),), None

    return run


def _dispatch(
    trunk: Trunk,
    pool_map: PoolMap,
    layer: int,
    h_BSD: Tensor,
    mask_B1SS: Tensor | None,
    reroute: Reroute | None = None,
) -> tuple[Tensor, Tensor, Tensor, Routing, _Dispatch]:
    """Run a layer up to its request: (residual stream, rows, gate values, routing, dispatch)."""
    block = trunk.blocks[layer]
    with trunk.autocast():
        h_BSD = block.attend(h_BSD, trunk.rope, mask_B1SS)  # type: ignore[operator]
        x_TD, routing = block.route(h_BSD)  # type: ignore[operator]
        if reroute:
            routing = reroute(layer, routing)
        expert_ids_TK = routing.topk_expert_ids_TK + pool_map.first_expert(layer)
        p = permutation(expert_ids_TK, pool_map.position_M)
        rows_ND = permute(x_TD.to(trunk.compute_dtype), p)
    dispatch = _Dispatch(p, expert_ids_TK, p.tokens_per_expert_M.cpu(), routing.tokens_per_expert_M)
    return h_BSD, rows_ND, routing.topk_scores_TK, routing, dispatch


def _combine(dispatch: _Dispatch, h_BSD: Tensor, y_ND: Tensor, topk_scores_TK: Tensor) -> Tensor:
    """Return the residual stream after a layer's experts. Gate values are applied here, in fp32."""
    return h_BSD + combine(y_ND, topk_scores_TK, dispatch.permutation).view_as(h_BSD)


def _request(kind: Kind, index: int, layer: int, rows_ND: Tensor, dispatch: _Dispatch) -> Request:
    return Request(kind, index, layer, rows_ND, dispatch.tokens_per_position)
