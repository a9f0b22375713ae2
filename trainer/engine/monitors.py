"""DeepSpeed's monitors (TensorBoard, CSV), protected from disks that are full or missing, and Weights & Biases."""

from __future__ import annotations

import math
import textwrap
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.engine.weights_and_biases import WandbRun
from trainer.telemetry.console import say


def quiet_writers() -> None:
    """Let the threads of TensorBoard, yet to be started, print no exceptions: they pass them on to the next write."""
    report = threading.excepthook

    def report_others(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    threading.excepthook = report_others


class Monitors:
    """DeepSpeed's monitor, to which its engine writes too. A full or missing disk turns it off; training continues.

    DeepSpeed's own monitor of Weights & Biases is not used: its engine counts samples where we count steps, and W&B
    drops what comes with a smaller number than it has seen.

    Attributes:
        wandb: The run at W&B, on rank 0 of a recipe that wants one.
    """

    def __init__(self, monitor: Any):
        self._monitor = monitor
        self.wandb: WandbRun | None = None
        self._write_events = monitor.write_events
        monitor.write_events = self._write

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Write the finite scalars of a step. Only rank 0 of the role writes."""
        if self._monitor.enabled:
            self._write([(name, value, step) for name, value in scalars.items() if math.isfinite(value)])
        if self.wandb:
            self.wandb.log(scalars, step)

    def write_late(self, scalars: dict[str, float], step: int) -> None:
        """Write the scalars of a step after those of later steps, to TensorBoard and W&B.

        The ranks may have left the job by then, which DeepSpeed's `write_events` does not allow.
        """
        board = self._monitor.tb_monitor
        if self._monitor.enabled and board is not None:
            for name, value in scalars.items():
                self._on_disk(partial(board.summary_writer.add_scalar, name, value, step))
            self._on_disk(board.summary_writer.flush)
        if self.wandb:
            self.wandb.log_late(scalars, step)

    def write_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """Write prompts and their continuations as texts of TensorBoard and as a table of W&B."""
        board = self._monitor.tb_monitor
        if self._monitor.enabled and board is not None:
            for number, (prompt, text) in enumerate(samples):
                shown = textwrap.indent(f"{prompt} | {text}", "    ", lambda line: True)  # code in Markdown
                self._on_disk(partial(board.summary_writer.add_text, f"samples/{number}", shown, step))
            self._on_disk(board.summary_writer.flush)
        if self.wandb:
            self.wandb.log_table("samples", ("step", "prompt", "text"), [(step, *sample) for sample in samples], step)

    def close(self) -> None:
        """End the run at W&B, at the regular end of the run."""
        if self.wandb:
            self.wandb.finish()

    def write_image(self, name: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
        """Write a picture (height x width x RGB) to TensorBoard and W&B, without which `draw` is not called."""
        board = self._monitor.tb_monitor if self._monitor.enabled else None
        if board is None and self.wandb is None:
            return
        pixels = draw()
        if board is not None:
            self._on_disk(lambda: board.summary_writer.add_image(name, pixels, step, dataformats="HWC"))
            self._on_disk(board.summary_writer.flush)  # the process may end before its thread does so
        if self.wandb:
            self.wandb.log_image(name, pixels, step)

    def _write(self, events: list[tuple[str, float, int]]) -> None:
        self._on_disk(lambda: self._write_events(events))

    def _on_disk(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._monitor.enabled = False
            say(f"warning: TensorBoard and other monitors are off until the next start ({error.strerror})")
