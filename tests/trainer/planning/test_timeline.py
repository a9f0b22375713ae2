"""The timeline: which ranks it shows, what its rows show, and that the file appears whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pool.schedule_builder import Costs, build_training_schedule
from pool.schedule_timing import StepTiming, time_schedule
from pool.topology import Topology
from trainer.planning.timeline import draw_timeline, shown_ranks

COSTS = Costs(trunk_layer=1.0, head=6.0, pool_layer=0.5, slot=0.05, transfer=0.1)


def timed(topology: Topology, load_of_first: float = 0.5) -> StepTiming:
    shards, layers = topology.expert_parallel, 3
    load_LS = np.full((layers, shards), (1 - load_of_first) / max(1, shards - 1))
    load_LS[:, 0] = load_of_first if shards > 1 else 1.0
    schedule = build_training_schedule(topology, layers, 2, 2, True, COSTS)
    return time_schedule(schedule, topology, layers, COSTS, load_LS, record=True)


@pytest.mark.parametrize(
    ("grid", "trunk_rows", "pool_rows"),
    [((1, 1, 1), 1, 1), ((4, 20, 20), 4, 20), ((400, 624, 624), 9, 15), ((1000, 24, 24), 18, 6), ((2, 300, 3), 2, 22)],
)
def test_shown_ranks_are_of_both_roles_and_evenly_spaced(
    grid: tuple[int, int, int], trunk_rows: int, pool_rows: int
) -> None:
    topology = Topology(*grid)
    ranks = shown_ranks(topology)
    trunk, pool = ranks[:trunk_rows], ranks[trunk_rows:]
    assert (len(trunk), len(pool)) == (trunk_rows, pool_rows)
    for these, first, last in ((trunk, 0, grid[0] - 1), (pool, grid[0], topology.world_size - 1)):
        assert (these[0], these[-1]) == (first, last)
        steps = np.diff(these)
        assert not steps.size or (steps.min() > 0 and steps.max() - steps.min() <= 1)


def test_shown_ranks_with_both_roles_are_evenly_spaced() -> None:
    assert shown_ranks(Topology(8, 8, 4, every_rank=True)) == tuple(range(8))
    ranks = shown_ranks(Topology(70, 70, 7, every_rank=True))
    assert len(ranks) == 24 and (ranks[0], ranks[-1]) == (0, 69) and set(np.diff(ranks)) == {3}


EVERY_RANK = (6, 6, 3, True)


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 5, 5), (30, 40, 4), EVERY_RANK])
def test_file_appears_whole(grid: tuple[int, int, int], tmp_path: Path) -> None:
    topology = Topology(*grid)
    path = tmp_path / "timeline.png"
    draw_timeline(timed(topology), topology, path, "a step", in_seconds=False)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    rows = len(shown_ranks(topology))
    assert width == 1560 and abs(height - 120 * (1.9 + 0.22 * rows)) <= 1
    assert list(tmp_path.iterdir()) == [path]


def test_picture_shows_the_data(tmp_path: Path) -> None:
    topology = Topology(2, 3, 3)
    pictures = []
    for number, (load, in_seconds) in enumerate(((0.5, True), (0.5, True), (0.7, True), (0.5, False))):
        path = tmp_path / f"{number}.png"
        draw_timeline(timed(topology, load), topology, path, "a step", in_seconds)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3


def test_a_row_is_coloured_by_its_busy_share(tmp_path: Path) -> None:
    """A pool rank is idle at first and ends the step with weight gradients, so its row lies between these colours."""
    topology = Topology(1, 1, 1)
    step = timed(topology)
    path = tmp_path / "step.png"
    draw_timeline(step, topology, path, "a step", in_seconds=False)
    picture = imread(path)[..., :3]
    idle, weight_gradients = (np.abs(picture - to_rgb(colour)).max(axis=2) < 0.01 for colour in ("#e8e8e8", "#35a06b"))
    row = np.flatnonzero(weight_gradients.any(axis=1))[5]
    inside = slice(np.flatnonzero(idle[row])[0], np.flatnonzero(weight_gradients[row])[-1] + 1)
    assert 1 - idle[row, inside].mean() == pytest.approx(step.pool_busy_P[0], abs=0.02)


def test_experts_have_colours_of_their_own_on_ranks_with_both_roles(tmp_path: Path) -> None:
    topology = Topology(*EVERY_RANK)
    draw_timeline(timed(topology), topology, tmp_path / "step.png", "a step", in_seconds=False)
    picture = imread(tmp_path / "step.png")[..., :3]
    for colour in ("#31688e", "#e08a3c", "#35a06b", "#440154", "#9ec3dd", "#f2c9a0"):
        assert (np.abs(picture - to_rgb(colour)).max(axis=2) < 0.01).sum() > 200, colour
