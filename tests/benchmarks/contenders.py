"""Contenders of a benchmark: each runs in its own processes, which stay alive and idle while others are measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.cluster.launch import free_port, malloc_settings

START_LIMIT = 300.0
RUN_LIMIT = 900.0
END_LIMIT = 5.0
"""Seconds that a contender may take to start, to serve one request, and to end."""

ROOT = Path(__file__).parents[2]


class ContenderFailed(RuntimeError):
    """A rank of a contender died or did not answer in time."""


class Contender:
    """A context with one process per rank that speaks `peer_protocol`; at its end all of them are stopped.

    Args:
        name: Name for messages.
        command: What every rank runs, with its rank in the usual environment variables of a launcher.
        ranks: Number of processes.
        threads: Threads of each process.
        folder: Where to write the ranks' logs.
    """

    def __init__(self, name: str, command: Sequence[str], ranks: int, threads: int, folder: Path):
        self.name = name
        self._logs = [folder / f"{name.replace(' ', '_')}-{rank}.log" for rank in range(ranks)]
        self._command = list(command)
        self._environment = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            **malloc_settings(),  # the trainer sets it for its ranks, and the peers shall not lack it
        }
        self._ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            for rank, log in enumerate(self._logs):
                self._ranks.append(self._start(rank, log))
            self._wait(START_LIMIT)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self, rank: int, log: Path) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as errors:
            return subprocess.Popen(
                self._command,
                env=os.environ | self._environment | place,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,  # an interrupt at the terminal reaches the benchmark, which ends them
            )

    def run(self, **request: Any) -> float:
        """Send a request to all ranks, and return the seconds until the last one has answered.

        Raises:
            ContenderFailed: A rank died, or the time limit has passed.
        """
        started = time.perf_counter()
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
        self._wait(RUN_LIMIT)
        return time.perf_counter() - started

    def _wait(self, limit: float) -> None:
        """Wait until every rank has answered one line."""
        deadline = time.monotonic() + limit
        waiting = {process.stdout: rank for rank, process in enumerate(self._ranks)}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContenderFailed(self._failure(min(waiting.values()), f"has not answered in {limit:.0f} s"))
            for pipe in ready:
                text = pipe.read(65536)
                if not text:
                    raise ContenderFailed(self._failure(waiting[pipe], "ended"))
                if text.endswith(b"\n"):
                    del waiting[pipe]

    def _failure(self, rank: int, what: str) -> str:
        return f"{self.name}, rank {rank}, {what}:\n{self._logs[rank].read_text()[-3000:]}"

    def close(self) -> None:
        """End every rank by closing its input; ranks that are still alive after a while are killed."""
        for process in self._ranks:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
        deadline = time.monotonic() + END_LIMIT
        for process in self._ranks:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._ranks.clear()


def end_in_order() -> None:
    """Let SIGTERM end the benchmark as an interrupt does, so that it stops what it started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
