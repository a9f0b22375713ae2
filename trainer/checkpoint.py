"""Checkpoints: one folder a step, one folder a role inside, DeepSpeed's own format inside that.

    checkpoints/step_00000160/trunk/...  pool/shard_0/...  layout.json  load.npy

A checkpoint is written under a name that starts with a dot and renamed when every rank has written its part, so a
folder named step_* is complete. In the layout that wrote it it is loaded as it is; in another one it is reshaped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.config import Recipe
from trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pool.placement import Placement
    from trainer.engine import RoleEngine
    from trainer.job import Job

_LAYOUT = "layout.json"
LOAD_FILE = "load.npy"


class Role(Protocol):
    """What a checkpoint needs of a trunk rank or a pool rank."""

    engines: dict[str, RoleEngine]
    """Its engines, by folder within the checkpoint."""

    @property
    def placement(self) -> Placement | None:
        """Where the experts live."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank wants back besides its engines."""
        ...

    def restore(self, state: dict[str, Any], shift: int) -> None:
        """Take over what `state_dict` gave, after the engines have loaded."""
        ...

    def recorded_load(self) -> NDArray[np.int64] | None:
        """The load to remember, if this rank knows it."""
        ...


def newest(checkpoints: Path) -> tuple[int, Path] | None:
    """(steps done, folder) of the newest complete checkpoint."""
    found = sorted(checkpoints.glob("step_*")) if checkpoints.is_dir() else []
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a checkpoint to be loaded."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "pool.experts": recipe.pool.experts,
        "router.kind": recipe.router.kind,
        "balance.scope": recipe.balance.scope,
        "balance.delay": recipe.balance.delay,
    }


def _layout(recipe: Recipe, placement: Placement | None) -> dict[str, Any]:
    """What must be equal for a checkpoint to be loaded as it is."""
    p = recipe.parallel
    return {
        "ranks": [p.trunk_ranks, p.pool_ranks, recipe.topology.expert_parallel],
        "zero": [p.trunk_zero, p.pool_zero if placement else 0],
        "placement": list(placement.order) if placement else None,
    }


def to_resume(recipe: Recipe, checkpoints: Path) -> tuple[int, Path] | None:
    """The newest checkpoint, if there is one.

    Raises:
        UserError: it is of another model than the recipe's.
    """
    found = newest(checkpoints)
    if found:
        saved = json.loads((found[1] / _LAYOUT).read_text()).get("identity")
        if saved is None:
            raise UserError(
                f"run.dir = {recipe.run.dir}: its checkpoint {found[1].name} is of an older version of this trainer; "
                f"use another run.dir"
            )
        for key, value in _identity(recipe).items():
            if saved[key] != value:
                raise UserError(
                    f"run.dir = {recipe.run.dir}: its checkpoint {found[1].name} has {key} = {saved[key]}, the recipe "
                    f"{value}; use the same or another run.dir"
                )
    return found


def choose_placement(recipe: Recipe, folder: Path | None) -> Placement | None:
    """Where the experts are to live: by the load that checkpoint `folder` remembers, if the recipe says so."""
    import torch

    from pool.placement import balanced, contiguous

    if recipe.model.ffn == "dense":
        return None
    shards, groups = recipe.topology.expert_parallel, recipe.model.groups
    if recipe.pool.placement == "auto" and folder is not None:
        return balanced(torch.from_numpy(read_load(folder)), shards, groups)
    return contiguous(recipe.pool.experts, groups, shards)


def read_placement(folder: Path) -> Placement | None:
    """Where the experts are in checkpoint `folder`; None for a dense model."""
    from pool.placement import Placement

    layout = json.loads((folder / _LAYOUT).read_text())["layout"]
    return Placement(tuple(layout["placement"]), layout["ranks"][2]) if layout["placement"] else None


def read_load(folder: Path) -> NDArray[np.int64]:
    """Assignments a step by layer and global expert, (L, M), as checkpoint `folder` remembers them."""
    import numpy as np

    load_LM: NDArray[np.int64] = np.load(folder / LOAD_FILE)
    return load_LM


def save(job: Job, recipe: Recipe, checkpoints: Path, steps_done: int, role: Role) -> None:
    """Write a checkpoint of all ranks. A collective of all ranks."""
    import torch

    final = checkpoints / f"step_{steps_done:08d}"
    partial = checkpoints / f".{final.name}.partial"
    if job.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        about = {
            "identity": _identity(recipe),
            "layout": _layout(recipe, role.placement),
            "steps": steps_done,
            "micro_batches": recipe.micro_batches,
        }
        (partial / _LAYOUT).write_text(json.dumps(about))
        load_LM = role.recorded_load()
        if load_LM is not None:
            import numpy as np

            np.save(partial / LOAD_FILE, load_LM)
    job.barrier()
    for name, engine in role.engines.items():
        engine.save(partial / name)
    if job.is_trunk:
        torch.save(role.state_dict(), _state_file(partial, job.rank))
    _sync(partial)
    job.barrier()
    if job.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(checkpoints.glob("step_*"))[: -recipe.checkpoint.keep]:
            shutil.rmtree(old)
    job.barrier()


def _state_file(folder: Path, trunk_rank: int) -> Path:
    return folder / "trunk" / f"rank_{trunk_rank}.pt"


def _sync(partial: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def load(job: Job, recipe: Recipe, folder: Path, role: Role) -> None:
    """Load this rank's part, reshaped if the layout is another one. A collective of all ranks."""
    import torch

    about = json.loads((folder / _LAYOUT).read_text())
    if about["layout"] == _layout(recipe, role.placement):
        for name, engine in role.engines.items():
            engine.load(folder / name)
    else:
        _reshape(job, folder, role)
    state: dict[str, Any] = {}
    if job.is_trunk:
        saved_ranks = about["layout"]["ranks"][0]
        state = torch.load(_state_file(folder, job.rank % saved_ranks), map_location=job.device, weights_only=True)
    role.restore(state, about["steps"] * (recipe.micro_batches - about["micro_batches"]))


def _reshape(job: Job, folder: Path, role: Role) -> None:
    from trainer.reshape import SavedCheckpoint, convert

    work = folder.parent / ".reshape"
    if job.rank == 0:
        print(f"checkpoint {folder.name} is of another layout: reshaping it", file=sys.stderr)
    convert(folder, work, job.rank, job.topology.world_size)
    job.barrier()
    saved = SavedCheckpoint(folder, read_placement(folder), work)
    for name, engine in role.engines.items():
        saved.take_over(name, engine)
    job.barrier()
    if job.rank == 0:
        shutil.rmtree(work, ignore_errors=True)
