"""A soak: a job trains for hours under random faults while the same job trains undisturbed; both must come to the same.

python -m tests.soak --hours 2 [--background] [--out runs/soak]

The recipe is quickstart's with smaller steps. Faults (`disturbances.py`) hit one job about every two minutes: ranks and
launchers are killed and stopped, its disk is full or slow. Every rank of both is scraped every second. There must be no
hang, no loss of what was saved, the very losses of the undisturbed job, and memory and file descriptors that do not
grow. `--background` lets it run on without a terminal. What was found so far is always in FOLDER/summary.json; a
soak that was ended goes on with the same command until its hours are full. As root, Linux only; needs util-linux and
e2fsprogs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from tests.soak.disk import SmallDisk
from tests.soak.disturbances import DISTURBANCES, Disturbance, Victims
from tests.soak.summary import summarise
from tests.soak.watched import WatchedJob

EVERY = 20
"""Steps between checkpoints."""

RECIPE = "quickstart"
SETS = (
    *("train.steps=100000", "train.global_batch=8", "train.micro_batch=4", "train.warmup_fraction=0.001"),
    *("eval.every=50", "eval.batches=2", f"checkpoint.every={EVERY}"),
)
DISK_MEGABYTES = 900

PROGRESS_LIMIT = 420.0
"""Seconds in which the disturbed job must do a step: 60 to notice a stopped rank, 10 to name it, 30 for the launcher to
remove it, 30 before the restart, and the rest for a start and a slow disk on a busy machine."""

AT_ONCE = 0.25
"""Share of the faults that do not wait for the job to have recovered from the one before."""

SAMPLE_SECONDS, LOG_SECONDS = 10.0, 60.0
_APART = "UNIPOOL_TEST_APART"


def _own_mounts() -> None:
    """Run on in a mount namespace of this command's own, so that its disk ends with it."""
    if _APART not in os.environ:
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.soak"]
        os.execvpe(command[0], [*command, *sys.argv[1:]], os.environ | {_APART: "1"})


def _in_background(out: Path) -> None:
    arguments = [word for word in sys.argv[1:] if word != "--background"]
    with (out / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.soak", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"process {process.pid}; {out / 'log'}, {out / 'summary.json'}; SIGTERM ends it with a summary")


class Soak:
    """The two jobs, the faults, and the record of both.

    Args:
        out: The folder of the soak, which may hold an earlier part of it.
        mean_seconds: Mean time between faults.
    """

    def __init__(self, out: Path, seconds: float, mean_seconds: float, seed: int):
        self._out, self._mean = out, mean_seconds
        self._events, self._samples = out / "events.jsonl", out / "samples.jsonl"
        self._before = _last_time(self._samples)
        self._begun = time.monotonic()
        self._seconds = seconds
        self._choose = random.Random(f"{seed} {self._before}")
        self._ended = False
        sets = (*SETS, f"data.dir={out / 'data'}")
        self._disk = SmallDisk(out / "disk.img", out / "disk", DISK_MEGABYTES)
        log = out / "disturbed.log"
        self._read = log.stat().st_size if log.exists() else 0
        self._quiet = WatchedJob("undisturbed", RECIPE, sets, out / "undisturbed", out / "undisturbed.log")
        self._job = WatchedJob("disturbed", RECIPE, sets, out / "disk" / "run", log, self._disk.prefix)
        self._victims = Victims(self._job, self._disk, self._choose)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_ended", True))

    @property
    def _now(self) -> float:
        """Seconds of soaking so far, over all parts."""
        return self._before + time.monotonic() - self._begun

    def _note(self, **fields: Any) -> None:
        with self._events.open("a") as file:
            file.write(json.dumps({"at": round(self._now, 1), **fields}) + "\n")

    def run(self) -> bool:
        """Soak; return whether all is well."""
        self._note(kind="begin")
        for job in (self._quiet, self._job):
            job.start()
        try:
            self._disturb()
            self._end()
        finally:
            for job in (self._quiet, self._job):
                job.kill()
            summary = summarise(self._out, self._quiet, self._job, EVERY)
            self._disk.close()
        print(json.dumps({key: value for key, value in summary.items() if key != "processes"}, indent=1))
        return not summary["problems"]

    def _disturb(self) -> None:
        """Watch, and let faults happen, until the time is over."""
        fault: Disturbance | None = None
        fault_ends = sampled = logged = 0.0
        next_fault, step_at_fault, progressed = self._now + self._pause(), -1, self._now
        seen, at_once = self._job.step, False
        while self._now < self._seconds and not self._ended:
            time.sleep(0.5)
            self._restart_what_ended()
            self._follow_log()
            step = self._job.step
            if step != seen:
                seen, progressed = step, self._now
            if self._now - progressed > PROGRESS_LIMIT:
                self._note(kind="hang", step=seen, log=self._tail())
                self._job.kill()
                progressed = self._now
            if fault and self._now > fault_ends:
                if fault.end:
                    fault.end(self._victims)
                self._note(kind="end", step=seen)
                fault, next_fault, step_at_fault = None, self._now + self._pause(), max(seen, step_at_fault)
                at_once = self._choose.random() < AT_ONCE
            # So that there is progress, most faults wait until the steps that were lost have been done again.
            if fault is None and self._now > next_fault and (seen > step_at_fault or at_once):
                fault, fault_ends = self._begin_fault()
            if self._now - sampled > SAMPLE_SECONDS:
                sampled = self._now
                self._sample()
            if self._now - logged > LOG_SECONDS:
                logged = self._now
                print(self._line(), flush=True)
                summarise(self._out, self._quiet, self._job, EVERY)
        if fault and fault.end:
            fault.end(self._victims)
            self._note(kind="end", step=seen)

    def _pause(self) -> float:
        return min(3 * self._mean, 10 + self._choose.expovariate(1 / self._mean))

    def _begin_fault(self) -> tuple[Disturbance | None, float]:
        kinds = [name for name in DISTURBANCES if self._disk.can_be_slow or "slow" not in name]
        name = self._choose.choices(kinds, [DISTURBANCES[kind].weight for kind in kinds])[0]
        fault, job = DISTURBANCES[name], self._job
        step, saved = job.step, job.saved
        try:
            victim = fault.begin(self._victims)
        except LookupError:  # between two attempts
            return None, 0.0
        self._note(kind="fault", name=name, victim=victim, step=step, saved=saved)
        return fault, self._now + self._choose.uniform(*fault.seconds)

    def _follow_log(self) -> None:
        """Note what the disturbed job says of its end, its resumes and its saves."""
        with self._job.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if found := re.match(r"resuming after step (\d+)", line):
                self._note(kind="resumed", step=int(found[1]))
            elif re.match(r"unipool: |warning: |WARNING: |error: ", line):
                self._note(kind="said", text=line[:400])

    def _restart_what_ended(self) -> None:
        """Do what a cluster does: give the same command again when a supervisor has ended."""
        for job in (self._quiet, self._job):
            if job.status is not None:
                self._note(kind="supervisor ended", job=job.name, status=job.status)
                job.start()

    def _end(self) -> None:
        """Let both jobs save and stop; the disturbed one may have to recover first."""
        deadline, step = self._now + PROGRESS_LIMIT, self._job.step
        while self._job.step <= step and self._now < deadline:
            self._restart_what_ended()
            self._follow_log()
            time.sleep(0.5)
        self._sample()
        for job in (self._quiet, self._job):
            self._note(kind="stopped", job=job.name, status=job.stop(PROGRESS_LIMIT), step=job.step)

    def _sample(self) -> None:
        sample = {"at": round(self._now, 1)}
        for job in (self._quiet, self._job):
            sizes = job.sizes()
            sample |= {job.name: {"step": job.step, "saved": job.saved, "processes": sizes, **vars(job.scrapes)}}
        with self._samples.open("a") as file:
            file.write(json.dumps(sample) + "\n")

    def _line(self) -> str:
        texts = [f"{job.name} step {job.step}, saved {job.saved}" for job in (self._quiet, self._job)]
        return f"{self._now / 60:.1f} of {self._seconds / 60:.0f} min: {'; '.join(texts)}"

    def _tail(self) -> str:
        return self._job.log.read_text(errors="replace")[-4000:]


def _last_time(samples: Path) -> float:
    """Return how long earlier parts of the soak have run."""
    lines = samples.read_text().splitlines() if samples.exists() else []
    return float(json.loads(lines[-1])["at"]) if lines else 0.0


@click.command(help=__doc__)
@click.option("--hours", default=2.0, show_default=True)
@click.option("--mean-seconds", default=100.0, show_default=True, help="Mean time between faults.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/soak"), show_default=True)
@click.option("--background", is_flag=True, help="Leave the terminal; output goes to FOLDER/log.")
def main(hours: float, mean_seconds: float, seed: int, out: Path, background: bool) -> None:
    """Soak, or start to in the background."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if background:
        _in_background(out)
        return
    _own_mounts()
    sys.exit(not Soak(out, hours * 3600, mean_seconds, seed).run())


if __name__ == "__main__":
    main()
