"""A shard of the pool: stacked SwiGLU experts with a hand-made backward in two passes.

The backward of a request gives the gradient of its tokens at once, because the trunk waits for it. Gradients of the
weights are work that nobody waits for: what they need is stashed and flushed as one product an expert over everything
stashed, into fp32 gradients. Autograd is not used: it would make a gradient of the whole pool for every layer.

Letters: N rows in expert-major order, D hidden, F expert width, e experts of this shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool.grouped_gemm import add_weight_gradient, grouped_gemm
from pool.permute import merge_order


@dataclass(frozen=True)
class Saved:
    """What the backward of a request needs: its tokens, and the hidden activations unless they are recomputed."""

    x_ND: Tensor
    h_N2F: Tensor | None
    tokens_per_expert: list[int]


@dataclass(frozen=True)
class _Stashed:
    """One merged backward whose weight gradients are still to be made."""

    x_ND: Tensor
    dh_N2F: Tensor
    act_NF: Tensor
    dy_ND: Tensor
    tokens_per_expert: list[int]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.x_ND, self.dh_N2F, self.act_NF, self.dy_ND))


class ExpertShard(nn.Module):
    """Experts `expert_ids` of the pool: e_i(x) = W2_i( silu(W1_i x) * W3_i x ), without bias.

    Weights are stacked and fp32; `compute_dtype` is that of the products and of tokens in and out. W1 and W3 stand in
    one tensor (W1 first), so that they are one product.

    Args:
        expert_ids: global ids, in the order of the stack.
        hidden, ffn_hidden: D and F.
        compute_dtype: float32 or bfloat16.
        recompute: keep only the tokens of a forward and recompute its hidden activations in backward.
        stash_bytes: flush when the stash holds more; where that happens depends on the requests alone, never on time.
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
        self._stash: list[_Stashed] = []
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

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self._compute_weights is None:
            self._compute_weights = (
                self.w13_e2FD.detach().to(self.compute_dtype),
                self.w2_eDF.detach().to(self.compute_dtype),
            )
        return self._compute_weights

    @torch.no_grad()
    def forward_rows(self, x_ND: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, Tensor]:
        """Expert outputs y_ND and the hidden activations h_N2F = [W1 x, W3 x], both in compute dtype."""
        w13_e2FD, w2_eDF = self._weights()
        h_N2F = grouped_gemm(x_ND, w13_e2FD.transpose(1, 2), tokens_per_expert)
        a_NF, b_NF = h_N2F.chunk(2, dim=1)
        return grouped_gemm(F.silu(a_NF) * b_NF, w2_eDF.transpose(1, 2), tokens_per_expert), h_N2F

    @torch.no_grad()
    def backward_rows(self, x_ND: Tensor, h_N2F: Tensor | None, dy_ND: Tensor, tokens_per_expert: list[int]) -> Tensor:
        """Gradient dx_ND of the tokens. What the weights' gradients need goes to the stash."""
        w13_e2FD, w2_eDF = self._weights()
        if h_N2F is None:
            h_N2F = grouped_gemm(x_ND, w13_e2FD.transpose(1, 2), tokens_per_expert)
        a_NF, b_NF = h_N2F.chunk(2, dim=1)
        dact_NF = grouped_gemm(dy_ND, w2_eDF, tokens_per_expert)
        sigmoid_NF = torch.sigmoid(a_NF)
        silu_NF = a_NF * sigmoid_NF
        da_NF = dact_NF * b_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
        dh_N2F = torch.cat((da_NF, dact_NF * silu_NF), dim=1)
        dx_ND = grouped_gemm(dh_N2F, w13_e2FD, tokens_per_expert)
        self._stash.append(_Stashed(x_ND, dh_N2F, silu_NF * b_NF, dy_ND, tokens_per_expert))
        return dx_ND

    def flush_if_full(self) -> None:
        """Flush when the stash holds more than `stash_bytes`; to be called when answers are out."""
        if sum(s.bytes for s in self._stash) > self.stash_bytes:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Add the weight gradients of everything stashed to `.grad` (fp32). After it the stack has a gradient."""
        for weight in (self.w13_e2FD, self.w2_eDF):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        stash, self._stash = self._stash, []
        if not stash:
            return
        assert self.w13_e2FD.grad is not None and self.w2_eDF.grad is not None
        index_N = merge_order([s.tokens_per_expert for s in stash]).to(self.w2_eDF.device)
        counts = [sum(column) for column in zip(*(s.tokens_per_expert for s in stash), strict=True)]

        def merged(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).index_select(0, index_N)

        add_weight_gradient(
            self.w13_e2FD.grad, merged([s.dh_N2F for s in stash]), merged([s.x_ND for s in stash]), counts
        )
        add_weight_gradient(
            self.w2_eDF.grad, merged([s.dy_ND for s in stash]), merged([s.act_NF for s in stash]), counts
        )

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
        x_ND, index_N, counts = _merge([x for x, _ in batches], [c for _, c in batches])
        y_ND, h_N2F = self.shard.forward_rows(x_ND, counts)
        sizes = [x.shape[0] for x, _ in batches]
        if keep_for_backward:
            hidden: list[Tensor | None] = [None] * len(batches)
            if not self.shard.recompute:
                hidden = list(_split(h_N2F, index_N, sizes))
            for key, (x, c), h in zip(keys, batches, hidden, strict=True):
                assert key not in self._saved, f"two forwards of {key} without a backward between"
                self._saved[key] = Saved(x, h, c)
        return _split(y_ND, index_N, sizes)

    def backward(self, keys: list[object], dys: list[Tensor]) -> list[Tensor]:
        """Gradients dx_ND of the tokens of earlier forwards.

        Raises:
            KeyError: a key without a forward.
        """
        saved = [self._saved.pop(key) for key in keys]
        all_counts = [s.tokens_per_expert for s in saved]
        x_ND, index_N, counts = _merge([s.x_ND for s in saved], all_counts)
        dy_ND = torch.cat(dys).index_select(0, index_N) if index_N is not None else dys[0]
        h_N2F = None
        if not self.shard.recompute:
            h_N2F, _, _ = _merge([s.h_N2F for s in saved if s.h_N2F is not None], all_counts)
        dx_ND = self.shard.backward_rows(x_ND, h_N2F, dy_ND, counts)
        return _split(dx_ND, index_N, [s.x_ND.shape[0] for s in saved])

    def tokens_per_expert(self, key: object) -> list[int] | None:
        """Counts of the open forward `key`; None if there is none."""
        return self._saved[key].tokens_per_expert if key in self._saved else None

    @property
    def open_forwards(self) -> int:
        """Forwards whose backward has not come yet: 0 at the end of a step."""
        return len(self._saved)


def _merge(parts: list[Tensor], counts: list[list[int]]) -> tuple[Tensor, Tensor | None, list[int]]:
    if len(parts) == 1:
        return parts[0], None, counts[0]
    index_N = merge_order(counts).to(parts[0].device)
    return torch.cat(parts).index_select(0, index_N), index_N, [sum(column) for column in zip(*counts, strict=True)]


def _split(merged_N: Tensor, index_N: Tensor | None, sizes: list[int]) -> list[Tensor]:
    if index_N is None:
        return [merged_N]
    apart = torch.empty_like(merged_N)
    apart.index_copy_(0, index_N, merged_N)
    return list(apart.split(sizes))
