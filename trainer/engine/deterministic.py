"""Kernels that give the same bits every time."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Let torch choose kernels that give the same bits every time.

    With `warn_only` flash and memory-efficient attention on CUDA would only warn, and add up gradients in any order
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu), and cuDNN's would be allowed.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    # `use_deterministic_algorithms` would also import torch's compiler, before the ranks meet, to set its option for
    # deterministic kernels; `pool.compiling.compiled` sets that itself. Torch's optimizers import it later.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we write before we read
