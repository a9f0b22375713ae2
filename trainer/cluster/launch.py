"""`train` without a launcher: start the ranks of a whole job, or of one node, through the deepspeed launcher."""

from __future__ import annotations

import base64
import errno
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from trainer.cluster.hostfile import Node
from trainer.cluster.rank_assignment import provisional_names
from trainer.common.errors import START_AGAIN
from trainer.common.gpus import VISIBLE, gpus_on_machine
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe

DONE_FILE = "UNIPOOL_DONE_FILE"
"""Environment variable: a path, at which local rank 0 of a job that ends with all saved makes an empty file.

The job's exit status is appended to the name: on a full disk a file can often be made, but not filled.
"""

RESTARTS = "UNIPOOL_RESTARTS"
"""Environment variable: how often this job has been restarted."""

MAX_RESTARTS = "UNIPOOL_MAX_RESTARTS"
"""Environment variable: how often this job may be restarted before it fails for good."""

_MALLOC = {
    "hugetlb": "1",  # ask for huge pages (madvise)
    "mmap_threshold": "1099511627776",  # take tensors from the heap
    "trim_threshold": "1099511627776",  # and keep the heap
    "top_pad": "67108864",
}
"""How glibc shall supply memory to ranks on CPUs. Most of their tensors have the same sizes in every step, and without
this the kernel supplies large ones anew, page by page."""

GRACE_SECONDS = 20.0
"""How long the ranks have to end by themselves after their launcher has ended."""

LONGEST_PAUSE_SECONDS = 30.0
"""Limit of the pause before a restart, which is 1 s at first and doubles each time."""

_LAUNCHER_CHANGES = (VISIBLE, "DS_ACCELERATOR")
"""Environment variables that the launcher sets, but that ranks shall have as they are here."""

LOOK_SECONDS = 1.0
"""Time between two looks at all processes of the machine, until all ranks have been found."""

POLL_SECONDS = 0.1
"""Time between two looks at these processes."""


def launched() -> bool:
    """Return whether a launcher (deepspeed, torchrun, MPI) started this process as one rank of a job."""
    return any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def free_port() -> int:
    """Return an unused TCP port, preferably one that is never assigned to outgoing connections.

    Nobody else who asks gets the same port for the next minute: the kernel holds it (TIME_WAIT) for servers that set
    SO_REUSEADDR, as those of PyTorch, Prometheus and Python's `http.server` do.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(min(10_000, first_ephemeral - 1), first_ephemeral)
    for port in (*random.SystemRandom().sample(candidates, min(100, len(candidates))), 0):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
                _hold(listener)
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _hold(listener: socket.socket) -> None:
    """Leave a closed connection on the port of a bound socket, whose own side was closed first."""
    # Set only now: the socket was not to be bound to a port that is held, but others shall be.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.listen(1)
    listener.settimeout(5)
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5) as client:
        listener.accept()[0].close()
        client.recv(1)


def restarts() -> int:
    """Return how often `train --max-restarts`, torchrun or a cluster has restarted this job.

    The first two do so after faults only; Kubernetes and Slurm also count a restart after a graceful stop.
    """
    return int(os.environ.get(RESTARTS) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def restart_limit() -> int | None:
    """Return how often `train --max-restarts`, torchrun or a cluster may restart this job, if they have told."""
    number = os.environ.get(MAX_RESTARTS) or os.environ.get("TORCHELASTIC_MAX_RESTARTS") or ""
    return int(number) if number.isdecimal() else None


def run_locally(recipe: Recipe, arguments: Sequence[str], max_restarts: int) -> int:
    """Start one process per rank with DeepSpeed's launcher and wait for the job, restarting it after faults.

    SIGTERM and SIGUSR1 are passed on to the ranks, which save a checkpoint and end with `START_AGAIN`. SIGINT, or a
    second signal other than SIGUSR1, ends every process at once.

    Args:
        arguments: The command line after `python -m trainer`, which every rank runs again.
        max_restarts: How often to restart the job after a fault; wrong input and signals to this process are no faults.

    Returns:
        The exit status of the job.
    """
    before = restarts()
    job = LocalJob(dict(enumerate(_names(recipe))))
    restart = 0
    while True:
        command = launcher({"localhost": recipe.grid.world_size}, 0, "127.0.0.1", free_port(), arguments)
        counted = {RESTARTS: str(before + restart)}
        if max_restarts:
            counted[MAX_RESTARTS] = str(before + max_restarts)
        status = job.run(command, _environment(recipe) | counted)
        if job.came_to_end or status in (0, 2) or job.ended_by or restart == max_restarts:
            return status
        restart += 1
        print(
            f"unipool: the job ended with status {status}; restart {restart} of {max_restarts} "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        if not job.pause(min(2.0 ** (restart - 1), LONGEST_PAUSE_SECONDS)):
            return 128 + job.ended_by[0]


def run_node(recipe: Recipe, node: Node, arguments: Sequence[str]) -> int:
    """Start the ranks of one node of a job, wait, and return the node's exit status.

    Signals are handled as in `run_locally`, and a signal to one node stops the whole job: its ranks agree on the step
    after which all of them save and end.
    """
    command = launcher(node.slots, node.rank, node.master_addr, node.master_port, arguments)
    first = sum(list(node.slots.values())[: node.rank])
    own = list(node.slots.values())[node.rank]
    names = dict(list(enumerate(_names(recipe)))[first : first + own])
    return LocalJob(names).run(command, _environment(recipe))


def _names(recipe: Recipe) -> list[str]:
    return provisional_names(recipe.grid, recipe.topology.order, recipe.grid.world_size)


def mark_end(local_rank: int, status: int) -> None:
    """Tell the `LocalJob` that has started this rank, if one has, with which exit status the job ends."""
    if local_rank == 0 and DONE_FILE in os.environ:
        with suppress(OSError):  # all is saved
            Path(f"{os.environ[DONE_FILE]}{status}").touch()


def end_on_signals() -> None:
    """Let SIGTERM and SIGUSR1 end this process until it has ranks, even as PID 1 of a container."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os._exit(128 + number))


def launcher(
    slots: Mapping[str, int], node_rank: int, master_addr: str, master_port: int, arguments: Sequence[str]
) -> list[str]:
    """Return the command that starts the ranks of one node: DeepSpeed's launcher of a node.

    Its runner, the command `deepspeed`, would read /job/hostfile and drop the user's CUDA_VISIBLE_DEVICES. The launcher
    sets that variable too, so each rank starts through `env`, which gives it back its value here.

    Args:
        slots: Number of ranks of each node, by host.
    """
    world = {host: list(range(number)) for host, number in slots.items()}
    world_info = base64.urlsafe_b64encode(dumps(world).encode()).decode()
    removed = [word for name in _LAUNCHER_CHANGES if name not in os.environ for word in ("-u", name)]
    restored = [f"{name}={os.environ[name]}" for name in _LAUNCHER_CHANGES if name in os.environ]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank", "--no_python"),
        *(f"--world_info={world_info}", f"--node_rank={node_rank}"),
        *(f"--master_addr={master_addr}", f"--master_port={master_port}"),
        *("env", *removed, *restored),
        *(sys.executable, "-u", "-m", "trainer", *arguments),
    ]


def _environment(recipe: Recipe) -> dict[str, str]:
    """Return the environment of the launcher, which needs no GPU itself."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    on_cpus = recipe.parallel.device == "cpu" or not gpus_on_machine()
    return (malloc_settings() if on_cpus else {}) | os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}


def malloc_settings() -> dict[str, str]:
    """Return an environment for ranks on CPUs, in which a step is a few percent faster.

    It is empty without glibc 2.35, and if the environment has settings of malloc already. A GPU's rank does not need
    it, and would keep the memory into which it has copied a checkpoint.
    """
    name, version = platform.libc_ver()
    chosen = any(variable.startswith("MALLOC_") for variable in os.environ)  # by the user, as for older versions
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35) or chosen:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{key}={value}" for key, value in _MALLOC.items())}


class LocalJob:
    """A launcher, its ranks, and the signals that this process receives for them. Create it in the main thread.

    Args:
        names: What the ranks that it starts are called, by their launcher ranks.

    Attributes:
        ended_by: Signals with which the user ended the job.
        came_to_end: Whether the last run has done all its steps, even if the model has diverged.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self.ended_by: list[int] = []
        self.came_to_end = False
        self._launcher: subprocess.Popen[bytes] | None = None
        self._had_ranks = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._end(number))

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Start the launcher, wait until it and all its ranks have ended, and return the exit status of the job."""
        with tempfile.TemporaryDirectory() as folder:
            own = environment | {DONE_FILE: f"{folder}/"}
            self._launcher = subprocess.Popen(command, env=own, start_new_session=True)
            self._had_ranks = False
            for place, early in enumerate(list(self.ended_by)):  # those that came while the launcher was starting
                self._handle(early, first=place == 0)
            first_gone = self._wait()
            status = self._launcher.returncode
            _wait_for_session(self._launcher.pid)
            self._launcher = None
            ended = next((file.name for file in Path(folder).iterdir()), "")
            self.came_to_end = ended not in ("", str(START_AGAIN))
            if ended and status == 1:  # as of a launcher that was asked to end, whatever its ranks make of that
                status = int(ended)
            if self.ended_by and status != START_AGAIN and not self.came_to_end:
                return 128 + self.ended_by[0]
            if status < 0:
                print("unipool: the job ended because its launcher was killed", file=sys.stderr)
            elif number := _killed_by(status):
                print(f"unipool: {first_gone} was killed by {number.name}", file=sys.stderr)
        return status if status >= 0 else 128 - status

    def _wait(self) -> str:
        """Wait for the launcher to end; return the name of the rank that ended first, if that is known."""
        assert self._launcher
        ranks: dict[str, psutil.Process] = {}
        first: list[str] = []
        look = 0.0
        while True:
            running = self._launcher.poll() is None
            if running and len(ranks) < len(self._names) and time.monotonic() > look:
                look = time.monotonic() + LOOK_SECONDS
                for process in _ranks(self._launcher.pid):
                    with suppress(psutil.Error, LookupError):
                        ranks[self._names[int(process.environ()["RANK"])]] = process
                self._had_ranks = bool(ranks)
            first = first or [name for name, process in ranks.items() if has_ended(process)]
            if not running:
                return first[0] if len(first) == 1 else "a rank"
            time.sleep(POLL_SECONDS)

    def pause(self, seconds: float) -> bool:
        """Wait; return False if the user ends the job meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.ended_by:
            time.sleep(POLL_SECONDS)
        return not self.ended_by

    def _end(self, number: int) -> None:
        first = not self.ended_by
        self.ended_by.append(number)
        if self._launcher:
            self._handle(number, first)

    def _handle(self, number: int, first: bool) -> None:
        """Let the ranks save and end because of a signal, or end everything."""
        assert self._launcher
        if number == signal.SIGUSR1 and not first:
            return  # Slurm sends USR1 before the time limit also to ranks that SIGTERM has asked to save
        ranks = list(_ranks(self._launcher.pid))
        # Ranks that have ended, as the job has saved, need no signal: their launcher ends by itself with their status.
        save = (bool(ranks) or self._had_ranks) and first and number != signal.SIGINT
        if not save:
            # The deepspeed launcher does not pass signals on, so every process of its session gets this one.
            _signal_session(self._launcher.pid, signal.SIGTERM)
        for rank in ranks:
            # To save, signal only the ranks: the launcher would give them 30 s and return 1 whatever their status is.
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number if save else signal.SIGINT)  # SIGINT ends a rank whatever it is doing


def _ranks(launcher: int) -> Iterator[psutil.Process]:
    """Yield the ranks below a deepspeed launcher: its descendants that are not launchers themselves."""
    try:
        process = psutil.Process(launcher)
        starts_ranks = "deepspeed.launcher.launch" in process.cmdline()
        children = process.children()
    except psutil.Error:
        return
    for child in children:
        try:
            is_launcher = any("deepspeed.launcher" in word for word in child.cmdline())
        except psutil.Error:
            continue
        if is_launcher:
            yield from _ranks(child.pid)
        elif starts_ranks:
            yield child


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its parent has not looked yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _killed_by(status: int) -> signal.Signals | None:
    """Return the signal that ended the first rank to end: deepspeed's launcher makes its negative status its own."""
    try:
        return signal.Signals(256 - status)
    except ValueError:
        return None


def _signal_session(leader: int, number: int) -> bool:
    """Send a signal to every process of a session that this process started; return False if none is left."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_session(leader: int) -> None:
    """Wait until no process of the session is left, and kill those that are left after a grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _signal_session(leader, 0):
        if time.monotonic() > deadline:
            _signal_session(leader, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(-leader, os.WNOHANG)  # as PID 1 of a container, this process inherits the launcher's children
        time.sleep(POLL_SECONDS)
