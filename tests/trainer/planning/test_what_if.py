"""Variants of a step agree with each other, and show the effect of load and placement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.config.recipe import load_recipe
from trainer.planning.memory import estimate_memory, pool_row_bytes
from trainer.planning.schedule import make_schedule
from trainer.planning.what_if import Counts, read_loads, recommend_splits, what_if

RECIPE = load_recipe("unipool-182m", ["parallel.lanes=2"])


def skewed() -> Counts:
    """Every layer sends half of its tokens to 3 neighbouring experts."""
    load_LM = np.full((12, 96), 100, dtype=np.int64)
    for layer, row in enumerate(load_LM):
        row[8 * layer : 8 * layer + 3] += 3200
    return load_LM


def test_an_even_load() -> None:
    variants = what_if(make_schedule(RECIPE), None)
    ways = {p.way: p for p in variants}
    assert list(ways) == ["lock step", "1 lane", "2 lanes", "3 lanes", "4 lanes"]
    assert recommend_splits(RECIPE, None) == []
    for p in variants:
        assert p.imbalance == pytest.approx(1.0)
        assert p.slowdown >= 1
        assert max(p.trunk_busy, p.pool_busy) <= 1
    assert ways["lock step"].requests_a_slot == 4.0, "all trunk ranks together"
    assert ways["2 lanes"].seconds < ways["1 lane"].seconds < 0.85 * ways["lock step"].seconds
    trunk, pool = estimate_memory(RECIPE, 1)
    assert ways["lock step"].trunk_bytes == trunk.total
    # With one micro-batch in flight the pool keeps what the estimate says, and defers up to the launch after which it
    # has more than it may; the estimate adds that launch to the limit.
    launch = 4 * 4096 * pool_row_bytes(RECIPE)[1]
    assert pool.total - launch < ways["lock step"].pool_bytes <= pool.total


def test_a_skewed_load_and_a_placement_for_it() -> None:
    apart = {(p.way, p.placed): p for p in what_if(make_schedule(RECIPE), skewed())}
    assert len(apart) == 10
    for way in ("lock step", "4 lanes"):
        assert apart[way, True].seconds < apart[way, False].seconds
    assert apart["lock step", False].seconds > what_if(make_schedule(RECIPE), None)[0].seconds
    assert [(split.shards, split.replicas) for split in recommend_splits(RECIPE, skewed())] == [(1, 4), (2, 2), (4, 1)]


def test_loads_are_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "micro_batches.npy", np.stack([skewed(), 2 * skewed()]))
    assert np.array_equal(read_loads(tmp_path / "micro_batches.npy", RECIPE), 3 * skewed())
    np.save(tmp_path / "small.npy", np.ones((8, 64), dtype=np.int64))
    with pytest.raises(UserError, match=r"small.npy: int64 \(8, 64\): must be non-negative integers .*\(12, 96\)"):
        read_loads(tmp_path / "small.npy", RECIPE)
    for text in ("no numbers", ""):
        (tmp_path / "text.npy").write_text(text)
        with pytest.raises(UserError, match=r"text.npy: not a .npy file"):
            read_loads(tmp_path / "text.npy", RECIPE)
    with pytest.raises(UserError, match="has no checkpoint"):
        read_loads(tmp_path, RECIPE)


def test_command(tmp_path: Path) -> None:
    """Tables, one JSON object, and a picture that is a PNG."""
    np.save(tmp_path / "load.npy", skewed())
    picture = tmp_path / "step.png"
    arguments = ["plan", "unipool-182m", "--simulate", "--loads", str(tmp_path / "load.npy")]
    shown = CliRunner().invoke(cli, [*arguments, "--timeline", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "placed" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = json.loads(CliRunner().invoke(cli, [*arguments, "--hardware", "h100", "--json"]).stdout)
    assert len(as_json["simulated"]) == 2 * len({p["way"] for p in as_json["simulated"]})
    assert 0.01 < as_json["simulated"][0]["seconds"] < 100, "seconds on an H100"
