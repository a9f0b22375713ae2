"""What engines and checkpoints exchange."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CHECKPOINT_TAG = "state"
"""Name of DeepSpeed's folder inside the role's folder of a checkpoint."""


@dataclass(frozen=True)
class ParameterState:
    """A whole parameter and its moments, fp32, each in the parameter's shape.

    Attributes:
        exp_avg_sq: None for a parameter that Muon updates.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
