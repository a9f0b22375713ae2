"""Restarts: after kills at random moments, faults and signals a job continues as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.faults.jobs import PLUG, Pause
from tests.trainer.forked import NAMES, POLL_SECONDS, POOL, TRUNK, ForkedJob, saving_recipe
from tests.trainer.job import (
    ROOT,
    TIME_LIMIT,
    processes_of,
    rank_process,
    started,
    steps,
    wait_for,
    write_recipe,
)
from trainer.checkpoint.format import newest
from trainer.common.errors import START_AGAIN
from trainer.config.recipe import Recipe

pytestmark = pytest.mark.slow

TRAIN = (sys.executable, "-m", "trainer", "train")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("restarts")))


@pytest.fixture(scope="module")
def recipe(recipe_file: str) -> Callable[..., Recipe]:
    """Makes the tiny recipe with some keys set; its data is prepared once."""
    return partial(saving_recipe, recipe_file)


KILLS = 8
KEYS = {"train__steps": 60, "eval__every": 10, "checkpoint__every": 3, "parallel__start_timeout_seconds": 20}


@pytest.fixture(scope="module")
def undisturbed(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What a run of KEYS comes to when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = ForkedJob(recipe(folder / "run", **KEYS), folder)
    assert job.end(TIME_LIMIT) == [0, 0], job.log(0)
    return steps(folder / "run")


def test_training_goes_through_random_kills(
    recipe: Callable[..., Recipe], undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    """Each time a random rank at a random moment: losses come to those of an undisturbed run, bit for bit."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    disturbed = recipe(tmp_path / "disturbed", **KEYS)
    for _ in range(KILLS):
        job = ForkedJob(disturbed, tmp_path)
        _await_moment(job, tmp_path / "disturbed" / "metrics.jsonl", choose)
        victim = choose.randrange(2)
        job.kill(victim)
        statuses = job.end(TIME_LIMIT)
        if statuses[1 - victim] == 0:  # this process was late, and the job had done all its steps
            done = newest(tmp_path / "disturbed" / "checkpoints")
            assert done and done[0] == KEYS["train__steps"], job.log(1 - victim)
            break
        assert statuses[victim] == -9, job.log(victim)
        assert statuses[1 - victim] == 1, job.log(1 - victim)
        assert NAMES[victim] in job.log(1 - victim)
    job = ForkedJob(disturbed, tmp_path)
    assert job.end(TIME_LIMIT) == [0, 0], job.log(0)
    assert steps(tmp_path / "disturbed") == undisturbed


def _await_moment(job: ForkedJob, metrics: Path, choose: random.Random) -> None:
    """Some time after the start of the job, or some steps on."""
    if choose.random() < 0.3:
        time.sleep(choose.uniform(0.2, 1.2))
        return
    wanted, deadline = _lines(metrics) + choose.randint(1, 5), time.monotonic() + TIME_LIMIT
    while all(job.running) and _lines(metrics) < wanted:
        assert time.monotonic() < deadline, job.log(0)
        time.sleep(POLL_SECONDS)
    time.sleep(choose.uniform(0.0, 0.05))


def _lines(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


# --- jobs as a user starts them ---

LONG = ("--set", "train.steps=100000", "--set", "eval.every=0")


def test_restarts_after_a_fault(recipe_file: str, undisturbed: list[dict[str, float]], tmp_path: Path) -> None:
    """`--max-restarts 2`: a rank is killed, and the job comes to the end of an undisturbed run."""
    mark = f"run.dir={tmp_path / 'run'}"
    sets = [word for key, value in KEYS.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    place = Pause(POOL, "trainer.engine.role_engine:RoleEngine.step", number=8)  # the second save has awaited the first
    pause = json.dumps(asdict(place) | {"folder": str(tmp_path)})
    paused = {"PYTHONPATH": f"{PLUG}:{ROOT}", "UNIPOOL_TEST_PAUSE": pause}
    with started(*TRAIN, recipe_file, "--max-restarts", "2", *sets, "--set", mark, **paused) as (job, log):
        deadline = time.monotonic() + TIME_LIMIT
        while not (tmp_path / "reached").exists():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(POLL_SECONDS)
        assert newest(tmp_path / "run" / "checkpoints")
        rank_process(mark, POOL).kill()
        text = wait_for(log, "; restart 1 of 2 from the newest checkpoint")
        # The other one says "died first", unless the launcher ends it before: "received SIGTERM after ... died".
        assert re.search(rf"{re.escape(NAMES[TRUNK])} stopped during .*{re.escape(NAMES[POOL])} died", text), text
        assert f"{START_AGAIN}; restart" not in text
        assert job.wait(TIME_LIMIT) == 0, log.read_text()
        assert processes_of(mark) == []
        assert log.read_text().count("resuming after step") == 1
    assert steps(tmp_path / "run") == undisturbed


def test_ctrl_c_ends_every_process(recipe_file: str, tmp_path: Path) -> None:
    mark = f"run.dir={tmp_path / 'run'}"
    with started(*TRAIN, recipe_file, *LONG, "--set", mark) as (job, log):
        wait_for(log, "step 1/")
        job.send_signal(signal.SIGINT)
        assert job.wait(TIME_LIMIT) == 128 + signal.SIGINT
        assert processes_of(mark) == []
        assert "Traceback" not in log.read_text()


def test_sigterm_and_sigusr1_save_and_ask_to_be_started_again(
    recipe_file: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Twice; the steps of all starts together are those of a run that nobody signalled."""
    mark = f"run.dir={tmp_path / 'run'}"
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with started(*TRAIN, recipe_file, *LONG, "--set", mark) as (job, log):
            wait_for(log, "/100000: loss")
            job.send_signal(number)
            assert job.wait(TIME_LIMIT) == START_AGAIN, log.read_text()
            assert processes_of(mark) == []
            assert "Traceback" not in log.read_text()
    assert "resuming after step" in log.read_text()
    done = steps(tmp_path / "run")
    other = ForkedJob(recipe(tmp_path / "other", train__steps=100000, eval__every=0), tmp_path)
    deadline = time.monotonic() + TIME_LIMIT
    while _lines(tmp_path / "other" / "metrics.jsonl") < len(done):
        assert all(other.running) and time.monotonic() < deadline, other.log(0)
        time.sleep(POLL_SECONDS)
    other.end(0.0)
    assert steps(tmp_path / "other")[: len(done)] == done


def test_no_process_outlives_a_killed_launcher(recipe_file: str, tmp_path: Path) -> None:
    mark = f"run.dir={tmp_path / 'run'}"
    with started(*TRAIN, recipe_file, *LONG, "--set", mark) as (job, log):
        wait_for(log, "step 1/")
        job.kill()
        wait_for(log, "its launcher is gone")
        psutil.wait_procs(processes_of(mark), timeout=TIME_LIMIT)
        assert [p for p in processes_of(mark) if p.pid != job.pid] == []
