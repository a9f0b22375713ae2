"""The comparison of a sweep's probes: who is compared with whom, and over which layers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from click.testing import CliRunner

from tests.benchmarks.randomized import main

ADDED = {"vanilla": 0.2, "unipool": 0.3, "other": 0.1}
"""What random experts of the layer's own add in the deep half, with seed 0; twice as much before it."""


def test_table_numbers_and_picture(tmp_path: Path) -> None:
    """Seed 1 adds 0.01 everywhere, and what UniPool adds to vanilla is 0.02 more there; the full pool doubles all."""
    for variant, deep in ADDED.items():
        for seed in (0, 1):
            more = 0.01 * seed + 0.02 * seed * (variant == "unipool")
            layers = [
                {"layer": layer, "over": over, "increase": (deep * (2 if layer < 2 else 1) + more) * factor}
                for layer in range(4)
                for over, factor in (("layer", 1), ("pool", 2))
            ]
            (tmp_path / f"{variant}-{seed}.json").write_text(json.dumps({"layers": layers}))
    done = CliRunner().invoke(main, [str(tmp_path), str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    # The interval of two seeds is 12.706 times their standard error, 0.01.
    assert rows == [
        ["`vanilla`", "2", "0.305", "", "0.610", "0.205", "", "0.410"],
        [
            "`unipool`",
            "2",
            "0.465",
            "+0.160 (+0.033 to +0.287)",
            "0.930",
            "0.315",
            "+0.110 (-0.017 to +0.237)",
            "0.630",
        ],
        ["`other`", "2", "0.155", "-0.150 (-0.150 to -0.150)", "0.310", "0.105", "-0.100 (-0.100 to -0.100)", "0.210"],
    ]
    numbers = list(csv.DictReader((tmp_path / "randomized.csv").open()))
    assert len(numbers) == 3 * 2 * 4 * 2
    assert {"variant": "unipool", "seed": "1", "layer": "3", "over": "pool", "nats": "0.66"} in numbers
    assert (tmp_path / "randomized.svg").stat().st_size > 1000


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path), str(tmp_path)])
    assert done.exit_code and "has no results named VARIANT-SEED.json" in done.output
