"""Scores on tasks during training: a process beside it, of which nothing reaches training but scores or a warning."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from tests.distributed import TIME_LIMIT, fork_rank
from trainer.cluster.launch import has_ended
from trainer.common.errors import UserError
from trainer.config.job_sections import Tasks
from trainer.engine.monitors import Monitors
from trainer.train.evaluation import tasks
from trainer.train.evaluation.tasks import BackgroundTasks, Scored

ANSWER = {
    "checkpoint": "step_00000002",
    "tasks": {
        "tasks": [
            {"task": "own", "part": False, "metrics": {"acc": {"value": 0.25}, "perplexity": {"value": None}}},
            {"task": "part of own", "part": True, "metrics": {"acc": {"value": 0.5}}},
        ],
        "mean": {"acc": 0.25, "acc_norm": 0.25, "tasks": 1},
    },
}


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: name)


def background(folder: Path, script: str, *program: str, **keys: object) -> BackgroundTasks:
    """Of tasks that a Python script, or one of another program, scores."""
    settings = Tasks.model_validate({"names": ["own", "other"], **keys})
    return BackgroundTasks(settings, folder, (*(program or (sys.executable, "-c")), script))


def scored(found: BackgroundTasks, saved: int) -> Scored:
    deadline = time.monotonic() + TIME_LIMIT  # at its low priority it may get little of a busy machine
    while time.monotonic() < deadline:
        if done := found.follow(saved):
            return done
        time.sleep(0.01)
    raise AssertionError("no scores")


def test_the_newest_checkpoint_is_scored_when_the_one_before_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = f"""
import os, sys, time
from pathlib import Path
with open({str(tmp_path / "calls")!r}, "a") as file:
    print(*sys.argv[1:], os.environ.get("WORLD_SIZE"), os.nice(0) > {os.nice(0)}, file=file)
while not Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.01)
print({json.dumps(ANSWER)!r})
"""
    found = background(tmp_path, script, limit=5, include_path="mine")
    assert found.follow(0) is None and not (tmp_path / "calls").exists()
    assert [found.follow(saved) for saved in (2, 4, 6)] == [None] * 3
    (tmp_path / "go").touch()
    assert scored(found, 6) == Scored(2, {"own": {"acc": 0.25}})
    assert [own.step for own in found.rest()] == [6], "4 was replaced while 2 was being scored"
    assert scored_flat() == {"tasks/own/acc": 0.25}
    options = "--tasks own,other --device cpu --json --limit 5 --include-path mine None True"
    lines = [f"{tmp_path}/step_{step:08d} {options}" for step in (2, 6)]
    assert (tmp_path / "calls").read_text().splitlines() == lines
    assert "warning" not in capsys.readouterr().err and not list(found.rest())


def scored_flat() -> dict[str, float]:
    return Scored(2, {"own": {"acc": 0.25}}).flat()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; print('error: no such task', file=sys.stderr); sys.exit(2)", "error: no such task"),
        ("import time; time.sleep(60)", "it took longer than tasks.minutes (0.01)"),
        ("print('hello')", "the answer cannot be read"),
        ("import os; os._exit(9)", "status 9"),
        (
            "import os, sys; print('100%', file=sys.stderr); os.kill(os.getpid(), 9)",
            "was killed by SIGKILL, as when mem",
        ),
    ],
)
def test_what_goes_wrong_is_a_warning(
    script: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_warning(background(tmp_path, script, minutes=0.01 if "minutes" in reason else 60.0), reason, capsys)


def test_what_does_not_heed_its_limit_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell has closed its ears long before the limit, even at a low priority on a busy machine."""
    monkeypatch.setattr(tasks, "_GRACE_SECONDS", 1)
    found = background(tmp_path, "trap '' TERM; exec sleep 600", "sh", "-c", minutes=0.1)
    reason = "longer than tasks.minutes (0.1), did not end within 1 s of SIGTERM, and was killed"
    assert_warning(found, reason, capsys)


def assert_warning(found: BackgroundTasks, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert found.follow(2) is None and not list(found.rest())
    warned = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: no scores on tasks of")
    ]
    assert len(warned) == 1 and "after step 2: " in warned[0] and reason in warned[0]


def test_it_ends_with_the_run_and_needs_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = background(tmp_path, "import time; time.sleep(3600)")
    found.follow(2)
    begun = time.monotonic()
    found.stop()
    assert time.monotonic() - begun < TIME_LIMIT and not found._running
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tasks.names = own, other: requires lm-evaluation-harness"):
        background(tmp_path, "")


def test_a_disk_without_room_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tasks.tempfile, "TemporaryFile", full)
    assert background(tmp_path, "").follow(2) is None
    assert "no scores on tasks of the checkpoint after step 2: [Errno 28]" in capsys.readouterr().err


def test_a_rank_that_dies_takes_it_along_and_short_memory_ends_it_first(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
Path({str(tmp_path / "partial")!r}).write_text(f"{{os.getpid()}} {{Path('/proc/self/oom_score_adj').read_text()}}")
os.rename({str(tmp_path / "partial")!r}, {str(tmp_path / "started")!r})
time.sleep(3600)
"""
    with fork_rank(_follow_until_started, tmp_path, script) as rank:
        rank.join(TIME_LIMIT)
        assert rank.exitcode == 0
    number, score = (tmp_path / "started").read_text().split()
    assert score == "1000"
    deadline = time.monotonic() + TIME_LIMIT
    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int(number))
        while not has_ended(orphan):
            assert time.monotonic() < deadline, "it goes on without its rank"
            time.sleep(0.01)


def _follow_until_started(folder: Path, script: str) -> None:
    tasks.find_spec = lambda name: name
    background(folder, script).follow(2)
    while not (folder / "started").exists():
        time.sleep(0.01)


def test_scores_that_come_when_the_ranks_have_left_reach_tensorboard() -> None:
    deepspeeds = MagicMock(enabled=True)
    deepspeeds.write_events.side_effect = AssertionError("DeepSpeed backend not set")
    Monitors(deepspeeds).write_late({"tasks/own/acc": 0.25}, 2)
    deepspeeds.tb_monitor.summary_writer.add_scalar.assert_called_once_with("tasks/own/acc", 0.25, 2)
