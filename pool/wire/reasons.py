"""What the messages of gloo, NCCL and the store mean. They are all that tells a slow peer from a broken connection."""

from __future__ import annotations

import re

# A description of NCCL's work has its limit in it, "Timeout(ms)=60000", whatever has happened to it.
_LIMIT = re.compile(r"timed out|timing out|timeout(?!\(ms\))", re.IGNORECASE)
_LOST = re.compile(
    r"connection|broken pipe|remote process exited|ncclRemoteError|communicator was aborted", re.IGNORECASE
)


def ran_out(reason: str) -> bool:
    """Whether a time limit has passed."""
    return bool(_LIMIT.search(reason))


def from_peers(reason: str) -> bool:
    """Whether another rank has stopped, or is gone."""
    return ran_out(reason) or bool(_LOST.search(reason))
