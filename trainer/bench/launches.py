"""What a GPU's host pays for work that the device does later: launches, and copies between the two.

On a CPU there is nothing to measure: the host computes itself, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.bench.wire import synchronize, timed

RUNS = 5
LAUNCHES = 200
"""Launches in a row; a stream holds about a thousand before the host has to wait for it."""
SMALL_BYTES = 4096


@dataclass(frozen=True)
class LaunchFigures:
    """What was measured.

    Attributes:
        launch: Seconds of the host to launch a small kernel.
        kernel: Seconds of the device to run one.
        to_device, to_host: Bytes/s of large copies from and to pinned memory.
        copy_latency: Seconds of a copy of 4 KiB to the host, until the host has it.
    """

    launch: float
    kernel: float
    to_device: float
    to_host: float
    copy_latency: float


def measure_launches(
    device: torch.device,
    copy_bytes: int,
    pinned: Callable[[int], Tensor] = lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True),
    new_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
) -> LaunchFigures:
    """Measure a GPU; of several runs the best counts.

    Args:
        copy_bytes: Size of a large copy.
        pinned, new_event: Return pinned memory of some bytes, and an event that can be timed; tests replace them.
    """
    launch, kernel = (min(times) for times in zip(*(_launches(device, new_event) for _ in range(RUNS)), strict=True))
    large, small = (_copies(device, pinned(size)) for size in (copy_bytes, SMALL_BYTES))
    return LaunchFigures(launch, kernel, copy_bytes / large[0], copy_bytes / large[1], small[1])


def _launches(device: torch.device, new_event: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the host and of the device for a small kernel.

    A product that takes longer than all launches goes first. The small kernels then wait in the stream, and follow each
    other as fast as the device can run them.
    """
    small = torch.zeros(1, device=device)
    a = torch.ones(4096, 4096, device=device) if device.type == "cuda" else small[None]
    begin, end = new_event(), new_event()
    small.add_(1.0)
    synchronize(device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            small.add_(1.0)

    for _ in range(4):
        torch.mm(a, a)
    begin.record()
    seconds = timed(launch, torch.device("cpu"))  # until the host goes on, whether or not the device is done
    end.record()
    synchronize(device)
    return seconds / LAUNCHES, begin.elapsed_time(end) / 1000 / LAUNCHES


def _copies(device: torch.device, on_host: Tensor) -> tuple[float, float]:
    """Seconds of a copy to the device, and of one to the host."""
    on_device = torch.empty_like(on_host, device=device)

    def best(target: Tensor, source: Tensor) -> float:
        return min(timed(lambda: target.copy_(source, non_blocking=True), device) for _ in range(RUNS))

    return best(on_device, on_host), best(on_host, on_device)
