"""`train --dry-run`: what it reports, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.forked import ForkedJob
from tests.trainer.job import write_recipe
from trainer.config.recipe import load_recipe
from trainer.train.dry_run.rehearsal import folder_of, nothing_left

PARTS = (
    *("the ranks meet", "data", "schedule and process groups", "model, optimizer and connections"),
    *("an optimizer step", "an evaluation", "a probe", "generated text", "a checkpoint", "the checkpoint read back"),
)


def dry_run(folder: Path, *sets: str) -> tuple[int | None, str]:
    recipe = str(write_recipe(folder))
    command = ["train", recipe, "--dry-run", *(word for value in sets for word in ("--set", value))]
    job = ForkedJob(load_recipe(recipe, sets), folder, command=command)
    return job.end(240.0)[0], job.log(0)


@pytest.mark.parametrize("layout", ["dedicated", "every_rank"])
def test_every_part_works_and_an_existing_run_is_not_touched(tmp_path: Path, layout: str) -> None:
    ranks = {"dedicated": (), "every_rank": ("parallel.trunk_ranks=2", "parallel.pool_ranks=0", "pool.experts=8")}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "mine").write_text("kept")
    status, log = dry_run(tmp_path, f"parallel.layout={layout}", *ranks[layout], 'eval.prompts=["def"]')
    assert status == 0, log
    rows = [line for line in log.splitlines() if line.rstrip().endswith(" works")]
    assert {row.strip().partition("  ")[0] for row in rows} == {*PARTS, "look for checkpoints"}, log
    assert "A step needs" in log and "FAILED" not in log
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.suffix != ".log"}
    assert left == {"run", "run/checkpoints", "run/mine", "text.jsonl", "tiny.yaml"}


def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    status, log = dry_run(tmp_path, "model.init_std=1e30", "parallel.pool_ranks=0")
    assert status == 1
    (row,) = [line for line in log.splitlines() if "FAILED" in line]
    assert row.strip().startswith("an optimizer step ") and "gradients of the first step are not finite" in row
    assert "unipool: the gradients of the first step are not finite" in log
    assert not list(tmp_path.glob(".run*"))


def test_folders_above_that_were_missing_go_too(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path)), [f"run.dir={tmp_path}/a/b/run"])
    with nothing_left(recipe):
        folder_of(recipe).mkdir(parents=True)
    assert not (tmp_path / "a").exists()
