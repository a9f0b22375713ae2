"""What a GPU's launches and copies cost, measured on the CPU with made-up events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.bench import launches
from trainer.bench.launches import LAUNCHES, measure_launches
from trainer.bench.measure import launch_figures

CPU = torch.device("cpu")


class Event:
    """The second of a pair comes 0.2 s after the first, and in later runs later."""

    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.at = 0.1 * Event.made * (Event.made % 2 == 0)
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def elapsed_time(self, end: Event) -> float:
        assert self.recorded and end.recorded
        return 1000 * (end.at - self.at)


def test_the_best_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timed piece takes 3 s, then 2 s, then 1 s, and so on; copies are of 1000 and 4096 bytes."""
    times = iter([3.0, 2.0, 5.0, 4.0, 6.0, *(8.0, 4.0, 5.0, 6.0, 7.0), *(1.0, 2.0, 0.5, 3.0, 4.0), *[9.0] * 10])

    def timed(function: Any, device: torch.device) -> float:
        function()
        return next(times)

    monkeypatch.setattr(launches, "timed", timed)
    found = measure_launches(CPU, 1000, lambda size: torch.zeros(size, dtype=torch.uint8), Event)
    assert found.launch == 2.0 / LAUNCHES
    assert found.kernel == pytest.approx(0.2 / LAUNCHES)
    assert (found.to_device, found.to_host, found.copy_latency) == (1000 / 4.0, 1000 / 0.5, 9.0)
    assert [figure.value for figure in launch_figures(found)] == [
        *(found.launch, found.kernel, found.to_device, found.to_host, found.copy_latency)
    ]
