"""Faults: whoever dies, stands still or raises, and wherever, the job ends in time, names it, and goes on again."""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pool.plan import Kind, RequestKey
from tests.trainer.forked import POLL_SECONDS, Fault, ForkedJob, Place, fail, kill, stop
from tests.trainer.job import TIME_LIMIT, processes_of, rank_process, started, steps, wait_for, write_recipe
from trainer.checkpoint import newest
from trainer.config import Recipe, load_recipe
from trainer.errors import START_AGAIN

pytestmark = pytest.mark.slow

GRACE = 90.0
"""Seconds that a rank has, beyond the configured limit, to find out about a fault and to end."""

NAMES = ("rank 0 (trunk 0)", "rank 1 (pool 0, shard 0)")
TRUNK, POOL = 0, 1
TRAIN = (sys.executable, "-m", "trainer", "train")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def recipe(recipe_file: str) -> Callable[..., Recipe]:
    """Makes the tiny recipe with some keys set; its data is prepared once."""

    def make(run_dir: Path, **keys: Any) -> Recipe:
        sets = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
        return load_recipe(recipe_file, [f"run.dir={run_dir}", "checkpoint.every=2", *sets])

    return make


def requested(kind: Kind, _wire: Any, key: RequestKey, step: int, *_: Any) -> bool:
    """Whether a trunk rank asks for this in step 1: not its first request, so the pool is there too."""
    return key.kind == kind and step >= 1 and key.layer == 1


def served(kind: Kind, _service: Any, served_kind: Kind, keys: list[RequestKey], _requests: Any, step: int) -> bool:
    """Whether a pool rank serves this in step 1."""
    return served_kind == kind and step >= 1 and bool(keys)


START_UP = "start-up"
STEP = r"[a-z ]*step [01]"
WHILE_SAVING = r"(the (checkpoint|evaluation) after step [24]|[a-z ]*step [23])"
"""The other rank goes on while a checkpoint is written."""
LAST_SAVE = Place("trainer.train:_Loop._finish_saving")
PLACES = {
    "start-up": (START_UP, [Place("trainer.job:Job._cross_group")] * 2),
    "engines": (START_UP, [Place("trainer.metrics:MetricsServer.__init__")] * 2),
    "forward": (
        STEP,
        [
            Place("pool.wire:TrunkWire.request", partial(requested, Kind.FORWARD)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.FORWARD)),
        ],
    ),
    "backward": (
        STEP,
        [
            Place("pool.wire:TrunkWire.request", partial(requested, Kind.BACKWARD)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.BACKWARD)),
        ],
    ),
    "step": (STEP, [Place("trainer.engine:RoleEngine.step")] * 2),
    "evaluation": (
        "the evaluation after step 2",
        [
            Place("pool.wire:TrunkWire.request", partial(requested, Kind.FORWARD_ONLY)),
            Place("pool.service:PoolService._serve_kind", partial(served, Kind.FORWARD_ONLY)),
        ],
    ),
    "copying for a save": (WHILE_SAVING, [Place("trainer.engine:RoleEngine.save")] * 2),
    "writing a save": (WHILE_SAVING, [Place("trainer.saver:_write", number=2)] * 2),
    "last save": ("the (last checkpoint|evaluation after step 4)", [LAST_SAVE] * 2),
}
"""Where a fault happens: the phase in which the other rank then is, and the place on a trunk and on a pool rank."""


def assert_named(log: str, phase: str, victim: int, fate: str) -> None:
    """The rank that wrote `log` says in which phase it stopped, and why."""
    wanted = rf"^unipool: rank {1 - victim}.* (stops|failed) in {phase}.*: .*{re.escape(NAMES[victim])}.*{fate}"
    assert re.search(wanted, log, re.M), f"no {wanted!r} in:\n{log}"


@pytest.mark.parametrize("victim", [TRUNK, POOL])
@pytest.mark.parametrize("phase", PLACES)
def test_a_killed_rank_is_named(phase: str, victim: int, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """All limits are long here: a death is noticed at once."""
    others_phase, places = PLACES[phase]
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, places[victim], kill))
    statuses = job.end(GRACE)
    assert statuses[victim] == -9
    assert statuses[1 - victim] == 1, job.log(1 - victim)
    assert_named(job.log(1 - victim), others_phase, victim, "died")


@pytest.mark.parametrize("victim", [TRUNK, POOL])
def test_a_rank_killed_on_another_machine_is_named(victim: int, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """All limits are long here: its connections break, and it is known by its heartbeats. Rank 0 holds the store."""
    others_phase, places = PLACES["forward"]
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, places[victim], kill), apart=True)
    assert job.end(GRACE)[1 - victim] == 1, job.log(1 - victim)
    assert_named(job.log(1 - victim), others_phase, victim, "does not respond")


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (TRUNK, Place("trainer.data.batches:SequenceStream.micro_batches", number=2)),
        (POOL, Place("pool.experts:ExpertServer.forward", number=5)),
    ],
)
def test_an_exception_is_named_by_both(
    victim: int, place: Place, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """User data that raises in its second step, and experts that do."""
    job = ForkedJob(recipe(tmp_path / "run"), tmp_path, Fault(victim, place, fail))
    assert job.end(GRACE) == [1, 1]
    wanted = rf"^unipool: {re.escape(NAMES[victim])} failed in {STEP}.*: ValueError: this row is broken"
    assert re.search(wanted, job.log(victim), re.M), job.log(victim)
    assert "Traceback" in job.log(victim)
    assert_named(job.log(1 - victim), STEP, victim, "died")


# Long enough that, where all these jobs start at once on a busy machine, only the stopped rank is late.
LIMIT = 8.0
START_LIMIT = 12.0
SAVE_LIMIT = 25.0
STOPS = {
    "before the store is there": (TRUNK, START_UP, Place("trainer.train:take_seat"), START_LIMIT, "has not come"),
    "before the roll call": (POOL, START_UP, Place("trainer.train:take_seat"), START_LIMIT, "has not come"),
    "start-up, trunk": (TRUNK, START_UP, PLACES["start-up"][1][TRUNK], START_LIMIT, "does not respond"),
    "start-up, pool": (POOL, START_UP, PLACES["start-up"][1][POOL], START_LIMIT, "does not respond"),
    "forward": (POOL, STEP, PLACES["forward"][1][POOL], LIMIT, "does not respond"),
    "step": (TRUNK, STEP, PLACES["step"][1][TRUNK], LIMIT, "does not respond"),
    "evaluation": (POOL, PLACES["evaluation"][0], PLACES["evaluation"][1][POOL], LIMIT, "does not respond"),
    "last save": (TRUNK, "the last checkpoint", LAST_SAVE, SAVE_LIMIT, "does not respond"),
}


@pytest.fixture(scope="module")
def stopped(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ForkedJob]:
    """All jobs with a stopped rank at once, for they mostly wait."""
    jobs = {}
    for name, (victim, _, place, limit, _) in STOPS.items():
        folder = tmp_path_factory.mktemp("stopped")
        limits = {"parallel__timeout_seconds": LIMIT}
        if limit != LIMIT:
            limits["parallel__start_timeout_seconds"] = limit
        jobs[name] = ForkedJob(recipe(folder / "run", **limits), folder, Fault(victim, place, stop))
    return jobs


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_rank_is_named(name: str, stopped: dict[str, ForkedJob]) -> None:
    """SIGSTOP: nothing is closed, only time tells."""
    victim, phase, _, limit, fate = STOPS[name]
    job = stopped[name]
    statuses = job.end(limit + GRACE, without=victim)
    assert statuses[victim] is None
    assert statuses[1 - victim] == 1, job.log(1 - victim)
    assert_named(job.log(1 - victim), phase, victim, fate)


def test_too_many_skipped_steps_end_the_job_and_name_their_data(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Weights that a huge rate has blown up: three steps in a row are skipped, no checkpoint is lost."""
    blown_up = {"train__lr": 1e20, "train__min_lr": 1e20, "train__max_skipped_steps": 3, "train__steps": 20}
    job = ForkedJob(recipe(tmp_path / "run", **blown_up), tmp_path)
    assert job.end(GRACE) == [1, 1], job.log(0)
    log = job.log(0)
    assert re.search(
        r"^unipool: step 4, of .*train.arrow: rank 0 \(trunk 0\): micro-batch 0 has loss nan \(rows \d+, ", log, re.M
    )
    assert "unipool: 3 steps in a row, the last is step 4, had gradients that are not finite" in log
    assert "Traceback" not in log + job.log(1)
    assert newest(tmp_path / "run" / "checkpoints") == (2, tmp_path / "run" / "checkpoints" / "step_00000002")


KILLS = 8
KEYS = {"train__steps": 60, "eval__every": 10, "checkpoint__every": 3, "parallel__start_timeout_seconds": 20}


@pytest.fixture(scope="module")
def undisturbed(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What a run of KEYS comes to when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = ForkedJob(recipe(folder / "run", **KEYS), folder)
    assert job.end(TIME_LIMIT) == [0, 0], job.log(0)
    return steps(folder / "run")


@pytest.mark.xdist_group("undisturbed")
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
        assert job.running[1 - victim], job.log(1 - victim)
        job.kill(victim)
        statuses = job.end(20 + GRACE)
        assert statuses[victim] == -9
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
    wanted = _lines(metrics) + choose.randint(1, 5)
    while all(job.running) and _lines(metrics) < wanted:
        time.sleep(POLL_SECONDS)
    time.sleep(choose.uniform(0.0, 0.05))


def _lines(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


# --- jobs as a user starts them ---

LONG = ("--set", "train.steps=100000", "--set", "eval.every=0")


@pytest.mark.xdist_group("undisturbed")
def test_restarts_after_a_fault(recipe_file: str, undisturbed: list[dict[str, float]], tmp_path: Path) -> None:
    """`--max-restarts 2`: a rank is killed, and the job comes to the end of an undisturbed run."""
    mark = f"run.dir={tmp_path / 'run'}"
    sets = [word for key, value in KEYS.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    with started(*TRAIN, recipe_file, "--max-restarts", "2", *sets, "--set", mark) as (job, log):
        while newest(tmp_path / "run" / "checkpoints") is None:
            assert job.poll() is None, log.read_text()
            time.sleep(POLL_SECONDS)
        rank_process(mark, POOL).kill()
        text = wait_for(log, "; restart 1 of 2, from the newest checkpoint")
        assert f"{NAMES[POOL]} died first" in text
        assert f"{START_AGAIN}; restart" not in text
        assert job.wait(TIME_LIMIT) == 0, log.read_text()
        assert processes_of(mark) == []
        assert log.read_text().count("resuming after step") == 1
    assert steps(tmp_path / "run") == undisturbed


@pytest.mark.xdist_group("launched")
def test_ctrl_c_ends_every_process(recipe_file: str, tmp_path: Path) -> None:
    mark = f"run.dir={tmp_path / 'run'}"
    with started(*TRAIN, recipe_file, *LONG, "--set", mark) as (job, log):
        wait_for(log, "step 1/")
        job.send_signal(signal.SIGINT)
        assert job.wait(TIME_LIMIT) == 128 + signal.SIGINT
        assert processes_of(mark) == []
        assert "Traceback" not in log.read_text()


@pytest.mark.xdist_group("launched")
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
    while _lines(tmp_path / "other" / "metrics.jsonl") < len(done):
        assert all(other.running), other.log(0)
        time.sleep(POLL_SECONDS)
    other.end(0.0)
    assert steps(tmp_path / "other")[: len(done)] == done


@pytest.mark.xdist_group("launched")
def test_no_process_outlives_a_killed_launcher(recipe_file: str, tmp_path: Path) -> None:
    mark = f"run.dir={tmp_path / 'run'}"
    with started(*TRAIN, recipe_file, *LONG, "--set", mark) as (job, log):
        wait_for(log, "step 1/")
        job.kill()
        wait_for(log, "its launcher is gone")
        psutil.wait_procs(processes_of(mark), timeout=TIME_LIMIT)
        assert [p for p in processes_of(mark) if p.pid != job.pid] == []
