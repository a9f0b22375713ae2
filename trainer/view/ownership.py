"""Which layer owns which expert: what a run has assigned, or what its recorded load would assign (`own`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from router import Ownership, assign
from trainer.checkpoint.format import OwnershipRecord
from trainer.checkpoint.format import read_ownership as read_record
from trainer.common.errors import UserError
from trainer.common.format import spans
from trainer.common.tables import new_table
from trainer.config.recipe import Recipe
from trainer.view.records import is_run, recorded_load, saved_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COVERAGE = 0.95
"""The coverage that is wanted of a run without a lock: the paper's."""


@dataclass(frozen=True)
class RunOwnership:
    """Who owns what in a run, beside the load that the run has recorded.

    Attributes:
        run: The run's folder.
        ownership: The partition of the pool over the layers.
        coverage: The share of each layer's tokens that was wanted inside its own set.
        load_LM: Assignments by layer and expert, as recorded.
        record: How the run has assigned its experts; None: it has not, and this is what the recorded load would assign.
    """

    run: Path
    ownership: Ownership
    coverage: float
    load_LM: NDArray[np.int64]
    record: OwnershipRecord | None = None

    @property
    def recorded_L(self) -> NDArray[np.float64]:
        """The share of each layer's recorded tokens inside its own set; 1 without tokens."""
        own_LM = np.asarray(self.ownership.owners) == np.arange(len(self.load_LM))[:, None]
        total_L = self.load_LM.sum(1)
        inside_L: NDArray[np.float64] = np.where(own_LM, self.load_LM, 0).sum(1) / total_L.clip(min=1)
        return np.where(total_L == 0, 1.0, inside_L)

    @property
    def most_L(self) -> NDArray[np.float64]:
        """The share of each layer's K most used experts: what its own set could cover at most."""
        layers, experts = self.load_LM.shape
        most_LK = np.sort(self.load_LM, axis=1)[:, experts - experts // layers :]
        most_L: NDArray[np.float64] = most_LK.sum(1) / self.load_LM.sum(1).clip(min=1)
        return most_L

    def as_json(self) -> dict[str, Any]:
        """Return what `own --json` prints."""
        own = self.ownership
        columns = zip(own.experts_by_layer, own.shares, own.shortfalls, self._compared_L.tolist(), strict=True)
        layers = [
            {"layer": layer, "experts": experts, "share": share, "shortfall": shortfall, self._compared: compared}
            for layer, (experts, share, shortfall, compared) in enumerate(columns)
        ]
        return {
            "run": str(self.run),
            "assigned_after_step": None if self.record is None else self.record.step,
            "val_loss": None if self.record is None else self.record.val_loss,
            "coverage": self.coverage,
            "feasible": own.feasible,
            "share": float(np.mean(own.shares)),
            "layers": layers,
            "owners": own.owners,
        }

    @property
    def _compared(self) -> str:
        """What the shares are compared with: what they could be at most, or what they have become."""
        return "most" if self.record is None else "recorded_share"

    @property
    def _compared_L(self) -> NDArray[np.float64]:
        return self.most_L if self.record is None else self.recorded_L

    def table(self) -> Table:
        own, per_layer = self.ownership, len(self.ownership.experts_by_layer[0])
        compared = f"its {per_layer} most used" if self.record is None else "share by the recorded load"
        share = "share of its tokens" if self.record is None else "share at the assignment"
        made = new_table(self._title, "layer", share, "short of the coverage", compared)
        made.add_column("experts", justify="left")
        for layer, experts in enumerate(own.experts_by_layer):
            shortfall = f"{own.shortfalls[layer]:.1%}" if own.shortfalls[layer] else ""
            compared_to = f"{self._compared_L[layer]:.1%}"
            made.add_row(str(layer), f"{own.shares[layer]:.1%}", shortfall, compared_to, spans(experts, ", "))
        made.add_section()
        made.add_row("mean", f"{np.mean(own.shares):.1%}", "", f"{self._compared_L.mean():.1%}", "")
        return made

    @property
    def _title(self) -> str:
        name = self.run.resolve().name
        if self.record is None:
            return f"{name}: what each layer would own, by the recorded load"
        return f"{name}: what each layer owns since step {self.record.step}"

    def notes(self) -> list[str]:
        own, record = self.ownership, self.record
        if record is not None and record.step == 0:
            return ["The experts were assigned at random before the first step."]
        wanted = f"at least {self.coverage:.0%} of its tokens inside its own set"
        lines = [f"Every layer has {wanted}."]
        if short := sum(shortfall > 0 for shortfall in own.shortfalls):
            most = f"{short} of {len(own.shares)} layers lack up to {max(own.shortfalls):.1%}"
            lines = [f"No partition was found that gives every layer {wanted}. This one has the largest sum; {most}."]
        if record is not None and record.val_loss is not None:
            lines.append(f"The validation loss at the assignment was {record.val_loss:.4f} nats per token.")
        return lines

    def draw(self) -> Figure:
        """Draw layers by experts, ordered by owner, and the share of each layer's recorded load inside its own set."""
        from trainer.telemetry.expert_heatmap import draw_ownership

        owners, load_LM = self.ownership.owners, self.load_LM.astype(float)
        return draw_ownership(load_LM, owners, self._title, self.recorded_L.tolist(), self.coverage)


def read_ownership(run: Path, coverage: float | None) -> RunOwnership:
    """Return who would own what in a run, or in one of its checkpoints.

    Args:
        run: The folder of either.
        coverage: The share wanted of each layer; by default `lock.coverage`, or COVERAGE without a lock.

    Raises:
        UserError: The folder is neither, no load is recorded, or its layers do not share one pool evenly; or a coverage
            is given although the experts are assigned already, or is not a share.
    """
    if coverage is not None and not 0 <= coverage <= 1:  # as NaN, which click lets through
        raise UserError(f"--coverage {coverage}: must be a share from 0 to 1")
    recipe = saved_recipe(run)
    if recipe is None:
        problem = "has no recipe that this version can read" if is_run(run) else "not a run or a checkpoint"
        raise UserError(f"{run}: {problem}; give the folder of a run (run.dir) or one of its checkpoints/step_*")
    _check_model(run, recipe)
    load_LM = recorded_load(run)
    if load_LM is None:
        saved = "it is saved with the first evaluation or checkpoint"
        raise UserError(f"{run}: has no load of the experts to assign them by; {saved}")
    shape = (recipe.model.layers, recipe.pool.experts)
    if load_LM.shape != shape or (load_LM < 0).any():
        raise UserError(f"{run}: load.npy is not of this run's layers and experts; remove it")
    record = read_record(run) if recipe.lock else None
    if record is None:
        default = recipe.lock.coverage if recipe.lock else COVERAGE
        wanted = default if coverage is None else coverage
        return RunOwnership(run, assign(torch.from_numpy(load_LM), wanted), wanted, load_LM)
    if (len(record.shares), len(record.owners)) != shape or len(record.shortfalls) != len(record.shares):
        raise UserError(f"{run}: ownership.json is not of this run's layers and experts")
    if coverage is not None:
        raise UserError(f"--coverage: {run} has assigned its experts already, after step {record.step}")
    assert recipe.lock
    ownership = Ownership(record.owners, record.shares, record.shortfalls, record.feasible)
    return RunOwnership(run, ownership, recipe.lock.coverage, load_LM, record)


def _check_model(run: Path, recipe: Recipe) -> None:
    m, experts = recipe.model, recipe.pool.experts
    if m.ffn == "dense":
        raise UserError(f"{run}: is a dense model (model.ffn), which has no experts to own")
    if m.groups == m.layers:
        raise UserError(f"{run}: every layer has its own experts already (model.groups = model.layers)")
    if m.groups > 1:
        raise UserError(f"{run}: model.groups = {m.groups}: only layers that share one pool (1) can divide it")
    if experts % m.layers:
        raise UserError(f"{run}: pool.experts = {experts} is not a multiple of model.layers ({m.layers})")
