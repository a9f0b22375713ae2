"""The loss in chunks of tokens is that of the whole, and its memory is bounded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pool.shard import ExpertShard
from tests.double import float32_is_float64
from tests.host_reads import no_host_reads
from tests.training import Outcome, assert_same, run_training, tiny
from trainer.config.recipe import Recipe
from trainer.model.loss import OutputProjection, cross_entropies, losses_and_gradients, mean_cross_entropy
from trainer.model.micro_batch import Objective, PoolMap, hidden_states, train_dense_micro_batch, train_micro_batch
from trainer.model.pool_client import LocalPool, PoolClient
from trainer.model.trunk import Trunk

B, S, D, V = 3, 7, 12, 37
T = B * S
SCALE = 0.3
FLOAT64 = torch.float64


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """From all logits at once, as it is defined; products are in the type of autocast."""
    return F.cross_entropy(F.linear(x_BSD, weight_VD).float().flatten(0, 1), targets_BS.flatten())


def in_chunks(chunk: int, compute_dtype: torch.dtype) -> Loss:
    return partial(mean_cross_entropy, chunk=chunk, compute_dtype=compute_dtype)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x_BSD, weight_VD and targets_BS: the same numbers in every type, but for rounding."""
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(B, S, D, generator=generator, dtype=torch.float32)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float32)
    return x_BSD.to(dtype), weight_VD.to(dtype), torch.randint(V, (B, S), generator=generator)


def run(
    loss_of: Loss, dtype: torch.dtype, of_x: bool = True, of_weight: bool = True, bf16: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients of SCALE * loss by x and by the weight."""
    x_BSD, weight_VD, targets_BS = inputs(dtype)
    x_BSD.requires_grad_(of_x)
    weight_VD.requires_grad_(of_weight)
    with float32_is_float64(dtype == FLOAT64), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(x_BSD, weight_VD, targets_BS)
    if loss.requires_grad:
        (SCALE * loss).backward()
    return loss.detach(), x_BSD.grad, weight_VD.grad


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    """The largest error relative to the largest element."""
    assert found is not None and expected is not None
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, T - 1])
@pytest.mark.parametrize(("of_x", "of_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_chunks_give_the_whole(chunk: int, of_x: bool, of_weight: bool) -> None:
    """In float64, to its last digits; rounding of fp32 and of bf16's products is all that differs there."""
    expected = run(whole, FLOAT64, of_x, of_weight)
    for dtype, compute_dtype, tolerance in (
        (FLOAT64, FLOAT64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 2**-6),
    ):
        found = run(in_chunks(chunk, compute_dtype), dtype, of_x, of_weight)
        assert found[0].dtype == dtype
        for value, exact in zip(found, expected, strict=True):
            assert (value is None) == (exact is None)
            assert value is None or (value.dtype == dtype and difference(value, exact) < tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_chunk_as_large_as_the_micro_batch_is_the_whole_to_the_bit(bf16: bool) -> None:
    expected = run(whole, torch.float32, bf16=bf16)
    for chunk in (T, 10 * T):
        found = run(in_chunks(chunk, torch.bfloat16 if bf16 else torch.float32), torch.float32)
        for value, exact in zip(found, expected, strict=True):
            assert value is not None and exact is not None and value.equal(exact)


def test_the_weights_gradient_is_summed_in_fp32() -> None:
    """A thousand equal parts: a sum in bf16 would stop growing at 256 of them."""
    tokens = 1024
    x_1TD, weight_VD = torch.ones(1, tokens, D), torch.zeros(V, D, requires_grad=True)
    mean_cross_entropy(x_1TD, weight_VD, torch.zeros(1, tokens, dtype=torch.int64), 1, torch.bfloat16).backward()
    assert weight_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad[0], torch.full((D,), 1 / V - 1), rtol=2**-8, atol=0)


def test_losses_of_tokens() -> None:
    x_BSD, weight_VD, targets_BS = inputs(torch.float32)
    losses_T = cross_entropies(partial(F.linear, weight=weight_VD), x_BSD.flatten(0, 1), targets_BS.flatten(), 4)
    logits_TV = F.linear(x_BSD.double(), weight_VD.double()).flatten(0, 1)
    assert difference(losses_T, F.cross_entropy(logits_TV, targets_BS.flatten(), reduction="none")) < 1e-6


def test_losses_that_are_not_finite_are_not_hidden() -> None:
    x_BSD, weight_VD, targets_BS = inputs(torch.float32)
    x_BSD[1, 2, 3] = torch.inf
    weight_VD.requires_grad_()
    loss = mean_cross_entropy(x_BSD, weight_VD, targets_BS, 4, torch.float32)
    loss.backward()
    assert loss.isnan() and weight_VD.grad is not None and weight_VD.grad.isnan().any()


def test_a_second_backward_pass_is_refused() -> None:
    x_BSD, weight_VD, targets_BS = inputs(torch.float32)
    weight_VD.requires_grad_()
    loss = mean_cross_entropy(x_BSD, weight_VD, targets_BS, 4, torch.float32)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and loss are one graph, and the numbers are the same, also of a single chunk."""
    for compiler in ("TORCHINDUCTOR", "TRITON"):
        monkeypatch.setenv(f"{compiler}_CACHE_DIR", str(tmp_path))
    expected = run(in_chunks(8, torch.bfloat16), torch.float32)
    found = run(partial(in_chunks(T, torch.bfloat16), compiled=True), torch.float32)
    for value, exact in zip(found, expected, strict=True):
        assert difference(value, exact) < 2**-7


@pytest.mark.parametrize(("tokens", "hidden"), [(16 * 1024, 768), (8 * 1024, 1536)])
@pytest.mark.parametrize("device", ["meta", "cuda:0"])
def test_a_device_is_never_waited_for(device: str, tokens: int, hidden: int) -> None:
    with FakeTensorMode() if device != "meta" else nullcontext(), no_host_reads(), torch.no_grad():
        x_TD = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        weight_VD, targets_T = (
            torch.empty(51200, hidden, device=device),
            torch.empty(tokens, dtype=torch.int64, device=device),
        )
        losses_T, *gradients = losses_and_gradients(x_TD, weight_VD, targets_T, (True, True), 4096, torch.bfloat16)
        assert (losses_T.shape, losses_T.dtype, losses_T.device) == ((tokens,), torch.float32, torch.device(device))
        for gradient, of in zip(gradients, (x_TD, weight_VD), strict=True):
            assert gradient is not None and (gradient.shape, gradient.dtype) == (of.shape, of.dtype)
        logits_of = partial(F.linear, weight=weight_VD.bfloat16())
        assert cross_entropies(logits_of, x_TD, targets_T, 4096).dtype == torch.float32


class Watch(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and the most bytes in use at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                self._count(leaf.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key not in known and key not in self._seen:
            self._seen.add(key)
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chunk", "size"), [(200, 128), (100, 86), (64, 64), (10, 10)])
def test_memory_is_bounded(chunk: int, size: int, compute_dtype: torch.dtype) -> None:
    """Two fp32 tensors of a chunk's logits, the gradients, and with bf16 copies of the operands."""
    tokens, hidden, vocab = 256, 16, 4000
    module = OutputProjection(hidden, vocab, chunk, compute_dtype, compiled=False)
    x_1TD, targets_1T = torch.randn(1, tokens, hidden, requires_grad=True), torch.randint(vocab, (1, tokens))
    others = (4 if compute_dtype == torch.float32 else 6) * (tokens + vocab) * hidden
    # Where torch's compiler watches calls, a caller keeps references that Python would otherwise hand over.
    for calls in (nullcontext(), torch.compiler.set_stance("force_eager")):
        x_1TD.grad = module.weight.grad = None
        with calls, Watch() as watch:
            module(x_1TD, targets_1T).backward()
        assert watch.peak == pytest.approx(8 * size * vocab + others, rel=0.05)
    with Watch() as watch, torch.no_grad():
        module(x_1TD, targets_1T)
    assert watch.largest <= max(size, hidden) * vocab


def each_use_of_the_head(recipe: Recipe) -> Iterator[Any]:
    """A micro-batch of training, its loss in evaluation, and the logits of the last position in generation."""
    m, trunk = recipe.model, Trunk(recipe, torch.device("cpu"))
    sequences_BS1 = torch.randint(m.vocab, (recipe.train.micro_batch, m.seq_len + 1))
    objective = Objective(1.0, lambda load_LM: None, 0.0, recipe.train.recompute)
    client, pool_map, training = PoolClient(), None, train_dense_micro_batch(trunk, sequences_BS1, objective)
    if m.ffn == "pool":
        shard = ExpertShard(tuple(range(recipe.pool.experts)), m.hidden, m.ffn_hidden, trunk.compute_dtype)
        shard.reset_parameters(0.1, 0.1, 0)
        pool_map = PoolMap(torch.arange(recipe.pool.experts), recipe.experts_per_layer, m.layers)
        client, training = LocalPool(shard), train_micro_batch(trunk, pool_map, sequences_BS1, 0, objective)
    yield client.run([training], (0,), 0)
    ((h_BSD, _),) = client.run([hidden_states(trunk, pool_map, sequences_BS1[:, :-1], 0)], (0,), 0)
    with torch.no_grad(), trunk.autocast():
        yield trunk.loss(h_BSD, sequences_BS1[:, 1:])
        yield trunk.head(h_BSD[:, -1])


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"precision": "fp32"}},
        {"train": {"precision": "bf16"}, "model": {"ffn_hidden": 32}},
        {"train": {"recompute": True, "precision": "fp32"}},
        {"model": {"ffn": "dense"}, "pool": {"experts": 0}},
    ],
    ids=str,
)
def test_no_use_of_the_head_builds_all_logits(sections: dict[str, Any]) -> None:
    model = {"vocab": 999, "seq_len": 64} | sections.get("model", {})
    train = {"loss_chunk": 32} | sections.get("train", {})
    with Watch() as watch:
        for _ in each_use_of_the_head(tiny(**{**sections, "model": model, "train": train})):
            assert watch.largest <= 32 * 999


@cache
def of_the_whole(method: str) -> Outcome:
    return run_training(tiny(parallel=COLOCATED, **METHODS[method]))


COLOCATED = {"trunk_zero": 0, "pool_zero": 0}
METHODS: dict[str, dict[str, Any]] = {
    "pool": {},
    "dense": {"model": {"ffn": "dense"}, "pool": {"experts": 0}},
}


@pytest.mark.parametrize(
    ("method", "chunk", "parallel", "recompute"),
    [
        ("pool", 5, COLOCATED, False),
        ("pool", 7, COLOCATED, True),
        ("pool", 4, {"trunk_zero": 1, "trunk_ranks": 2, "pool_ranks": 1}, False),
        ("pool", 4, {"trunk_zero": 2, "trunk_ranks": 2, "pool_ranks": 2, "pool_zero": 1}, True),
        ("pool", 4, {"trunk_zero": 3, "trunk_ranks": 2, "pool_ranks": 1, "lanes": 1, "stagger": False}, False),
        ("pool", 4, {"trunk_zero": 3, "trunk_ranks": 2}, True),
        ("dense", 4, {"trunk_zero": 0}, False),
        ("dense", 17, {"trunk_zero": 3, "trunk_ranks": 2}, False),
    ],
)
def test_training_in_chunks(method: str, chunk: int, parallel: dict[str, Any], recompute: bool) -> None:
    """Losses, gradients and weights are those of the whole: 18 tokens in a micro-batch."""
    train = {"loss_chunk": chunk, "recompute": recompute}
    assert_same(of_the_whole(method), run_training(tiny(train=train, parallel=parallel, **METHODS[method])))
