"""A shard of the pool: stacked SwiGLU experts with a hand-written backward in two passes.

The trunk waits for the gradient of its tokens, so the backward of a request returns it at once. Nobody waits for the
gradients of the weights: their work is deferred, and later done as one product per expert over many requests, into fp32
gradients. Autograd is not used, because it would build a gradient of the whole pool for every layer.

Letters: N rows in expert-major order, D hidden, F expert width, e experts of this shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pool import grouped_experts, loop_experts
from pool.counts import Counts, total
from pool.permute import merge_order

Orders = tuple[Tensor, Tensor]
Hidden = Any
"""What a back end keeps of a request's forward; see `loop_experts` and `grouped_experts`."""

EXPERTS_AT_A_TIME = 4
"""Experts whose weight gradients `drain_some` computes on a CPU before it looks for a request again."""

WEIGHTS_AT_A_TIME = 2**24
"""As many weights as a GPU does at a time: by arithmetic half a millisecond on an H100 at 2048 rows an expert."""

PIECES_AHEAD = 2
"""Such pieces of work that a GPU is given beforehand: one to compute, and the next, so that it does not run dry."""

PAUSE = 1e-4
"""Seconds after which `drain_until` looks again whether a GPU has done a piece."""


@dataclass(frozen=True)
class Saved:
    """What the backward of a request needs: its tokens, and the hidden activations unless they are recomputed.

    Attributes:
        together: The keys of the requests merged with it in the forward.
        orders: How they were merged.
    """

    x_ND: Tensor
    hidden: Hidden | None
    counts: Counts
    together: tuple[object, ...]
    orders: Orders | None


@dataclass
class _Batch:
    """Deferred work that is computed together.

    Attributes:
        work: What `add_weight_gradients` of the back end needs, one entry per backward.
        bytes: Size of the work.
        next_expert: First expert whose weight gradients are still to be computed.
    """

    work: list[Any] = field(default_factory=list)
    bytes: int = 0
    next_expert: int = 0


class DeferredWeightGradients:
    """Weight-gradient work that is put off until no request waits.

    Backward passes add to an open batch. `seal` closes it, and each sealed batch becomes one product per expert. The
    batches' borders decide how sums are rounded, so they depend on the requests alone; when a sealed batch is computed
    does not affect the result.

    Args:
        shard: The shard whose weights the work belongs to.
        limit_bytes: Size of the work above which `drain_if_full` makes room.

    Attributes:
        peak_bytes: Largest size of the work since a caller last set this to 0.
    """

    def __init__(self, shard: ExpertShard, limit_bytes: int):
        self._shard, self._limit_bytes = shard, limit_bytes
        self._open = _Batch()
        self._sealed: deque[_Batch] = deque()
        self._launched: deque[torch.cuda.Event] = deque()
        self.peak_bytes = 0

    @property
    def _sealed_bytes(self) -> int:
        return sum(batch.bytes for batch in self._sealed)

    @property
    def waits(self) -> bool:
        """Whether there is sealed work, so that idle time can be used."""
        return bool(self._sealed)

    def add(self, work: Any, size: int) -> None:
        """Defer the work of one backward, `size` bytes."""
        self._open.work.append(work)
        self._open.bytes += size
        self.peak_bytes = max(self.peak_bytes, self._open.bytes + self._sealed_bytes)

    def seal(self) -> None:
        """Close the open batch."""
        if self._open.work:
            self._sealed.append(self._open)
            self._open = _Batch()

    def drain_until(self, coming: Future[Any]) -> None:
        """Compute sealed work a few milliseconds at a time, until `coming` is done or nothing is left."""
        while self._sealed and not coming.done():
            if not self.drain_some():
                wait((coming,), PAUSE)

    def drain_some(self) -> bool:
        """Compute a few milliseconds' worth of sealed work.

        Returns:
            False if there is none, or if a GPU has been given so much already that a request would wait for it.
        """
        while self._launched and self._launched[0].query():
            self._launched.popleft()
        if not self._sealed or len(self._launched) == PIECES_AHEAD:
            return False
        w2_eDF = self._shard.w2_eDF
        if not w2_eDF.is_cuda:
            self._advance(EXPERTS_AT_A_TIME)
            return True
        weights_of_one = 3 * w2_eDF.shape[1] * w2_eDF.shape[2]
        self._advance(max(1, WEIGHTS_AT_A_TIME // weights_of_one))
        event = torch.cuda.Event()
        event.record()
        self._launched.append(event)
        return True

    def drain(self) -> None:
        """Seal the open batch and compute all sealed work. Afterwards all weights have gradients, possibly zeros."""
        self.seal()
        self._drain_sealed()
        self._shard.gradients()

    def drain_if_full(self) -> None:
        """Make room when the work exceeds the limit. Call it once the answers have been sent.

        Sealed work goes first. Whether the open batch is sealed too depends on its own size only: batch borders must
        not depend on how far `drain_some` has come.
        """
        if self._open.bytes + self._sealed_bytes > self._limit_bytes:
            self._drain_sealed()
        if self._open.bytes > self._limit_bytes:
            self.drain()

    def _drain_sealed(self) -> None:
        while self._sealed:
            self._advance(len(self._shard.expert_ids))

    def _advance(self, experts: int) -> None:
        """Compute the next `experts` experts of the oldest sealed batch."""
        oldest, total = self._sealed[0], len(self._shard.expert_ids)
        end = min(oldest.next_expert + experts, total)
        self._shard.add_weight_gradients(oldest.work, slice(oldest.next_expert, end))
        oldest.next_expert = end
        if end == total:
            self._sealed.popleft()


class ExpertShard(nn.Module):
    """Experts `expert_ids` of the pool: e_i(x) = W2_i( silu(W1_i x) * W3_i x ), without bias.

    Weights are stacked and fp32; `compute_dtype` is the dtype of the products and of incoming and outgoing tokens. W1
    and W3 share one tensor (W1 first), so that they take one product.

    Args:
        expert_ids: Global ids, in the order of the stack.
        hidden, ffn_hidden: D and F.
        compute_dtype: float32 or bfloat16.
        recompute: Whether to keep only the tokens of a forward, and to recompute the hidden activations in backward.
        deferred_bytes: Limit of deferred weight-gradient work (recipe key `pool.stash_bytes`).

    Attributes:
        deferred_dw: Weight gradients that are still to be computed.
    """

    def __init__(
        self,
        expert_ids: tuple[int, ...],
        hidden: int,
        ffn_hidden: int,
        compute_dtype: torch.dtype,
        recompute: bool = False,
        deferred_bytes: int = 2**30,
    ):
        super().__init__()
        e = len(expert_ids)
        self.expert_ids = expert_ids
        self.w13_e2FD = nn.Parameter(torch.empty(e, 2 * ffn_hidden, hidden))
        self.w2_eDF = nn.Parameter(torch.empty(e, hidden, ffn_hidden))
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.deferred_dw = DeferredWeightGradients(self, deferred_bytes)
        self._gradients: list[Tensor] = []
        self._compute_weights: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self, std: float, output_std: float, seed: int) -> None:
        """Draw W1 and W3 from N(0, std), W2 from N(0, output_std).

        Each expert is drawn from (seed, global id), so sharding does not change the weights.
        """
        with torch.no_grad():
            for place, expert in enumerate(self.expert_ids):
                generator = torch.Generator().manual_seed((seed << 20) + expert)
                for weight, scale in ((self.w13_e2FD, std), (self.w2_eDF, output_std)):
                    drawn = torch.empty(weight.shape[1:]).normal_(0.0, scale, generator=generator)
                    weight[place].copy_(drawn)

    def weights_changed(self) -> None:
        """Drop the copies in compute dtype. Call it after an optimizer step or a load."""
        self._compute_weights = None

    @property
    def frozen(self) -> bool:
        """Whether the weights have no gradients."""
        return not self.w2_eDF.requires_grad

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self._compute_weights is None:
            self._compute_weights = (
                self.w13_e2FD.detach().to(self.compute_dtype),
                self.w2_eDF.detach().to(self.compute_dtype),
            )
        return self._compute_weights

    def _kernels(self) -> ModuleType:
        """The faster back end for this shard's device and dtype."""
        return grouped_experts if grouped_experts.supports(self.w2_eDF.device, self.compute_dtype) else loop_experts

    @torch.no_grad()
    def forward_rows(self, x_ND: Tensor, batches: Sequence[Counts]) -> tuple[Tensor, list[Hidden]]:
        """Compute the expert outputs of one or several requests.

        Args:
            x_ND: Rows of all requests, expert-major; within an expert the requests follow the order of `batches`.
            batches: Rows of each expert, of every request.

        Returns:
            y_ND in compute dtype, and the hidden activations [W1 x, W3 x] of every request.
        """
        y_ND, hidden = self._kernels().forward(x_ND, *self._weights(), batches)
        return y_ND, hidden

    @torch.no_grad()
    def backward_rows(
        self, x_ND: Tensor, hidden: Sequence[Hidden] | None, dy_ND: Tensor, batches: Sequence[Counts]
    ) -> Tensor:
        """Compute the gradient dx_ND of the tokens, and defer the weights' gradients unless they are frozen.

        Args:
            x_ND: As in `forward_rows`.
            hidden: The hidden activations of the requests; None recomputes them.
            dy_ND: Gradient of the outputs.
            batches: As in `forward_rows`.
        """
        dx_ND, for_weights = self._kernels().backward(x_ND, hidden, dy_ND, *self._weights(), batches)
        if not self.frozen:
            width = 2 * x_ND.shape[1] + 3 * self.w2_eDF.shape[2]
            size = len(x_ND) * width * x_ND.element_size()
            self.deferred_dw.add((x_ND, dy_ND, for_weights, total(batches)), size)
        return dx_ND  # type: ignore[no-any-return]

    @torch.no_grad()
    def add_weight_gradients(self, work: list[Any], experts: slice) -> None:
        """Add the weight gradients of deferred work to `.grad` (fp32), for some of the experts."""
        self._kernels().add_weight_gradients(*self.gradients(), work, experts)

    def gradients(self) -> list[Tensor]:
        """Return the weights' `.grad`, zeros at first. Its memory is reused, because new memory is slow to touch."""
        for place, weight in enumerate((self.w13_e2FD, self.w2_eDF)):
            if weight.grad is None:
                if place == len(self._gradients):
                    self._gradients.append(torch.empty_like(weight))
                weight.grad = self._gradients[place].zero_()
        return [weight.grad for weight in (self.w13_e2FD, self.w2_eDF) if weight.grad is not None]

    def scale_gradients(self, factor: float) -> None:
        """Multiply the weights' gradients by `factor`."""
        for gradient in self.gradients():
            gradient.mul_(factor)


class ExpertServer:
    """Answers requests with a shard: merges the requests of a slot, and keeps what their backwards need.

    Requests are known by any hashable key; a backward names the key of its forward.
    """

    def __init__(self, shard: ExpertShard):
        self.shard = shard
        self._saved: dict[object, Saved] = {}

    def forward(
        self, keys: Sequence[object], batches: Sequence[tuple[Tensor, Counts]], keep_for_backward: bool
    ) -> list[Tensor]:
        """Return the outputs y_ND of every batch (x_ND, rows of each expert), in the batch's own order."""
        counts = [c for _, c in batches]
        orders = _orders(counts, sum(len(x) for x, _ in batches))
        x_ND = _merged([x for x, _ in batches], orders)
        y_ND, hidden = self.shard.forward_rows(x_ND, counts)
        if keep_for_backward:
            for key, (x, c), h in zip(keys, batches, hidden, strict=True):
                assert key not in self._saved, f"two forwards of {key} without a backward in between"
                self._saved[key] = Saved(x, None if self.shard.recompute else h, c, tuple(keys), orders)
        return _split(y_ND, orders, [x.shape[0] for x, _ in batches])

    def backward(self, keys: Sequence[object], dys: list[Tensor]) -> list[Tensor]:
        """Return the gradients dx_ND of the tokens of earlier forwards.

        Args:
            keys: The keys of the forwards.
            dys: Gradients of their outputs.

        Raises:
            KeyError: A key has no open forward.
        """
        saved = [self._saved.pop(key) for key in keys]
        counts = [s.counts for s in saved]
        as_before = saved[0].together == tuple(keys)
        orders = saved[0].orders if as_before else _orders(counts, sum(map(len, dys)))
        x_ND, dy_ND = _merged([s.x_ND for s in saved], orders), _merged(dys, orders)
        hidden = None if self.shard.recompute else [s.hidden for s in saved]
        dx_ND = self.shard.backward_rows(x_ND, hidden, dy_ND, counts)
        return _split(dx_ND, orders, [s.x_ND.shape[0] for s in saved])

    def counts(self, key: object) -> Counts | None:
        """Return the rows of each expert in the open forward `key`, or None if there is none."""
        return self._saved[key].counts if key in self._saved else None

    @property
    def open_forwards(self) -> int:
        """Forwards whose backward has not come yet: 0 at the end of a step."""
        return len(self._saved)


def _orders(counts: Sequence[Counts], rows: int) -> Orders | None:
    """Return the orders of `merge_order`; None for a single request."""
    return merge_order(torch.stack([c.rows_e for c in counts]), rows) if len(counts) > 1 else None


def _merged(parts: Sequence[Tensor], orders: Orders | None) -> Tensor:
    """Return the expert-major rows of all parts."""
    return parts[0] if orders is None else torch.cat([*parts]).index_select(0, orders[0])


def _split(merged_N: Tensor, orders: Orders | None, sizes: list[int]) -> list[Tensor]:
    """Undo `_merged`."""
    return [merged_N] if orders is None else list(merged_N.index_select(0, orders[1]).split(sizes))
