"""The timeline: which ranks it shows, what its rows show, and that the file appears whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from pool.schedule_builder import Costs, build_training_schedule
from pool.schedule_timing import Intervals, StepTiming, Work, time_schedule
from pool.topology import Topology
from trainer.planning.timeline import covered, draw_timeline, row_picture, shown_ranks

COSTS = Costs(trunk_layer=1.0, head=6.0, pool_layer=0.5, slot=0.05, transfer=0.1)


def timed(topology: Topology, load_of_first: float = 0.5) -> StepTiming:
    shards, layers = topology.expert_parallel, 3
    load_LS = np.full((layers, shards), (1 - load_of_first) / max(1, shards - 1))
    load_LS[:, 0] = load_of_first if shards > 1 else 1.0
    schedule = build_training_schedule(topology, layers, 2, 2, True, COSTS)
    return time_schedule(schedule, topology, layers, COSTS, load_LS, shown_ranks(topology))


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


def test_covered_is_the_share_of_each_column() -> None:
    starts, ends = np.array([0.5, 2.0, 2.25, 3.5]), np.array([1.25, 2.25, 2.5, 4.0])
    np.testing.assert_allclose(covered(starts, ends, 4.0, 4), [0.5, 0.25, 0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(covered(starts[:0], ends[:0], 4.0, 3), [0, 0, 0])


def test_covered_beside_a_fine_count() -> None:
    edges = np.sort(np.random.default_rng(0).integers(0, 7000, 60)) / 1000
    starts, ends = edges[::2], edges[1::2]
    middles = (np.arange(7000) + 0.5) / 1000
    inside = ((starts[:, None] < middles) & (middles < ends[:, None])).any(axis=0)
    np.testing.assert_allclose(covered(starts, ends, 7.0, 7), inside.reshape(7, -1).mean(axis=1), atol=1e-9)


def test_a_row_stacks_what_shares_a_column() -> None:
    """A quarter of the step forward, then bars far shorter than a column: half backward, a quarter weight gradients."""
    starts = np.arange(2500, 10000) / 10000
    parts = [([0.0], [0.25], Work.POOL_FORWARD)]
    parts += [(starts, starts + 5e-5, Work.POOL_BACKWARD), (starts + 5e-5, starts + 7.5e-5, Work.WEIGHT_GRADIENTS)]
    start_I, end_I = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    work_I = np.concatenate([np.full(len(part[0]), part[2], dtype=np.int8) for part in parts])
    rank_I = np.full(len(start_I), 3, dtype=np.int32)
    picture = row_picture(Intervals(rank_I, start_I, end_I, work_I), 3, 1.0)
    height, width, _ = picture.shape
    left, right = picture[:, 5], picture[:, width // 2]
    assert (left == left[0]).all()
    bands = [right[0], right[height // 4 + 1], right[-1]]  # idle, weight gradients, backward
    expected = np.repeat(bands, [height // 4, height // 4, height // 2], axis=0)
    assert (np.abs(right - expected).sum(axis=1) > 0).sum() <= 2  # bars that a column's edge cuts
    assert len({tuple(colour) for colour in (*bands, left[0])}) == 4
    nobody = row_picture(Intervals(rank_I, start_I, end_I, work_I), 2, 1.0)
    assert (nobody == right[0]).all()


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 5, 5), (30, 40, 4)])
def test_file_appears_whole(grid: tuple[int, int, int], tmp_path: Path) -> None:
    topology = Topology(*grid)
    path = tmp_path / "timeline.png"
    draw_timeline(timed(topology), topology, path, "a step")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    rows = len(shown_ranks(topology))
    assert width == 1560 and abs(height - 120 * (1.9 + 0.22 * rows)) <= 1
    assert list(tmp_path.iterdir()) == [path]


def test_picture_shows_the_data(tmp_path: Path) -> None:
    topology = Topology(2, 3, 3)
    pictures = []
    for number, (load, unit) in enumerate(((0.5, "ms"), (0.5, "ms"), (0.7, "ms"), (0.5, "nominal units"))):
        path = tmp_path / f"{number}.png"
        draw_timeline(timed(topology, load), topology, path, "a step", unit)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3
