"""The runs of a sweep: which ones are finished, and how the others are trained by `train`, as a user would start it.

All processes of a run inherit the lock on its log, so nobody starts a run that is still being trained. If a sweep is
killed (SIGKILL), its runs continue; the next start of the sweep waits for them and counts them among its jobs.
"""

from __future__ import annotations

import fcntl
import io
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
from trainer.common.gpus import VISIBLE, share_of_gpus
from trainer.common.machine import usable_cores
from trainer.common.safe_read import open_file
from trainer.config.recipe import load_recipe, save_recipe
from trainer.sweep.spec import Experiment, Run
from trainer.telemetry.console import say
from trainer.train.ends.early_stop import ended_early
from trainer.view.records import CHECKPOINTS, METRICS_FILE, RECIPE_FILE, Records

TRAIN = (sys.executable, "-m", "trainer", "train")
POLL_SECONDS = 0.5
LOG_SECONDS = 60.0
"""Time between two lines of progress where stderr is no terminal."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LAST_BYTES = 2**20  # of a run's log that are read to say why it failed
_IRRELEVANT_KEYS = {"run.dir", "data.dir"}
_IRRELEVANT_SECTIONS = {"checkpoint", "metrics", "probe", "tasks"}
"""Recipe keys and sections that do not affect the results of training."""


def is_done(run: Run) -> bool:
    """Return whether a run is finished: it has its last validation, or one that ends it, and its last checkpoint.

    A folder `checkpoints` that was removed to save space is not missed.
    """
    records, last = records_of(run), run.recipe.train.steps
    if ended_early(run.recipe.eval, records.val_losses):
        last = records.val_steps[-1]
    if last not in records.val_steps:
        return False
    found = checkpoint.newest(run.folder / CHECKPOINTS)
    return found[0] == last if found else not (run.folder / CHECKPOINTS).exists()


def records_of(run: Run) -> Records:
    """Read what a run has recorded."""
    records = Records(run.folder)
    records.read()
    return records


def write_recipe(run: Run) -> None:
    """Write the recipe that `train` is started with."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(run.recipe_file, lambda path: save_recipe(run.recipe, path))


def check_folders(experiment: Experiment, force: bool) -> None:
    """Check that the runs' folders have no runs of other recipes; `force` renames them to NAME.replaced-N.

    Raises:
        UserError: There is such a run, and `force` is not set.
    """
    for run in experiment.runs:
        if problem := _other_recipe(run):
            if not force:
                raise UserError(
                    f"{run.folder}: has a run of another recipe ({problem}); use another --dir, or pass --force to "
                    "rename that folder and train again"
                )
            say(f"{run.folder}: has a run of another recipe ({problem}); renamed to {_put_aside(run.folder)}")


def _other_recipe(run: Run) -> str | None:
    """Describe how the run in the folder differs from the planned one; None if it does not."""
    if not (run.folder / RECIPE_FILE).exists():
        return f"it has no {RECIPE_FILE}" if (run.folder / METRICS_FILE).exists() else None
    try:
        saved = load_recipe(str(run.folder / RECIPE_FILE))
    except UserError:
        return "this version cannot read its recipe"
    lines = [
        f"{key} {before} -> {now}"
        for key, (before, now) in differences(saved, run.recipe).items()
        if key not in _IRRELEVANT_KEYS and key.partition(".")[0] not in _IRRELEVANT_SECTIONS
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
    log_start: int
    place: int


@dataclass
class Runner:
    """Trains the unfinished runs of a sweep, `jobs` at a time. Create and run it in the main thread.

    Attributes:
        command: Command that trains; the path of a recipe is added as its last argument.
        done, failed, stopped: Runs that ended so; stopped ones resume when the sweep is started again.
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
        self._signals_seen: list[int] = []
        self._reported: set[str] = set()
        self._records = {run.name: Records(run.folder) for run in self.experiment.runs}

    def run(self) -> int:
        """Train all unfinished runs; return the exit status: 0 finished, 1 some failed, 75 or 130 stopped."""
        for run in self.experiment.runs:
            (self.done if is_done(run) else self._waiting).append(run)
        terminal = sys.stderr.isatty()
        graph = " {bar}" if terminal else ""
        with (
            self._handle_signals(),
            tqdm(
                total=sum(run.recipe.train.steps for run in self.experiment.runs),
                initial=self._steps(),
                file=sys.stderr if terminal else io.StringIO(),
                smoothing=0.0,
                bar_format=f"{{desc}}, step {{n_fmt}}/{{total_fmt}}{graph}{{postfix}}, ETA {{remaining}}",
                dynamic_ncols=True,
            ) as bar,
        ):
            shown = time.monotonic()
            while self._active or (self._waiting and not self._signals_seen):
                if not self._signals_seen:
                    self._fill()
                time.sleep(POLL_SECONDS)
                for active in list(self._active):
                    if active.process.poll() is not None:
                        self._active.remove(active)
                        self._ended(active)
                if terminal or time.monotonic() - shown > LOG_SECONDS:
                    shown = time.monotonic()
                    self._update(bar)
                    if not terminal:
                        say(str(bar))
        return self._status()

    def _status(self) -> int:
        if self._signals_seen and len(self.done) < len(self.experiment.runs):
            first, *more = self._signals_seen
            return 128 + first if more or first == signal.SIGINT else START_AGAIN
        return 1 if self.failed else START_AGAIN if self.stopped else 0

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, lambda number, _: self._stop(number)) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        """Pass a signal on: after the first one the runs save a checkpoint, after the second they end at once."""
        self._signals_seen.append(number)
        for active in self._active:
            if active.process.poll() is None:
                active.process.send_signal(signal.SIGTERM)

    def _fill(self) -> None:
        """Start waiting runs until there are enough; runs that other processes train count as well."""
        elsewhere = 0
        for run in list(self._waiting):
            if len(self._active) + elsewhere >= self.jobs or self._signals_seen:
                return
            if self._start(run):
                self._waiting.remove(run)
            else:
                elsewhere += 1

    def _start(self, run: Run) -> bool:
        """Start a run unless another process trains it; return whether it no longer waits."""
        try:
            write_recipe(run)
            log = run.log.open("ab")
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be written ({error.strerror}); choose another --dir") from None
        with log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if run.name not in self._reported:
                    say(f"{run.name}: is being trained by another process; see {run.log}")
                self._reported.add(run.name)
                return False
            if is_done(run):  # by that process
                self.done.append(run)
                return True
            self._active.append(self._train(run, log))
        if self._signals_seen:  # while it was starting
            self._active[-1].process.send_signal(signal.SIGTERM)
        return True

    def _train(self, run: Run, log: BinaryIO) -> _Active:
        environment = dict(os.environ)
        place = min(set(range(self.jobs)) - {active.place for active in self._active})
        if self.jobs > 1:  # with a single job, `train` divides the cores among its ranks itself
            threads = usable_cores() // (self.jobs * run.recipe.grid.world_size)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
            if gpus := share_of_gpus(place, self.jobs):
                environment[VISIBLE] = gpus
        say(f"{run.name}: starts; its log is {run.log}")
        process = subprocess.Popen(
            [*self.command, str(run.recipe_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches the sweep only, which passes it on
        )
        return _Active(run, process, log.tell(), place)

    def _ended(self, active: _Active) -> None:
        run, status = active.run, active.process.returncode
        records = records_of(run)
        if is_done(run):
            self.done.append(run)
            say(f"{run.name}: done, validation loss {records.val_losses[-1]:.4f}")
        elif status == START_AGAIN or self._signals_seen:
            self.stopped.append(run)
            say(f"{run.name}: stopped after step {records.steps[-1] if records.steps else 0}")
        else:
            self.failed.append(run)
            say(f"{run.name}: FAILED with status {status}: {_last_words(run.log, active.log_start)}")

    def _steps(self) -> int:
        """Count the optimizer steps that all runs have made."""
        for records in self._records.values():
            records.read()
        return sum(records.steps[-1] for records in self._records.values() if records.steps)

    def _update(self, bar: tqdm[Never]) -> None:
        """Show progress, losses and time left on the bar."""
        bar.n = self._steps()
        losses = []
        for active in self._active:
            column = self._records[active.run.name].columns["loss"]
            losses.append(f"{active.run.name} {column[-1]:.4f}" if column else f"{active.run.name} starts")
        runs = f"{len(self.done)}/{len(self.experiment.runs)} runs done"
        runs += f", {len(self.failed)} FAILED" if self.failed else ""
        bar.set_description_str(runs, refresh=False)
        bar.set_postfix_str("; ".join(losses))


def _last_words(log: Path, start: int) -> str:
    """Return the line that says why a run failed, from what it has written since its start."""
    with open_file(log) as file:
        file.seek(max(start, log.stat().st_size - _LAST_BYTES))
        lines = [line for line in file.read(_LAST_BYTES).decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "unipool:"))]
    return f"{(errors or lines or ['it wrote nothing'])[-1].strip()}; see {log}"
