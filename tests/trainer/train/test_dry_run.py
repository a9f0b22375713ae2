"""`train --dry-run`: what it reports, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner

from tests.distributed import TIME_LIMIT
from tests.trainer.forked import ForkedJob
from tests.trainer.job import write_recipe
from trainer.checkpoint.format import RECIPE_FILE
from trainer.checkpoint.format import folder_of as folder_of_steps
from trainer.checkpoint.resume import check
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe, save_recipe
from trainer.data import prepare
from trainer.engine import ds_config
from trainer.train.commands import train
from trainer.train.dry_run import job
from trainer.train.dry_run.rehearsal import FOLDER, MOST_DOCUMENTS, folder_of, new_folder, nothing_left, rehearsal
from trainer.train.pool_rank import PoolRank

PARTS = (
    *("the ranks meet", "data", "schedule and process groups", "model, optimizer and connections"),
    *("an optimizer step", "an evaluation", "a probe", "generated text", "a checkpoint", "the checkpoint read back"),
)


def dry_run(folder: Path, *sets: str) -> tuple[int | None, str]:
    recipe = str(write_recipe(folder))
    command = ["train", recipe, "--dry-run", *(word for value in sets for word in ("--set", value))]
    job = ForkedJob(load_recipe(recipe, sets), folder, command=command)
    return job.end(TIME_LIMIT)[0], job.log(0)


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


def test_pool_ranks_need_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that sees no source, or no prepared data: then their recipe has less data than the checkpoint's."""
    file = write_recipe(tmp_path)
    missing = load_recipe(str(file), [f"data.source={tmp_path}/elsewhere.jsonl"])
    recipe = rehearsal(missing, tmp_path / "tried")
    assert recipe.data.max_documents == MOST_DOCUMENTS
    with pytest.raises(UserError, match="elsewhere.jsonl"):
        prepare.prepare_for(recipe)
    saved = folder_of_steps(tmp_path, 1)
    saved.mkdir()
    save_recipe(recipe.model_copy(update={"data": missing.data}), saved / RECIPE_FILE)
    monkeypatch.setattr(job, "choose", lambda _, own, folder, force: (1, check(own, saved, force)))
    monkeypatch.setattr(job, "load_checkpoint", MagicMock())
    run = MagicMock(recipe=recipe, role=MagicMock(spec=PoolRank, norms=None))
    run.role.evaluate.return_value = (1.0, None)
    run.job.sum_over_ranks.return_value = [0.0]
    job._rehearse(run, MagicMock())


def test_folders_above_that_were_missing_go_too(tmp_path: Path) -> None:
    folder = new_folder(load_recipe(str(write_recipe(tmp_path)), [f"run.dir={tmp_path}/a/b/run"]))
    with nothing_left(folder):
        folder.mkdir(parents=True)
    assert not (tmp_path / "a").exists()


def test_each_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same recipe at the same time; what a process that was killed has left goes with the next one.

    Another container with the same host name has process numbers of its own.
    """
    recipe = load_recipe(str(write_recipe(tmp_path)), [f"run.dir={tmp_path}/[run]"])
    folders = {}
    for pid in (1, 2**22 + 1):  # one runs, the other cannot: Linux has no larger number than 2^22
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        folders[pid] = new_folder(recipe)
        (folders[pid] / "data").mkdir(parents=True)
    longer = tmp_path / f".[run].dry-run-{socket.gethostname()}-1-{2**22 + 1}"  # of the machine "...-1"
    longer.mkdir()
    monkeypatch.setattr("trainer.train.dry_run.rehearsal.process_namespace", lambda: "another container's")
    contained = new_folder(recipe)
    contained.mkdir()
    by_port = folder_of(recipe, 29500)  # under a launcher
    with_hostfile = {host: folder_of(recipe, 29500, host) for host in ("a", "b", "a/b")}
    assert len({by_port, folder_of(recipe, 29501), *with_hostfile.values()}) == 5
    assert {path.parent for path in with_hostfile.values()} == {tmp_path}
    by_port.mkdir()
    monkeypatch.undo()
    assert new_folder(recipe) not in folders.values()
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {folders[1], longer, contained, by_port}
    monkeypatch.setenv(FOLDER, str(folders[1]))
    assert folder_of(recipe, 29500) == folders[1], "that of the command that has started this rank"


@pytest.fixture
def handlers() -> Iterator[None]:
    """Leaves the handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_nothing_is_left_by_a_signal_while_data_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(recipe: Recipe) -> None:
        (Path(recipe.data.dir) / "half").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(prepare, "prepare_for", interrupted)
    monkeypatch.setenv(FOLDER, "")  # which the command sets
    sets = ["--set", "parallel.device=cpu"]
    result = CliRunner().invoke(train, [str(write_recipe(tmp_path)), "--dry-run", *sets])
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl", "tiny.yaml"}


@pytest.mark.usefixtures("handlers")
def test_a_folder_that_training_refuses_is_refused(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    caught = CliRunner().invoke(train, [recipe, "--dry-run", "--set", "parallel.device=cpu"]).exception
    assert isinstance(caught, UserError) and "is an export" in str(caught)


@pytest.mark.usefixtures("handlers")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    sets = ("run.dir=/proc/unipool/run", "parallel.device=cpu", f"data.dir={tmp_path}/data")
    command = [str(write_recipe(tmp_path)), "--dry-run", *(word for value in sets for word in ("--set", value))]
    caught = CliRunner().invoke(train, command).exception
    assert isinstance(caught, UserError) and str(caught).startswith("run.dir = /proc/unipool/.run.dry-run-")


def test_the_current_folder_may_be_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(write_recipe(tmp_path)), ["run.dir=."])
    assert folder_of(recipe, 29500) == tmp_path.with_name(f".{tmp_path.name}.dry-run-29500")


def test_wandb_is_missed_before_training_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="metrics.wandb = mine: wandb is not installed"):
        rehearsal(load_recipe(str(write_recipe(tmp_path)), ["metrics.wandb=mine"]), tmp_path / "tried")
