"""Muon for the matrices inside the network, AdamW for everything else.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix's gradient by a nearly
orthogonal matrix. Scaled as in Moonlight (arXiv:2502.16982), such an update is as large as AdamW's, so that both share
the learning rate and the weight decay. What is stored as one tensor but is several matrices (the experts of a shard, W1
and W3, queries and keys and values) is orthogonalised matrix by matrix.

torch.optim.Muon and DeepSpeed's take whole parameters of two dimensions, and compute in 16 bits on any device; with
that, runs in fp32 would agree between layouts to a few thousandths only.

Letters: n matrices of R rows and C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.recipe import Recipe
from trainer.model.trunk import compute_dtype

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
RMS = 0.2
"""Root mean square of an update's elements, as of AdamW's in Moonlight."""

WEIGHTS_AT_A_TIME = 2**24
"""Elements that are orthogonalised at once, unless a matrix has more; they bound the working memory."""


def stacked_rows(name: str, parameter: Tensor, recipe: Recipe) -> tuple[int, ...] | None:
    """Return the rows of each matrix that a parameter of the trunk or of a shard has along its last but one dimension.

    Args:
        name: Its name in the module.

    Returns:
        None if AdamW updates it: vectors, the embedding, the output projection, and the routers, each row of which is
        an output class (an expert) with a gradient of its own size, down to none.
    """
    if parameter.ndim < 2:
        return None
    m, rows = recipe.model, parameter.shape[-2]
    if name.endswith("attention.qkv.weight"):
        return m.heads * m.head_size, m.kv_heads * m.head_size, m.kv_heads * m.head_size
    if name.endswith(("ffn.w13.weight", "w13_e2FD")):
        return rows // 2, rows // 2
    return (rows,) if name.endswith(("attention.out.weight", "ffn.w2.weight", "w2_eDF")) else None


def orthogonalized(matrices_nRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 (between 0.7 and 1.2, and less if they are almost 0).

    Five quintic Newton-Schulz iterations. Matrices of zeros stay zero.

    Args:
        dtype: float32, or bfloat16 for speed on GPUs.
    """
    a, b, c = COEFFICIENTS
    wide = matrices_nRC if matrices_nRC.shape[-2] <= matrices_nRC.shape[-1] else matrices_nRC.mT
    norm_n11 = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    x: Tensor = (wide / (norm_n11 + EPS)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices_nRC else x.mT


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, except that parameters with an entry in their group's "rows" are updated by Muon.

    Their only moment has the name and the form of AdamW's first, "exp_avg". "step" counts their updates too, because
    AdamW looks for it when a state is loaded.

    Args:
        groups: Parameter groups; "rows" has the result of `stacked_rows` for each of the "params".
        dtype: Of the iteration; see `orthogonalized`.
        settings: AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype, **settings: Any):
        super().__init__(groups, **settings)
        self._dtype = dtype

    def updates_by_muon(self, parameter: Tensor) -> bool:
        """Return whether a parameter is updated by Muon, so that it has one moment."""
        return any(parameter is p for group in self.param_groups for p, rows in _members(group) if rows)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        for group in groups:
            for parameter, rows in _members(group):
                if rows and parameter.grad is not None:
                    self._update(parameter, rows, group["lr"], group["weight_decay"])
        try:
            self.param_groups = [{**g, "params": [p for p, rows in _members(g) if not rows]} for g in groups]
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, parameter: Tensor, rows: tuple[int, ...], lr: float, weight_decay: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum, gradient = state["exp_avg"], parameter.grad
        state["step"] += 1
        momentum.lerp_(gradient, 1 - MOMENTUM)
        parameter.mul_(1 - lr * weight_decay)
        stacks = (_stack(t).split(rows, dim=-2) for t in (parameter, momentum, gradient))
        for weights_nRC, momenta_nRC, gradients_nRC in zip(*stacks, strict=True):
            scale = lr * RMS * math.sqrt(max(weights_nRC.shape[-2:]))
            at_a_time = max(1, WEIGHTS_AT_A_TIME // weights_nRC[0].numel())
            parts = (t.split(at_a_time) for t in (weights_nRC, momenta_nRC, gradients_nRC))
            for weights, momenta, gradients in zip(*parts, strict=True):
                update = orthogonalized(gradients.lerp(momenta, MOMENTUM), self._dtype)  # Nesterov's look ahead
                weights.sub_(update, alpha=scale)


def muon_optimizer(
    module: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, settings: dict[str, Any]
) -> MuonWithAdamW:
    """Return the optimizer of a role's parameter groups.

    Args:
        settings: What the role's file of `ds_configs/` has for AdamW.
    """
    rows = {parameter: stacked_rows(name, parameter, recipe) for name, parameter in module.named_parameters()}
    groups = [{**group, "rows": [rows[parameter] for parameter in group["params"]]} for group in groups]
    adamw = {key: value for key, value in settings.items() if key != "torch_adam"}  # DeepSpeed's own key
    return MuonWithAdamW(groups, compute_dtype(recipe), **adamw)


def _members(group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, tuple[int, ...] | None]]:
    return zip(group["params"], group["rows"], strict=True)


def _stack(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
