"""Compiled segments: one graph each for all layers, without breaks, with the numbers of the functions as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
import torch._dynamo
from torch import Tensor

from pool.placement import contiguous
from router import Reach
from tests.distributed import TIME_LIMIT
from tests.trainer.model.fused_for_cuda import Counter
from tests.training import END, tiny, tokens
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.model import segments
from trainer.model.lock import Reaches, forced_reaches
from trainer.model.micro_batch import (
    MicroBatchResult,
    Objective,
    PoolMap,
    hidden_states,
    train_dense_micro_batch,
    train_micro_batch,
)
from trainer.model.pool_client import MicroBatch
from trainer.model.segments import EAGER, Segments
from trainer.model.trunk import Trunk
from trainer.model.warm_up import warm_up

T = TypeVar("T")
CPU = torch.device("cpu")
# Every router, and attention with and without document masks, kept and recomputed; each compilation takes seconds.
VARIANTS: dict[str, dict[str, Any]] = {
    "norm, sub-pools, one kv head each": {
        "router": {"kind": "norm", "top_k": 1},
        "model": {"groups": 3, "kv_heads": 4},
        "pool": {"experts": 12},
    },
    "norm, normalized, forced": {
        "router": {"top_k": 2, "z_loss": 0.03, "force": "balanced"},
        "balance": {"scores": "normalized"},
    },
    "norm, documents, recompute": {
        "data": {"document_mask": True},
        "train": {"recompute": True},
    },
    "softmax, documents": {
        "router": {"kind": "softmax", "top_k": 2, "z_loss": 0.03},
        "data": {"document_mask": True},
    },
    "sigmoid, recompute": {"router": {"kind": "sigmoid_bias", "top_k": 2}, "train": {"recompute": True}},
    "norm_bias, private expert": {"model": {"private_ffn": 7}, "router": {"kind": "norm_bias", "top_k": 2}},
    "keys of imported models": {
        "model": {"head_dim": 8, "qk_norm": "all", "qkv_bias": True, "private_ffn": 7, "private_gate": True},
        "router": {"kind": "softmax", "top_k": 2, "renormalize": True, "logit_bias": True},
    },
    "frozen": {"train": {"freeze": "trunk", "init_from": "unused"}},
    "dense": {"model": {"ffn": "dense"}, "pool": {"experts": 0}, "balance": {"pool": 0.0}},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Backend:
    """Compiles nothing, and counts the graphs."""

    graphs: int = 0
    segments: Segments = field(init=False)

    def __post_init__(self) -> None:
        self.segments = compiled_by(self._run)

    def _run(self, gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)  # type: ignore[return-value]


def compiled_by(backend: Callable[..., Any]) -> Segments:
    return Segments(*(torch.compile(f, fullgraph=True, dynamic=False, backend=backend) for f in EAGER))


def trunk_of(recipe: Recipe, compiled: Segments = EAGER) -> Trunk:
    trunk = Trunk(recipe, CPU, END if recipe.data.document_mask else None)
    trunk.requires_grad_(recipe.train.freeze != "trunk")
    trunk.segments = compiled
    return trunk


def map_of(recipe: Recipe) -> PoolMap | None:
    if recipe.model.ffn == "dense":
        return None
    layers_per_group = recipe.model.layers // recipe.model.groups
    position_M = contiguous(recipe.pool.experts, recipe.model.groups, 1).position_M
    return PoolMap(position_M, recipe.experts_per_layer, layers_per_group, forced_reaches(recipe, CPU))


def answered(coroutine: MicroBatch[T]) -> T:
    """The value of a micro-batch whose pool multiplies each column by a number of its own."""
    rows_ND = None
    while True:
        try:
            rows_ND = coroutine.send(rows_ND).rows_ND  # type: ignore[arg-type]
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        rows_ND = rows_ND * torch.linspace(0.5, 1.5, rows_ND.shape[1]).to(rows_ND.dtype)


def trained(trunk: Trunk, recipe: Recipe, number: int = 0, reaches: Sequence[Reach] | None = None) -> MicroBatchResult:
    """One micro-batch, forward and backward."""
    sequences_BS1 = torch.from_numpy(tokens(recipe)[2 * number : 2 * number + 2])
    experts = max(1, recipe.experts_per_layer)
    coefficients_LM = torch.rand(recipe.model.layers, experts, generator=torch.Generator().manual_seed(number))
    objective = Objective(0.5, lambda load: coefficients_LM, recipe.router.z_loss, recipe.train.recompute)
    pool_map = map_of(recipe)
    if pool_map is None:
        return answered(train_dense_micro_batch(trunk, sequences_BS1, objective))
    seen = replace(pool_map, reaches=reaches or pool_map.reaches)
    return answered(train_micro_batch(trunk, seen, sequences_BS1, number, objective))


def gradients(trunk: Trunk) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def assert_close(found: MicroBatchResult, expected: MicroBatchResult) -> None:
    assert found.scalars.keys() == expected.scalars.keys()
    for name, value in expected.scalars.items():
        torch.testing.assert_close(found.scalars[name], value, rtol=1e-6, atol=0, msg=name)
    torch.testing.assert_close(found.gates_L, expected.gates_L, rtol=1e-6, atol=0)
    assert torch.equal(found.tokens_per_expert_LM, expected.tokens_per_expert_LM)
    assert found.nonfinite_router_tokens == expected.nonfinite_router_tokens == 0


def assert_gradients_close(found: Trunk, expected: Trunk) -> None:
    theirs = gradients(expected)
    assert gradients(found).keys() == theirs.keys()
    for name, value in gradients(found).items():
        atol = 1e-6 * float(theirs[name].abs().max())
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_of_each_segment(variant: str) -> None:
    """However many layers there are; with eager's numbers; and neither warming up nor evaluation adds another."""
    recipe, backend = tiny(**VARIANTS[variant]), Backend()
    trunk, eager = trunk_of(recipe, backend.segments), trunk_of(recipe)
    trunk.compiled = True
    warm_up(trunk, map_of(recipe), recipe)
    assert not gradients(trunk)
    # With recompute a segment runs in two ways, without autograd and again with it, but for the last.
    expected = 1 if variant == "dense" else 5 if recipe.train.recompute else 3
    assert backend.graphs == expected
    for number in range(2):
        assert_close(trained(trunk, recipe, number), trained(eager, recipe, number))
    assert_gradients_close(trunk, eager)
    assert bool(gradients(trunk)) == (variant != "frozen")
    for length in (3, 5):
        answered(hidden_states(trunk, map_of(recipe), torch.ones(1, length, dtype=torch.int64), 0))
    assert backend.graphs == expected


@pytest.mark.parametrize("allocation", ["learned", "random"])
def test_one_graph_for_each_kind_of_reach(allocation: str) -> None:
    """The pool and the ramp share one, and all are compiled before the first step, within which they change."""
    lock = {"full_fraction": 0.25, "anneal_fraction": 0.5, "allocation": allocation}
    recipe, backend = tiny(pool={"experts": 12}, lock=lock), Backend()
    trunk, eager = trunk_of(recipe, backend.segments), trunk_of(recipe)
    trunk.compiled = True
    warm_up(trunk, map_of(recipe), recipe)
    expected = 5 if allocation == "learned" else 3
    assert backend.graphs == expected and not gradients(trunk)
    reaches = Reaches(recipe, CPU)
    for step in range(1, 5):
        if step > 1 or allocation == "random":
            reaches.assign([2, 0, 1] * 4)
        at = reaches.at(step)
        assert {reach[0].storage_offset() for reach in at} == {0}
        found = [trained(t, recipe, step, at) for t in (trunk, eager)]
        assert_close(*found)
    assert_gradients_close(trunk, eager)
    load_LM = found[0].tokens_per_expert_LM
    assert [int(load_LM[layer, first::3].sum()) for layer, first in enumerate((1, 2, 0))] == [36] * 3
    assert backend.graphs == expected


def test_segments_of_every_sub_pool_get_aligned_tensors() -> None:
    """Inductor's code for GPUs assumes that all inputs are aligned as those of the first call, or copies them."""
    pool_map = map_of(tiny(**VARIANTS["norm, sub-pools, one kv head each"]))
    assert pool_map and [int(pool_map.first_of(layer)) for layer in range(3)] == [0, 4, 8]
    assert [pool_map.first_of(layer).storage_offset() for layer in range(3)] == [0, 0, 0]


def test_in_bf16() -> None:
    """The weights of a router are fp32, and so are their gradients' products, as without the compiler."""
    recipe = tiny(train={"precision": "bf16"}, model={"ffn_hidden": 24})
    trunk, eager = trunk_of(recipe, Backend().segments), trunk_of(recipe)
    found, expected = trained(trunk, recipe), trained(eager, recipe)
    torch.testing.assert_close(found.scalars["loss"], expected.scalars["loss"], rtol=1e-2, atol=0)
    theirs = gradients(eager)
    for name, value in gradients(trunk).items():
        if "router" in name:
            assert (value - value.bfloat16().float()).abs().max() > 0, "rounded to bf16"
        assert (value - theirs[name]).norm() < 0.05 * theirs[name].norm(), name


@pytest.mark.slow
def test_inductor() -> None:
    """Three steps of plain gradient descent: loss, load and gradients as eager; and the same bits in a second run."""
    recipe = tiny(router={"kind": "norm", "top_k": 2, "z_loss": 0.03})
    runs = []
    for compiled in (segments.compiled_segments(), segments.compiled_segments(), EAGER):
        trunk, steps = trunk_of(recipe, compiled), []
        for number in range(3):
            trunk.zero_grad()
            steps.append(trained(trunk, recipe, number))
            with torch.no_grad():
                for parameter in trunk.parameters():
                    parameter -= 0.01 * parameter.grad
        runs.append((trunk, steps))
    (first, of_first), (second, of_second), (eager, of_eager) = runs
    for mine, theirs in zip(of_first, of_eager, strict=True):
        assert_close(mine, theirs)
    assert_gradients_close(first, eager)
    for mine, again in zip(of_first, of_second, strict=True):
        assert all(torch.equal(mine.scalars[name], again.scalars[name]) for name in mine.scalars)
    assert all(torch.equal(mine, gradients(second)[name]) for name, mine in gradients(first).items())


LOCKS = {
    "annealed": {"lock": {"full_fraction": 0.25, "anneal_fraction": 0.5}},
    "locked": {"lock": {"allocation": "random"}},
}


@pytest.mark.parametrize("variant", ["norm, documents, recompute", "softmax, documents", *LOCKS])
def test_few_kernels_on_a_gpu(variant: str) -> None:
    """A segment is at most 25 kernels forward and 45 backward, as inductor fuses them for CUDA."""
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn_hidden": 64, "seq_len": 256, "vocab": 61}
    train = {"precision": "bf16", "recompute": "recompute" in variant}
    sections = {"model": shape, "train": train, "pool": {"experts": 60 if variant in LOCKS else 64}}
    recipe = tiny(**VARIANTS.get(variant, {}) | sections | LOCKS.get(variant, {}))
    reaches = None
    if recipe.lock:
        made = Reaches(recipe, CPU)
        made.assign([0, 1, 2] * 20)
        reaches = made.at(2)
    counter = Counter()
    torch.use_deterministic_algorithms(True)
    try:
        trained(trunk_of(recipe, compiled_by(counter.backend)), recipe, reaches=reaches)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(counter.backward) == 3
    assert len(counter.forward) == (5 if recipe.train.recompute else 3)  # without autograd and again with it
    for forward in counter.forward:
        assert len(forward) <= 25, forward
    for backward in counter.backward:
        assert len(backward) <= 45, backward


def test_nothing_is_compiled_on_cpus_by_default() -> None:
    """A micro-batch does not even load the compiler, which takes seconds."""
    code = (
        "import sys, torch; from tests.training import tiny; from trainer.model.trunk import Trunk\n"
        "from trainer.model.micro_batch import train_dense_micro_batch, Objective\n"
        "recipe = tiny(model={'ffn': 'dense'}, pool={'experts': 0}, balance={'pool': 0.0})\n"
        "objective = Objective(1.0, lambda load: None, 0.0, False)\n"
        "trunk = Trunk(recipe, torch.device('cpu'))\n"
        "list(train_dense_micro_batch(trunk, torch.zeros(1, 10).long(), objective))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    assert done.stdout.split() == ["False"]


def test_a_compiler_that_fails_is_one_line() -> None:
    def fails(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no compiler\nand more")

    recipe = tiny()
    trunk = trunk_of(recipe, compiled_by(fails))
    trunk.compiled = True
    with pytest.raises(UserError, match=r"^train.compile: .*no compiler.*set train.compile: false$"):
        warm_up(trunk, map_of(recipe), recipe)
