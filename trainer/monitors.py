"""DeepSpeed's monitors (TensorBoard and whatever the JSON enables) on disks that are full or gone."""

from __future__ import annotations

import threading
from typing import Any

from trainer.progress import say


def survive_full_disks(monitor: Any) -> Any:
    """`monitor` such that a disk that is full or gone ends them, not training."""
    write, report = monitor.write_events, threading.excepthook

    def write_events(events: list[Any]) -> None:
        try:
            write(events)
        except OSError as error:
            monitor.enabled = False
            say(f"warning: TensorBoard and other monitors are off until the next start ({error.strerror})")

    def report_others(failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its exception on to the next `write_events`.
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    monitor.write_events, threading.excepthook = write_events, report_others
    return monitor
