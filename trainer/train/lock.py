"""UniPool-lock in a run: which layer owns which experts, decided once by held-out routing; and when the run is to end.

"Eq. M35" and the like are equations of docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from router import assign, entropy_loss, random_ownership
from trainer.checkpoint.format import OwnershipRecord
from trainer.cluster.process_groups import Job
from trainer.common.errors import DIVERGED
from trainer.common.strict_json import dumps
from trainer.config.lock import assigned_after, stage_of
from trainer.config.recipe import Recipe
from trainer.model.lock import Reaches

PATIENCE = 2
"""Evaluations in a row with too high a loss that end a run."""


class RunLock:
    """The lock of a run, the same on all trunk ranks.

    Args:
        device: Where the trunk computes.

    Attributes:
        reaches: What the layers reach in a step.
        record: The assignment, once it has been made.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        assert recipe.lock
        self._recipe, self._keys = recipe, recipe.lock
        self.reaches = Reaches(recipe, device)
        self.record: OwnershipRecord | None = None
        self._loads: list[Tensor] = []  # of the evaluations before the assignment, the newest first
        self._above = 0
        if self._keys.allocation == "random":
            ownership = random_ownership(recipe.model.layers, recipe.pool.experts, recipe.run.seed)
            self._use(OwnershipRecord(**asdict(ownership), step=0))

    def entropy(self, step: int) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """Return `Objective.entropy` for a step."""
        if not self._keys.entropy:
            return None
        target = math.log(self._recipe.pool.experts / self._recipe.model.layers)
        return partial(entropy_loss, coefficient=stage_of(self._recipe, step).entropy, target=target)

    def keep(self, load_LM: Tensor) -> None:
        """Remember the load of an evaluation before the assignment, (L, M)."""
        self._loads = [load_LM, *self._loads][: self._keys.evaluations]

    def choose(self, done: int, val_loss: float) -> OwnershipRecord:
        """Assign experts by the loads of the last evaluations (Eq. M35).

        Args:
            done: Optimizer steps done.
            val_loss: Loss of the last evaluation, nats.
        """
        weights = torch.tensor([0.5**age for age in range(len(self._loads))], dtype=torch.float64)
        smoothed_LM = torch.tensordot(weights / weights.sum(), torch.stack(self._loads).double(), 1)
        ownership = assign(smoothed_LM, self._keys.coverage)
        return OwnershipRecord(**asdict(ownership), step=done, val_loss=val_loss)

    def use(self, text: str) -> None:
        """Use the assignment that `choose` has returned on rank 0, as JSON."""
        self._use(OwnershipRecord.model_validate_json(text))
        self._loads, self._above = [], 0

    def _use(self, record: OwnershipRecord) -> None:
        self.record = record
        self.reaches.assign(record.owners)

    def exceeds(self, val_loss: float) -> bool:
        """Take a validation loss after the assignment; return whether the run is to end because of it."""
        if self.record is None or self.record.val_loss is None:
            return False
        self._above = 0 if val_loss <= self.record.val_loss + self._keys.stop_above else self._above + 1
        return self._above >= PATIENCE

    def why_it_ends(self, done: int, val_loss: float, saved: bool) -> str:
        """Return the line with which the run ends after `exceeds`.

        Args:
            saved: Whether there is a checkpoint after `done` steps.
        """
        record = self.record
        assert record and record.val_loss is not None
        return (
            f"unipool: ended after step {done}: two validation losses in a row, the last {val_loss:.4f}, exceed that "
            f"at the assignment after step {record.step}, {record.val_loss:.4f}, by more than lock.stop_above "
            f"({self._keys.stop_above:g}). {'Its checkpoint is saved' if saved else 'Its checkpoint is not saved'}; "
            f"to go on, raise lock.stop_above. Exit status {DIVERGED}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        record = None if self.record is None else dumps(self.record.model_dump())
        return {"record": record, "loads": [load_LM.clone() for load_LM in self._loads], "above": self._above}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["record"] is not None:
            self._use(OwnershipRecord.model_validate_json(state["record"]))
        self._loads, self._above = [load_LM.cpu() for load_LM in state["loads"]], state["above"]


def assigns(recipe: Recipe, done: int) -> bool:
    """Return whether experts are assigned by the evaluation after `done` steps."""
    return bool(recipe.lock) and 0 < done == assigned_after(recipe) and done < recipe.train.steps


class HasLock(Protocol):
    """A role of the run; `lock` is None on pool ranks, which know neither losses nor loads."""

    lock: RunLock | None


def after_evaluation(
    job: Job, recipe: Recipe, role: HasLock, done: int, val_loss: float, load_LM: Tensor | None
) -> bool:
    """Let the lock see an evaluation: before, at or after the assignment. A collective of all ranks.

    Args:
        done: Optimizer steps done.
        load_LM: Load by layer and expert, on trunk ranks.

    Returns:
        Whether the run is to end, because the loss has risen since the assignment.
    """
    lock = role.lock
    if lock and load_LM is not None and done <= assigned_after(recipe):
        lock.keep(load_LM)
    if assigns(recipe, done):

        def choose() -> str:
            assert lock, "rank 0 is a trunk rank"
            return dumps(lock.choose(done, val_loss).model_dump())

        text = job.shared.broadcast("ownership", choose)
        if lock:
            lock.use(text)
        return False
    (ending,) = job.sum_over_ranks([float(lock is not None and lock.exceeds(val_loss))])
    return ending > 0
