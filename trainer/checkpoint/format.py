"""The files of a checkpoint: one folder for each role, in DeepSpeed's own format, and a few files that describe it.

    checkpoints/step_00000160/trunk/...  pool/shard_0/...  recipe.yaml  layout.json  load.npy  manifest.json  COMPLETE

and with a lock, after the assignment, ownership.json.

The manifest has the size and the SHA-256 of every other file; COMPLETE, written last, has the manifest's. A checkpoint
is written (trainer/checkpoint/save.py) under a name that starts with a dot, and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from trainer.common.errors import UserError, one_line, os_reason
from trainer.common.safe_read import open_file, read_array, read_bytes
from trainer.config.lock import OWNERSHIP_FILE, placed_by_load
from trainer.config.recipe import Recipe
from trainer.config.sections import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pool.placement import Placement
    from trainer.engine.role_engine import Engine

LAYOUT_FILE = "layout.json"
LOAD_FILE = "load.npy"
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMPLETE"

_Count = Annotated[int, Field(ge=0, le=LARGEST)]


class Layout(BaseModel, frozen=True):
    """How a checkpoint is divided among ranks. A run of an equal layout loads it as it is.

    Attributes:
        ranks: The number of trunk ranks, of ranks that hold only experts, and of shards of the pool.
        zero: The ZeRO stages of trunk and pool.
        freeze: The recipe's train.freeze.
        placement: Global expert ids in shard-major order; None for a dense model.
        aligned: Whether each weight of the trunk starts at a multiple of 16 bytes in ZeRO's partitions, as at stages 1
            and 2. Checkpoints of older versions do not have it.
    """

    ranks: tuple[Annotated[int, Field(ge=1)], _Count, Annotated[int, Field(ge=1)]]
    zero: tuple[_Count, _Count]
    freeze: str = "none"
    placement: tuple[_Count, ...] | None
    aligned: bool = False

    @model_validator(mode="after")
    def _is_placement(self) -> Self:
        """Check that every expert is somewhere, and that all shards have equally many."""
        order = self.placement
        if order is not None and (sorted(order) != list(range(len(order))) or not order or len(order) % self.ranks[2]):
            raise ValueError("not a placement")
        return self


class CheckpointInfo(BaseModel, frozen=True):
    """What layout.json says about its checkpoint.

    Attributes:
        layout: How it is divided among ranks.
        data: What identifies the prepared data.
        steps: The number of steps done, including those that were skipped.
        updates: The number of steps that were applied; None in checkpoints of older versions.
        micro_batches: The number of micro-batches of a trunk rank in a step.
    """

    layout: Layout
    data: str
    steps: _Count
    updates: _Count | None = None
    micro_batches: Annotated[int, Field(ge=1)]


class OwnershipRecord(BaseModel, frozen=True):
    """What ownership.json says: the experts of each layer in a run with a lock, and how they were found.

    Attributes:
        owners: The layer that owns each expert.
        shares: The share of each layer's routed tokens that its own experts had.
        shortfalls: By how much less than `lock.coverage` that is, by layer.
        feasible: Whether no layer falls short.
        step: Optimizer steps done at the assignment.
        val_loss: The validation loss then, in nats; None if there was none, or it was not finite.
    """

    owners: tuple[_Count, ...]
    shares: tuple[float, ...]
    shortfalls: tuple[float, ...]
    feasible: bool
    step: _Count
    val_loss: float | None = None

    @model_validator(mode="after")
    def _is_partition(self) -> Self:
        """Check that every layer owns equally many experts."""
        layers, experts = len(self.shares), len(self.owners)
        each = experts // max(1, layers)
        if not each or sorted(self.owners) != [layer for layer in range(layers) for _ in range(each)]:
            raise ValueError("not a partition of the experts into equal parts")
        return self


class _File(BaseModel):
    bytes: _Count
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _File]


class Role(Protocol):
    """What a checkpoint needs from a trunk rank or a pool rank.

    Attributes:
        engines: Its engines, by folder within the checkpoint.
    """

    engines: dict[str, Engine]

    @property
    def placement(self) -> Placement | None:
        """Where the experts are; None for a dense model."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state apart from its engines."""

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Restore what `state_dict` returned, after the engines have been loaded."""

    @property
    def ownership(self) -> OwnershipRecord | None:
        """The experts of each layer, if this rank knows them, in a run with a lock after the assignment."""

    def recorded_load(self) -> NDArray[np.int64] | None:
        """Return the load to save, (L, M), if this rank knows it."""

    def move_to(self, placement: Placement) -> None:
        """Use another placement with as many shards from here on; the weights of the experts are loaded afterwards."""

    def weights_changed(self) -> None:
        """Use new weights of the experts from here on."""


def folder_of(checkpoints: Path, steps: int) -> Path:
    """Return the folder of the checkpoint after `steps` steps."""
    return checkpoints / f"step_{steps:08d}"


def steps_of(folder: Path) -> int:
    """Return the number of steps done in the checkpoint `folder`."""
    return int(folder.name.removeprefix("step_"))


def folders(checkpoints: Path) -> list[Path]:
    """Return all folders named as checkpoints, the oldest first; a copy under another name is not one."""
    return [path for path in sorted(checkpoints.glob("step_*")) if re.fullmatch(r"step_\d{8,}", path.name)]


def complete(checkpoints: Path) -> list[Path]:
    """Return the folders of the complete checkpoints, the oldest first."""
    return [folder for folder in folders(checkpoints) if (folder / MARKER_FILE).is_file()]


def newest(checkpoints: Path) -> tuple[int, Path] | None:
    """Return (steps done, folder) of the newest complete checkpoint."""
    found = complete(checkpoints)
    return (steps_of(found[-1]), found[-1]) if found else None


def damage(folder: Path, pick: Callable[[list[str]], list[str]] = list) -> str | None:
    """Return what is wrong with a checkpoint: the first file that differs from its manifest, or None.

    Args:
        pick: Selects which of its files to read.
    """
    try:
        name = MARKER_FILE
        marker = read_bytes(folder / name).decode()
        name = MANIFEST_FILE
        manifest = read_bytes(folder / name)
        if hashlib.sha256(manifest).hexdigest() != marker:
            return f"{MANIFEST_FILE} is not the one that {MARKER_FILE} was written for"
        files = _Manifest.model_validate_json(manifest).files
        name = LAYOUT_FILE
        CheckpointInfo.model_validate_json(read_bytes(folder / LAYOUT_FILE))
        for name in (RECIPE_FILE, LAYOUT_FILE):
            if name not in files:
                return f"{MANIFEST_FILE} does not list {name}"
        for name in pick(sorted(files)):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                return f"{MANIFEST_FILE} lists {one_line(name)}, which is outside the checkpoint"
            size = (folder / name).stat().st_size
            if size != files[name].bytes:
                return f"{name} has {size:,} bytes instead of {files[name].bytes:,}"
            with open_file(folder / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name].sha256:
                    return f"{name} does not have the checksum in its manifest"
    except (OSError, UnicodeDecodeError) as error:
        return f"{name} cannot be read ({os_reason(error) if isinstance(error, OSError) else 'not text'})"
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        file_name = LAYOUT_FILE if error.title == CheckpointInfo.__name__ else MANIFEST_FILE
        return f"{file_name} has unexpected content ({where or 'not JSON'})"
    except ValueError:  # a path with a null byte
        return f"{MANIFEST_FILE} lists a file that cannot exist"
    return None


def weights_of(folder: Path) -> str:
    """Return a value that is equal for checkpoints of a run with the same weights: no step between them was applied."""
    try:
        updates = read_info(folder).updates
    except UserError:  # damaged
        updates = None
    return folder.name if updates is None else f"{updates} updates"


def read_info(folder: Path) -> CheckpointInfo:
    """Read what a checkpoint says about itself.

    Raises:
        UserError: It cannot be read, or is damaged.
    """
    try:
        return CheckpointInfo.model_validate_json(read_bytes(folder / LAYOUT_FILE))
    except (OSError, ValueError):
        raise UserError(f"{folder / LAYOUT_FILE}: missing or damaged; use another checkpoint of this run") from None


def layout_of(recipe: Recipe, placement: Placement | None) -> Layout:
    """Return the layout of a run."""
    p = recipe.parallel
    return Layout(
        ranks=(p.trunk_ranks, p.pool_ranks, recipe.grid.expert_parallel),
        zero=(p.trunk_zero, p.pool_zero if placement else 0),
        freeze=recipe.train.freeze,
        placement=tuple(placement.order) if placement else None,
        aligned=p.trunk_zero in (1, 2),
    )


def choose_placement(recipe: Recipe, folder: Path | None, moments_WL: Tensor | None = None) -> Placement | None:
    """Return where the experts are at the start of a run; None for a dense model.

    Args:
        moments_WL: What the run's schedule has in flight together (`pool.placement.moments`).
        folder: The checkpoint from which it resumes. They stay where they are in it if that has as many shards, unless
            the recipe wants them placed by the load that it recorded.
    """
    import torch

    from pool.placement import contiguous, more_even

    if recipe.model.ffn == "dense":
        return None
    shards, groups = recipe.grid.expert_parallel, recipe.model.groups
    placement = contiguous(recipe.pool.experts, groups, shards)
    if folder is None:
        return placement
    saved = read_placement(folder)
    if saved and saved.shards == shards:
        placement = saved
    if placed_by_load(recipe, steps_of(folder)):
        return more_even(torch.from_numpy(read_load(folder)), placement, groups, moments_WL)
    return placement


def read_placement(folder: Path) -> Placement | None:
    """Return where the experts are in a checkpoint; None for a dense model."""
    from pool.placement import Placement

    layout = read_info(folder).layout
    return Placement(layout.placement, layout.ranks[2]) if layout.placement else None


def read_load(folder: Path) -> NDArray[np.int64]:
    """Return the assignments in a step by layer and global expert, (L, M), that a checkpoint recorded.

    Raises:
        UserError: They cannot be read, or are damaged.
    """
    import numpy as np

    try:
        load_LM = read_array(folder / LOAD_FILE)
        if load_LM.ndim != 2 or load_LM.dtype.kind not in "iu" or (load_LM < 0).any():
            raise ValueError(f"it holds {load_LM.dtype} {load_LM.shape} instead of counts by layer and expert")
        return load_LM.astype(np.int64)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LOAD_FILE}: missing or damaged ({error}); use another checkpoint") from None


def read_ownership(folder: Path) -> OwnershipRecord | None:
    """Return the experts of each layer that the folder of a run or of a checkpoint records; None without a lock.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return OwnershipRecord.model_validate_json(read_bytes(folder / OWNERSHIP_FILE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{folder / OWNERSHIP_FILE}: damaged; use another checkpoint of this run") from None


def state_file(folder: Path, trunk_rank: int) -> Path:
    """Return the path of a trunk rank's own state."""
    return folder / "trunk" / f"rank_{trunk_rank}.pt"
