"""What a rank is doing, and what the time of its process goes into."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from trainer.common.errors import DIVERGED, START_AGAIN
from trainer.telemetry.rank_time import CAUSES, RankTime
from trainer.telemetry.serving import Stage
from trainer.train import loop


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "now", 1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_causes_add_up_to_the_time_of_the_process(clock: type[Clock]) -> None:
    spent = RankTime(age=5.0)
    for seconds, act in (
        (2.0, lambda: spent.enter("rendezvous")),
        (3.0, lambda: spent.enter("preparing")),
        (7.0, lambda: spent.enter("training")),  # 17 s since the start
        (1.0, lambda: spent.stepped("lost")),
        (1.5, lambda: spent.stepped("training")),
        (0.25, lambda: spent.enter("training")),  # between two steps
        (2.5, lambda: spent.stepped("skipped")),
        (0.5, lambda: spent.enter("evaluating")),
        (4.0, lambda: spent.enter("saving")),
        (6.0, lambda: spent.enter("stopping")),
        (8.0, lambda: spent.enter("finished")),
    ):
        clock.now += seconds
        act()
    found = spent.seconds()
    assert found == {
        "startup": 17.0,
        "training": 2.25,
        "skipped": 2.5,
        "lost": 1.0,
        "evaluation": 4.0,
        "checkpoint": 6.0,
        "shutdown": 8.0,
    }
    assert sum(found.values()) == clock.now - 1000.0 + 5.0


def test_what_lasts_is_served_meanwhile_but_not_a_step_that_may_be_skipped(clock: type[Clock]) -> None:
    """No cause ever decreases: Prometheus would take that for a restart."""
    spent = RankTime()
    clock.now += 60.0
    assert spent.seconds()["startup"] == 60.0
    spent.enter("training")
    clock.now += 30.0
    assert spent.seconds() == dict.fromkeys(CAUSES, 0.0) | {"startup": 60.0}
    spent.stepped("skipped")
    assert spent.seconds() == dict.fromkeys(CAUSES, 0.0) | {"startup": 60.0, "skipped": 30.0}


def test_a_step_that_a_fault_cuts_off_is_lost(clock: type[Clock]) -> None:
    spent = RankTime()
    spent.enter("training")
    clock.now += 30.0
    spent.enter("failed")
    clock.now += 2.0
    assert spent.seconds() == dict.fromkeys(CAUSES, 0.0) | {"lost": 30.0, "shutdown": 2.0}


@pytest.mark.parametrize(("status", "phase"), [(0, "finished"), (START_AGAIN, "stopping"), (DIVERGED, "failed")])
def test_only_a_run_with_all_its_steps_is_finished(status: int, phase: str) -> None:
    stage = Stage(MagicMock(), MagicMock(time=RankTime()))
    stage.enter("stopping", "the checkpoint before a stop")
    stage.end(status)
    assert stage.metrics.time.phase == phase


def test_steps_that_were_done_before_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after step 2 where 4 were done: steps 3 and 4 are done again. Skipped again, they are still lost."""
    outcomes = iter([(True, "lost"), (False, "lost"), (True, "training"), (False, "skipped"), (True, "training")])
    stage = Stage(MagicMock(stop_asked=False), MagicMock())
    saver, reporter = MagicMock(saved=0), MagicMock()
    run = SimpleNamespace(role=MagicMock(), job=None, stage=stage, saver=saver, reporter=reporter, recorded=4, start=2)
    run.reporter.usage.return_value = []
    run.recipe = MagicMock()
    run.recipe.train.max_skipped_steps = 9
    causes = []
    steps = loop.Loop(run)  # type: ignore[arg-type]
    for step, (finite, cause) in enumerate(outcomes, 2):
        outcome = loop.StepOutcome(None, finite, finite, [0.0, 0.0])
        monkeypatch.setattr(loop, "update", lambda *_, outcome=outcome: outcome)
        steps._step(step)
        causes.append(cause)
    assert [call.args[0] for call in stage.metrics.time.stepped.call_args_list] == causes  # type: ignore[attr-defined]
