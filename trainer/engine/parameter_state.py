"""What engines and checkpoints exchange."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.common.errors import UserError, short_line

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


def refuse_paths(file: Path, saved: dict[str, Any]) -> None:
    """Check the names of parameters in a file of a checkpoint, which DeepSpeed's conversion takes as names of folders.

    Raises:
        UserError: One would lead out of the folder that the conversion writes to.
    """
    shards = saved.get("optimizer_state_dict") or {}
    tables = (saved.get("module"), *(saved.get("param_shapes") or ()), *(shards.get("param_slice_mappings") or ()))
    for name in (name for table in tables if isinstance(table, dict) for name in table):
        if "/" in str(name) or name == "..":
            raise UserError(
                f"{file}: refused: it has a parameter named {short_line(name)}, which is a path; the file may have "
                "been tampered with"
            )
