"""Tokens that a variant needs for the baseline's last loss, the bands of the curves, and the best point of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trainer.sweep.plot import draw_curves
from trainer.sweep.result import MEASURES, RunResult, SweepResult, collect, steps_to_reach, variant_result
from trainer.sweep.spec import Experiment, load_sweep
from trainer.sweep.table import print_result

TOKENS = 16 * 128
"""Tokens of a step of the recipe `small`."""


def a_run(seed: int, losses: Sequence[float]) -> RunResult:
    """A run that was validated every ten steps."""
    steps = tuple(range(10, 10 * len(losses) + 1, 10))
    measures = dict.fromkeys(MEASURES, 1.0)
    return RunResult(seed=seed, folder="", val_loss=losses[-1], val_steps=steps, val_losses=tuple(losses), **measures)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    sweep = {
        "base": "small",
        "baseline": "raw",
        "seeds": [0, 1],
        "set": {"train.steps": 30},
        "variants": {"raw": {}, "other": {"balance.scores": "normalized"}},
        "grid": {"train.lr": [1e-3, 2e-3]},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return load_sweep(str(tmp_path / "s.yaml"), folder=tmp_path / "runs")


BASELINE = [a_run(0, (4.0, 3.0, 2.5)), a_run(1, (4.2, 3.2, 2.6))]


def result_of(experiment: Experiment, runs: Sequence[RunResult]) -> SweepResult:
    """A result in which `other` has these runs at the first learning rate, and 0.5 more loss at the second."""
    empty = collect(experiment)
    worse = [replace(run, val_loss=run.val_loss + 0.5) for run in runs]
    by_name = {"raw,train.lr=0.001": BASELINE, "other,train.lr=0.001": runs, "other,train.lr=0.002": worse}
    variants = [
        variant_result(cell, by_name.get(cell.name, BASELINE), None if cell.baseline is None else BASELINE)
        for cell in experiment.cells
    ]
    return replace(empty, variants=tuple(variants))


def test_steps_to_a_loss_by_hand() -> None:
    run = a_run(0, (4.0, 3.0, 3.5, 2.0))
    assert steps_to_reach(run, 3.25) == pytest.approx(17.5), "between two validations, the first time"
    assert steps_to_reach(run, 2.0) == 40 and steps_to_reach(run, 3.0) == 20
    assert steps_to_reach(run, 5.0) == 10, "no earlier than the first validation"
    assert math.isnan(steps_to_reach(run, 1.9))


def test_tokens_to_the_baselines_last_loss(experiment: Experiment) -> None:
    """Each seed is compared with the baseline's own loss, and a seed that does not reach it does not count."""
    both = result_of(experiment, [a_run(0, (4.0, 2.75, 2.25)), a_run(1, (4.1, 2.7, 2.5))]).variants[2]
    assert both.variant == "other" and both.tokens_to_baseline is not None
    assert both.tokens_to_baseline.mean == pytest.approx((25 + 25) / 2 * TOKENS) and both.tokens_to_baseline.n == 2
    one = result_of(experiment, [a_run(0, (4.0, 2.0, 1.0)), a_run(1, (4.1, 2.7, 2.65))]).variants[2]
    assert one.tokens_to_baseline is not None and one.tokens_to_baseline.n == 1
    assert one.tokens_to_baseline.mean == pytest.approx(17.5 * TOKENS)


def test_the_table_says_who_reaches_and_which_point_is_best(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(result_of(experiment, [a_run(0, (4.0, 2.0, 1.0)), a_run(1, (4.1, 2.7, 2.65))]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (best,) = [line for line in lines if line.startswith("other * ")]
    assert best.startswith("other * 0.001 ") and " 35.8K (1/2) " in best
    (worse,) = [line for line in lines if line.startswith("other 0.002")]
    assert " 35.8K (1/2) " in worse
    assert "* the point of the axes" in " ".join(lines)


def test_bands_are_the_intervals_of_the_mean(experiment: Experiment) -> None:
    """Around the two curves that stand out, if they have several seeds."""
    runs = [a_run(0, (4.0, 2.75, 2.25)), a_run(1, (4.1, 2.7, 2.5))]
    result = result_of(experiment, runs)
    shown = result.variants[::2]  # both variants at the first learning rate
    losses, differences = draw_curves(result, shown).axes
    assert (len(losses.collections), len(differences.collections)) == (2, 1)
    (band,) = differences.collections
    ends = [y for x, y in band.get_paths()[0].vertices if x == 30 * TOKENS]
    difference = shown[1].difference
    assert difference is not None
    assert (min(ends), max(ends)) == pytest.approx((difference.low, difference.high))
    single = replace(result, variants=tuple(replace(v, runs=v.runs[:1]) for v in shown))
    assert not any(axes.collections for axes in draw_curves(single, single.variants).axes)
