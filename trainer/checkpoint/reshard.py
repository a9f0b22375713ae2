"""Loads a checkpoint into another layout: other ranks or roles of ranks, replicas, ZeRO stages, placement.

Each role's folder is converted into DeepSpeed's universal format (at ZeRO 0 its file is read as it is), and every rank
picks the parameters that it has now: trunk parameters by name, experts by their global id. So a run can resume in
another layout, and its experts can move to other shards while it goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pool.placement import Placement
from pool.shard import ExpertShard
from trainer.checkpoint.format import Role, folder_of, read_placement
from trainer.checkpoint.save import Saver
from trainer.cluster.process_groups import Job
from trainer.common.errors import one_line
from trainer.common.safe_read import read_tensors
from trainer.engine.parameter_state import CHECKPOINT_TAG, ParameterState
from trainer.engine.role_engine import Engine, to_universal
from trainer.telemetry.console import say

WORK_FOLDER = ".reshape"
"""Beside the checkpoints, while one of them is converted."""


class SavedRole:
    """The complete parameters in one role's folder of a checkpoint, each read on demand.

    Args:
        folder: What `RoleEngine.save` wrote.
        universal: What `to_universal` made of it; missing for ZeRO 0, which does not need it.

    Attributes:
        frozen: Whether the role was frozen, so that its parameters have no moments.
    """

    def __init__(self, folder: Path, universal: Path):
        model_states = sorted((folder / CHECKPOINT_TAG).glob("*mp_rank_00_model_states.pt"))
        self._saved: dict[str, Any] = read_tensors(model_states[0], mmap=True)
        self._universal = universal
        partitioned = is_partitioned(folder)
        self.frozen: bool = self._saved["optimizer"] is None and not partitioned
        self._places = {} if self.frozen or partitioned else _optimizer_places(self._saved)

    def read(self, name: str) -> ParameterState:
        """Return a parameter and its moments by its name in the module; zeros if it has never been updated."""
        weight = self.weight(name)
        if self.frozen or not self.updates:  # no moments exist before the first step that is not skipped
            return ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))
        if name not in self._places:
            return ParameterState(weight, self._part(name, "exp_avg"), self._part(name, "exp_avg_sq"))
        moments = self._saved["optimizer"]["state"][self._places[name]]
        return ParameterState(weight, moments["exp_avg"], moments.get("exp_avg_sq"))  # Muon has one moment

    def weight(self, name: str) -> Tensor:
        """Return a parameter alone, or a buffer. It is memory-mapped: only what is used of it is read."""
        complete = self.frozen or name in self._places or name in self._saved["buffer_names"]
        weight: Tensor = self._saved["module"][name] if complete else self._part(name, "fp32")
        return weight

    def _part(self, name: str, key: str) -> Tensor:
        """A file of the universal format; `key` is fp32, exp_avg or exp_avg_sq."""
        shape = next(shapes[name] for shapes in self._saved["param_shapes"] if name in shapes)
        value = read_tensors(self._universal / "zero" / name / f"{key}.pt", mmap=True)
        flat: Tensor = value if isinstance(value, Tensor) else value["param"]  # ZeRO 3 has the tensor alone
        return flat.view(shape)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers, by name."""
        return {name: self._saved["module"][name] for name in self._saved["buffer_names"]}

    @property
    def updates(self) -> int:
        """How often the parameters had been updated: the schedule advances with every step that is not skipped."""
        return int(self._saved["lr_scheduler"]["last_batch_iteration"])


def is_partitioned(folder: Path) -> bool:
    """Whether a role's folder was saved at ZeRO 1, 2 or 3."""
    return any((folder / CHECKPOINT_TAG).glob("*_optim_states.pt"))


def _optimizer_places(saved: dict[str, Any]) -> dict[str, int]:
    """The optimizer's number of each parameter: matrices first, as `parameter_groups` orders them."""
    weights = {name: value for name, value in saved["module"].items() if name not in saved["buffer_names"]}
    ordered = sorted(weights, key=lambda name: weights[name].ndim <= 1)
    numbers = [number for group in saved["optimizer"]["param_groups"] for number in group["params"]]
    return dict(zip(ordered, numbers, strict=True))


class SavedCheckpoint:
    """The trunk and the whole pool of a checkpoint whose folders have all been converted.

    Args:
        work: The folder that `convert` wrote to.
    """

    def __init__(self, folder: Path, work: Path):
        self.trunk = SavedRole(folder / "trunk", work / "trunk")
        self._placement = placement = read_placement(folder)
        names = [f"pool/shard_{shard}" for shard in range(placement.shards if placement else 0)]
        self._shards = [SavedRole(folder / name, work / name) for name in names]

    def load_resharded(self, name: str, engine: Engine) -> None:
        """Load role `name` ("trunk" or "pool/shard_N") of this rank."""
        if name == "trunk":
            engine.load_resharded(self.trunk.read, self.trunk.buffers, self.trunk.updates, self.trunk.frozen)
            return
        assert isinstance(engine.module, ExpertShard)
        ids = engine.module.expert_ids
        first = self._shards[0]
        engine.load_resharded(lambda weight: self.read_experts(weight, ids), {}, first.updates, first.frozen)

    def read_experts(self, name: str, expert_ids: tuple[int, ...]) -> ParameterState:
        """Return weight `name` of an `ExpertShard` and its moments, stacked in the order of `expert_ids`."""
        places = [self._place(expert) for expert in expert_ids]
        states = {shard: self._shards[shard].read(name) for shard in sorted({shard for shard, _ in places})}

        def stacked(key: str) -> Tensor:
            return torch.stack([getattr(states[shard], key)[place] for shard, place in places])

        single = states[places[0][0]].exp_avg_sq is None
        return ParameterState(stacked("weight"), stacked("exp_avg"), None if single else stacked("exp_avg_sq"))

    def expert_weight(self, name: str, expert: int) -> Tensor:
        """Return weight `name` of an `ExpertShard` for one expert, by its global id; see `SavedRole.weight`."""
        shard, place = self._place(expert)
        return self._shards[shard].weight(name)[place]

    def _place(self, expert: int) -> tuple[int, int]:
        """(shard, place within the shard) of an expert."""
        assert self._placement is not None
        return divmod(int(self._placement.position_M[expert]), self._placement.num_local_experts)


def convert(folder: Path, work: Path, part: int = 0, parts: int = 1, trunk: bool = True) -> None:
    """Convert the partitioned role folders of a checkpoint.

    Args:
        work: The folder to write to.
        part, parts: Convert every `parts`-th folder, beginning with the `part`-th, so that ranks can share the work.
        trunk: Whether to convert the trunk's folder too.
    """
    roles = [*([folder / "trunk"] if trunk else []), *sorted((folder / "pool").glob("shard_*"))]
    for role in roles[part::parts]:
        if is_partitioned(role):
            target = work / role.relative_to(folder)
            shutil.rmtree(target, ignore_errors=True)
            to_universal(role, target)


def reshard(job: Job, folder: Path, engines: Mapping[str, Engine]) -> None:
    """Load this rank's part of a checkpoint that has another layout. A collective of all ranks.

    Args:
        engines: The engines to load, by their names in a checkpoint.
    """
    work = folder.parent / WORK_FOLDER
    convert(folder, work, job.rank, job.topology.world_size)
    job.barrier()
    _load_converted(job, folder, engines)


def _load_converted(job: Job, folder: Path, engines: Mapping[str, Engine]) -> None:
    work = folder.parent / WORK_FOLDER
    saved = SavedCheckpoint(folder, work)
    for name, engine in engines.items():
        saved.load_resharded(name, engine)
    job.barrier()
    if job.rank == 0:
        shutil.rmtree(work, ignore_errors=True)


def move_experts(job: Job, saver: Saver, role: Role, placement: Placement | None, steps: int) -> None:
    """Move the experts of a running job to another placement with as many shards. A collective of all ranks.

    Each rank loads the experts that it gets from the checkpoint after `steps` steps, which are the steps done, once it
    is complete. If it could not be saved or converted, as on a full disk, all experts stay where they are.

    Args:
        saver: What is saving that checkpoint, or has just saved it.
        placement: The same on all ranks; None moves nothing.
    """
    if placement is None or not saver.finish():
        return
    folder = folder_of(saver.checkpoints, steps)
    problem = None
    try:
        convert(folder, folder.parent / WORK_FOLDER, job.rank, job.topology.world_size, trunk=False)
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
        problem = one_line(error)
    job.barrier()
    (failed,) = job.sum_over_ranks([float(problem is not None)])
    if failed:
        if problem is not None:
            say(f"warning: {job.name} could not convert {folder}; is the disk full? ({problem}). No experts move")
        if job.rank == 0:
            shutil.rmtree(folder.parent / WORK_FOLDER, ignore_errors=True)
        return
    role.move_to(placement)
    engines = {name: engine for name, engine in role.engines.items() if name != "trunk"}
    _load_converted(job, folder, engines)
    role.weights_changed()
