"""The segments of a micro-batch as functions of tensors: what the trunk computes between two calls of the pool.

Each function is one region for torch.compile (`train.compile`). All layers share the graph of a function, because the
block's parameters are inputs of it and the shapes of a run's micro-batches never change.

Letters: B batch, S sequence, T tokens, D hidden, K top-k, N = T * K assignments, M experts that a layer sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pool.compiling import compiled
from pool.permute import Permutation, combine, permutation, permute
from router import Reach, Routing

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe
    from trainer.model.trunk import Block


class Surroundings(NamedTuple):
    """What the segments of a micro-batch have in common.

    Attributes:
        rope: See `trainer.model.trunk.rotary_table`.
        bias_B1SS: The document mask as `document_mask.as_bias` makes it, or None.
        position_M: Position of every global expert in shard-major order (int64); None for a dense model.
        compute_dtype: Dtype of matrix products, and of tokens on the wire.
    """

    rope: tuple[Tensor, Tensor]
    bias_B1SS: Tensor | None
    position_M: Tensor | None
    compute_dtype: torch.dtype


class Seen(NamedTuple):
    """What a layer sees of the pool, as inputs of the graph that all layers share.

    Attributes:
        first_expert: Global id of the layer's expert 0: a scalar on the device.
        reach: Which of its experts the layer reaches, with a lock or forced routing; None: all, as it prefers.
    """

    first_expert: Tensor
    reach: Reach | None


class Dispatch(NamedTuple):
    """How a layer's tokens were dispatched: what `combine` and the request's header need. Carries no gradient.

    Attributes:
        expert_ids_TK: Experts by their ids in the whole pool.
        tokens_per_expert_M: Load of the experts that the layer sees.
    """

    permutation: Permutation
    expert_ids_TK: Tensor
    tokens_per_expert_M: Tensor


class Health(NamedTuple):
    """What a segment reports of its gate values: scalars without gradient.

    Attributes:
        gates: Sum of a token's gate values, mean over the tokens (fp32).
        nonfinite: Tokens with a router logit that is not finite (int64).
    """

    gates: Tensor
    nonfinite: Tensor


class Opened(NamedTuple):
    """What a segment finds besides its roots; without `health` if it runs again in backward."""

    dispatch: Dispatch
    health: Health | None


Roots = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""h_BSD, rows_ND, topk_scores_TK, mean_scores_M, z_loss: the outputs of a segment to which gradients belong later.

Without a z-loss there is None in its place."""


def autocast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Return the context in which the trunk computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype == torch.bfloat16)


def embed_to_request(
    embedding: nn.Embedding, block: Block, around: Surroundings, seen: Seen, again: bool, tokens_BS: Tensor
) -> tuple[Roots, Opened]:
    """Run the first segment: from the tokens to layer 0's request; see `combine_to_request`."""
    return _to_request(block, around, seen, again, embedding(tokens_BS))


def combine_to_request(
    block: Block,
    around: Surroundings,
    seen: Seen,
    again: bool,
    before: Dispatch,
    h_BSD: Tensor,
    y_ND: Tensor,
    topk_scores_TK: Tensor,
) -> tuple[Roots, Opened]:
    """Run a segment in the middle: from the previous layer's answer to this layer's request.

    Args:
        again: Whether the segment runs again in backward.
        before: How the previous layer's tokens were dispatched.
    """
    return _to_request(block, around, seen, again, combined(before, h_BSD, y_ND, topk_scores_TK))


def _to_request(block: Block, around: Surroundings, seen: Seen, again: bool, h_BSD: Tensor) -> tuple[Roots, Opened]:
    h_BSD, x_TD, routing = route(block, around, seen, h_BSD)
    rows_ND, dispatch = dispatched(around, seen, x_TD, routing)
    z_loss = routing.z_loss if block.router.has_z_loss else None
    roots = (h_BSD, rows_ND, routing.topk_scores_TK, routing.mean_scores_M, z_loss)
    return roots, Opened(dispatch, None if again else _health(routing.topk_scores_TK.detach()))


def _health(topk_scores_TK: Tensor) -> Health:
    gates_T = topk_scores_TK.sum(dim=-1)
    return Health(gates_T.mean(), gates_T.isfinite().logical_not_().sum())


def route(block: Block, around: Surroundings, seen: Seen, h_BSD: Tensor) -> tuple[Tensor, Tensor, Routing]:
    """Return the residual stream after attention and a private expert, the normed tokens x_TD, and their routing."""
    with autocast(h_BSD.device, around.compute_dtype):
        h_BSD = block.attend(h_BSD, around.rope, around.bias_B1SS)
        x_TD, routing = block.route(h_BSD, seen.reach)
        private_TD = block.private(x_TD)
        if private_TD is not None:
            h_BSD = h_BSD + private_TD.view_as(h_BSD)
        return h_BSD, x_TD, routing


def dispatched(around: Surroundings, seen: Seen, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Dispatch]:
    """Return the rows for the pool, and how they were dispatched."""
    assert around.position_M is not None, "a dense model dispatches nothing"
    expert_ids_TK = routing.topk_expert_ids_TK + seen.first_expert
    p = permutation(expert_ids_TK, around.position_M)
    rows_ND = permute(x_TD.to(around.compute_dtype), p)
    return rows_ND, Dispatch(p, expert_ids_TK, routing.tokens_per_expert_M)


def combined(before: Dispatch, h_BSD: Tensor, y_ND: Tensor, topk_scores_TK: Tensor) -> Tensor:
    """Return the residual stream after a layer's experts. Gate values are applied here, in fp32."""
    return h_BSD + combine(y_ND, topk_scores_TK, before.permutation).view_as(h_BSD)


def dense_layer(block: Block, around: Surroundings, h_BSD: Tensor) -> Tensor:
    """Return the residual stream after a layer of the dense baseline."""
    with autocast(h_BSD.device, around.compute_dtype):
        return block.dense(block.attend(h_BSD, around.rope, around.bias_B1SS))


class Segments(NamedTuple):
    """The functions of this module, as they are or compiled."""

    embed_to_request: Callable[..., tuple[Roots, Opened]]
    combine_to_request: Callable[..., tuple[Roots, Opened]]
    combined: Callable[..., Tensor]
    dense_layer: Callable[..., Tensor]


EAGER = Segments(embed_to_request, combine_to_request, combined, dense_layer)


def compiled_segments() -> Segments:
    """Return the segments as compiled regions: one graph each, which all layers share."""
    return Segments(*(compiled(function, dynamic=False) for function in EAGER))


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Return whether a run compiles its segments on a device.

    ZeRO-3 gathers and drops weights in hooks of modules, which cannot be part of a graph.
    """
    by_default = device.type == "cuda" and recipe.parallel.trunk_zero < 3
    return by_default if recipe.train.compile is None else recipe.train.compile
