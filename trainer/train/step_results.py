"""What the micro-batches of an optimizer step report, reduced over the trunk ranks, and the step's scalars from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pool.placement import Placement
from router import dead_experts, effective_experts, load_imbalance, specialisation
from trainer.cluster.process_groups import Job
from trainer.config.lock import STAGES, stage_of
from trainer.config.recipe import Recipe
from trainer.model.micro_batch import MicroBatchResult
from trainer.telemetry.step_scalars import StepScalars


@dataclass(frozen=True)
class StepResults:
    """The micro-batches of a step, over all trunk ranks.

    Attributes:
        means: `MicroBatchResult.scalars`, means over the micro-batches.
        gates_L: `MicroBatchResult.gates_L`, mean over the micro-batches.
        nonfinite_router_tokens: Sum over the micro-batches.
        load_LM: Assignments by layer and the experts that it sees, int64 on the host.
        own_losses: Loss of each micro-batch of this rank.
        norms: What `reduce_results` was given to read from the device with them.
    """

    means: dict[str, float]
    gates_L: list[float]
    nonfinite_router_tokens: int
    load_LM: Tensor
    own_losses: list[float]
    norms: list[float]


def reduce_results(results: Sequence[MicroBatchResult], norms: Sequence[Tensor], job: Job) -> StepResults:
    """Reduce the results of this rank's micro-batches over all trunk ranks, in one collective.

    It needs what a step has computed on the host, in one copy; nothing before it in a step waits for the device.

    Args:
        norms: fp32 scalars, to be read in the same copy.
    """
    names = list(results[0].scalars)
    counted = [r.nonfinite_router_tokens.to(r.gates_L.dtype) for r in results]
    rows = [
        torch.cat((torch.stack((n, *r.scalars.values())), r.gates_L)) for n, r in zip(counted, results, strict=True)
    ]
    load_LM = torch.stack([r.tokens_per_expert_LM for r in results]).sum(0)
    # float64 holds these counts exactly.
    read = torch.cat([torch.cat((*rows, torch.stack([*norms]))).double(), load_LM.flatten().double()]).cpu()
    own, read_norms, load = read.split((len(rows) * len(rows[0]), len(norms), load_LM.numel()))
    own_rows = own.view(len(rows), -1)
    sums = torch.zeros(len(rows[0]), dtype=torch.float64)
    for row in own_rows:
        sums += row
    sums[1:] /= len(results) * job.role_size
    together = torch.cat((sums, load))
    job.sum_over_role(together)
    nonfinite, means, gates_L, load = together.split((1, len(names), len(results[0].gates_L), load_LM.numel()))
    return StepResults(
        dict(zip(names, means.tolist(), strict=True)),
        gates_L.tolist(),
        int(nonfinite),
        load.long().view(load_LM.shape),
        own_rows[:, 1 + names.index("loss")].tolist(),
        read_norms.tolist(),
    )


def over_all_experts(load_LM: Tensor, groups: int) -> Tensor:
    """Return the load by layer and global expert id, 0 where a layer does not reach.

    Args:
        load_LM: Load by layer and the experts that it sees.
        groups: Sharing groups of adjacent layers.
    """
    return torch.block_diag(*load_LM.chunk(groups))  # type: ignore[no-any-return]


def lock_scalars(recipe: Recipe, step: int, load_LM: Tensor, owners_M: Tensor | None) -> dict[str, Any]:
    """Compute the scalars of a step that only a run with a lock has.

    Args:
        owners_M: The layer that owns each expert; None before the assignment.
    """
    stage = stage_of(recipe, step)
    scalars: dict[str, Any] = {"lock_stage": STAGES.index(stage.name)}
    if owners_M is not None:
        own_LM = load_LM * (owners_M == torch.arange(len(load_LM)).unsqueeze(-1))
        own_shares_L = own_LM.sum(1) / load_LM.sum(1).clamp(min=1)
        scalars |= {"own_share": float(own_shares_L.mean()), "layer_own_shares": tuple(own_shares_L.tolist())}
        if stage.name == "locked":
            scalars["foreign_assignments"] = int((load_LM - own_LM).sum())
    return scalars


def step_scalars(
    recipe: Recipe,
    placement: Placement | None,
    results: StepResults,
    *,
    grad_norm: float,
    lr: float,
    seconds: float,
    seconds_waiting: float,
    applied: bool,
    lock: Mapping[str, Any] = MappingProxyType({}),
) -> StepScalars:
    """Compute the scalars of a step.

    Args:
        lock: What `lock_scalars` returned, in a run with a lock.
    """
    tokens = recipe.train.global_batch * recipe.model.seq_len
    everywhere_LM = over_all_experts(results.load_LM, recipe.model.groups)
    load_M = everywhere_LM.sum(0)
    shard_load_s = load_M[torch.tensor(placement.order)].view(placement.shards, -1).sum(1) if placement else load_M
    layer_imbalance_L = load_imbalance(results.load_LM)
    return StepScalars(
        **results.means,  # type: ignore[arg-type]  # floats, under the names of float fields
        grad_norm=grad_norm,
        lr=lr,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        load_imbalance=float(load_imbalance(load_M)),
        shard_imbalance=float(load_imbalance(shard_load_s)),
        layer_imbalance=float(layer_imbalance_L.mean()),
        layer_imbalances=tuple(layer_imbalance_L.tolist()),
        layer_gate=fmean(results.gates_L),
        smallest_gate=min(results.gates_L),
        layer_gates=tuple(results.gates_L),
        dead_experts=int(dead_experts(load_M)) if placement else 0,
        effective_experts=float(effective_experts(load_M)),
        specialisation=specialisation(everywhere_LM) if placement else 0.0,
        nonfinite_router_tokens=results.nonfinite_router_tokens,
        pool_wait=seconds_waiting / seconds,
        applied=applied,
        **lock,
    )
