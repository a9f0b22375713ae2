"""A job of the soak: started, scraped every second, and measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.trainer.job import ROOT, environment, processes_of
from trainer.checkpoint.format import newest

RESTARTS = 100_000
"""`--max-restarts`: the same supervisor over all faults."""


@dataclass
class Scrapes:
    """What reading the pages of a job has come to.

    Attributes:
        slowest: The longest successful read, in seconds.
    """

    good: int = 0
    failed: int = 0
    slowest: float = 0.0
    bytes: int = 0


@dataclass
class WatchedJob:
    """A job under its own supervisor, `unipool train --max-restarts`.

    Attributes:
        name: "disturbed" or "undisturbed".
        run: Its `run.dir`.
        prefix: Command in front of `python -m trainer`.
    """

    name: str
    recipe: str
    sets: Sequence[str]
    run: Path
    log: Path
    prefix: Sequence[str] = ()
    scrapes: Scrapes = field(default_factory=Scrapes)
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        threading.Thread(target=self._scrape, daemon=True, name=f"scrape {self.name}").start()

    def start(self) -> None:
        """Start it; it resumes where it was."""
        # If this process is killed, the supervisor is too, and its ranks end by themselves.
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            *self.prefix,
            sys.executable,
            "-m",
            "trainer",
            "train",
            self.recipe,
        ]
        command += ["--max-restarts", str(RESTARTS)]
        command += [word for key in (*self.sets, self._mark) for word in ("--set", key)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def _mark(self) -> str:
        return f"run.dir={self.run}"

    @property
    def status(self) -> int | None:
        """The supervisor's exit status; None while it runs."""
        assert self._process
        return self._process.poll()

    def processes(self) -> dict[str, psutil.Process]:
        """Return its processes: "supervisor", "launcher", "rank 0", ..."""
        found = {}
        for process in processes_of(self._mark):
            try:
                if not process.name().startswith("python"):
                    continue
                if "deepspeed.launcher.launch" in process.cmdline():
                    found["launcher"] = process
                else:
                    rank = process.environ().get("RANK")
                    found["supervisor" if rank is None else f"rank {rank}"] = process
            except (psutil.Error, OSError):
                continue
        return found

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Return, by process: its number, resident bytes, open descriptors and threads."""
        sizes: dict[str, dict[str, Any]] = {}
        for name, process in self.processes().items():
            try:
                with process.oneshot():
                    rss, threads = process.memory_info().rss, process.num_threads()
                sizes[name] = {"pid": process.pid, "rss": rss, "fds": process.num_fds(), "threads": threads}
            except psutil.Error:
                continue
        return sizes

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that are whole."""
        try:
            text = (self.run / "metrics.jsonl").read_bytes()
        except OSError:
            return []
        lines = [line for line in text.split(b"\n")[:-1] if line]
        return [json.loads(line) for line in lines]

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            if b'"loss"' in line and line.startswith(b"{"):
                return int(json.loads(line)["step"])
        return 0

    @property
    def saved(self) -> int:
        """Steps in the newest checkpoint."""
        found = newest(self.run / "checkpoints")
        return found[0] if found else 0

    def stop(self, limit: float) -> int | None:
        """Ask it to save and stop; return the status, None if it had to be killed."""
        if self.status is None:
            assert self._process
            self._process.send_signal(signal.SIGTERM)
        status = self.wait(limit)
        self.kill()
        return status

    def wait(self, limit: float) -> int | None:
        """Wait for the supervisor to end; return its status, None if it has not."""
        assert self._process
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> int:
        """Kill what is left; return how many processes that was."""
        left = processes_of(self._mark)
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=30)
        if self._process:
            self._process.wait(30)
        return len(left)

    def _scrape(self) -> None:
        """Read every rank's page once a second, as Prometheus would, from the list that the run writes for it."""
        while True:
            time.sleep(1.0)
            try:
                (group,) = json.loads((self.run / "targets.json").read_text())
            except (OSError, ValueError):
                continue
            for target in group["targets"]:
                since = time.monotonic()
                try:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
                        self.scrapes.bytes += len(page.read())
                except OSError:
                    self.scrapes.failed += 1
                    continue
                self.scrapes.good += 1
                self.scrapes.slowest = max(self.scrapes.slowest, time.monotonic() - since)
