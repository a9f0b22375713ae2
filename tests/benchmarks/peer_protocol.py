"""How a contender's rank talks to the benchmark: a JSON object a line on stdin, and one a line back.

Imports the standard library only, because it runs in the peers' environment too. Waiting is a blocking read, so an idle
contender takes no processor time; at the end of stdin the process ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def take_stdout() -> Callable[[dict[str, Any]], None]:
    """Keep stdout for answers; whatever else a library prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return answer


def serve(answer: Callable[[dict[str, Any]], None], work: Callable[..., None]) -> None:
    """Say that this rank is ready, then do `work(**request)` for every request, until stdin ends."""
    answer({"ready": True})
    for line in sys.stdin:
        work(**json.loads(line))
        answer({"done": True})


def pin(rank: int) -> None:
    """This thread to a core of its own, where each rank has one thread; to be called when its groups are made."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
