"""The order of the tests. `make test` runs several files at once, each in one process: its tests share their set-up."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

import pytest

# The Python files of exports are imported from here. Processes do not share them, and within a process the folder never
# changes: once transformers has imported one of them, it looks for all others in the same folder.
MODULES = tempfile.mkdtemp(prefix="unipool-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES
atexit.register(shutil.rmtree, MODULES, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Close the pipe to pytest-xdist in forked processes, where it would hide that the worker has ended."""
    pipes = [
        plugin.channel.gateway._io.outfile.fileno()
        for plugin in config.pluginmanager.get_plugins()
        if type(plugin).__name__ == "WorkerInteractor"
    ]

    def close() -> None:  # once: a process that is forked by a forked one may use the number for something else
        while pipes:
            os.close(pipes.pop())

    os.register_at_fork(after_in_child=close)


FIRST = (
    "trainer/train/test_jobs.py",
    "trainer/train/test_restarts.py",
    "deploy/test_kubernetes.py",
    "trainer/train/test_faults.py",
    "trainer/checkpoint/test_reshard.py",
    "trainer/train/test_layouts.py",
    "gpu/test_check.py",
    "trainer/model/test_segments.py",
    "trainer/checkpoint/test_resume.py",
    "trainer/planning/test_memory.py",
    "trainer/checkpoint/test_save.py",
    "deploy/test_scrape.py",
)
"""Files that take longest: begun last, one of them would run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        place = [number for number, name in enumerate(FIRST) if item.path.match(f"tests/{name}")]
        return place[0] if place else len(FIRST)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Let garbage collections skip what is imported, and come less often: torch's compiler makes many objects."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
