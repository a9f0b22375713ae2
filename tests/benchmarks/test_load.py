"""Work in flight: windows, modes and layouts computed by hand, and a realistic recording."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pool.placement import Placement
from pool.schedule import Kind, RequestKey, lockstep_schedule
from pool.topology import Topology
from tests.benchmarks.load import (
    MICRO_BATCHES,
    MODES,
    RANKS,
    Counts,
    by_shard,
    imbalance_in_flight,
    in_layout,
    main,
    measure,
    requests_of,
    work_in_windows,
)
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.schedule import make_schedule

BLOCK = RANKS * MICRO_BATCHES


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """8 layers, 64 experts, 2 lanes."""
    return load_recipe("quickstart")


def recording(micro_batches: int, rows: int = 2048) -> Counts:
    """Routing like that of a trained model (N, 8, 64).

    Each layer has log-normal preferences for experts, and the text of each micro-batch shifts them log-normally.
    """
    rng = np.random.default_rng(0)
    layer_LM = rng.normal(0, 1.2, (8, 64))
    text_NLM = rng.normal(0, 0.4, (micro_batches, 8, 64))
    share_NLM = np.exp(layer_LM + text_NLM)
    return rng.multinomial(rows, share_NLM / share_NLM.sum(-1, keepdims=True))


def slices(micro_batches: int) -> Counts:
    """Layer l sends 10 rows to each of experts 8 l to 8 l + 7: the l-th of 8 contiguous shards has all of them."""
    load_NLM = np.zeros((micro_batches, 8, 64), dtype=np.int64)
    for layer in range(8):
        load_NLM[:, layer, 8 * layer : 8 * layer + 8] = 10
    return load_NLM


def key(trunk_rank: int, layer: int, kind: Kind) -> RequestKey:
    return RequestKey(trunk_rank, 0, 0, layer, kind)


LOAD_NLS = np.array([[[3, 1], [0, 4]], [[1, 3], [2, 2]]])
"""One micro-batch of each of two trunk ranks, two layers, two shards."""


def test_lockstep_windows_by_hand() -> None:
    """Windows are slots, and a backward has the rows of its forward."""
    requests = requests_of(0, Topology(2, 2, 2), lockstep_schedule(2, 1, 2).slots)
    work_WS = work_in_windows(requests, LOAD_NLS, trunk_ranks=2, size=2, stride=2)
    assert work_WS.tolist() == [[4, 4], [2, 6], [2, 6], [4, 4]]
    assert imbalance_in_flight(work_WS[None]) == (4 + 6 + 6 + 4) / (4 + 4 + 4 + 4)


def test_sliding_windows_by_hand() -> None:
    """Rows in order: 3 1, 0 4, 1 3, 0 4; three windows of two requests."""
    requests = [key(0, 0, Kind.FORWARD), key(0, 1, Kind.FORWARD), key(1, 0, Kind.FORWARD), key(0, 1, Kind.BACKWARD)]
    work_WS = work_in_windows(requests, LOAD_NLS, trunk_ranks=2, size=2, stride=1)
    assert work_WS.tolist() == [[3, 5], [1, 7], [1, 7]]


def test_the_replica_with_the_largest_sum_counts() -> None:
    """The busiest shards of replica 0 have 3 and 2 rows, those of replica 1 have 2 and 4."""
    work_RWS = np.array([[[3, 1], [2, 2]], [[2, 2], [0, 4]]])
    assert imbalance_in_flight(work_RWS) == (2 + 4) / (2 + 2)


def test_replicas_serve_their_own_trunk_ranks() -> None:
    """Trunk ranks 1 and 3 of 4 belong to replica 1 of 2, in the slots' order."""
    requests = requests_of(1, Topology(4, 4, 2), lockstep_schedule(4, 2, 1).slots)
    expected = [(1, 0), (3, 0), (1, 0), (3, 0), (1, 1), (3, 1), (1, 1), (3, 1)]
    assert [(request.trunk_rank, request.micro_batch) for request in requests] == expected


def test_every_micro_batch_of_a_block_is_used(recipe: Recipe) -> None:
    """A request's rows are those of its own micro-batch and layer: the sum over all is twice the recording."""
    load_NLM = recording(BLOCK)
    layout = in_layout(recipe, 4)
    load_NLS = by_shard(load_NLM, Placement(tuple(range(64)), 4))
    work = 0
    for replica in range(2):
        requests = requests_of(replica, layout.grid, make_schedule(layout).step.slots)
        work += work_in_windows(requests, load_NLS, RANKS, size=1, stride=1).sum(0)
    assert work.tolist() == (2 * load_NLM.reshape(-1, 4, 16).sum((0, 2))).tolist()


def test_rows_by_shard() -> None:
    load_NLM = np.array([[[1, 2, 4, 8]]])
    assert by_shard(load_NLM, Placement((2, 0, 3, 1), 2)).tolist() == [[[5, 10]]]


@pytest.mark.parametrize("shards", [8, 4, 2])
def test_layers_that_prefer_one_shard(recipe: Recipe, shards: int) -> None:
    """In lock step one shard of each replica has all the work; with experts placed, each layer is spread evenly."""
    results = measure(recipe, shards, slices(2 * BLOCK))
    assert results["lockstep"] == [shards]
    assert results["placed"] == [1]
    assert results["both"] == [1]
    assert 1 < results["staggered"][0] < 0.85 * shards


def test_staggered_is_that_of_the_loop(recipe: Recipe) -> None:
    """4 shards x 2 replicas, 3 lanes: windows of 4 trunk ranks x 3 lanes, each starting at the next request."""
    parallel = recipe.parallel.model_copy(update={"lanes": 3})
    recipe = recipe.model_copy(update={"parallel": parallel})
    load_NLM = recording(2 * BLOCK)
    slots = make_schedule(in_layout(recipe, 4)).step.slots
    sequences = [[k for slot in slots for k in slot if k.trunk_rank % 2 == replica] for replica in range(2)]
    largest, total = [0, 0], 0
    for start in range(len(sequences[0]) - 12 + 1):
        for replica, sequence in enumerate(sequences):
            rows_QM = [
                load_NLM[BLOCK + 8 * k.micro_batch + k.trunk_rank, k.layer] for k in sequence[start : start + 12]
            ]
            work = [int(sum(rows_M[16 * s : 16 * s + 16].sum() for rows_M in rows_QM)) for s in range(4)]
            largest[replica] += max(work)
            total += sum(work)
    assert measure(recipe, 4, load_NLM)["staggered"] == pytest.approx([max(largest) / (total / 8)], rel=1e-12)


def test_the_measured_half_places_nothing(recipe: Recipe) -> None:
    """A first half without any load tells nothing: the experts stay where they were."""
    load_NLM = recording(2 * BLOCK)
    load_NLM[:BLOCK] = 0
    results = measure(recipe, 8, load_NLM)
    assert results["placed"] == results["lockstep"]
    assert results["both"] == results["staggered"]


def test_modes_on_a_realistic_recording(recipe: Recipe) -> None:
    """Stagger and placement each help; both help more, in every block."""
    results = measure(recipe, 8, recording(6 * BLOCK))
    for lockstep, staggered, placed, both in zip(*(results[mode] for mode in MODES), strict=True):
        assert both < staggered < lockstep
        assert both < placed < lockstep
    assert {len(values) for values in results.values()} == {3}


def test_command(tmp_path: Path) -> None:
    """The object on the last line names the four modes of the layout that is best with both."""
    np.save(tmp_path / "loads.npy", recording(2 * BLOCK))
    done = CliRunner().invoke(main, ["--loads", str(tmp_path / "loads.npy"), "--json"])
    assert done.exit_code == 0, done.output
    ratios = json.loads(done.output.splitlines()[-1])["ratios"]
    best = min(("8x1", "4x2", "2x4"), key=lambda layout: ratios[f"{layout}_both"])
    assert [ratios[f"imbalance_{mode}"] for mode in MODES] == [ratios[f"{best}_{mode}"] for mode in MODES]
    assert f"8 contiguous shards in lock step, for comparison: {ratios['8x1_lockstep']:.2f}" in done.output


def test_several_recordings(tmp_path: Path) -> None:
    """Each counts once, whatever its length."""
    arguments = []
    for place, load_NLM in enumerate((recording(2 * BLOCK), recording(4 * BLOCK, rows=512))):
        np.save(tmp_path / f"{place}.npy", load_NLM)
        arguments += ["--loads", str(tmp_path / f"{place}.npy")]
    several = CliRunner().invoke(main, arguments)
    assert several.exit_code == 0, several.output
    rounds = [line.split()[-1] for line in several.output.splitlines() if line.startswith("8x1_both")]
    assert rounds == ["2"]


@pytest.mark.parametrize(
    "load, message",
    [
        (np.ones((2 * BLOCK, 8, 32), dtype=np.int64), "must be integers of shape (N, 8, 64)"),
        (np.ones((8, 64), dtype=np.int64), "must be integers of shape (N, 8, 64)"),
        (np.ones((2 * BLOCK, 8, 64)), "float64 of shape"),
        (np.ones((2 * BLOCK - 1, 8, 64), dtype=np.int64), "63 micro-batches; must be at least 64"),
    ],
)
def test_wrong_recordings(tmp_path: Path, load: Counts, message: str) -> None:
    np.save(tmp_path / "loads.npy", load)
    done = CliRunner().invoke(main, ["--loads", str(tmp_path / "loads.npy")])
    assert done.exit_code == 2
    assert message in done.output


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "loads.npy").write_text("0 1 2")
    done = CliRunner().invoke(main, ["--loads", str(tmp_path / "loads.npy")])
    assert done.exit_code == 2
    assert "not an array that numpy.save wrote" in done.output
