"""Start a job by its real launcher, with a process that waits at a chosen place, and see how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.trainer.job import ROOT, environment, processes_of, steps
from trainer.checkpoint import format as checkpoint
from trainer.config.recipe import load_recipe

PLUG = Path(__file__).parent / "plug"

TIMEOUT, START_TIMEOUT = 20, 60
"""`parallel.timeout_seconds` and `parallel.start_timeout_seconds` of the jobs here."""

EVERY = 2
"""Steps between checkpoints."""

LEAVES = 15.0
"""Seconds for ranks to notice that their launcher is gone."""

KEYS: dict[str, Any] = {
    "train.steps": 10,
    "train.micro_batch": 2,
    "checkpoint.every": EVERY,
    "eval.every": 4,
    "probe.every": 0,
    "parallel.lanes": 2,
    "parallel.timeout_seconds": TIMEOUT,
    "parallel.start_timeout_seconds": START_TIMEOUT,
    "metrics.csv": False,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "1+1": {"parallel.trunk_ranks": 1, "parallel.pool_ranks": 1},
    "2+1": {"parallel.trunk_ranks": 2, "parallel.pool_ranks": 1},
    "every_rank": {"parallel.trunk_ranks": 2, "parallel.pool_ranks": 0, "parallel.layout": "every_rank"},
    "colocated": {"parallel.trunk_ranks": 2, "parallel.pool_ranks": 0},
}


@dataclass(frozen=True)
class Pause:
    """Where a process waits for a fault.

    Attributes:
        who: A launcher rank, or "train": the process `unipool train` that starts the ranks.
        place: "module:Class.function"; "": as soon as Python runs.
        kind: The kind of request that an argument of the call must have, if any.
        number: Which of these calls.
        then: What the call does when it goes on: "" what it always does; "raise"; "nan": its result contains a NaN;
            "nan on": so do all later results.
        start: How often the job must have been restarted before.
    """

    who: int | str
    place: str = ""
    kind: str = ""
    number: int = 1
    then: str = ""
    start: int = 0


@dataclass(frozen=True)
class Node:
    """What is special to the processes of one node.

    Attributes:
        slots: Its ranks.
        prefix: Command in front of `python -m trainer`, such as one that enters a namespace.
        arguments: Further arguments of `train`.
    """

    slots: int
    prefix: Sequence[str] = ()
    arguments: Sequence[str] = ()


@dataclass
class Setting:
    """How the jobs of a case are started. A fault may change it before the first start.

    Attributes:
        folder: A folder of the case's own: the run, logs, and what the plug writes.
        keys: Keys of the recipe that differ from `KEYS`.
    """

    folder: Path
    recipe: Path
    layout: str
    keys: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    run: Path = Path()
    log_folder: Path = Path()

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.log_folder = self.folder

    @property
    def sets(self) -> list[str]:
        """`--set` of all keys; the run's folder comes last, by which its processes are found."""
        keys = KEYS | LAYOUTS[self.layout] | self.keys | {"run.dir": self.run}
        return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]

    @property
    def mark(self) -> str:
        return f"run.dir={self.run}"

    @property
    def names(self) -> list[str]:
        """What errors call the ranks."""
        grid = load_recipe(str(self.recipe), self.sets[1::2]).grid
        return [grid.describe(rank) for rank in range(grid.world_size)]


class Start:
    """One start of a job, in the background.

    Args:
        number: Of the start within its case.
        restarts: `--max-restarts`.
    """

    def __init__(self, setting: Setting, number: int = 0, pause: Pause | None = None, restarts: int = 0):
        self._setting, self._talk = setting, setting.folder / f"talk{number}"
        self._talk.mkdir()
        variables = environment() | {"PYTHONPATH": str(ROOT)} | setting.environment
        if pause:
            variables["PYTHONPATH"] = f"{PLUG}:{ROOT}"
            variables["UNIPOOL_TEST_PAUSE"] = json.dumps(asdict(pause) | {"folder": str(self._talk)})
        nodes = setting.nodes or [Node(0, arguments=("--max-restarts", str(restarts)))]
        self.logs, self._processes = [], []
        for index, node in enumerate(nodes):
            log = setting.log_folder / f"start{number}-node{index}.log"
            # Without this process, what it starts shall not live on either.
            command = ["setpriv", "--pdeathsig", "KILL", *node.prefix, sys.executable, "-m", "trainer", "train"]
            command += [str(setting.recipe), *node.arguments, *setting.sets]
            with log.open("w") as output:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.logs.append(log)
            self._processes.append(process)

    @property
    def log(self) -> str:
        """What all nodes have said so far."""
        return "".join(log.read_text(errors="replace") for log in self.logs)

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def reached(self, limit: float) -> bool:
        """Wait until the paused process is at its place; return False if the job ends before, or at the limit."""
        deadline = time.monotonic() + limit
        while not (self._talk / "reached").exists():
            if not self.running or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def go_on(self) -> None:
        """Let the paused process continue."""
        (self._talk / "go").touch()

    def process(self, who: int | str) -> psutil.Process:
        """Return the process of a launcher rank, of "train", or of deepspeed's "launcher".

        Raises:
            LookupError: There is none.
        """
        for process in processes_of(self._setting.mark):
            try:
                is_launcher = "deepspeed.launcher.launch" in process.cmdline()
                rank = None if is_launcher else process.environ().get("RANK")
                name = "launcher" if is_launcher else "train" if rank is None else int(rank)
                if name == who and process.name().startswith("python"):
                    return process
            except (psutil.Error, OSError):
                continue
        raise LookupError(f"no process of {who}")

    def kill_node(self, node: int) -> None:
        """End everything on a node that is a process namespace."""
        self._processes[node].kill()

    def wait(self, limit: float) -> list[int] | None:
        """Return the exit status of each node, or None if the job has not ended at the limit."""
        deadline = time.monotonic() + limit
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)
        return None if self.running else [process.wait() for process in self._processes]

    def _left(self) -> list[psutil.Process]:
        left = []
        for process in processes_of(self._setting.mark):
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        return left

    def clean_up(self) -> int:
        """Kill what is left of the job some seconds after its end; return how many processes that were."""
        deadline = time.monotonic() + LEAVES
        while (left := self._left()) and not self.running and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        psutil.wait_procs(left, timeout=30)
        return len(left)


@dataclass(frozen=True)
class Reference:
    """What a layout's undisturbed run comes to.

    Attributes:
        records: Its steps and evaluations.
        weights: What its last checkpoint holds; see `weights_of`.
        half: Copy of its folder as of step 4, to resume from.
    """

    records: list[dict[str, float]]
    weights: dict[str, str]
    half: Path


HALF = 4
"""Steps done in `Reference.half`."""


def weights_of(run: Path) -> dict[str, str]:
    """Return a checksum of the tensors and numbers in each file of the newest checkpoint, by its name.

    The files themselves differ, because DeepSpeed puts its configuration into them, and that knows `run.dir`.
    """
    import torch

    found = checkpoint.newest(run / "checkpoints")
    files = sorted(found[1].rglob("*.pt")) if found else []
    digests = {}
    for file in files:
        state = torch.load(file, map_location="cpu", weights_only=False)  # this command has written it itself
        digest = hashlib.sha256()
        for part in _numbers(state):
            digest.update(part)
        digests[str(file.relative_to(run))] = digest.hexdigest()
    return digests


def _numbers(state: Any) -> Iterator[bytes]:
    """Yield what a saved state consists of, without texts."""
    import torch

    if isinstance(state, torch.Tensor):
        yield repr(state.shape).encode() + state.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield str(key).encode()
            yield from _numbers(state[key])
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _numbers(value)
    elif isinstance(state, int | float):
        yield repr(state).encode()


def undisturbed(folder: Path, recipe: Path, layout: str) -> Reference:
    """Run a layout without a fault."""
    folder.mkdir()
    setting = Setting(folder, recipe, layout, {"checkpoint.keep": 9})
    start = Start(setting)
    statuses = start.wait(300)
    start.clean_up()
    assert statuses == [0], start.log
    half = folder / "half"
    shutil.copytree(setting.run, half)
    for later in checkpoint.folders(half / "checkpoints"):
        if checkpoint.steps_of(later) > HALF:
            shutil.rmtree(later)
    metrics = half / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= HALF + 1))
    return Reference(steps(setting.run), weights_of(setting.run), half)


def resumed_after(log: str) -> list[int]:
    """Return the steps after which starts resumed, in order; a start from the beginning does not count."""
    return [int(number) for number in re.findall(r"^resuming after step (\d+)", log, re.M)]
