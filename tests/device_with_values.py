"""A device with values, in the place of a GPU: its tensors compute on the CPU, but may not meet those of the host.

torch takes it for its meta device. What a program forgets to move to its device, or to read from it, shows here on a
machine without GPUs: an operation on tensors of both raises `Mixed`. CUDA would let an index of the host through, but
would copy it and wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class Mixed(AssertionError):
    """An operation on tensors of the device and of the host."""


class OnDevice(Tensor):
    """A tensor of the device; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.values = values
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.values!r})"

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    hosts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.dim()]
    targets = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    name = func.overloadpacket.__name__
    if ours and hosts and name not in ("copy_", "_to_copy", "to"):
        raise Mixed(f"{func}: a tensor of the host among those of the device")
    inner_args, inner = tree_map(_on_host, (args, kwargs))
    if name == "histc":  # of integers: CUDA has it, and transformers uses it there
        inner_args = (inner_args[0].float(), *inner_args[1:])
    result = func(*inner_args, **inner)
    if name == "copy_":
        return args[0]
    if (targets[0] != DEVICE) if targets else not ours:
        return result
    made = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, made) if ours and not targets else made


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.values
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


class _Factories(TorchDispatchMode):
    """Makes the tensors that are asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = DEVICE in [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        return _run(func, args, kwargs or {}) if on_device else func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Copies numbers and modules to the device, which torch does below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def moved(module: nn.Module) -> nn.Module:
    """Move a module's weights and buffers to the device, in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(OnDevice(weight.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


class _Autocast(nullcontext[None]):
    """In the place of `torch.autocast`, which the meta device does not know; for fp32."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True):
        super().__init__()
        assert not enabled


def _enter(mode: Any) -> None:
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


def _exit(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


@contextmanager
def device_with_values() -> Iterator[torch.device]:
    """Let `torch.device("meta")` be a device with values inside, in fp32 only."""
    to = nn.Module.to

    def to_device(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return moved(module) if args and args[0] == DEVICE else to(module, *args, **kwargs)

    with (
        patch.object(torch, "autocast", _Autocast),
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.object(torch.inference_mode, "__enter__", _enter),  # in it operators that consist of others come whole
        patch.object(torch.inference_mode, "__exit__", _exit),
        patch.object(nn.Module, "to", to_device),
        _Copies(),
        _Factories(),
    ):
        yield DEVICE
