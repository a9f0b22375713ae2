"""Runs that end before their last step, and samples at their evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.trainer.forked import train_as_forked
from tests.trainer.job import write_recipe
from trainer.checkpoint.format import steps_of
from trainer.common.errors import UserError
from trainer.config.job_sections import Eval
from trainer.config.recipe import load_recipe
from trainer.sweep.runs import is_done
from trainer.sweep.spec import Run
from trainer.train.ends.early_stop import EarlyStop, early_stop, ended_early
from trainer.view.records import Records


def test_patience_counts_validations_without_a_new_lowest_loss() -> None:
    stop = EarlyStop(Eval(every=1, patience=2))
    assert [stop.add(loss) for loss in (3.0, 2.0, 2.0, 1.9, math.nan)] == [""] * 5
    resumed = EarlyStop(Eval(every=1, patience=2))
    resumed.restore(stop.state_dict())
    for own in (stop, resumed):
        assert own.add(1.9) == "the last 2 validations (eval.patience) had no loss below 1.9000"


def test_a_loss_that_is_low_enough_ends_a_run() -> None:
    keys = Eval(every=1, stop_below=2.0)
    assert [ended_early(keys, losses) for losses in ([], [3.0, 2.0], [3.0, 1.5], [1.5, 3.0])] == [
        *(False, False, True, False)
    ]
    assert "below eval.stop_below (2)" in EarlyStop(keys).add(1.5)
    assert early_stop(Eval(every=1)) is None and not ended_early(Eval(every=1), [1.0, 2.0, 3.0])


def test_nothing_can_end_a_run_that_is_not_validated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.patience = 2: needs eval.every above 0"):
        load_recipe(str(write_recipe(tmp_path)), ["eval.every=0", "eval.patience=2"])


def test_a_run_ends_early_with_its_checkpoint_and_stays_ended(tmp_path: Path) -> None:
    """Ranks of both roles end together; the same command finds the end again, and a sweep takes the run for done."""
    recipe = str(write_recipe(tmp_path))
    sets = ["train.steps=6", "eval.stop_below=99", 'eval.prompts=["def f", "return"]', "eval.prompt_tokens=3"]
    for _ in range(2):
        status, log = train_as_forked(tmp_path, recipe, *sets)
        assert status == 0, log
        assert "unipool: ended after step 2 of 6: validation loss" in log and "eval.stop_below (99)" in log
    run = tmp_path / "run"
    assert [steps_of(folder) for folder in (run / "checkpoints").iterdir()] == [2]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    (samples,) = [line["samples"] for line in lines if "samples" in line]
    assert [sample["prompt"] for sample in samples] == ["def f", "return"] and all(s["text"] for s in samples)
    checked = load_recipe(recipe, sets)
    records = Records(run)
    records.read()
    assert list(records.val_steps) == [2]
    assert is_done(Run("a", 0, checked))
    assert not is_done(Run("a", 0, load_recipe(recipe, sets[:1])))
