"""What `plan` prints, compared with the paper's table, the modules themselves and torch's own counters."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pool.shard import ExpertShard
from pool.wire.nccl import MAX_CTAS
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.common.format import count
from trainer.config.recipe import Recipe, load_recipe, recipe_names
from trainer.model.micro_batch import Objective, PoolMap, train_dense_micro_batch, train_micro_batch
from trainer.model.pool_client import LocalPool, PoolClient
from trainer.model.trunk import Trunk
from trainer.planning.memory import CONTEXT, MEMORY_KINDS, WIRE_CHANNELS, Memory, estimate_memory
from trainer.planning.model_costs import FP32, count_flops, count_parameters
from trainer.planning.report import make_cost_report, print_cost_report

CPU = torch.device("cpu")
LARGER = ("parallel.trunk_ranks=8", "parallel.pool_ranks=16")
ODD = (
    "model.layers=3",
    "model.hidden=72",
    "model.heads=6",
    "model.kv_heads=2",
    "model.ffn_hidden=40",
    "model.vocab=70",
    "model.seq_len=40",
    "train.micro_batch=2",
    "train.global_batch=8",
    "run.dir=runs/odd",
)
VARIANTS = {
    "unipool": ("pool.experts=15",),
    "top2": ("pool.experts=15", "router.top_k=2"),
    "private": ("pool.experts=15", "model.private_ffn=24"),
    "vanilla": ("pool.experts=15", "model.groups=3", "router.kind=softmax"),
    "imported": (
        *("pool.experts=15", "router.kind=softmax", "router.top_k=2", "router.renormalize=true"),
        *("router.logit_bias=true", "model.head_dim=18", "model.qk_norm=all", "model.qkv_bias=true"),
        *("model.private_ffn=24", "model.private_gate=true"),
    ),
    "dense": ("pool.experts=0", "model.ffn=dense", "parallel.pool_ranks=0"),
}


def odd_recipe(variant: str, *overrides: str) -> Recipe:
    return load_recipe("quickstart", (*ODD, *VARIANTS[variant], *overrides))


def parameters_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("scale", "active", "total"),
    [
        ("182m", 182e6, "777.9M"),
        ("469m", 469e6, "2.588B"),
        ("650m", 650e6, "3.834B"),
        ("830m", 830e6, "5.081B"),
        ("978m", 978e6, "5.742B"),
    ],
)
def test_parameters_of_the_papers_models(scale: str, active: float, total: str) -> None:
    unipool, vanilla, dense = (
        count_parameters(load_recipe(f"{kind}-{scale}")) for kind in ("unipool", "vanilla", "dense")
    )
    assert count(unipool.total) == total
    assert unipool.active == vanilla.active == dense.active == dense.total
    assert unipool.active == pytest.approx(active, rel=0.006)
    assert unipool.pool == vanilla.pool


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_the_modules(variant: str) -> None:
    recipe = odd_recipe(variant)
    m = recipe.model
    trunk = Trunk(recipe, CPU)
    shard = ExpertShard(tuple(range(recipe.pool.experts)), m.hidden, m.ffn_hidden, torch.float32)
    counted = count_parameters(recipe)
    assert (counted.trunk, counted.pool) == (parameters_of(trunk), parameters_of(shard))
    assert counted.total == counted.trunk + counted.pool
    routers = [parameters_of(block.router) for block in trunk.blocks if m.ffn == "pool"]  # type: ignore[arg-type]
    assert counted.routers == sum(routers)


def test_flops_at_182m() -> None:
    flops = count_flops(load_recipe("unipool-182m"))
    parts = (flops.trunk_layer, flops.head, flops.expert, flops.router)
    assert [round(part / 1e6, 2) for part in parts] == [4.72, 78.64, 14.16, 0.15]
    assert flops.trunk == 12 * (flops.trunk_layer + flops.router) + flops.head
    assert flops.pool == 12 * flops.expert
    assert flops.training == 3 * (flops.trunk + flops.pool)


def test_frozen_weights_have_no_gradients() -> None:
    """Only products with weights have two products in their backward; attention's own are between activations."""
    started = ("train.init_from=elsewhere", "train.freeze=")
    pool, trunk = (
        count_flops(load_recipe("unipool-182m", (started[0], started[1] + role))) for role in ("pool", "trunk")
    )
    assert pool.training == 3 * pool.trunk + 2 * pool.pool
    attention = 12 * 2 * 1024 * 768
    assert trunk.training == 2 * (trunk.trunk - attention) + 3 * attention + 3 * trunk.pool


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_torchs_count(variant: str) -> None:
    # torch counts neither fused attention nor products in place: hence plain attention, and bf16.
    recipe = odd_recipe(variant, "train.precision=bf16")
    m = recipe.model
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_one_micro_batch(recipe, Trunk(recipe, CPU))
    # It counts all of attention's scores; we count half, because of the causal mask.
    masked_half = 3 * m.layers * 2 * m.seq_len * m.heads * m.head_size
    expected = count_flops(recipe).training + masked_half
    assert counter.get_total_flops() == recipe.train.micro_batch * m.seq_len * expected


def train_one_micro_batch(recipe: Recipe, trunk: Trunk) -> None:
    """Forward and backward of one micro-batch, with the weight gradients of the experts."""
    m = recipe.model
    sequences_BS1 = torch.randint(m.vocab, (recipe.train.micro_batch, m.seq_len + 1))
    objective = Objective(1.0, lambda load_LM: None, 0.0, recipe.train.recompute)
    if m.ffn == "dense":
        PoolClient().run([train_dense_micro_batch(trunk, sequences_BS1, objective)], (), 0)
        return
    shard = ExpertShard(tuple(range(recipe.pool.experts)), m.hidden, m.ffn_hidden, trunk.compute_dtype)
    shard.reset_parameters(0.1, 0.1, 0)
    pool_map = PoolMap(torch.arange(recipe.pool.experts), recipe.experts_per_layer, m.layers // m.groups)
    LocalPool(shard).run([train_micro_batch(trunk, pool_map, sequences_BS1, 0, objective)], (0,), 0)
    shard.deferred_dw.drain()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trunk_keeps_what_autograd_saves(variant: str, precision: str) -> None:
    wider = (
        "parallel.lanes=1",
        "model.hidden=96",
        "model.layers=6",
        "train.micro_batch=4",
        f"train.precision={precision}",
    )
    recipe = odd_recipe(variant, *wider)
    trunk = Trunk(recipe, CPU)
    m, tokens = recipe.model, recipe.train.micro_batch * recipe.model.seq_len
    known = {t.untyped_storage().data_ptr() for t in (*trunk.parameters(), *trunk.rope)}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        train_one_micro_batch(recipe, trunk)
    trunk_memory = estimate_memory(recipe, 1)[0]
    # Autograd's list has one tensor of the logits' size, and has neither the dispatched rows nor the answers, which
    # the segments themselves keep.
    compute = 2 if precision == "bf16" else FP32
    rows = 0 if m.ffn == "dense" else 2 * m.layers * recipe.router.top_k * m.hidden * compute
    estimated = trunk_memory.activations + trunk_memory.compute_copies + tokens * (m.vocab * FP32 - rows)
    assert estimated == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.03)


def memory_of(name: str, *overrides: str) -> tuple[Memory, ...]:
    return estimate_memory(load_recipe(name, overrides), 2)


def bytes_per_parameter(memory: Memory) -> float:
    state = memory.weights + memory.compute_copies + memory.gradients + memory.optimizer
    return state / memory.parameters


def test_channels_are_those_of_the_wire() -> None:
    assert WIRE_CHANNELS == MAX_CTAS


def test_pool_memory() -> None:
    _, pool = memory_of("unipool-182m", f"pool.stash_bytes={2**30}")
    assert (pool.role, pool.ranks, pool.parameters) == ("pool", 4, 96 // 4 * 3 * 768 * 3072)
    assert bytes_per_parameter(pool) == 4 + 2 + 4 + 8
    # 2 lanes of 4 trunk ranks bring 32 sequences through 12 layers to 4 shards; a row is x and both hidden halves, bf16
    assert pool.expert_activations == 2 * 16 * 1024 * 12 * (768 + 2 * 3072) * 2
    # Beyond the limit there may be the launch that exceeded it: 2 lanes of 4 trunk ranks, x, dH, the activation and dy.
    assert pool.stash == 2**30 + 2 * 16 * 1024 * (2 * 768 + 3 * 3072) * 2
    _, recomputing = memory_of("unipool-182m", "pool.recompute=true")
    assert recomputing.expert_activations == 2 * 16 * 1024 * 12 * 768 * 2


def test_pool_memory_with_replicas() -> None:
    _, one = memory_of("unipool-182m", "parallel.pool_zero=1")
    assert bytes_per_parameter(one) == 4 + 2 + 4 + (4 + 8)
    _, two = memory_of("unipool-182m", "parallel.pool_zero=1", "parallel.expert_parallel=2")
    assert bytes_per_parameter(two) == 4 + 2 + 4 + (4 + 8) / 2
    assert two.parameters == 2 * one.parameters
    assert two.expert_activations == one.expert_activations


@pytest.mark.parametrize(("zero", "expected"), [(0, 4 + 4 + 8), (1, 4 + 4 + 12 / 8), (2, 4 + 4 + 12 / 8)])
def test_trunk_memory_by_zero_stage(zero: int, expected: float) -> None:
    (dense,) = memory_of("dense-182m", f"parallel.trunk_zero={zero}", "train.precision=fp32")
    assert bytes_per_parameter(dense) == pytest.approx(expected)
    assert dense.compute_copies == dense.expert_activations == dense.stash == 0


def test_recompute_keeps_less() -> None:
    kept, recomputed = (memory_of("unipool-182m", f"train.recompute={on}")[0] for on in ("false", "true"))
    assert recomputed.activations < kept.activations / 3
    assert recomputed.logits == kept.logits


def test_colocated_memory_is_both_roles() -> None:
    overrides = ("parallel.trunk_ranks=1", "parallel.pool_ranks=0")
    (both,) = memory_of("unipool-182m", *overrides)
    trunk, pool = memory_of("unipool-182m", "parallel.trunk_ranks=1", "parallel.pool_ranks=1")
    assert (both.role, both.ranks) == ("trunk + pool", 1)
    apart = ("messages", "stash", "step_end", "device")
    assert (both.step_end, both.device) == (max(trunk.step_end, pool.step_end), CONTEXT)
    for kind in set(MEMORY_KINDS) - set(apart):
        assert getattr(both, kind) == getattr(trunk, kind) + getattr(pool, kind), kind


@pytest.mark.parametrize("hardware", [None, "h100"])
@pytest.mark.parametrize("layout", [(), LARGER])
@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith(("unipool-", "vanilla-", "dense-"))])
def test_recipes_for_8_gpus_fit_80_gb(name: str, layout: tuple[str, ...], hardware: str | None) -> None:
    """Also in the larger layout that their comments name, and with the lanes chosen for an H100."""
    if layout and (name.startswith("dense-") or name.endswith("182m")):
        return
    recipe = load_recipe(name, (*layout, *([f"parallel.hardware={hardware}"] if hardware else ())))
    assert recipe.grid.world_size == (24 if layout else 8)
    report = make_cost_report(recipe)
    assert all(memory.total <= 0.9 * 80e9 for memory in report.memory) and not report.warnings


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith(("unipool-", "vanilla-"))])
def test_larger_layouts_split_as_recommended(name: str) -> None:
    report = make_cost_report(load_recipe(name, () if name.endswith("182m") else LARGER))
    assert report.split == report.recommended


def test_run_and_split_at_182m() -> None:
    report = make_cost_report(load_recipe("unipool-182m"))
    assert (report.steps, report.micro_batches, report.tokens_per_step) == (60_000, 8, 512 * 1024)
    assert report.tokens == 60_000 * 512 * 1024
    assert report.training_flops == report.tokens * report.flops_per_token.training
    assert report.trunk_to_pool == pytest.approx(0.807, abs=1e-3)
    # The pool is the slower role: 170 MFLOP per token on 4 ranks, 137 on the other 4
    assert report.split is not None
    assert (report.split.trunk_ranks, report.split.pool_ranks) == (4, 4)
    assert report.split.busy == pytest.approx((137.04 + 169.87) / (2 * 169.87), abs=1e-4)


def test_recommended_split_moves_ranks() -> None:
    report = make_cost_report(load_recipe("unipool-978m", ["parallel.trunk_ranks=16", "parallel.pool_ranks=8"]))
    assert report.split is not None and report.recommended is not None
    assert (report.recommended.trunk_ranks, report.recommended.pool_ranks) == (8, 16)
    assert report.recommended.busy > 1.9 * report.split.busy


def test_no_split_for_a_dense_model_or_one_rank() -> None:
    dense = make_cost_report(load_recipe("dense-182m"))
    assert (dense.trunk_to_pool, dense.split, dense.recommended) == (None, None, None)
    alone = make_cost_report(load_recipe("quickstart", ["parallel.pool_ranks=0"]))
    assert (alone.split, alone.recommended) == (None, None)


def test_json_names_the_fields() -> None:
    tree = make_cost_report(load_recipe("unipool-182m")).to_json()
    assert tree["parameters"]["total"] == 777_898_764
    trunk, pool = tree["memory"]
    parts = ("weights", "gradients", "optimizer", "device", "compute_copies", "activations", "logits", "messages")
    assert trunk["total"] == sum(trunk[kind] for kind in (*parts, "working"))
    assert tree["recommended"]["pool_ranks"] == pool["ranks"] == 4


@pytest.mark.parametrize("name", ["unipool-182m", "dense-182m"])
def test_tables(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_cost_report(make_cost_report(load_recipe(name)))
    text = capsys.readouterr().out
    assert ("777.9M" if name == "unipool-182m" else "182.5M") in text
    assert ("best by FLOPs" in text) == (name == "unipool-182m")
    assert "Memory is an estimate" in text


def unipool(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments])


@pytest.mark.parametrize(
    ("gbit", "said"),
    [("100", "The wire limits the step: a pool rank's link must carry"), ("400", "The wire is fast enough")],
)
def test_predicted_step_says_whether_the_wire_limits_it(gbit: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = unipool("unipool-182m", "--hardware", "h100", "--interconnect", gbit).output
    assert said in " ".join(text.split())
    assert "Predicted step" in text and "Best layouts of 8 devices" in text and "Assumed, not measured" in text
    assert "…" not in text


@pytest.mark.parametrize("layout", [(), ("--set", "parallel.trunk_ranks=1", "--set", "parallel.pool_ranks=0")])
def test_memory_and_predicted_step_are_of_the_same_lanes(layout: tuple[str, ...]) -> None:
    """Not of those that a run without `parallel.hardware` would choose; nor of those of a faster link."""
    arguments = ("unipool-182m", *layout, "--json", "--hardware", "h100", "--interconnect", "100")
    tree = json.loads(unipool(*arguments).output)
    assert tree["lanes"] == tree["predicted"]["lanes"]
    assert max(memory["total"] for memory in tree["memory"]) == tree["predicted"]["memory"]
    others = [json.loads(unipool(*words).output)["lanes"] for words in (arguments[:-2], arguments[:-4])]
    assert layout or tree["lanes"] not in others


def test_predicted_step_as_json() -> None:
    tree = json.loads(unipool("unipool-182m", "--hardware", "h100", "--devices", "6", "--json").output)
    predicted = tree["predicted"]
    assert predicted["trunk_ranks"] == 4 and predicted["hardware"]["name"] == "h100"
    dedicated = [step for step in predicted["layouts"] if step["layout"] == "dedicated"]
    assert dedicated and all(step["trunk_ranks"] + step["pool_ranks"] == 6 for step in dedicated)
    assert "predicted" not in json.loads(unipool("unipool-182m", "--json").output)


@pytest.mark.parametrize("arguments", [("dense-182m",), ("unipool-182m", "--set", "parallel.pool_ranks=0")])
def test_predicted_step_without_pool_ranks(arguments: tuple[str, ...]) -> None:
    text = unipool(*arguments, "--hardware", "a100").output
    assert "Predicted step" in text and "Best layouts" not in text and "wire" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("unipool-182m", "--devices", "4"), "--devices 4: needs --hardware"),
        (("unipool-182m", "--interconnect", "4"), "--interconnect 4: needs --hardware"),
        (("unipool-182m", "--network", "4"), "--network 4: needs --hardware"),
        (("unipool-182m", "--hardware", "h100", "--devices", "0"), "--devices 0: must be at least 1"),
        (("unipool-182m", "--hardware", "h100", "--interconnect", "-1"), "--interconnect -1: must be"),
        (("unipool-182m", "--hardware", "h10"), "--hardware h10: neither"),
        (("dense-182m", "--hardware", "h100", "--devices", "4"), "there is no pool"),
    ],
)
def test_wrong_options_of_a_prediction(arguments: tuple[str, ...], said: str) -> None:
    error = unipool(*arguments).exception
    assert isinstance(error, UserError) and said in str(error) and "\n" not in str(error)
