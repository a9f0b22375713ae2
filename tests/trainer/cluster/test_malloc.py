"""How ranks on CPUs get their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.distributed import TIME_LIMIT
from tests.trainer.job import environment
from trainer.cluster import launch
from trainer.cluster.launch import malloc_settings, run_locally
from trainer.config.recipe import load_recipe


@pytest.mark.parametrize(
    ("keys", "gpus", "own", "expected"),
    [
        ((), 0, None, True),
        ((), 2, None, False),
        (("parallel.device=cpu",), 2, None, True),
        ((), 0, "glibc.malloc.check=3", False),
    ],
    ids=["no GPU", "GPUs", "GPUs that are not used", "the user's own"],
)
def test_ranks_on_cpus_keep_their_memory(
    keys: tuple[str, ...], gpus: int, own: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ranks of `train` have in their environment."""
    job: Any = MagicMock(**{"run.return_value": 0})
    monkeypatch.setattr(launch, "LocalJob", lambda names: job)
    monkeypatch.setattr(launch, "gpus_on_machine", lambda: gpus)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for variable in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(variable)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    assert run_locally(load_recipe("quickstart", keys), ["train", "quickstart"], 0) == 0
    ((_, given),) = (call.args for call in job.run.call_args_list)
    assert ("trim_threshold" in (given.get("GLIBC_TUNABLES") or "")) == expected
    assert own is None or given["GLIBC_TUNABLES"] == own
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    assert malloc_settings() == {}
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert malloc_settings()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    assert malloc_settings() == {}


def test_malloc_takes_the_settings() -> None:
    """What a freed array leaves stays in the heap: the next one finds it, and no page fault follows."""
    code = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**25); before = faults()
for _ in range(4): bytearray(2**25)
print(faults() - before)
"""
    settings = malloc_settings()
    if not settings:
        pytest.skip("needs glibc 2.35")
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment() | settings, capture_output=True, check=True, timeout=TIME_LIMIT)
    assert int(run.stdout) < 1000, "of 32 MiB each: 8,192 pages of 4 KiB"
