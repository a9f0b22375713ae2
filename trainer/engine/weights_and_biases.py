"""Weights & Biases: a run is one run there, over all of its starts.

A thread of rank 0 talks to wandb. Training never waits for it and never ends with it: whatever fails is a warning, and
what W&B has missed by then is in metrics.jsonl.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.safe_read import read_bytes
from trainer.config.recipe import Recipe
from trainer.telemetry.console import say

ID_FILE = "wandb_id"
"""File of the run's folder with the run's id at W&B."""

WAITING = 1000
"""Messages that may wait for wandb; with more it is given up."""

LAST_WAIT = 60.0
"""Longest wait at the end of the run until wandb has written or uploaded everything, in seconds."""


class WandbRun:
    """A run at W&B, which continues if the trainer's run resumes.

    wandb's own environment variables configure what is not in the recipe: WANDB_MODE, WANDB_ENTITY, ...

    Args:
        project: The project at W&B.
        folder: The folder of the run.
        config: What is shown as its configuration.
        done: Optimizer steps done before this start of the run.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any], done: int):
        self._queue: Queue[Callable[[Any], object] | None] = Queue(WAITING)
        self._on, self._idle = True, Event()
        settings = {
            "project": project,
            "id": os.environ.get("WANDB_RUN_ID") or _run_id(folder, done),
            "name": os.environ.get("WANDB_NAME") or folder.resolve().name,
            "dir": os.environ.get("WANDB_DIR") or str(folder),
            "resume": os.environ.get("WANDB_RESUME") or "allow",
            "config": dict(config),
            "allow_val_change": True,
        }
        Thread(target=self._work, args=(settings,), daemon=True, name="wandb").start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the finite ones of a step's values."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._add(lambda run: run.log(finite, step=step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send a table that belongs to a step."""
        self._add(
            lambda run: run.log({name: _wandb().Table(columns=list(columns), data=[*map(list, rows)])}, step=step)
        )

    def log_image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Send a picture (height x width x RGB) that belongs to a step."""
        self._add(lambda run: run.log({name: _wandb().Image(pixels)}, step=step))

    def log_late(self, values: Mapping[str, float], step: int) -> None:
        """Send values of an earlier step, which W&B shows over `tasks/step`: its own steps only increase."""
        self._add(lambda run: run.log({**values, "tasks/step": step}))

    def finish(self) -> None:
        """Wait until wandb has everything, but not for long."""
        self._add(None)
        if not self._idle.wait(LAST_WAIT if self._on else min(LAST_WAIT, 1.0)):
            self._give_up(f"not everything is sent after {LAST_WAIT:g} s; `wandb sync` sends the rest")
        if not self._on:
            for process in psutil.Process().children():  # otherwise the interpreter waits for it at its end
                with suppress(psutil.Error):
                    if process.name().startswith("wandb"):
                        process.kill()
                        sys.unraisablehook = lambda _: None  # wandb's exit handler would miss the process

    def _add(self, message: Callable[[Any], object] | None) -> None:
        if not self._on:
            return
        try:
            self._queue.put_nowait(message)
        except Full:
            self._give_up("it does not keep up")

    def _give_up(self, reason: str) -> None:
        if self._on:
            self._on = False
            say(f"warning: Weights & Biases is off until the next start ({reason})")

    def _work(self, settings: dict[str, Any]) -> None:
        try:
            # Its capture of the console would stand between a failing rank and its last words.
            quiet = _wandb().Settings(console=os.environ.get("WANDB_CONSOLE", "off"))
            run = _wandb().init(**settings, settings=quiet)
            run.define_metric("tasks/*", step_metric="tasks/step")
            while self._on and (message := self._queue.get()):
                message(run)
            if self._on:
                run.finish()
        except Exception as error:  # of any kind: a library with a network must not end training
            text = str(error).strip() or type(error).__name__
            self._give_up(text.splitlines()[0])
        self._idle.set()


def _wandb() -> Any:
    import wandb

    return wandb


def _run_id(folder: Path, done: int) -> str:
    """Return the run's id: that of its earlier starts if it resumes, otherwise a new one, which is kept."""
    file = folder / ID_FILE
    with suppress(OSError, ValueError):
        if done and (kept := read_bytes(file).decode().strip()):
            return kept
    made = secrets.token_hex(4)
    with suppress(OSError):
        atomic_write(file, lambda path: path.write_text(made))
    return made


def wandb_run(recipe: Recipe, folder: Path, done: int) -> WandbRun | None:
    """Return the run at W&B, if the recipe wants one. Called by rank 0."""
    if not recipe.metrics.wandb:
        return None
    return WandbRun(recipe.metrics.wandb, folder, recipe.model_dump(mode="json"), done)
