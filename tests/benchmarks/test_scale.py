"""The arithmetic of the benchmark of scale, and its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import scale
from tests.benchmarks.scale import GROWTH_HARDWARE, MODELS, RANKS, ROUTING, largest_of, on_ranks, parts_of, stretched
from trainer.planning.hardware import DATA_SHEETS
from trainer.planning.step_time import step_time


def test_a_recording_is_stretched() -> None:
    """12 layers and 96 experts from 8 and 64: each layer and expert of the recording is found once or twice."""
    load_NLM = np.arange(2 * 8 * 64).reshape(2, 8, 64)
    stretched_NLM = stretched(load_NLM, on_ranks(MODELS[0], "every_rank", 16))
    assert stretched_NLM.shape == (2, 12, 96)
    assert stretched_NLM[1, :, 0].tolist() == [load_NLM[1, layer, 0] for layer in (0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7)]
    assert stretched_NLM[0, 0, :6].tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_mean_of_the_largest_draw(draws: int) -> None:
    """Over all ways to draw from three times."""
    times = np.array([1.0, 2.0, 4.0])
    ways = np.stack(np.meshgrid(*[times] * draws)).reshape(draws, -1)
    assert largest_of(times, draws) == pytest.approx(ways.max(0).mean())


def test_weak_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the recorded load steps are longer than at an even one, and less so with placed experts."""
    monkeypatch.setattr(scale, "DRAWS", 2)
    monkeypatch.setattr(scale, "GROWTH", {key: values[:1] for key, values in scale.GROWTH.items()})
    load_NLM = np.load(ROUTING).astype(np.int64)
    result = scale.weak_scaling(MODELS[0], "every_rank", DATA_SHEETS["h100"], load_NLM)
    for ranks in RANKS:
        assert result.steps[ranks].seconds < result.seconds[ranks][True] < result.seconds[ranks][False]
    assert result.efficiency(16, True) == 1 > result.efficiency(1024, True) > 0.9
    needed = scale.slowest_network(result)
    assert needed is not None and 1e9 < needed < 50e9
    from tests.benchmarks.scale_figure import draw

    draw([result], tmp_path / "scale.svg")
    assert "1,024" in (tmp_path / "scale.svg").read_text()


def test_parts_are_the_whole_step() -> None:
    parts, more = (parts_of("pool.experts", experts) for experts in (96, 384))
    recipe = on_ranks(MODELS[0], "every_rank", 64, f"parallel.expert_parallel={parts.shards}")
    assert parts.seconds == pytest.approx(step_time(recipe, GROWTH_HARDWARE).seconds)
    assert more.router == pytest.approx(4 * parts.router, rel=1e-3)
    assert (more.attention, more.permutation) == pytest.approx((parts.attention, parts.permutation), rel=1e-3)
