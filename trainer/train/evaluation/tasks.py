"""Scores on tasks while training goes on: a process of its own evaluates the newest checkpoint.

The job's ranks take no part, so that training neither stops nor depends on it: a harness asks a model thousands of
questions of different lengths, each of which would be a round through all pool ranks. The process is `unipool eval` on
rank 0's machine, at a low priority and for a limited time; whatever goes wrong with it is a warning.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from trainer.checkpoint.format import folder_of
from trainer.common.errors import UserError
from trainer.common.strict_json import loads
from trainer.config.job_sections import Tasks
from trainer.telemetry.console import say

EVAL = (sys.executable, "-m", "trainer", "eval")

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "CROSS_", "TORCHELASTIC", "OMPI_", "PMI")
"""How variables begin that make a process a rank of a job; the harness would look for its peers."""

_ENDS_WITH_RANK = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
"""A rank that is killed takes the process with it; without this command, `timeout` ends it some day."""

_FIRST_WITHOUT_MEMORY = ("sh", "-c", 'echo 1000 2>&- >/proc/self/oom_score_adj; exec "$@"', "sh")
"""When memory is short, the kernel ends the process before a rank. It begins with that: its children inherit it."""

_GRACE_SECONDS = 10
"""Time between SIGTERM, after `tasks.minutes`, and SIGKILL."""

Values = dict[str, dict[str, float]]
"""Scores by task and metric."""


@dataclass(frozen=True)
class Scored:
    """The scores of the checkpoint after `step` steps."""

    step: int
    values: Values

    def flat(self) -> dict[str, float]:
        """Return the scores for TensorBoard and the other monitors: "tasks/piqa/acc", ..."""
        return {f"tasks/{task}/{name}": value for task, own in self.values.items() for name, value in own.items()}


@dataclass
class _Running:
    step: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]


class BackgroundTasks:
    """Scores the newest checkpoint of a run, whenever the one before has been scored. Rank 0 has one.

    Args:
        checkpoints: The folder of the checkpoints.
        command: `eval`, to which the checkpoint and options are added.

    Raises:
        UserError: The harness is not installed.
    """

    def __init__(self, keys: Tasks, checkpoints: Path, command: Sequence[str] = EVAL):
        if find_spec("lm_eval") is None:
            raise UserError(
                f"tasks.names = {', '.join(keys.names)}: requires lm-evaluation-harness: pip install -c "
                "constraints.txt -r requirements-eval.txt, or the extra `eval`"
            )
        self._keys, self._checkpoints, self._command = keys, checkpoints, command
        self._running: _Running | None = None
        self._newest = self._begun = 0

    def follow(self, saved: int) -> Scored | None:
        """Begin with the newest checkpoint, after `saved` steps, unless another one is being scored; never waits.

        Returns:
            The scores of one that is done, if there is one.
        """
        self._newest = max(self._newest, saved)
        done = self._done()
        if self._running is None and self._newest > self._begun:
            self._begin(self._newest)
        return done

    def rest(self) -> Iterator[Scored]:
        """Wait for what is being scored, then for the last checkpoint; each takes `tasks.minutes` at most."""
        while self._running or self._newest > self._begun:
            if self._running is None:
                self._begin(self._newest)
            if self._running:
                say(f"waiting for the scores of the checkpoint after step {self._running.step} on tasks")
                self._running.process.wait()
            if scored := self._done():
                yield scored

    def stop(self) -> None:
        """End what is running."""
        if self._running:
            self._running.process.terminate()
            self._running.process.wait()
            self._ended(self._running)

    def _begin(self, step: int) -> None:
        keys, self._begun = self._keys, step
        limit = ["timeout", "-v", "-k", str(_GRACE_SECONDS), f"{60 * keys.minutes:g}"]
        options = ["--tasks", ",".join(keys.names), "--device", keys.device, "--json"]
        options += ["--limit", str(keys.limit)] if keys.limit else []
        options += ["--include-path", keys.include_path] if keys.include_path else []
        command = [*self._command, str(folder_of(self._checkpoints, step)), *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
        if keys.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by `_ended`)
            process = subprocess.Popen(
                [*_ENDS_WITH_RANK, *_FIRST_WITHOUT_MEMORY, "nice", "-n", "10", *limit, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
            )
        except OSError as error:  # such as a full disk
            self._warn(step, str(error))
        else:
            self._running = _Running(step, process, output, errors)

    def _done(self) -> Scored | None:
        running = self._running
        if running is None or (status := running.process.poll()) is None:
            return None
        said, errors = self._ended(running)
        if status:
            self._warn(running.step, self._why(status, [line for line in errors.splitlines() if line.strip()]))
        else:
            try:
                return Scored(running.step, _values(said))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                self._warn(running.step, f"the answer cannot be read ({error})")
        return None

    def _why(self, status: int, errors: Sequence[str]) -> str:
        """Return why there are no scores.

        Args:
            status: Of `timeout`: 124 if the time was up, otherwise that of the command; negative for a signal.
            errors: What the command has written to stderr, and `timeout` about the signals that it has sent.
        """
        last = errors[-1] if errors else f"status {status}"
        late = f"it took longer than tasks.minutes ({self._keys.minutes:g})"
        if status == 124:
            return late
        if status not in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return last
        if last.startswith("timeout: ") and "KILL" in last:
            return f"{late}, did not end within {_GRACE_SECONDS} s of SIGTERM, and was killed"
        return "it was killed by SIGKILL, as when memory is short"

    def _ended(self, running: _Running) -> tuple[str, str]:
        """Forget a process that has ended; return what it has written to stdout and stderr."""
        self._running = None
        with running.output as output, running.errors as errors:
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return texts[0], texts[1]

    def _warn(self, step: int, reason: str) -> None:
        say(f"warning: no scores on tasks of the checkpoint after step {step}: {reason}")


def _values(text: str) -> Values:
    """Return the scores in what `eval --json` has printed; those that are not finite are null, and left out."""
    found = loads(text.splitlines()[-1])["tasks"]
    scores = {
        task["task"]: {name: score["value"] for name, score in task["metrics"].items() if score["value"] is not None}
        for task in found["tasks"]
        if not task["part"]
    }
    mean = {name: value for name, value in found["mean"].items() if name != "tasks"}
    return scores | ({"mean": mean} if mean and len(scores) > 1 else {})
