"""The bytes that kernels are assumed to move, counted in the code on a CPU: without the compiler, beside products."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pool import grouped_experts
from pool.counts import Counts
from pool.placement import contiguous
from pool.shard import ExpertServer, ExpertShard
from tests.training import tiny
from trainer.config.recipe import Recipe
from trainer.model.micro_batch import Objective, PoolMap, train_micro_batch
from trainer.model.trunk import Trunk
from trainer.planning import kernels

D, F, M, K = 64, 48, 8, 2
PRODUCTS = ("mm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")
PRODUCTS += ("_scaled_dot_product_flash_attention_for_cpu_backward",)
MERGING = ("cat", "index_select", "index_copy_")
NORMS_ON_A_CPU = 2 * ((28 - 8) + (92 - 20))
"""Bytes of a number that a CPU moves beyond a GPU's fused kernels for two norms, forward and backward."""


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes that they read and write, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in PRODUCTS and not name.startswith(("empty", "new_empty", "zeros", "detach")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.kernels += 1
            self.bytes[name] += sum(t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes for t in tensors)
        return out


def recipe_of(seq_len: int, **train: Any) -> Recipe:
    model = {"hidden": D, "heads": 4, "kv_heads": 2, "ffn_hidden": F, "seq_len": seq_len, "vocab": 61}
    router = {"kind": "norm", "top_k": K}
    return tiny(model=model, router=router, pool={"experts": M}, train={"precision": "bf16", **train})


def trunk_traffic(seq_len: int) -> int:
    """Bytes of the forward and backward of a middle layer."""
    recipe = recipe_of(seq_len)
    trunk, found = Trunk(recipe, torch.device("cpu")), 0
    for parameter in trunk.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pool_map = PoolMap(contiguous(M, 1, 1).position_M, M, 3)
    sequences = torch.randint(61, (2, seq_len + 1))
    objective = Objective(1.0, lambda load: torch.ones(3, M), 0, False)
    coroutine = train_micro_batch(trunk, pool_map, sequences, 0, objective)
    rows_ND = None
    for segment in range(6):  # the requests of three layers forward, and of three backward
        with Traffic() as traffic:
            rows_ND = coroutine.send(rows_ND).rows_ND  # type: ignore[arg-type]  # None starts a generator
        found += sum(traffic.bytes.values()) if segment in (1, 4) else 0  # layer 1: its forward, then its backward
    return found


def test_a_trunk_layer() -> None:
    per_token = (trunk_traffic(256) - trunk_traffic(128)) / (2 * 128)
    assumed = 3 * kernels.trunk_layer(recipe_of(128), compiled=False).bytes
    assert assumed == pytest.approx(per_token - NORMS_ON_A_CPU * D, rel=0.1)


def pool_traffic(rows: int) -> Counter[str]:
    """Bytes of twice two requests that are merged forward and backward, and of their weight gradients."""
    shard = ExpertShard(tuple(range(M)), D, F, torch.bfloat16, deferred_bytes=2**40)
    shard.reset_parameters(0.02, 0.02, seed=0)
    server, counts = ExpertServer(shard), [Counts.of([rows] * M), Counts.of([rows] * M)]
    x_ND = torch.ones(M * rows, D, dtype=torch.bfloat16)
    with Traffic() as traffic:
        for keys in ([0, 1], [2, 3]):
            server.forward(keys, [(x_ND, c) for c in counts], keep_for_backward=True)
            server.backward(keys, [x_ND, x_ND])
        shard.deferred_dw.drain()
    return traffic.bytes


def test_swiglu_that_is_not_compiled() -> None:
    recipe, eager = recipe_of(64), recipe_of(64, compile=False)
    h_N2F, dact_NF = torch.ones(4, 2 * F, dtype=torch.bfloat16), torch.ones(4, F, dtype=torch.bfloat16)
    with Traffic() as forward:
        grouped_experts.swiglu(h_N2F)
    with Traffic() as backward:
        grouped_experts.swiglu_backward(h_N2F, dact_NF)
    for merged in (False, True):
        compiled, assumed = kernels.experts(recipe, merged), kernels.experts(eager, merged)
        per_row = (sum(forward.bytes.values()) + sum(backward.bytes.values())) / 4
        assert 3 * (assumed.bytes - compiled.bytes) == pytest.approx(per_row - 18 * F)
        assert assumed.launches - compiled.launches == (forward.kernels + backward.kernels - 2) / 2


def test_merging_and_flushes_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "supports", lambda device, dtype: True)
    few, many = pool_traffic(64), pool_traffic(128)
    per_row = {name: (many[name] - few[name]) / (4 * M * 64) for name in many}
    recipe = recipe_of(64)
    alone, merged = (3 * kernels.experts(recipe, merged).bytes for merged in (False, True))
    swiglu = 18 * F  # compiled on a GPU, so not counted here
    assert alone - swiglu == 8 * (2 * D + 3 * F), "what a flush gathers"
    assert merged - swiglu == pytest.approx(sum(per_row[name] for name in MERGING if name in per_row), rel=0.15)
    weights = 3 * D * F * M
    constant = sum(few[name] for name in ("masked_fill_", "add_"))
    assert kernels.flush_bytes(weights) - 2 * weights == pytest.approx(constant, rel=0.05)
