"""The runs of a sweep, with a fake `train`: finished ones are skipped, stopped ones resume, failures are reported."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import TIME_LIMIT, context
from tests.trainer.forked import ForkedJob
from tests.trainer.job import write_recipe
from trainer.common.errors import UserError
from trainer.common.machine import usable_cores
from trainer.sweep.result import collect
from trainer.sweep.runs import Runner, check_folders, is_done
from trainer.sweep.spec import Experiment, Run, load_sweep

# Two steps a run; FAKE says by run what goes wrong. Each start is noted with the step it goes on from.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
import yaml

signal.alarm(600)  # nobody waits for it for ever, and a test that fails leaves none behind
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
text = Path(sys.argv[-1]).read_text()
recipe = yaml.safe_load(text)
folder, steps = Path(recipe["run"]["dir"]), recipe["train"]["steps"]
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "recipe.yaml").write_text(text)
what = json.loads(os.environ["FAKE"]).get(f"{folder.parent.name} {recipe['run']['seed']}")
saved = sorted((folder / "checkpoints").glob("step_*"))
start = int(saved[-1].name[5:]) if saved else 0
with (folder / "starts").open("a") as file:
    print(start, os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)

def append(**record):
    with (folder / "metrics.jsonl").open("a") as file:
        print(json.dumps(record), file=file)

def save(step):
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").touch()

for step in range(start + 1, steps + 1):
    append(step=step, loss=3.0, tokens=10, seconds=0.1)
    if what == "fails":
        print("error: no such data", file=sys.stderr)
        sys.exit(2)
    if what == "signals the sweep":
        other = folder.parents[1] / "a" / folder.name / "metrics.jsonl"
        while not other.exists():  # by then it handles the signal that the sweep passes on
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
    while what in ("waits", "signals the sweep") and not asked and not (folder / "go on").exists():
        time.sleep(0.01)
    if asked:
        save(step)
        sys.exit(75)
append(step=steps, val_loss=2.0 + recipe["run"]["seed"])
save(steps)
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    sweep = tmp_path / "two.yaml"
    sweep.write_text("{base: small, baseline: a, seeds: [0, 1], variants: {a: {}, b: {train.lr: 1e-2}},"
        "set: {train.steps: 2}}")  # fmt: skip
    (tmp_path / "train.py").write_text(TRAIN)
    return load_sweep(str(sweep), folder=tmp_path / "runs")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sweep.runs.POLL_SECONDS", 0.02)
    monkeypatch.setenv("FAKE", "{}")


def runner(experiment: Experiment, jobs: int = 1) -> Runner:
    return Runner(experiment, jobs, (sys.executable, str(experiment.folder.with_name("train.py"))))


def starts(run: Run) -> list[int]:
    """Steps from which the run's processes went on."""
    return [int(line.split()[0]) for line in (run.folder / "starts").read_text().splitlines()]


def names(runs: list[Run]) -> list[str]:
    return sorted(run.name for run in runs)


def test_what_is_done_is_left_out_and_what_fails_is_said(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE", json.dumps({"a 1": "fails"}))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    first = runner(experiment, jobs=2)
    assert first.run() == 1
    assert names(first.done) == ["a seed 0", "b seed 0", "b seed 1"] and names(first.failed) == ["a seed 1"]
    said = capsys.readouterr().err
    assert "a seed 1: FAILED with status 2: error: no such data; see" in said
    assert "b seed 1: done, validation loss 3.0000" in said
    threads = max(1, usable_cores() // 2)
    assert (experiment.runs[0].folder / "starts").read_text().split() == ["0", str(threads), "3"]
    assert {(run.folder / "starts").read_text().split()[2] for run in experiment.runs} == {"3", "5"}
    monkeypatch.setenv("FAKE", "{}")
    again = runner(experiment)
    assert again.run() == 0 and names(again.done) == names(experiment.runs)
    assert {run.name: starts(run) for run in experiment.runs} == {
        "a seed 0": [0],
        "a seed 1": [0, 0],
        "b seed 0": [0],
        "b seed 1": [0],
    }
    assert [row.losses for row in collect(experiment).variants] == [{0: 2.0, 1: 3.0}] * 2


def test_a_signal_stops_the_runs_and_the_next_start_goes_on(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", json.dumps({"a 0": "waits", "b 0": "signals the sweep"}))
    before = signal.getsignal(signal.SIGTERM)
    stopped = runner(experiment, jobs=2)
    assert stopped.run() == 75
    assert names(stopped.stopped) == ["a seed 0", "b seed 0"] and stopped.done == []
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(run.folder.exists() for run in experiment.runs[2:]), "nothing more was started"
    monkeypatch.setenv("FAKE", "{}")
    assert runner(experiment).run() == 0
    assert [starts(run) for run in experiment.runs] == [[0, 1], [0, 1], [0], [0]]


def test_the_next_start_waits_for_the_runs_of_a_killed_sweep(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = experiment.runs[:2]
    killed = context.Process(target=_sweep, args=(experiment,))
    killed.start()
    deadline = time.monotonic() + TIME_LIMIT
    while not all((run.folder / "metrics.jsonl").exists() for run in (a, b)) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    said = []

    def say(line: str) -> None:
        said.append(line)
        for run in (a, b):
            if line.startswith(f"{run.name}: is being trained by another process"):
                (run.folder / "go on").touch()

    monkeypatch.setattr("trainer.sweep.runs.say", say)
    again = runner(experiment, jobs=2)
    assert again.run() == 0
    assert [line.split(":")[0] for line in said if "another process" in line] == [a.name, b.name]
    assert [starts(run) for run in experiment.runs] == [[0]] * 4


def _sweep(experiment: Experiment) -> None:
    os.environ["FAKE"] = json.dumps({"a 0": "waits", "b 0": "waits"})
    runner(experiment, jobs=2).run()


def test_a_run_that_somebody_else_trains_is_waited_for(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    run = experiment.runs[0]
    run.folder.parent.mkdir(parents=True)
    with run.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        one = runner(experiment)
        one._waiting = list(experiment.runs)
        one._fill()
        assert one._active == [], "it is one of the jobs"
        other = runner(experiment, jobs=2)
        other._waiting = list(experiment.runs)
        other._fill()
        assert "a seed 0: is being trained by another process" in capsys.readouterr().err
        assert [active.run.name for active in other._active] == ["b seed 0"] and run in other._waiting
        other._active[0].process.wait(TIME_LIMIT)


def test_another_run_in_the_place(experiment: Experiment, tmp_path: Path) -> None:
    assert runner(experiment).run() == 0
    check_folders(experiment, force=False)
    elsewhere = load_sweep(str(tmp_path / "two.yaml"), ["checkpoint.keep=5", "data.dir=else"], experiment.folder)
    check_folders(elsewhere, force=False)  # where things lie is no other run
    longer = load_sweep(str(tmp_path / "two.yaml"), ["train.steps=3"], experiment.folder)
    with pytest.raises(
        UserError, match=r"seed_0: has a run of another recipe \(train.steps 2 -> 3\); use another --dir"
    ):
        check_folders(longer, force=False)
    check_folders(longer, force=True)
    assert [path.name for path in (experiment.folder / "a").glob("*.replaced-1")] != []
    assert runner(longer).run() == 0 and [starts(run) for run in longer.runs] == [[0]] * 4


def test_done_is_with_the_last_validation_and_checkpoint(experiment: Experiment) -> None:
    run = experiment.runs[0]
    assert runner(experiment).run() == 0 and is_done(run)
    checkpoint = run.folder / "checkpoints" / "step_00000002"
    checkpoint.rename(checkpoint.with_name(".step_00000002"))
    assert not is_done(run), "killed before the checkpoint was complete"
    (run.folder / "checkpoints").rename(run.folder / "removed")
    assert is_done(run), "removed by a person, to save room"
    file = run.folder / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert not is_done(run)


def test_real_runs_are_known_as_done(tmp_path: Path) -> None:
    """As `train` leaves its folder; the ranks are forked instead of launched."""
    recipe = write_recipe(tmp_path)
    sweep = tmp_path / "real.yaml"
    sweep.write_text(f"{{base: {recipe}, baseline: a, seeds: [0], set: {{parallel.pool_ranks: 0}},"
        "variants: {a: {}, b: {router.kind: softmax}}}")  # fmt: skip
    experiment = load_sweep(str(sweep), folder=tmp_path / "runs")
    for run in experiment.runs:
        run.folder.parent.mkdir(parents=True)
    jobs = []
    for run in experiment.runs:
        job = ForkedJob(run.recipe, run.folder.parent)
        jobs.append(job)
    assert [job.end(TIME_LIMIT) for job in jobs] == [[0], [0]], [job.log(0) for job in jobs]
    check_folders(experiment, force=False)
    nothing = Runner(experiment, command=("false",))
    assert nothing.run() == 0 and len(nothing.done) == 2
    a, b = collect(experiment).variants
    assert a.val_loss.mean > 1 and b.difference and b.difference.mean == b.val_loss.mean - a.val_loss.mean != 0
    assert a.tokens_per_second > 0 and 1 <= a.distinct_experts <= 2
