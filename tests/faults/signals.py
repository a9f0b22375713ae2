"""Faults of processes: signals, exceptions, values that are not finite, a clock that jumps."""

from __future__ import annotations

import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable

from tests.faults.jobs import PLUG
from tests.faults.scene import Fault, Scene, anything, is_fault, is_fine

SHORT = 4.0
"""Seconds of a pause that all limits allow."""


def _send(number: int, times: int = 1) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        process = scene.process
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.3)

    return act


def _pause(scene: Scene) -> None:
    process = scene.process
    process.suspend()
    time.sleep(SHORT)
    process.resume()


def _wake_late(scene: Scene) -> None:
    """Stop a process, and let it go on when the others have given up, but before it has been killed."""
    process = scene.process
    process.suspend()
    timer = threading.Timer(scene.limit + 18.0, process.resume)
    timer.start()
    scene.undo.append(timer.cancel)


def _freeze_all(scene: Scene) -> None:
    """Stop every rank at once for a while, as a machine that is suspended or migrated."""
    assert scene.start
    ranks = [scene.start.process(rank) for rank in range(len(scene.setting.names))]
    for rank in ranks:
        rank.suspend()
    time.sleep(SHORT)
    for rank in ranks:
        rank.resume()


def _is_stop(status: int) -> bool:
    """Saved and stopped, or ended by the signal during start-up, or there was nothing left to do."""
    ended = {base + number for number in (signal.SIGTERM, signal.SIGUSR1) for base in (128, 256 - 2 * number)}
    return status in {0, 75, *ended}  # the launcher's status for a rank that heeds no signals yet is 256 - the signal


def _is_interrupted(status: int) -> bool:
    return status in (0, 75, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def _own_clock(scene: Scene) -> None:
    """Give the job a wall clock of its own, which follows a file; see `plug/clock.c`."""
    library, file = scene.setting.folder / "clock.so", scene.setting.folder / "clock"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(PLUG / "clock.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    file.write_bytes(bytes(8))
    scene.setting.environment |= {"LD_PRELOAD": str(library), "UNIPOOL_TEST_CLOCK": str(file)}


def _clock(seconds: int) -> Fault:
    """Let the wall clock jump by so many seconds."""

    def jump(scene: Scene) -> None:
        with (scene.setting.folder / "clock").open("r+b") as file:
            file.write(struct.pack("q", seconds))

    return Fault(is_fine, prepare=_own_clock, act=jump)


YEAR = 365 * 24 * 3600

FAULTS: dict[str, Fault] = {
    "kill -9": Fault(is_fault, act=_send(signal.SIGKILL), goes_on=False, names=True),
    "SIGSTOP": Fault(is_fault, act=_send(signal.SIGSTOP), goes_on=False, names=True, waits=True),
    "SIGSTOP, SIGCONT in time": Fault(is_fine, act=_pause, seconds=SHORT),
    "SIGSTOP, SIGCONT too late": Fault(is_fault, act=_wake_late, names=True, waits=True),
    "all ranks frozen for a while": Fault(is_fine, act=_freeze_all, seconds=SHORT),
    # Its heart beats: only waits of the wire can say which rank they waited for.
    "alive but stuck": Fault(
        is_fault, goes_on=False, waits=True, says="imed out|has not reached this point|has not joined"
    ),
    "exception": Fault(is_fault, then="raise", names=True, says="ValueError: this row is broken"),
    "SIGTERM": Fault(_is_stop, act=_send(signal.SIGTERM)),
    "SIGUSR1": Fault(_is_stop, act=_send(signal.SIGUSR1)),
    "SIGTERM twice": Fault(_is_stop, act=_send(signal.SIGTERM, 2)),
    "SIGINT": Fault(_is_interrupted, act=_send(signal.SIGINT)),
    "kill -9 of a launcher": Fault(is_fault, act=_send(signal.SIGKILL), says="its launcher is gone|was killed"),
    "SIGTERM of a launcher": Fault(anything, act=_send(signal.SIGTERM)),
    "NaN once": Fault(is_fine, then="nan", says="skipped because gradients are not finite", losses="other"),
    # A checkpoint after a skipped step goes on behind it.
    "NaN from then on": Fault(is_fault, then="nan on", says="steps in a row, up to step", losses="other"),
    "clock jumps forward by an hour": _clock(3600),
    "clock jumps back by an hour": _clock(-3600),
    "clock jumps forward by 20 years": _clock(20 * YEAR),
    "clock jumps back to before the run": _clock(-20 * YEAR),
}
