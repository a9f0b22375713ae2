"""Two engines in one process, as where every rank has both roles: one over all ranks, one over a shard's replicas."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import run_ranks
from tests.training import tiny
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import scheduled_rate

RANKS, STEPS, SAVED = 4, 3, 2
SHARDS = (4, 2, 1)
"""With 1, 2 and 4 replicas."""
CASES = ((2, 0, 0), (2, 0, 2), (2, 1, 1), (2, 2, 0), (2, 3, 2), (4, 0, 1), (4, 1, 0), (1, 3, 0))
"""(shards, the trunk's ZeRO stage, the pool's)."""

MODEL = "mp_rank_00_model_states.pt"


def recipe(trunk_zero: int, pool_zero: int) -> Recipe:
    parallel = {"layout": "every_rank", "trunk_ranks": RANKS, "trunk_zero": trunk_zero, "pool_zero": pool_zero}
    return tiny(parallel={**parallel, "lanes": 1, "stagger": False})


def new_module(role: str) -> nn.Linear:
    """A matrix, which decays, and a bias, which does not; of odd sizes, and different for each role and shard."""
    module = nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, len(role), parameter.numel()).view_as(parameter))
    return module


def inputs(role: str, rank: int, step: int) -> Tensor:
    return torch.arange(5.0) * (1 + rank) + step + len(role)


class Pair:
    """The engines of a rank."""

    def __init__(self, recipe: Recipe, shards: int, group: Any, pool_first: bool):
        from trainer.engine.role_engine import build_engine

        self.rank = torch.distributed.get_rank()
        self.pool = f"pool{'+' * (self.rank % shards)}"

        def build(role: str) -> Any:
            own = (RANKS // shards, group) if role == "pool" else (RANKS, None)
            return build_engine(new_module(self.pool if role == "pool" else role), recipe, role, *own)

        built = {role: build(role) for role in (("pool", "trunk") if pool_first else ("trunk", "pool"))}
        self.engines = {"trunk": built["trunk"], self.pool: built["pool"]}

    def step(self, step: int) -> dict[str, float]:
        """Make a step, clipped by the norm over all roles; return this rank's norms."""
        trunk, pool = self.engines.values()
        with trunk.accumulating(), pool.accumulating():
            for role, engine in self.engines.items():
                engine.module(inputs(role, self.rank, step)).square().sum().backward()
        norms = {role: float(engine.grad_norm()) for role, engine in self.engines.items()}
        everywhere: list[Any] = [None] * RANKS
        torch.distributed.all_gather_object(everywhere, norms)
        total = math.sqrt(sum(norm**2 for norm in {k: v for each in everywhere for k, v in each.items()}.values()))
        assert all(engine.step(total) for engine in reversed(self.engines.values()))
        return norms

    def weights(self) -> dict[str, list[Tensor]]:
        import deepspeed

        found = {}
        for role, engine in self.engines.items():
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3):
                found[role] = [parameter.detach().clone() for parameter in engine.module.parameters()]
        return found

    def save(self, folder: Path) -> list[str]:
        files = []

        def write(path: Path, state: Any) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
            files.append(str(path.relative_to(folder)))

        for role, engine in self.engines.items():
            engine.save(folder / role, write)
        return files

    def load(self, folder: Path) -> None:
        for role, engine in self.engines.items():
            engine.load(folder / role)


def train_pairs(folder: Path) -> list[dict[str, Any]]:
    """One after the other, all in this process: three steps, a checkpoint, and its last step again."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    groups = {n: [dist.new_group(range(shard, RANKS, n)) for shard in range(n)][dist.get_rank() % n] for n in SHARDS}
    found = []
    for number, (shards, *stages) in enumerate(CASES):
        pair = Pair(recipe(*stages), shards, groups[shards], pool_first=number % 2 == 1)
        norms = [pair.step(step) for step in range(SAVED)]
        files = pair.save(folder / str(number))
        norms.append(pair.step(SAVED))
        weights = pair.weights()
        dist.barrier()
        pair.load(folder / str(number))
        pair.step(SAVED)
        found.append({"norms": norms, "weights": weights, "again": pair.weights(), "files": files})
    dist.destroy_process_group()
    return found


def save_frozen(folder: Path) -> list[str]:
    """Names of the files that this rank writes for a frozen pool in two shards."""
    import torch.distributed as dist

    from trainer.engine.role_engine import build_engine

    dist.init_process_group("gloo")
    group = [dist.new_group(range(shard, RANKS, 2)) for shard in range(2)][dist.get_rank() % 2]
    frozen = tiny(train={"freeze": "pool", "init_from": "unused"}, parallel={"trunk_ranks": RANKS})
    files: list[str] = []
    build_engine(new_module("pool"), frozen, "pool", 2, group).save(folder, lambda path, _: files.append(path.name))
    dist.destroy_process_group()
    return files


def test_the_first_rank_of_a_group_writes_a_frozen_role(tmp_path: Path) -> None:
    assert run_ranks(RANKS, save_frozen, tmp_path) == [[MODEL], [MODEL], [], []]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(RANKS, train_pairs, tmp_path_factory.mktemp("pairs"))


@cache
def expected(shards: int) -> tuple[dict[str, list[Tensor]], list[dict[str, float]]]:
    """Weights by role after all steps, and norms by step: torch's AdamW on means of gradients, in float64."""
    settings = recipe(0, 0).train
    members: dict[str, list[int]] = defaultdict(list)
    for rank in range(RANKS):
        members["trunk"].append(rank)
        members[f"pool{'+' * (rank % shards)}"].append(rank)
    modules = {role: new_module(role).double() for role in members}
    weights = [module.weight for module in modules.values()]
    biases = [module.bias for module in modules.values()]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for role, ranks in members.items():
            for rank in ranks:
                (modules[role](inputs(role, rank, step).double()).square().sum() / len(ranks)).backward()
        of_role = {r: float(nn.utils.get_total_norm([p.grad for p in m.parameters()])) for r, m in modules.items()}  # type: ignore[misc]
        norms.append(of_role)
        nn.utils.clip_grad_norm_([*weights, *biases], settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(recipe(0, 0), step)
        optimizer.step()
    return {role: [p.detach().float() for p in module.parameters()] for role, module in modules.items()}, norms


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_engines_do_not_disturb_each_other(number: int, trained: list[list[dict[str, Any]]]) -> None:
    """Weights and norms are those of one process with one optimizer, and a loaded checkpoint continues bit for bit."""
    weights, norms = expected(CASES[number][0])
    for rank in range(RANKS):
        found = trained[rank][number]
        for role, parameters in found["weights"].items():
            torch.testing.assert_close(parameters, weights[role], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(parameters, found["again"][role], rtol=0, atol=0)
        for of_step, expected_norms in zip(found["norms"], norms, strict=True):
            assert of_step == pytest.approx({role: expected_norms[role] for role in of_step}, rel=1e-5)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_files_are_those_of_separate_jobs(number: int, trained: list[list[dict[str, Any]]]) -> None:
    """The first rank of a group writes the model without ZeRO; with it, each rank writes its part of the optimizer."""
    shards, trunk_zero, pool_zero = CASES[number]
    for rank in range(RANKS):
        files = []
        pool = f"pool{'+' * (rank % shards)}"
        for role, place, stage in (("trunk", rank, trunk_zero), (pool, rank // shards, pool_zero)):
            if stage == 3:
                files.append(f"{role}/state/zero_pp_rank_{place}_{MODEL}")
            elif place == 0:
                files.append(f"{role}/state/{MODEL}")
            if stage:
                files.append(f"{role}/state/zero_pp_rank_{place}_mp_rank_00_optim_states.pt")
        assert sorted(trained[rank][number]["files"]) == sorted(files)
