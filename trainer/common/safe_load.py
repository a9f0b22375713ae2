"""A file that torch has saved, read as data: nothing that it holds is run."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from trainer.common.errors import UserError


def load_file(path: Path | str, device: Any = "cpu", mmap: bool = False) -> Any:
    """What is in a file of a checkpoint.

    Args:
        device: where tensors are to be, as torch's `map_location`.
        mmap: map the tensors: only what is used of them is read.
    Raises:
        UserError: the file holds more than tensors, plain values and the few types that checkpoints have.
    """
    try:
        return torch.load(path, map_location=device, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, which no checkpoint has" if found else "it holds what no checkpoint has"
        raise UserError(
            f"{path}: refused, and nothing of it was run: {what}; somebody may have put it there, or it is of another "
            "version"
        ) from None
