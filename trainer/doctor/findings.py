"""Checks, and what they find. Each runs in a process of its own: one that hangs or crashes costs the others nothing.

A forked process is killed when its time is over, whatever it waits for: a disk that is out of reach, a broken driver.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal

from trainer.common.errors import UserError, os_reason, short_line
from trainer.config.recipe import Recipe

SECONDS = 30.0
"""Longest time of a check."""

_END_SECONDS = 10.0
"""How long to wait for the end of a process that has answered, or has closed its pipe and is about to end."""

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check says about one thing.

    Attributes:
        about: The thing, in a word or two.
        found: What was found.
        mend: What to do about it; "" if all is well.
    """

    about: str
    status: Status
    found: str
    mend: str = ""


def ok(about: str, found: str) -> Finding:
    """All is well."""
    return Finding(about, "ok", found)


def warning(about: str, found: str, mend: str) -> Finding:
    """A run works, but may be slower, or fail later."""
    return Finding(about, "warning", found, mend)


def error(about: str, found: str, mend: str) -> Finding:
    """A run would fail."""
    return Finding(about, "error", found, mend)


@dataclass(frozen=True)
class Check:
    """A check: its name, and what it does with the recipe, if there is one.

    Attributes:
        seconds: Its longest time.
    """

    name: str
    run: Callable[[Recipe | None], Iterable[Finding]]
    seconds: float = SECONDS


def examine(checks: Sequence[Check], recipe: Recipe | None, done: Callable[[], object]) -> list[Finding]:
    """Run all checks at once, and return what they find, in the order of the checks.

    Args:
        done: Called whenever a check has ended.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Check, BaseProcess, float]] = {}
    found: dict[str, list[Finding]] = {}
    for check in checks:
        ours, theirs = context.Pipe(duplex=False)
        started = context.Process(target=_run, args=(check, recipe, theirs), daemon=True)
        started.start()
        theirs.close()
        running[ours] = check, started, time.monotonic() + check.seconds
    while running:
        soonest = min(deadline for _, _, deadline in running.values())
        answered = wait(list(running), max(0.0, soonest - time.monotonic()))
        late = [pipe for pipe, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
        for pipe in {*answered, *late}:
            assert isinstance(pipe, Connection)
            check, process, _ = running.pop(pipe)
            found[check.name] = _answer(check, pipe, process, pipe in answered)
            done()
    return [finding for check in checks for finding in found[check.name]]


def _answer(check: Check, pipe: Connection, process: BaseProcess, in_time: bool) -> list[Finding]:
    """What a check has found; a check that is late or ends without an answer is killed, and is an error itself."""
    if in_time:
        with suppress(EOFError, OSError):
            answer: list[Finding] = pipe.recv()
            process.join(_END_SECONDS)
            return answer
        process.join(_END_SECONDS)
    else:
        process.kill()
        found = f"no answer within {check.seconds:.0f} s"
        return [error(check.name, found, "what it asks hangs, such as a disk or a driver: see dmesg")]
    code = process.exitcode or 0
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return [error(check.name, f"the check {ended}", "see dmesg; what it asks is broken")]


def _run(check: Check, recipe: Recipe | None, answer: Connection) -> None:
    """The process of a check, whose libraries may say nothing on the terminal."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    sys.stdout = sys.stderr = os.fdopen(nothing, "w")
    found: list[Finding] = []
    try:
        found.extend(check.run(recipe))  # keeps what was found before an error
    except UserError as problem:
        found.append(Finding(check.name, "error", str(problem)))
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        found.append(error(check.name, f"{where}{os_reason(problem)}", "see that this user may read it"))
    except Exception as problem:
        text = short_line(f"{type(problem).__name__}: {problem}")
        found.append(error(check.name, f"the check failed: {text}", "please report it with unipool --version"))
    answer.send(found)
    answer.close()
    os._exit(0)
