"""Arrays in .npy files, read as numbers and nothing else."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_array(path: Path) -> NDArray[Any]:
    """The one array of numbers in a .npy file.

    The file is mapped first: a header that promises more than the file holds costs no memory.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no regular file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's parser of headers has a dozen kinds
        raise ValueError(f"no .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError("several arrays: must be one .npy file")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{array.dtype} are no numbers")
    return np.array(array)
