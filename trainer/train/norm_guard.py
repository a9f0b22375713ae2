"""Steps that are skipped because their gradient norm is a spike, as all ranks decide alike."""

from __future__ import annotations

from typing import Any

from trainer.config.recipe import Recipe
from trainer.telemetry.over_steps import Spikes


def guarded_norms(recipe: Recipe) -> Spikes | None:
    """Return what tells which steps are to be skipped; None if none are."""
    return None if recipe.train.skip_spikes is None else Spikes(recipe.train.skip_spikes)


def restore_norms(norms: Spikes | None, state: dict[str, Any]) -> None:
    """Continue with the norms in a trunk rank's saved state, if the run that saved it has had any."""
    if norms is not None:
        norms.values.extend(state.get("norms", ()))
