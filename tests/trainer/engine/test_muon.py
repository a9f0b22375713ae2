"""Muon against its textbook, matrix by matrix in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pool.placement import contiguous
from tests.training import tiny
from trainer.config.recipe import Recipe
from trainer.engine import muon
from trainer.engine.ds_config import deepspeed_config
from trainer.engine.experts import build_shard
from trainer.engine.muon import muon_optimizer, orthogonalized, stacked_rows
from trainer.model.trunk import DenseFFN, Trunk, parameter_groups
from trainer.planning.memory import estimate_memory

CPU = torch.device("cpu")
RECIPE = tiny(
    model={"private_ffn": 7, "private_gate": True, "qkv_bias": True},
    train={"optimizer": "muon", "weight_decay": 0.3},
    parallel={"trunk_zero": 0, "pool_zero": 0},
)


def textbook(gradient: Tensor) -> Tensor:
    """X <- a X + b (X X') X + c (X X')^2 X, five times, from the gradient divided by its Frobenius norm."""
    x = gradient / (gradient.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


class Reference:
    """A parameter's updates by hand, in float64; Muon's if `matrices` names the parts of it that are matrices."""

    def __init__(self, weight: Tensor, matrices: list[Any], decay: float):
        self.weight, self.matrices, self.decay = weight.double().clone(), matrices, decay
        self.m, self.v, self.updates = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def step(self, gradient: Tensor, lr: float) -> None:
        g, t = gradient.double(), RECIPE.train
        self.updates += 1
        self.weight *= 1 - lr * self.decay
        if self.matrices:
            self.m = 0.95 * self.m + 0.05 * g
            for part in self.matrices:
                ahead = 0.05 * g[part] + 0.95 * self.m[part]
                self.weight[part] -= lr * 0.2 * math.sqrt(max(ahead.shape)) * textbook(ahead)
            return
        (b1, b2), n = t.betas, self.updates
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        self.weight -= lr * (self.m / (1 - b1**n)) / ((self.v / (1 - b2**n)).sqrt() + t.eps)


def parts_of(name: str, weight: Tensor) -> list[Any]:
    """Indices of the matrices in a parameter: 4 heads and 2 key and value heads of width 6; W1 and W3; every expert."""
    rows: list[Any] = [slice(None)]
    if weight.ndim == 1:
        return []
    if "qkv" in name:
        rows = [slice(0, 24), slice(24, 36), slice(36, 48)]
    elif "w13" in name:
        half = weight.shape[-2] // 2
        rows = [slice(0, half), slice(half, None)]
    elif not name.endswith(("out.weight", "w2.weight", "w2_eDF")) or name.startswith("head"):
        return []
    return rows if weight.ndim == 2 else [(expert, part) for expert in range(len(weight)) for part in rows]


@pytest.mark.parametrize("at_a_time", [muon.WEIGHTS_AT_A_TIME, 1000])
def test_every_matrix_is_updated_by_itself(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "WEIGHTS_AT_A_TIME", at_a_time)
    drawn = torch.Generator().manual_seed(0)
    moments = 0
    for role, module in (
        ("trunk", Trunk(RECIPE, CPU)),
        ("pool", build_shard(RECIPE, contiguous(8, 1, 1), 0, CPU)),
    ):
        settings = deepspeed_config(RECIPE, role, 1, 10)["optimizer"]["params"]
        optimizer = muon_optimizer(module, parameter_groups(module, 0.3), RECIPE, settings)
        weights = dict(module.named_parameters())
        references = {
            name: Reference(weight.detach(), parts_of(name, weight), 0.3 if weight.ndim > 1 else 0.0)
            for name, weight in weights.items()
        }
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            for name, weight in weights.items():
                weight.grad = torch.randn(weight.shape, generator=drawn) * 10.0 ** (-step)
                if weight.ndim == 3:
                    weight.grad[1 + step] = 0  # an expert without tokens; 0 never had any
                    weight.grad[0] = 0
                references[name].step(weight.grad, 0.01 * (step + 1))
            optimizer.step()
        for name, weight in weights.items():
            torch.testing.assert_close(weight.double(), references[name].weight, rtol=1e-5, atol=1e-5, msg=name)
            moments += sum(moment.nbytes for key, moment in optimizer.state[weight].items() if key != "step")
    (memory,) = estimate_memory(RECIPE, 1)
    assert memory.optimizer == moments


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24)])
def test_singular_values_come_near_1(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = (orthogonalized(matrices, dtype) for dtype in (torch.float32, torch.bfloat16))
    values = torch.linalg.svdvals(exact)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)
    assert not orthogonalized(torch.zeros(shape), torch.float32).any()


@pytest.mark.parametrize("recipe", [RECIPE, tiny(model={"ffn": "dense"}, pool={"experts": 0})], ids=["pool", "dense"])
def test_muon_has_the_matrices_inside_the_layers(recipe: Recipe) -> None:
    """All linear maps of attention and FFNs; neither routers, embedding nor head."""
    trunk = Trunk(recipe, CPU)
    inside: set[nn.Parameter] = set()
    for block in trunk.blocks:
        modules = [block.attention, *(m for m in block.modules() if isinstance(m, DenseFFN))]
        inside |= {p for module in modules for p in module.parameters() if p.ndim > 1}
    assert len(inside) == 4 * len(trunk.blocks)
    for name, parameter in trunk.named_parameters():
        rows = stacked_rows(name, parameter, recipe)
        assert (rows is not None) == (parameter in inside), name
        assert rows is None or sum(rows) == len(parameter)
