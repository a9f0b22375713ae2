"""The runs of a sweep: which are done, and `train`, as a user would start it, for the others.

A run's log is locked by every process of the run, which inherit it: nobody begins a run that still goes on. A sweep
that was killed (SIGKILL) leaves its runs to themselves; the next one waits for them, and they count among its jobs.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Never

from tqdm import tqdm

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.resume import differences
from trainer.common.atomic import atomic_write
from trainer.common.errors import START_AGAIN, UserError
from trainer.common.machine import usable_cores
from trainer.config.recipe import load_recipe, save_recipe
from trainer.sweep.spec import Experiment, Run
from trainer.telemetry.console import say
from trainer.view.records import CHECKPOINTS, METRICS_FILE, RECIPE_FILE, Records

TRAIN = (sys.executable, "-m", "trainer", "train")
POLL_SECONDS = 0.5
LOG_SECONDS = 60.0
"""Where stderr is no terminal: between two lines of progress."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_HOW = {"run.dir", "data.dir"}
"""Keys that may differ: where things lie. And sections on which no number of the training depends:"""
_HOW_SECTIONS = {"checkpoint", "metrics", "probe"}


def is_done(run: Run) -> bool:
    """Whether the run in this folder has come to its end: the last validation and the last checkpoint are there.

    Checkpoints that a person has removed to save room are not missed.
    """
    records = records_of(run)
    if run.recipe.train.steps not in records.val_steps:
        return False
    found = checkpoint.newest(run.folder / CHECKPOINTS)
    return found[0] == run.recipe.train.steps if found else not (run.folder / CHECKPOINTS).exists()


def records_of(run: Run) -> Records:
    """What the run has recorded."""
    records = Records(run.folder)
    records.read()
    return records


def write_recipe(run: Run) -> None:
    """Write what `train` is started with."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(run.recipe_file, lambda path: save_recipe(run.recipe, path))


def check_places(experiment: Experiment, force: bool) -> None:
    """Whether what is in the runs' folders is of these very recipes.

    Args:
        force: put another run aside, under a name that ends with .replaced-N.
    Raises:
        UserError: a run of another recipe is there.
    """
    for run in experiment.runs:
        if problem := _another(run):
            if not force:
                raise UserError(
                    f"{run.folder}: has a run of another recipe ({problem}); use another --dir, or --force to put that "
                    "run aside and train anew"
                )
            say(f"{run.folder}: {problem}: that run is now {_put_aside(run.folder)}")


def _another(run: Run) -> str | None:
    """What differs, if another run is there."""
    if not (run.folder / RECIPE_FILE).exists():
        return f"it has no {RECIPE_FILE}" if (run.folder / METRICS_FILE).exists() else None
    try:
        saved = load_recipe(str(run.folder / RECIPE_FILE))
    except UserError:
        return "this version cannot read its recipe"
    lines = [
        f"{key} {before} -> {now}"
        for key, (before, now) in differences(saved, run.recipe).items()
        if key not in _HOW and key.partition(".")[0] not in _HOW_SECTIONS
    ]
    return ", ".join(lines) or None


def _put_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    return folder.rename(aside)


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    records: Records
    log_start: int


@dataclass
class Runner:
    """Trains what is not done, `jobs` runs at once. To be made in the main thread.

    Attributes:
        command: what trains a recipe's file, which is its last argument.
        done, failed, stopped: the runs that ended so; stopped ones go on when the sweep is started again.
    """

    experiment: Experiment
    jobs: int = 1
    command: Sequence[str] = TRAIN
    done: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    stopped: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: list[Run] = []
        self._active: list[_Active] = []
        self._asked: list[int] = []
        self._told: set[str] = set()

    def run(self) -> int:
        """Train; returns the exit status: 0 all done, 1 some failed, 75 or 130 stopped by a signal."""
        for run in self.experiment.runs:
            (self.done if is_done(run) else self._waiting).append(run)
        with self._signals(), self._progress() as show:
            while self._active or (self._waiting and not self._asked):
                if not self._asked:
                    self._fill()
                time.sleep(POLL_SECONDS)
                for active in list(self._active):
                    if active.process.poll() is not None:
                        self._active.remove(active)
                        self._ended(active)
                show()
        return self._status()

    def _status(self) -> int:
        everything = len(self.done) == len(self.experiment.runs)
        if self._asked and not everything:
            if len(self._asked) > 1 or self._asked[0] == signal.SIGINT:
                return 128 + self._asked[0]
            return START_AGAIN
        return 1 if self.failed else START_AGAIN if self.stopped else 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, lambda number, _: self._ask(number)) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int) -> None:
        """The first signal asks the runs for a checkpoint; at a second one `train` ends at once."""
        self._asked.append(number)
        for active in self._active:
            if active.process.poll() is None:
                active.process.send_signal(signal.SIGTERM)

    def _fill(self) -> None:
        elsewhere = 0
        for run in list(self._waiting):
            if len(self._active) + elsewhere >= self.jobs or self._asked:
                return
            if self._start(run):
                self._waiting.remove(run)
            else:
                elsewhere += 1

    def _start(self, run: Run) -> bool:
        """Start a run unless another process has it. Whether it is no longer to be started."""
        try:
            write_recipe(run)
            log = run.log.open("ab")
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be written ({error.strerror}); choose another --dir") from None
        with log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if run.name not in self._told:
                    say(f"{run.name}: is being trained by another process; see {run.log}")
                self._told.add(run.name)
                return False
            if is_done(run):  # by that process
                self.done.append(run)
                return True
            self._active.append(self._train(run, log))
        if self._asked:  # while it was starting
            self._active[-1].process.send_signal(signal.SIGTERM)
        return True

    def _train(self, run: Run, log: BinaryIO) -> _Active:
        environment = dict(os.environ)
        if self.jobs > 1:  # else `train` divides the cores among its own ranks
            threads = usable_cores() // (self.jobs * run.recipe.grid.world_size)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        say(f"{run.name}: starts; its log is {run.log}")
        process = subprocess.Popen(
            [*self.command, str(run.recipe_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        return _Active(run, process, records_of(run), log.tell())

    def _ended(self, active: _Active) -> None:
        run, status = active.run, active.process.returncode
        if is_done(run):
            self.done.append(run)
            say(f"{run.name}: done, validation loss {records_of(run).val_losses[-1]:.4f}")
        elif status == START_AGAIN or self._asked:
            self.stopped.append(run)
            say(f"{run.name}: stopped after step {_steps(active.records)}")
        else:
            self.failed.append(run)
            say(f"{run.name}: FAILED with status {status}: {_last_words(run.log, active.log_start)}")

    @contextmanager
    def _progress(self) -> Iterator[_Show]:
        runs = self.experiment.runs
        finished = sum(run.recipe.train.steps for run in self.done)
        begun = {run.name: min(_steps(records_of(run)), run.recipe.train.steps) for run in self._waiting}
        bar: tqdm[Never]
        with tqdm(
            total=sum(run.recipe.train.steps for run in runs),
            initial=finished + sum(begun.values()),
            disable=not sys.stderr.isatty(),
            smoothing=0.0,
            bar_format="{desc}, step {n_fmt}/{total_fmt} {bar}{postfix}, ETA {remaining}",
            dynamic_ncols=True,
        ) as bar:
            yield _Show(self, bar, begun)

    def steps(self, begun: dict[str, int]) -> int:
        """Steps that all runs have behind them.

        Args:
            begun: those of runs that wait to be started again.
        """
        finished = sum(run.recipe.train.steps for run in self.done)
        active = sum(_steps(active.records) for active in self._active)
        ended = sum(_steps(records_of(run)) for run in (*self.failed, *self.stopped))
        return finished + active + ended + sum(begun[run.name] for run in self._waiting)

    def active(self) -> Iterator[tuple[Run, Records]]:
        """The runs that are being trained, with what they have recorded up to now."""
        for active in self._active:
            active.records.read()
            yield active.run, active.records


class _Show:
    """The progress line: runs done, losses of those that go on, time left."""

    def __init__(self, runner: Runner, bar: tqdm[Never], begun: dict[str, int]):
        self._runner, self._bar, self._begun = runner, bar, begun
        self._start = self._last = time.monotonic()
        self._first = bar.n if not bar.disable else runner.steps(begun)

    def __call__(self) -> None:
        runner, bar = self._runner, self._bar
        losses = [
            f"{run.name} {records.columns['loss'][-1]:.4f}" if records.steps else f"{run.name} starts"
            for run, records in runner.active()
        ]
        runs = f"{len(runner.done)}/{len(runner.experiment.runs)} runs done"
        runs += f", {len(runner.failed)} FAILED" if runner.failed else ""
        steps, now = runner.steps(self._begun), time.monotonic()
        if not bar.disable:
            bar.set_description_str(runs, refresh=False)
            bar.set_postfix_str("; ".join(losses), refresh=False)
            bar.n = steps
            bar.refresh()
        elif now - self._last > LOG_SECONDS:
            self._last = now
            total = sum(run.recipe.train.steps for run in runner.experiment.runs)
            made = steps - self._first
            left = tqdm.format_interval((now - self._start) / made * (total - steps)) if made > 0 else "?"
            say(f"{runs}, step {steps}/{total}: {'; '.join(losses)}, ETA {left}")


def _steps(records: Records) -> int:
    return records.steps[-1] if records.steps else 0


def _last_words(log: Path, start: int) -> str:
    """The line that says why, of what a run has written since its start."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("error:", "unipool:"))]
    return f"{(said or lines or ['it has said nothing'])[-1].strip()}; see {log}"
