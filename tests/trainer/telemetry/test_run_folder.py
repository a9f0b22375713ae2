"""The run's folder: metrics survive resumes and full disks; a full disk turns off monitors and nothing else."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.training import tiny
from trainer.common.errors import Unavailable, UserError
from trainer.common.versions import software
from trainer.engine.monitors import Monitors
from trainer.telemetry import run_folder
from trainer.telemetry.run_folder import RunFolder


def write_on_a_full_disk(folder: Path) -> str:
    """What is said on stderr."""
    run = RunFolder(tiny(run={"dir": str(folder)}))
    run.make()
    said = io.StringIO()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(said):
        run.append_metrics({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # room for half of the second line
        for step in (2, 3):
            run.append_metrics({"step": step})
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        run.append_metrics({"step": 4})
    return said.getvalue()


@pytest.mark.parametrize("there", [True, False])
def test_only_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    run = RunFolder(tiny(run={"dir": str(folder)}))
    run.make()
    with pytest.raises(KeyError), run.removed_if_unused():
        raise KeyError
    assert folder.exists() == there


@pytest.mark.parametrize("file", ["plan.json", None])
def test_a_disk_that_is_full_before_the_first_step_is_named(file: str | None, tmp_path: Path) -> None:
    """Whoever was to write there. Not all say where, and then it need not be a disk. The folder is gone again."""
    run = RunFolder(tiny(run={"dir": str(tmp_path / "run")}))
    run.make()
    with pytest.raises(Unavailable) as caught, run.removed_if_unused():
        raise OSError(errno.ENOSPC, "No space left on device", *([file] if file else []))
    here = f"{test_a_disk_that_is_full_before_the_first_step_is_named.__name__} in {Path(__file__).name} names no file"
    guess = "" if file else f"if the disk of this folder or of {tempfile.gettempdir()} is full, "
    assert str(caught.value) == (
        f"run.dir = {tmp_path}/run: No space left on device ({file or here}); "
        f"{guess}free some space or choose another folder"
    )
    assert caught.value.status == 1 and not run.path.exists()


def test_an_export_is_not_taken_for_a_run(tmp_path: Path) -> None:
    """Commands would read the export in it, and not what was trained."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an export .* choose another folder"):
        RunFolder(tiny(run={"dir": str(tmp_path)})).make()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_loses_whole_lines_and_says_so_once(tmp_path: Path) -> None:
    (said,) = run_ranks(1, write_on_a_full_disk, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    assert said.count("metrics.jsonl: lines are lost (") == 1


def test_prometheus_finds_a_run_for_as_long_as_it_lasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the run's folder and in the one that is watched; if that is gone, the run goes on with a warning."""
    watched = tmp_path / "watched"
    run = RunFolder(tiny(run={"dir": str(tmp_path / "run")}, metrics={"targets_dir": str(watched)}))
    run.make()
    run.announce(["127.0.0.1:9400", "127.0.0.1:9401"])
    files = [tmp_path / "run" / "targets.json", watched / "run.json"]
    for file in files:
        assert json.loads(file.read_text()) == [
            {"targets": ["127.0.0.1:9400", "127.0.0.1:9401"], "labels": {"run": "run"}}
        ]
    run.withdraw()
    assert not any(file.exists() for file in files)
    run.announce(["127.0.0.1:9400", ""])
    assert not any(file.exists() for file in files), "a rank that cannot listen ends the job"
    run.announce(["127.0.0.1:9400"])
    with pytest.raises(UserError), run.removed_if_unused():
        raise UserError("the data is not there")
    assert not (tmp_path / "run").exists() and not files[1].exists(), "nobody is missing from a run that has not begun"
    run.make()
    watched.rmdir()
    watched.write_text("no folder")
    run.announce(["127.0.0.1:9400"])
    run.withdraw()
    assert f"warning: {watched}/run.json: cannot be written" in capsys.readouterr().err


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """The evaluation and the probe after the checkpoint's step too: they are made again."""
    run = RunFolder(tiny(run={"dir": str(tmp_path)}))
    run.make()
    records = [{"step": 1, "loss": 3.0}, {"step": 1, "val_loss": 3.0}, {"step": 2, "loss": 2.0}]
    records += [{"step": 2, "val_loss": 2.0}, {"step": 2, "random_routing": 0.1}, {"step": 3, "loss": 1.0}]
    for record in records:
        run.append_metrics(record)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')  # a killed run's last line
    run.begin(tiny(), '{"lanes": 1}', "CPU", {"tokenizer.json": "{}"}, done_steps=2)
    plan = json.loads(run.plan_file.read_text())
    assert plan == {"lanes": 1, "devices": "CPU", "software": software(), "started": plan["started"], "recorded": 3}
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == records[:3]
    assert run.recorded == 3, "the third step will be done again"
    again = RunFolder(tiny(run={"dir": str(tmp_path)}))
    again.begin(tiny(), '{"lanes": 1}', "CPU", {"tokenizer.json": "{}"}, done_steps=2)
    assert again.recorded == 3, "a second fault came before the third step was done again"
    run.plan_file.write_text('{"recorded": 1e999}')
    again.begin(tiny(), '{"lanes": 1}', "CPU", {"tokenizer.json": "{}"}, done_steps=2)
    assert again.recorded == 2, "what is damaged does not count"


def test_goodput_counts_each_step_once_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were lost, skipped steps, and all other time since the first start are in the denominator alone."""

    def start(done: int, now: float) -> RunFolder:
        monkeypatch.setattr(run_folder.psutil, "Process", lambda: SimpleNamespace(create_time=lambda: now))
        run = RunFolder(tiny(run={"dir": str(tmp_path)}))
        run.make()
        run.begin(tiny(), '{"lanes": 1}', "CPU", {"tokenizer.json": "{}"}, done_steps=done)
        return run

    def step(run: RunFolder, number: int, now: float, applied: bool = True) -> float:
        monkeypatch.setattr(run_folder.time, "time", lambda: now)
        run.append_metrics({"step": number, "loss": 1.0, "seconds": 10.0, "applied": applied})
        return run.goodput(10.0 * applied)

    first = start(0, 1000.0)
    assert step(first, 1, 1020.0) == 10 / 20
    assert step(first, 2, 1030.0, applied=False) == 10 / 30
    assert step(first, 3, 1040.0) == 20 / 40
    first.append_metrics({"step": 3, "val_loss": 1.0})
    again = start(2, 1090.0)  # step 3 was lost
    assert step(again, 3, 1100.0) == 20 / 100
    (tmp_path / "plan.json").write_text('{"lanes": 1, "devices": "CPU"}')  # of an earlier version
    assert step(start(3, 2000.0), 4, 2020.0) == 10 / 20


def test_monitors_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def write_events(events: list[Any]) -> None:
        raise OSError(28, "No space left on device")

    monitor = SimpleNamespace(write_events=write_events, enabled=True)
    Monitors(monitor).write({"loss": 1.0}, 1)
    assert not monitor.enabled
    assert "monitors are off until the next start (No space left on device)" in capsys.readouterr().err


def test_a_picture_is_written_at_once() -> None:
    """Its run may end without another record, and without TensorBoard's thread."""
    done: list[str] = []
    writer = SimpleNamespace(add_image=lambda *_, **__: done.append("add"), flush=lambda: done.append("flush"))
    monitor = SimpleNamespace(write_events=None, enabled=True, tb_monitor=SimpleNamespace(summary_writer=writer))
    Monitors(monitor).write_image("load", lambda: np.zeros((1, 1, 3), np.uint8), 1)
    assert done == ["add", "flush"]
