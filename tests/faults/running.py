"""Run one case, and judge what came of it."""

from __future__ import annotations

import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.catalogue import ALL_PLACES, FAULTS, PREPARING
from tests.faults.jobs import EVERY, START_TIMEOUT, TIMEOUT, Reference, Setting, Start, resumed_after, weights_of
from tests.faults.scene import Case, Fault, Scene, anything
from tests.trainer.job import steps
from trainer.checkpoint.format import newest

PREPARES = 200.0
"""Seconds for a start up to any place, on a busy machine."""

ENDS = 75.0
"""Seconds beyond the time limit of the phase: to find out who is lost (10), for deepspeed's launcher to remove stopped
processes (30), and for a busy machine."""


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        reached: Whether the fault took place.
        status: Exit status of the attempt that the fault hit; None: it hung.
        seconds: From the fault to the end of that attempt, or of the job.
        said: The line that says what happened.
        statuses: Exit status of each start of the job.
        resumed: The steps after which later attempts resumed.
        lost: The most steps that a resume repeated.
        problems: What is not as it should be; empty: all is well.
    """

    number: int
    layout: str
    fault: str
    phase: str
    victim: str
    reached: bool = False
    status: int | None = None
    seconds: float = 0.0
    said: str = ""
    statuses: list[int] | None = None
    resumed: list[int] | None = None
    lost: int = 0
    problems: list[str] | None = None


def run_case(case: Case, folder: Path, recipe: Path, reference: Reference) -> Outcome:
    """Run a case in `folder`, which must not exist."""
    folder.mkdir()
    fault = FAULTS[case.fault]
    setting = Setting(folder, recipe, case.layout, dict(case.keys))
    if case.phase == PREPARING:
        setting.keys["data.dir"] = folder / "data"
    if case.resumes:
        shutil.copytree(reference.half, setting.run)
    scene = Scene(setting, case.victim, _limit_at(case.phase), random.Random(case.number))
    victim = setting.names[case.victim] if isinstance(case.victim, int) else str(case.victim)
    outcome = Outcome(case.number, case.layout, case.fault, case.phase, victim, problems=[], statuses=[], resumed=[])
    try:
        fault.prepare(scene)
        _first_start(case, fault, scene, outcome)
        if outcome.problems:
            return outcome
        if outcome.statuses != [0]:
            fault.heal(scene)
            _second_start(scene, outcome)
        _compare(fault, setting.run, reference, outcome)
    except Exception as error:
        outcome.problems = [*(outcome.problems or []), f"{type(error).__name__}: {error}"]
    finally:
        if scene.start:
            scene.start.clean_up()
        for undo in reversed(scene.undo):
            undo()
    outcome.said = outcome.said.replace(str(folder.parent), "FOLDER")
    return outcome


def _limit_at(phase: str) -> float:
    place = ALL_PLACES.get(phase)
    return TIMEOUT if place and place.in_step else START_TIMEOUT


def _first_start(case: Case, fault: Fault, scene: Scene, outcome: Outcome) -> None:
    """Start the job, let the fault happen, and wait until the job has ended or a restart has done the rest."""
    assert outcome.problems is not None
    start = scene.start = Start(scene.setting, 0, case.pause, restarts=1)
    if case.pause:
        outcome.reached = start.reached(PREPARES)
        if not outcome.reached:
            statuses = start.wait(ENDS)
            outcome.problems.append(f"the place was not reached; status {statuses}:\n{start.log[-2000:]}")
            return
        reached = newest(scene.setting.run / "checkpoints")
        before = _steps_done(scene.setting.run)
        since = time.monotonic()
        fault.act(scene)
        if fault.goes_on:
            start.go_on()
    else:
        outcome.reached, since, reached, before = True, time.monotonic(), None, 0
    limit = (scene.limit if fault.waits else 0) + fault.seconds + ENDS
    attempt = _end_of_attempt(start, limit + (0 if case.pause else PREPARES))
    outcome.seconds = round(time.monotonic() - since, 1)
    log = start.log
    outcome.said = _essence(log)
    if attempt is None:
        outcome.problems.append(f"HUNG: not ended {limit:g} s after the fault:\n{log[-3000:]}")
        return
    statuses = start.wait(PREPARES + ENDS)
    left = start.clean_up()
    log = start.log
    if statuses is None:
        outcome.problems.append(f"HUNG: the restart did not end:\n{log[-3000:]}")
        return
    if left:
        outcome.problems.append(f"{left} processes were left")
    first = re.search(r"the job ended with status (\d+); restart 1 of 1", log)
    outcome.status = int(first[1]) if first else max(statuses)
    outcome.statuses = [max(statuses)] if max(statuses) else [min(statuses)]
    if not fault.ends(outcome.status):
        outcome.problems.append(f"status {outcome.status}:\n{log[-3000:]}")
    _check_words(case, fault, scene, log, outcome)
    _note_resumes(log, before, reached[0] if reached else 0, outcome)


def _end_of_attempt(start: Start, limit: float) -> bool | None:
    """Wait until the job, or its first attempt, has ended; None at the limit."""
    deadline = time.monotonic() + limit
    while start.running:
        if "; restart 1 of 1" in start.log:
            return True
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return True


def _second_start(scene: Scene, outcome: Outcome) -> None:
    """Give the same command again."""
    assert outcome.problems is not None and outcome.statuses is not None
    found = newest(scene.setting.run / "checkpoints")
    before = _steps_done(scene.setting.run)
    start = scene.start = Start(scene.setting, 1)
    statuses = start.wait(PREPARES + ENDS)
    left = start.clean_up()
    if statuses is None or max(statuses) or left:
        outcome.problems.append(f"LOST: the second start: status {statuses}, {left} left:\n{start.log[-3000:]}")
        return
    outcome.statuses.append(max(statuses))
    _note_resumes(start.log, before, found[0] if found else 0, outcome)


def _steps_done(run: Path) -> int:
    """Return the last step in metrics.jsonl, 0 without one."""
    try:
        return max((int(record["step"]) for record in steps(run) if "loss" in record), default=0)
    except (OSError, ValueError):
        return 0


def _note_resumes(log: str, before: int, saved: int, outcome: Outcome) -> None:
    """Check that a restart has lost nothing that was saved, and no more than what two intervals can hold."""
    assert outcome.problems is not None and outcome.resumed is not None
    again = resumed_after(log)
    outcome.resumed += again
    if not again:
        return
    lost = before - again[-1]
    outcome.lost = max(outcome.lost, lost)
    # A save is complete at the next one at the latest, which waits for it.
    if again[-1] < saved and "is damaged" not in log:
        outcome.problems.append(f"LOST: resumed after step {again[-1]}, though step {saved} was saved")
    if lost > 2 * EVERY:
        outcome.problems.append(f"LOST: {lost} steps were repeated")


_BLAMES = (
    r"^unipool: .*? (?:stopped|failed) during [^:]*: (?:PeerLost: )?(rank [^:]*?) (?:died|does not|has not joined)"
)


def _check_words(case: Case, fault: Fault, scene: Scene, log: str, outcome: Outcome) -> None:
    """Check that the log names the victim, and says what it must."""
    assert outcome.problems is not None
    if fault.names and isinstance(case.victim, int):
        name = re.escape(scene.setting.names[case.victim])
        said = rf"^unipool: (.*(stopped|failed) during .*{name}.*|{name} was killed by SIGKILL)"
        if fault.then == "raise":
            said = rf"^unipool: {name} failed during .*"
        if found := re.search(said, log, re.M):
            outcome.said = found[0]
        else:
            outcome.problems.append(f"the victim is not named:\n{log[-3000:]}")
        bare = log.replace(", which hosts the job's store,", "")
        blamed = set(re.findall(_BLAMES, bare, re.M)) - {scene.setting.names[case.victim]}
        if blamed and not scene.setting.nodes:  # two nodes blame each other
            outcome.problems.append(f"others are blamed: {', '.join(sorted(blamed))}:\n{log[-3000:]}")
    if fault.says and not re.search(fault.says, log):
        outcome.problems.append(f"it does not say {fault.says!r}:\n{log[-3000:]}")
    spoke = re.search(r"^(unipool: |error: |Traceback)", log, re.M) or fault.ends is anything
    if outcome.status not in (0, 75) and not spoke and "log" not in case.fault:
        outcome.problems.append(f"it says nothing:\n{log[-3000:]}")
    if "Fatal Python error" in log or "terminate called" in log:
        outcome.problems.append(f"a crash:\n{log[-3000:]}")


def _essence(log: str) -> str:
    """Return the first line in which the job says what happened."""
    lines = [line for line in log.splitlines() if re.match(r"(unipool|error|warning|WARNING): ", line)]
    return next((line for line in lines if "ended with status" not in line), "")


def _compare(fault: Fault, run: Path, reference: Reference, outcome: Outcome) -> None:
    """Compare what the run has come to with what an undisturbed run comes to."""
    assert outcome.problems is not None
    records = steps(run)
    if fault.losses == "other":
        if _steps_done(run) != _steps_done_in(reference.records):
            outcome.problems.append(f"it ended after step {_steps_done(run)}")
        return
    foreign = [record for record in records if record not in reference.records]
    if len(foreign) > (fault.losses == "record"):
        outcome.problems.append("LOST: other losses than those of an undisturbed run")
    if fault.losses == "same" and len(records) != len(reference.records):
        outcome.problems.append(f"LOST: {len(records)} records instead of {len(reference.records)}")
    weights = weights_of(run)
    if differing := [name for name in reference.weights if weights.get(name) != reference.weights[name]]:
        outcome.problems.append(f"LOST: other weights than those of an undisturbed run: {', '.join(differing)}")


def _steps_done_in(records: list[dict[str, float]]) -> int:
    return max(int(record["step"]) for record in records)
