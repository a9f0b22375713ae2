"""How the layers of a run differ, by depth: gates, loads, and how many experts each of them uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.config.recipe import Recipe
from trainer.view.records import Numbers, Records

GATE, IMBALANCE = "Gate values of a token, summed, by layer", "Load imbalance by layer, max / mean"
EFFECTIVE, FAVOURITES = (
    "Effective number of experts by layer",
    "Share of a layer's tokens on its M / L most used experts",
)
OWN = "Share of a layer's tokens on its own experts"


def by_depth(records: Records, recipe: Recipe | None, load_LM: NDArray[np.int64] | None) -> dict[str, Numbers]:
    """Return what is known by layer, (L) each, by title: of the last steps' records, and of the load as last saved."""
    if recipe is None or recipe.model.ffn == "dense":
        return {}
    layers = recipe.model.layers
    found = {
        GATE: records.layers("layer_gates", layers),
        IMBALANCE: records.layers("layer_imbalances", layers),
        OWN: records.layers("layer_own_shares", layers),
    }
    if load_LM is not None and len(load_LM) == layers:
        found |= {EFFECTIVE: effective(load_LM), FAVOURITES: favourites(load_LM)}
    return {title: values for title, values in found.items() if np.isfinite(values).any()}


def effective(load_LM: NDArray[np.int64]) -> Numbers:
    """Return exp of the entropy of each layer's load, (L); NaN without tokens."""
    shares_LM = _shares(load_LM)
    logs_LM = np.log(shares_LM, out=np.zeros_like(shares_LM), where=shares_LM > 0)
    exponents_L = np.exp(-(shares_LM * logs_LM).sum(1))
    return np.where(load_LM.sum(1) > 0, exponents_L, np.nan)


def favourites(load_LM: NDArray[np.int64]) -> Numbers:
    """Return the share of each layer's tokens on its M / L most used experts, (L); NaN without tokens."""
    layers, experts = load_LM.shape
    most_L = np.sort(_shares(load_LM), axis=1)[:, -max(experts // layers, 1) :].sum(1)
    return np.where(load_LM.sum(1) > 0, most_L, np.nan)


def _shares(load_LM: NDArray[np.int64]) -> Numbers:
    shares_LM: Numbers = load_LM / load_LM.sum(1, keepdims=True).clip(min=1)
    return shares_LM
