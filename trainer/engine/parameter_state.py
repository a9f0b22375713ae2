"""What engines and checkpoints exchange."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.common.errors import UserError, short_line

CHECKPOINT_TAG = "state"
"""Name of DeepSpeed's folder inside the role's folder of a checkpoint."""

_EXPERTS_OF_DEEPSPEED = ("ds_autoep_layers", "autoep_layers")


@dataclass(frozen=True)
class ParameterState:
    """A whole parameter and its moments, fp32, each in the parameter's shape.

    Attributes:
        exp_avg_sq: None for a parameter that Muon updates.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None


def refuse_paths(file: Path, saved: Any) -> None:
    """Check the keys in a file of a checkpoint, of which DeepSpeed's conversion takes some as names of folders.

    Raises:
        UserError: One would lead out of the folder that the conversion writes to, or the file has experts of
            DeepSpeed's own, for which it makes names of other values.
    """
    tampered = "the file may have been tampered with"
    left, seen = [saved], set()
    while left:
        value = left.pop()
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        left += value.values() if isinstance(value, dict) else value
        for name in value if isinstance(value, dict) else ():
            if name in _EXPERTS_OF_DEEPSPEED and value[name] is not None:
                raise UserError(f"{file}: refused: it has {name}, which no checkpoint of this trainer has; {tampered}")
            if "/" in str(name) or name == "..":
                raise UserError(
                    f"{file}: refused: it has a parameter named {short_line(name)}, which is a path; {tampered}"
                )
