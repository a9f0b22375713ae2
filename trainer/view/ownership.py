"""Which layer owns which expert: what a run has assigned, or what its recorded load would assign (`own`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from router import Ownership, assign
from trainer.common.errors import UserError
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
    """

    run: Path
    ownership: Ownership
    coverage: float
    load_LM: NDArray[np.int64]

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
        columns = zip(own.experts_by_layer, own.shares, own.shortfalls, self.most_L.tolist(), strict=True)
        layers = [
            {"layer": layer, "experts": experts, "share": share, "shortfall": shortfall, "most": most}
            for layer, (experts, share, shortfall, most) in enumerate(columns)
        ]
        return {
            "run": str(self.run),
            "coverage": self.coverage,
            "feasible": own.feasible,
            "share": float(np.mean(own.shares)),
            "layers": layers,
            "owners": own.owners,
        }

    def table(self) -> Table:
        own, per_layer = self.ownership, len(self.ownership.experts_by_layer[0])
        title = f"{self.run.resolve().name}: what each layer would own, by the recorded load"
        made = new_table(title, "layer", "share of its tokens", "short of the coverage", f"its {per_layer} most used")
        made.add_column("experts", justify="left")
        for layer, experts in enumerate(own.experts_by_layer):
            shortfall = f"{own.shortfalls[layer]:.1%}" if own.shortfalls[layer] else ""
            cells = (f"{own.shares[layer]:.1%}", shortfall, f"{self.most_L[layer]:.1%}", ranges(experts))
            made.add_row(str(layer), *cells)
        made.add_section()
        made.add_row("mean", f"{np.mean(own.shares):.1%}", "", f"{self.most_L.mean():.1%}", "")
        return made

    def notes(self) -> list[str]:
        short = sum(shortfall > 0 for shortfall in self.ownership.shortfalls)
        wanted = f"at least {self.coverage:.0%} of its tokens inside its own set"
        if not short:
            return [f"Every layer has {wanted}."]
        lacking = f"{short} layers lack up to {max(self.ownership.shortfalls):.1%}"
        return [f"No partition gives every layer {wanted}. This one has the largest sum of shares; {lacking}."]

    def draw(self) -> Figure:
        """Draw layers by experts, ordered by owner, and the share of each layer inside its own set."""
        from trainer.telemetry.expert_heatmap import draw_ownership

        title = f"{self.run.resolve().name}: what each layer would own"
        own = self.ownership
        return draw_ownership(self.load_LM.astype(float), own.owners, title, own.shares, self.coverage)


def ranges(numbers: tuple[int, ...]) -> str:
    """Write ascending numbers with runs of neighbours as ranges: 0-3, 7, 9-10."""
    runs = [[n for _, n in own] for _, own in groupby(enumerate(numbers), lambda placed: placed[1] - placed[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_ownership(run: Path, coverage: float | None) -> RunOwnership:
    """Return who would own what in a run, or in one of its checkpoints.

    Args:
        run: The folder of either.
        coverage: The share wanted of each layer; by default COVERAGE.

    Raises:
        UserError: The folder is neither, no load is recorded, or its layers do not share one pool evenly.
    """
    recipe = saved_recipe(run)
    if recipe is None:
        problem = "has no recipe that this version can read" if is_run(run) else "not a run or a checkpoint"
        raise UserError(f"{run}: {problem}; give the folder of a run (run.dir) or one of its checkpoints/step_*")
    _check_model(run, recipe)
    load_LM = recorded_load(run)
    if load_LM is None:
        saved = "it is saved with the first evaluation or checkpoint"
        raise UserError(f"{run}: has no load of the experts to assign them by; {saved}")
    if load_LM.shape != (recipe.model.layers, recipe.pool.experts) or (load_LM < 0).any():
        raise UserError(f"{run}: load.npy is not of this run's layers and experts; remove it")
    wanted = COVERAGE if coverage is None else coverage
    return RunOwnership(run, assign(torch.from_numpy(load_LM), wanted), wanted, load_LM)


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
