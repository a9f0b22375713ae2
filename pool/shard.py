"""A shard of the pool: stacked SwiGLU experts with a hand-made backward in two passes.

The backward of a request gives the gradient of its tokens at once, because the trunk waits for it. Gradients of the
weights are work that nobody waits for: what they need is stashed and flushed as one product an expert over everything
stashed, into fp32 gradients. Autograd is not used: it would make a gradient of the whole pool for every layer.

Letters: N rows in expert-major order, D hidden, F expert width, e experts of this shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pool import grouped_experts, loop_experts
from pool.permute import merge_order

Hidden = Any
"""What a back end keeps of a request's forward; see `loop_experts` and `grouped_experts`."""

EXPERTS_AT_A_TIME = 4
"""Weight gradients made between two looks at whether a request has come."""


@dataclass(frozen=True)
class Saved:
    """What the backward of a request needs: its tokens, and the hidden activations unless they are recomputed."""

    x_ND: Tensor
    hidden: Hidden | None
    tokens_per_expert: list[int]


@dataclass
class _Ready:
    """A stash that has been cut: what it holds, and the first expert whose weight gradients are still to be made."""

    stash: list[Any]
    bytes: int
    next_expert: int = 0


class ExpertShard(nn.Module):
    """Experts `expert_ids` of the pool: e_i(x) = W2_i( silu(W1_i x) * W3_i x ), without bias.

    Weights are stacked and fp32; `compute_dtype` is that of the products and of tokens in and out. W1 and W3 stand in
    one tensor (W1 first), so that they are one product.

    Args:
        expert_ids: global ids, in the order of the stack.
        hidden, ffn_hidden: D and F.
        compute_dtype: float32 or bfloat16.
        recompute: keep only the tokens of a forward and recompute its hidden activations in backward.
        stash_bytes: make room when the stash holds more.
    Attributes:
        peak_stash_bytes: the most that was stashed since somebody set it to 0.
    """

    def __init__(
        self,
        expert_ids: tuple[int, ...],
        hidden: int,
        ffn_hidden: int,
        compute_dtype: torch.dtype,
        recompute: bool = False,
        stash_bytes: int = 2**30,
    ):
        super().__init__()
        e = len(expert_ids)
        self.expert_ids = expert_ids
        self.w13_e2FD = nn.Parameter(torch.empty(e, 2 * ffn_hidden, hidden))
        self.w2_eDF = nn.Parameter(torch.empty(e, hidden, ffn_hidden))
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.stash_bytes = stash_bytes
        self._stash: list[Any] = []
        self._uncut_bytes = 0
        self._ready: deque[_Ready] = deque()
        self._ready_bytes = 0
        self.peak_stash_bytes = 0
        self._gradients: list[Tensor] = []
        self._compute_weights: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self, std: float, output_std: float, seed: int) -> None:
        """N(0, std), W2 N(0, output_std), drawn per expert from (seed, global id): sharding does not change them."""
        with torch.no_grad():
            for place, expert in enumerate(self.expert_ids):
                generator = torch.Generator().manual_seed((seed << 20) + expert)
                for weight, scale in ((self.w13_e2FD, std), (self.w2_eDF, output_std)):
                    drawn = torch.empty(weight.shape[1:]).normal_(0.0, scale, generator=generator)
                    weight[place].copy_(drawn)

    def weights_changed(self) -> None:
        """Drop the compute-dtype copies: call after an optimizer step or a load."""
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
        """The back end of this shard's device and dtype; the faster one where both can (README, "Experts")."""
        grouped = self.w2_eDF.is_cuda and self.compute_dtype == torch.bfloat16
        return grouped_experts if grouped else loop_experts

    @torch.no_grad()
    def forward_rows(self, x_ND: Tensor, batches: Sequence[list[int]]) -> tuple[Tensor, list[Hidden]]:
        """Expert outputs y_ND, and of every request the hidden activations [W1 x, W3 x]; both in compute dtype.

        Args:
            x_ND: rows of all requests, expert-major; within an expert the requests in the order of `batches`.
            batches: tokens per expert of every request.
        """
        y_ND, hidden = self._kernels().forward(x_ND, *self._weights(), batches)
        return y_ND, hidden

    @torch.no_grad()
    def backward_rows(
        self, x_ND: Tensor, hidden: Sequence[Hidden] | None, dy_ND: Tensor, batches: Sequence[list[int]]
    ) -> Tensor:
        """Gradient dx_ND of the tokens. What the weights' gradients need goes to the stash, unless they are frozen.

        Args:
            hidden: the hidden activations of the requests; None computes them again.
        """
        dx_ND, for_weights = self._kernels().backward(x_ND, hidden, dy_ND, *self._weights(), batches)
        if self.frozen:
            return dx_ND  # type: ignore[no-any-return]
        self._stash.append((x_ND, dy_ND, for_weights, [sum(column) for column in zip(*batches, strict=True)]))
        width = 2 * x_ND.shape[1] + 3 * self.w2_eDF.shape[2]
        self._uncut_bytes += len(x_ND) * width * x_ND.element_size()
        self.peak_stash_bytes = max(self.peak_stash_bytes, self._uncut_bytes + self._ready_bytes)
        return dx_ND  # type: ignore[no-any-return]

    def flush_if_full(self) -> None:
        """Make room when more than `stash_bytes` is stashed; to be called when answers are out.

        What is cut already goes first. Whether that is enough is asked of the rest alone, which follows from the
        requests: a cut must not depend on how far `flush_some` has come.
        """
        if self._uncut_bytes + self._ready_bytes > self.stash_bytes:
            self._drain()
        if self._uncut_bytes > self.stash_bytes:
            self.cut()
            self._drain()

    def cut(self) -> None:
        """What is stashed until now is one product an expert: it waits for `flush_some` or `flush`.

        Where cuts are decides how sums are rounded, so they follow from the requests alone; when the products are made
        does not matter.
        """
        if self._stash:
            self._ready.append(_Ready(self._stash, self._uncut_bytes))
            self._ready_bytes += self._uncut_bytes
            self._stash, self._uncut_bytes = [], 0

    @torch.no_grad()
    def flush_some(self) -> bool:
        """Make a few milliseconds' worth of the products that wait; False if none does."""
        if not self._ready:
            return False
        self._make(EXPERTS_AT_A_TIME)
        if self.w2_eDF.is_cuda:  # launches return at once: without a wait all that is left would stand in the queue
            torch.cuda.current_stream(self.w2_eDF.device).synchronize()
        return True

    @torch.no_grad()
    def flush(self) -> None:
        """Add the weight gradients of everything stashed to `.grad` (fp32). After it the stack has a gradient."""
        self.cut()
        self._drain()
        self._gradient_buffers()

    @torch.no_grad()
    def _drain(self) -> None:
        while self._ready:
            self._make(len(self.expert_ids))

    def _make(self, experts: int) -> None:
        """Weight gradients of the next experts of the oldest cut."""
        oldest = self._ready[0]
        end = min(oldest.next_expert + experts, len(self.expert_ids))
        part = slice(oldest.next_expert, end)
        self._kernels().add_weight_gradients(*self._gradient_buffers(), oldest.stash, part)
        oldest.next_expert = end
        if end == len(self.expert_ids):
            self._ready.popleft()
            self._ready_bytes -= oldest.bytes

    def _gradient_buffers(self) -> list[Tensor]:
        """The weights' `.grad`. Its memory is kept from step to step: fresh memory is slow to touch."""
        for place, weight in enumerate((self.w13_e2FD, self.w2_eDF)):
            if weight.grad is None:
                if place == len(self._gradients):
                    self._gradients.append(torch.empty_like(weight))
                weight.grad = self._gradients[place].zero_()
        return [weight.grad for weight in (self.w13_e2FD, self.w2_eDF) if weight.grad is not None]

    def scale_gradients(self, factor: float) -> None:
        """Multiply the weight gradients: the pool sums what it receives and scales once a step."""
        for weight in (self.w13_e2FD, self.w2_eDF):
            assert weight.grad is not None, "flush first"
            weight.grad.mul_(factor)


class ExpertServer:
    """Serves requests with a shard: merges those of one slot into one launch and keeps what their backwards need.

    A request is known by a hashable key of the caller's choosing; a backward names the key of its forward.
    """

    def __init__(self, shard: ExpertShard):
        self.shard = shard
        self._saved: dict[object, Saved] = {}

    def forward(
        self, keys: list[object], batches: list[tuple[Tensor, list[int]]], keep_for_backward: bool
    ) -> list[Tensor]:
        """Outputs y_ND of every batch (x_ND, tokens_per_expert), in its own order."""
        counts = [c for _, c in batches]
        x_ND, index_N = _merge([x for x, _ in batches], counts)
        y_ND, hidden = self.shard.forward_rows(x_ND, counts)
        if keep_for_backward:
            for key, (x, c), h in zip(keys, batches, hidden, strict=True):
                assert key not in self._saved, f"two forwards of {key} without a backward between"
                self._saved[key] = Saved(x, None if self.shard.recompute else h, c)
        return _split(y_ND, index_N, [x.shape[0] for x, _ in batches])

    def backward(self, keys: list[object], dys: list[Tensor]) -> list[Tensor]:
        """Gradients dx_ND of the tokens of earlier forwards.

        Raises:
            KeyError: a key without a forward.
        """
        saved = [self._saved.pop(key) for key in keys]
        counts = [s.tokens_per_expert for s in saved]
        x_ND, index_N = _merge([s.x_ND for s in saved], counts)
        dy_ND = dys[0] if index_N is None else torch.cat(dys).index_select(0, index_N)
        hidden = None if self.shard.recompute else [s.hidden for s in saved]
        dx_ND = self.shard.backward_rows(x_ND, hidden, dy_ND, counts)
        return _split(dx_ND, index_N, [s.x_ND.shape[0] for s in saved])

    def tokens_per_expert(self, key: object) -> list[int] | None:
        """Counts of the open forward `key`; None if there is none."""
        return self._saved[key].tokens_per_expert if key in self._saved else None

    @property
    def open_forwards(self) -> int:
        """Forwards whose backward has not come yet: 0 at the end of a step."""
        return len(self._saved)


def _merge(parts: list[Tensor], counts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Expert-major rows of all parts, and where they come from; None if there is one part."""
    if len(parts) == 1:
        return parts[0], None
    index_N = merge_order(counts).to(parts[0].device)
    return torch.cat(parts).index_select(0, index_N), index_N


def _split(merged_N: Tensor, index_N: Tensor | None, sizes: list[int]) -> list[Tensor]:
    if index_N is None:
        return [merged_N]
    apart = torch.empty_like(merged_N)
    apart.index_copy_(0, index_N, merged_N)
    return list(apart.split(sizes))
