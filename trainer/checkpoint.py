"""Checkpoints: one folder a step, one folder a role inside, DeepSpeed's own format inside that.

    checkpoints/step_00000160/trunk/...  pool/shard_0/...  layout.json

A checkpoint is written under a name that starts with a dot and renamed when every rank has written its part, so a
folder named step_* is complete. It is loaded in the layout that wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Recipe
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.engine import RoleEngine
    from trainer.job import Job

_LAYOUT = "layout.json"


def newest(checkpoints: Path) -> tuple[int, Path] | None:
    """(steps done, folder) of the newest complete checkpoint."""
    found = sorted(checkpoints.glob("step_*")) if checkpoints.is_dir() else []
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None


def layout(recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a checkpoint to be loaded."""
    p = recipe.parallel
    return {
        "model": recipe.model.model_dump(),
        "pool.experts": recipe.pool.experts,
        "router.kind": recipe.router.kind,
        "balance.scope": recipe.balance.scope,
        "balance.delay": recipe.balance.delay,
        "parallel": [p.trunk_ranks, p.pool_ranks, recipe.topology.expert_parallel, p.trunk_zero, p.pool_zero],
    }


def to_resume(recipe: Recipe, checkpoints: Path) -> tuple[int, Path] | None:
    """The newest checkpoint, if there is one.

    Raises:
        UserError: it is of another model or layout than the recipe's.
    """
    found = newest(checkpoints)
    if found:
        _check_layout(recipe, found[1])
    return found


def _check_layout(recipe: Recipe, folder: Path) -> None:
    saved = json.loads((folder / _LAYOUT).read_text())
    for key, value in json.loads(json.dumps(layout(recipe))).items():
        if saved[key] != value:
            raise UserError(
                f"run.dir = {recipe.run.dir}: its checkpoint {folder.name} has {key} = {saved[key]}, the recipe "
                f"{value}; use the same or another run.dir"
            )


def save(
    job: Job, recipe: Recipe, checkpoints: Path, steps_done: int, parts: dict[str, tuple[RoleEngine, Any]]
) -> None:
    """Write a checkpoint of all ranks. A collective of all ranks.

    Args:
        parts: this rank's engines by folder within the checkpoint, each with what it wants back at load.
    """
    final = checkpoints / f"step_{steps_done:08d}"
    partial = checkpoints / f".{final.name}.partial"
    if job.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _LAYOUT).write_text(json.dumps(layout(recipe)))
    job.barrier()
    for name, (engine, state) in parts.items():
        engine.save(partial / name, {"state": state})
    _sync(partial, list(parts))
    job.barrier()
    if job.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(checkpoints.glob("step_*"))[: -recipe.checkpoint.keep]:
            shutil.rmtree(old)
    job.barrier()


def _sync(partial: Path, names: list[str]) -> None:
    for name in names:
        for path in (partial / name).rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)


def load(folder: Path, parts: dict[str, RoleEngine]) -> dict[str, Any]:
    """Load this rank's engines; returns what each wanted back."""
    return {name: engine.load(folder / name)["state"] for name, engine in parts.items()}
