"""Double precision where the program uses float32, for comparisons to more digits than float32 has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from router.calibration import norm_constant


@contextmanager
def float32_is_float64(wanted: bool = True) -> Iterator[None]:
    """Let `torch.float32` and `Tensor.float` mean float64 inside; not wanted, nothing happens."""
    if not wanted:
        yield
        return
    single, to_single = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    torch.set_default_dtype(torch.float64)
    norm_constant.cache_clear()  # it holds constants that were computed in float32
    try:
        yield
    finally:
        torch.float32 = torch.float = single  # type: ignore[misc]
        torch.Tensor.float = to_single  # type: ignore[method-assign]
        torch.set_default_dtype(single)
        norm_constant.cache_clear()
