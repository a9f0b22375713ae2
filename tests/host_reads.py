"""Finds where the host reads from the compute device, and so waits for it, on tensors without values.

On the meta device a whole micro-batch runs at any size, and fake CUDA tensors know devices and strides besides. Neither
has values, so nothing that depends on one could run; this mode says in a line what it was and where.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOMS = ("pool", "router", "trainer", "deepspeed")

WAITS = {
    *("_local_scalar_dense", "equal", "is_nonzero"),
    *("bincount", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"),
}
"""Operators that give the host a value of the device, or a shape that depends on one."""

VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "expand", "alias", "detach", "lift_fresh"),
    *("t", "transpose", "permute", "squeeze", "unsqueeze", "slice", "select", "unbind"),
    *("split", "split_with_sizes", "chunk", "empty", "empty_strided", "empty_like", "new_empty"),
}
"""Operators that launch nothing."""


class HostRead(AssertionError):
    """The host reads from the device, or mixes its tensors with those of the host."""


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.launches[name] += 1
        if found := _wait(func, name, args, kwargs):
            raise HostRead(f"{place()}: {found}")
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    """Sees `torch.tensor(..., device=...)`, which copies from memory that is not pinned, below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type != "cpu":
            raise HostRead(f"{place()}: {func.__name__} on the device copies from the host, and waits for it")
        return func(*args, **kwargs)


def _wait(func: Any, name: str, args: Any, kwargs: Any) -> str | None:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {t.device.type for t in tensors}
    if kwargs.get("device"):
        devices.add(torch.device(kwargs["device"]).type)
    if devices <= {"cpu"}:
        return None
    if name in WAITS:
        return f"{name} waits for the device"
    if name == "index" and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None):
        return "an index of bools waits for the device"
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size waits for the device"
    if name in ("_to_copy", "copy_") and len(devices) > 1:
        return f"a copy between {' and '.join(sorted(devices))}"
    mixed = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}  # numbers are passed to kernels by value
    return f"{name} on tensors of {' and '.join(sorted(map(str, mixed)))}" if len(mixed) > 1 else None


def place(with_line: bool = True) -> str:
    """The innermost line of the product, or of DeepSpeed, that is being run: file, line and function."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if "tests" not in parts and (name := next((p for p in reversed(parts) if p in ROOMS), None)):
            last = len(parts) - 1 - parts[::-1].index(name)
            line = f":{frame.lineno}" if with_line else ""
            return f"{'/'.join(parts[last:])}{line} ({frame.name})"
    return "outside the product"


@contextmanager
def no_host_reads() -> Iterator[Counter[str]]:
    """Raise HostRead where the host would wait for the device; yields how often each operator was launched."""
    with _Called(), _Dispatched() as dispatched:
        yield dispatched.launches


def host_read(function: Callable[[], object]) -> str:
    """Where and what `function` reads from the device, for tests of this module's own eyes."""
    try:
        with no_host_reads():
            function()
    except HostRead as error:
        return str(error)
    return ""


READERS = {"cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__index__"}
"""Methods of tensors with which the host reads, on a CPU too, where nobody waits for them."""


class _Readers(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in READERS:
            self.places.append(f"{place(with_line=False)}: {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def listed_reads() -> Iterator[list[str]]:
    """List the reads of a run with values, in order: "file (function): method"."""
    with _Readers() as readers:
        yield readers.places
