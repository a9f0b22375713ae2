"""Checkpoints: one folder a step, one folder a role inside, DeepSpeed's own format inside that.

    checkpoints/step_00000160/trunk/...  pool/shard_0/...  recipe.yaml  layout.json  load.npy  manifest.json  COMPLETE

The manifest has the size and the SHA-256 of every other file; COMPLETE, written last, has the manifest's. A checkpoint
is written (trainer/checkpoint/save.py) under a name that starts with a dot and renamed when it is complete. The layout
that wrote it loads it as it is; another one reshapes it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from trainer.common.errors import UserError, one_line
from trainer.config.recipe import Recipe
from trainer.config.sections import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pool.placement import Placement
    from trainer.cluster.process_groups import Job
    from trainer.engine.role_engine import Engine

LAYOUT_FILE = "layout.json"
LOAD_FILE = "load.npy"
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMPLETE"


_Count = Annotated[int, Field(ge=0, le=LARGEST)]


class Layout(BaseModel, frozen=True):
    """How a checkpoint is divided among ranks.

    Attributes:
        ranks: trunk ranks, pool ranks, shards of the pool.
        zero: stages of trunk and pool.
        freeze: train.freeze of the recipe.
        placement: global expert ids in shard-major order; None for a dense model.
    """

    ranks: tuple[Annotated[int, Field(ge=1)], _Count, Annotated[int, Field(ge=1)]]
    zero: tuple[_Count, _Count]
    freeze: str = "none"
    placement: tuple[_Count, ...] | None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Every expert is somewhere, and each shard has as many."""
        order = self.placement
        if order is not None and (sorted(order) != list(range(len(order))) or not order or len(order) % self.ranks[2]):
            raise ValueError("is no placement")
        return self


class About(BaseModel, frozen=True):
    """What layout.json says of its checkpoint.

    Attributes:
        data: what identifies the prepared data.
        steps: done, the skipped ones included.
        updates: steps of these that were applied; None in checkpoints of older versions.
        micro_batches: of a trunk rank in a step.
    """

    layout: Layout
    data: str
    steps: _Count
    updates: _Count | None = None
    micro_batches: Annotated[int, Field(ge=1)]


class _File(BaseModel):
    bytes: _Count
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _File]


_ABOUT, _MANIFEST = TypeAdapter(About), TypeAdapter(_Manifest)


class Role(Protocol):
    """What a checkpoint needs of a trunk rank or a pool rank."""

    engines: dict[str, Engine]
    """Its engines, by folder within the checkpoint."""

    @property
    def placement(self) -> Placement | None:
        """Where the experts live."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank wants back besides its engines."""
        ...

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Take over what `state_dict` gave, after the engines have loaded."""
        ...

    def recorded_load(self) -> NDArray[np.int64] | None:
        """The load to remember, if this rank knows it."""
        ...


def folder_of(checkpoints: Path, steps: int) -> Path:
    """The folder of the checkpoint after `steps` steps."""
    return checkpoints / f"step_{steps:08d}"


def steps_of(folder: Path) -> int:
    """Steps done in the checkpoint `folder`."""
    return int(folder.name.removeprefix("step_"))


def folders(checkpoints: Path) -> list[Path]:
    """What is named as a checkpoint, the oldest first. A copy under another name is somebody's own."""
    return [path for path in sorted(checkpoints.glob("step_*")) if re.fullmatch(r"step_\d{8,}", path.name)]


def complete(checkpoints: Path) -> list[Path]:
    """Folders of the complete checkpoints, the oldest first."""
    return [folder for folder in folders(checkpoints) if (folder / MARKER_FILE).is_file()]


def newest(checkpoints: Path) -> tuple[int, Path] | None:
    """(steps done, folder) of the newest complete checkpoint."""
    found = complete(checkpoints)
    return (steps_of(found[-1]), found[-1]) if found else None


def damage(folder: Path, pick: Callable[[list[str]], list[str]] = list) -> str | None:
    """What is wrong with a checkpoint: the first file that is not what its manifest says, or None.

    Args:
        pick: which of its files to read.
    """
    try:
        name = MARKER_FILE
        marker = (folder / name).read_text()
        name = MANIFEST_FILE
        manifest = (folder / name).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != marker:
            return f"{MANIFEST_FILE} is not the one that {MARKER_FILE} was written for"
        files = _MANIFEST.validate_json(manifest).files
        _ABOUT.validate_json((folder / LAYOUT_FILE).read_bytes())
        for name in (RECIPE_FILE, LAYOUT_FILE):
            if name not in files:
                return f"{MANIFEST_FILE} does not name {name}"
        for name in pick(sorted(files)):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                return f"{MANIFEST_FILE} names {one_line(name)}, which is not in the checkpoint"
            size = (folder / name).stat().st_size
            if size != files[name].bytes:
                return f"{name} has {size:,} bytes, its manifest says {files[name].bytes:,}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name].sha256:
                    return f"{name} has another checksum than its manifest says"
    except (OSError, UnicodeDecodeError) as error:
        return f"{name} cannot be read ({error.strerror if isinstance(error, OSError) else 'not text'})"
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        return f"{LAYOUT_FILE if error.title == About.__name__ else MANIFEST_FILE} is not one ({where or 'not JSON'})"
    except ValueError:  # a path with a null byte
        return f"{MANIFEST_FILE} names a file that cannot be"
    return None


def weights_of(folder: Path) -> str:
    """What is the same for checkpoints of a run between which no step was applied, and so nothing was learned."""
    try:
        updates = _ABOUT.validate_json((folder / LAYOUT_FILE).read_bytes()).updates
    except (OSError, ValueError):  # damaged
        updates = None
    return folder.name if updates is None else f"{updates} updates"


def read_about(folder: Path) -> About:
    """What checkpoint `folder` says of itself.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        return _ABOUT.validate_json((folder / LAYOUT_FILE).read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"{folder / LAYOUT_FILE}: cannot be read, or is damaged; take another checkpoint of this run"
        ) from None


def layout_of(recipe: Recipe, placement: Placement | None) -> Layout:
    """What must be equal for a checkpoint to be loaded as it is."""
    p = recipe.parallel
    return Layout(
        ranks=(p.trunk_ranks, p.pool_ranks, recipe.grid.expert_parallel),
        zero=(p.trunk_zero, p.pool_zero if placement else 0),
        freeze=recipe.train.freeze,
        placement=tuple(placement.order) if placement else None,
    )


def choose_placement(recipe: Recipe, folder: Path | None) -> Placement | None:
    """Where the experts are to live: by the load that checkpoint `folder` remembers, if the recipe says so."""
    import torch

    from pool.placement import balanced, contiguous

    if recipe.model.ffn == "dense":
        return None
    shards, groups = recipe.grid.expert_parallel, recipe.model.groups
    if recipe.pool.placement == "auto" and folder is not None:
        return balanced(torch.from_numpy(read_load(folder)), shards, groups)
    return contiguous(recipe.pool.experts, groups, shards)


def read_placement(folder: Path) -> Placement | None:
    """Where the experts are in checkpoint `folder`; None for a dense model."""
    from pool.placement import Placement

    layout = read_about(folder).layout
    return Placement(layout.placement, layout.ranks[2]) if layout.placement else None


def read_load(folder: Path) -> NDArray[np.int64]:
    """Assignments a step by layer and global expert, (L, M), as checkpoint `folder` remembers them."""
    import numpy as np

    from trainer.common.arrays import read_array

    try:
        load_LM = read_array(folder / LOAD_FILE)
        if load_LM.ndim != 2 or load_LM.dtype.kind not in "iu" or (load_LM < 0).any():
            raise ValueError(f"{load_LM.dtype} {load_LM.shape}, and not counts by layer and expert")
        return load_LM.astype(np.int64)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LOAD_FILE}: is not numbers alone: refused ({error})") from None


def state_file(folder: Path, trunk_rank: int) -> Path:
    """Where a trunk rank's own state is."""
    return folder / "trunk" / f"rank_{trunk_rank}.pt"


def load(job: Job, recipe: Recipe, folder: Path, role: Role) -> None:
    """Load this rank's part, reshaped if the layout is another one. A collective of all ranks."""
    from trainer.common.safe_load import load_file

    about = read_about(folder)
    if about.layout == layout_of(recipe, role.placement):
        for name, engine in role.engines.items():
            engine.load(folder / name)
    else:
        _reshape(job, folder, role)
    state: dict[str, Any] = {}
    if job.is_trunk:
        saved_ranks = about.layout.ranks[0]
        state = load_file(state_file(folder, job.rank % saved_ranks), job.device)
    role.restore(state, about.steps, about.steps * (recipe.micro_batches - about.micro_batches))


def _reshape(job: Job, folder: Path, role: Role) -> None:
    from trainer.checkpoint.reshard import SavedCheckpoint, convert

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
