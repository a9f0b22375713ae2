"""Kernels that give the same bits every time: what torch is asked for, and that CUDA would refuse no operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.model.test_segments import VARIANTS, trained, trunk_of
from tests.training import tiny
from trainer.engine.deterministic import use_deterministic_kernels

REFUSED = {"put_", "histc", "bincount", "median", "kthvalue", "nll_loss2d_forward", "scatter_reduce", "index_reduce"}
"""Operations of one dimension that have no deterministic kernel on CUDA, by `torch.use_deterministic_algorithms`."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args))
        self.names.add(f"{name} of floats" if name == "cumsum" and floats else name)
        return func(*args, **(kwargs or {}))


def test_torch_refuses_what_differs_from_run_to_run() -> None:
    """If it only warned, attention's backward on CUDA would add up gradients in any order."""
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_micro_batch_runs_nothing_that_cuda_refuses(variant: str) -> None:
    use_deterministic_kernels()
    recipe = tiny(**VARIANTS[variant])
    with _Seen() as seen:
        trained(trunk_of(recipe), recipe)
    assert len(seen.names) > 20 and not seen.names & {*REFUSED, "cumsum of floats"}
