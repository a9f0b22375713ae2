"""`train` without a launcher: start the whole job on this machine through the deepspeed launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.config import Recipe

DONE_FILE = "UNIPOOL_DONE_FILE"
"""Environment variable: a file that rank 0 makes when the job has come to its end."""

GRACE_SECONDS = 20.0
"""How long the ranks have to end by themselves once their launcher has ended."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def run_locally(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Start one process a rank with `deepspeed` and wait. Returns the job's exit status.

    SIGINT and SIGTERM end every process of the job.

    Args:
        arguments: the command line behind `python -m trainer`, which every rank runs again.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    command += ["--num_gpus", str(recipe.topology.world_size), "--master_port", str(free_port())]
    command += ["--module", "trainer", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/kfd").exists():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else the launcher warns that it found no GPU
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        return _run(command, environment | {DONE_FILE: str(done)}, done)


def _run(command: list[str], environment: dict[str, str], done: Path) -> int:
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    ended_by: list[int] = []

    def end(number: int, _: object) -> None:
        ended_by.append(number)
        # The deepspeed launcher does not pass signals on by itself; every process of its session gets this one.
        _signal_session(launcher.pid, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    status = launcher.wait()
    _wait_for_session(launcher.pid)
    if ended_by:
        return 128 + ended_by[0]
    if status == 0 and not done.exists():
        # The deepspeed launcher says 0 when its per-node process was killed.
        print("unipool: the job ended before its last step; its launcher was killed", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


def _signal_session(leader: int, number: int) -> bool:
    """Send a signal to every process of a session that this process started; False if none is left."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_session(leader: int) -> None:
    """Return when no process of the session is left; after a grace time kill what is."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _signal_session(leader, 0):
        if time.monotonic() > deadline:
            _signal_session(leader, signal.SIGKILL)
        time.sleep(0.1)
