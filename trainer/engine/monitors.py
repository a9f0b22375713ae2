"""DeepSpeed's monitors (TensorBoard, CSV, Weights & Biases), protected from disks that are full or missing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.telemetry.console import say


class Monitors:
    """DeepSpeed's monitor, to which its engine writes too. A full or missing disk turns it off; training continues."""

    def __init__(self, monitor: Any):
        self._monitor = monitor
        self._write_events, self._report = monitor.write_events, threading.excepthook
        monitor.write_events, threading.excepthook = self._write, self._report_others

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Write the finite scalars of a step. Only rank 0 of the role writes."""
        if self._monitor.enabled:
            self._write([(name, value, step) for name, value in scalars.items() if math.isfinite(value)])

    def write_image(self, name: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
        """Write a picture (height x width x RGB) to TensorBoard, the only monitor that has pictures.

        `draw` is not called without TensorBoard.
        """
        board = self._monitor.tb_monitor
        if self._monitor.enabled and board is not None:
            self._on_disk(lambda: board.summary_writer.add_image(name, draw(), step, dataformats="HWC"))
            self._on_disk(board.summary_writer.flush)  # the process may end before its thread does so

    def _write(self, events: list[tuple[str, float, int]]) -> None:
        self._on_disk(lambda: self._write_events(events))

    def _on_disk(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._monitor.enabled = False
            say(f"warning: TensorBoard and other monitors are off until the next start ({error.strerror})")

    def _report_others(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread passes its exception on to the next `write_events`.
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._report(failure)
