"""How a contender's rank talks to the benchmark: one JSON object per line on stdin, and one per line in answer.

This module imports only the standard library, because it also runs in the peers' environment. A rank waits in a
blocking read, so an idle contender uses no processor time. At the end of stdin the process ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def take_stdout() -> Callable[[dict[str, Any]], None]:
    """Reserve stdout for answers; whatever libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return answer


def serve(answer: Callable[[dict[str, Any]], None], work: Callable[..., None]) -> None:
    """Report that this rank is ready, then call `work(**request)` for every request until stdin ends."""
    answer({"ready": True})
    for line in sys.stdin:
        work(**json.loads(line))
        answer({"done": True})


def pin(rank: int) -> None:
    """Pin this thread to a core of its own; call it after process groups have been made, if ranks have one thread."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
