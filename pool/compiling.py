"""torch.compile as the pool and the trunk use it, and the folder in which it keeps what it has compiled."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@cache
def compiled(function: Callable[P, T], dynamic: bool) -> Callable[P, T]:
    """Return the function as one compiled graph, the same on every call with the same function.

    Importing the compiler takes seconds. Do it only where something will be compiled.

    Args:
        function: What to compile. It may contain nothing that the compiler cannot trace.
        dynamic: Whether the function takes tensors only, whose numbers of rows are variables of the graph. Other sizes
            are not: a kernel would divide by them for each of its elements. Each new one is compiled anew, 8 at most.
    """
    _set_cache_folders()
    # Otherwise the fastest kernels are found by trying, and sums in the kernels of two runs may differ.
    graph = torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})
    if not dynamic:
        return graph

    @wraps(function)
    def with_any_rows(*tensors: P.args, **others: P.kwargs) -> T:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return graph(*tensors, **others)

    return with_any_rows


@cache
def _set_cache_folders() -> None:
    """Let the compilers keep their results in the user's cache folder, unless the environment names others.

    What they keep is loaded as code, and torch's default is a folder in /tmp that anyone may have created before.
    """
    home = _cache_home()
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("TRITON_CACHE_DIR", "triton")):
        if os.environ.get(variable, "").startswith(_TORCH_DEFAULT):
            del os.environ[variable]
        os.environ.setdefault(variable, str(home / name))


_TORCH_DEFAULT = os.path.join(tempfile.gettempdir(), "torchinductor_")
"""How torch's default begins; torch puts it into the environment when something, such as DeepSpeed, asks for it."""


def _cache_home() -> Path:
    """Return the user's cache folder, or one for this process only if that cannot be written."""
    with suppress(OSError, RuntimeError):  # Path.home() without a home is a RuntimeError
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(home, os.W_OK | os.X_OK):
            return home
    home = Path(tempfile.mkdtemp(prefix="unipool-compiled-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    logging.getLogger(__name__).warning(
        "unipool: the user's cache folder cannot be written, so what is compiled is kept in %s, for this process only; "
        "XDG_CACHE_HOME names another cache folder",
        home,
    )
    return home
