"""The end of a run before its last step, because its validation loss is low enough or no longer falls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from trainer.config.job_sections import Eval

if TYPE_CHECKING:
    from trainer.cluster.process_groups import Job
    from trainer.config.recipe import Recipe


class EarlyStop:
    """Follows the validation losses of a run, the same on all trunk ranks."""

    def __init__(self, keys: Eval):
        self._keys = keys
        self._lowest, self._without = math.inf, 0

    def add(self, val_loss: float) -> str:
        """Take a validation loss in nats; return why the run is to end, or nothing."""
        if val_loss < self._lowest:  # never so if it is not a number
            self._lowest, self._without = val_loss, 0
        else:
            self._without += 1
        below, patience = self._keys.stop_below, self._keys.patience
        if below is not None and val_loss < below:
            return f"validation loss {val_loss:.4f} is below eval.stop_below ({below:g})"
        if patience is not None and self._without >= patience:
            number = "the last validation" if patience == 1 else f"the last {patience} validations"
            return f"{number} (eval.patience) had no loss below {self._lowest:.4f}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"lowest": self._lowest, "without": self._without}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._lowest, self._without = state["lowest"], state["without"]


def early_stop(keys: Eval) -> EarlyStop | None:
    """Return what may end a run early; None without the keys for it."""
    return None if keys.patience is None and keys.stop_below is None else EarlyStop(keys)


def ended_early(keys: Eval, val_losses: Iterable[float]) -> bool:
    """Return whether a run with these validation losses, one after the other, has ended early."""
    stop = early_stop(keys)
    return stop is not None and any([stop.add(loss) for loss in val_losses][-1:])


class HasEarlyStop(Protocol):
    """A role of the run; `early_stop` is None on pool ranks, which know no losses."""

    early_stop: EarlyStop | None


def enough(job: Job, recipe: Recipe, role: HasEarlyStop, val_loss: float) -> str:
    """Return why the run is to end after an evaluation, or nothing, as all ranks do. A collective of all ranks."""
    if early_stop(recipe.eval) is None:
        return ""
    reason = role.early_stop.add(val_loss) if role.early_stop else ""
    (ending,) = job.sum_over_ranks([float(bool(reason))])
    return reason or "its validation loss says so" if ending else ""
