"""The order of the tests. `make test` runs several files at once, each in one process: its tests share their set-up."""

from __future__ import annotations

import pytest

FIRST = (
    "trainer/test_jobs.py",
    "trainer/test_restarts.py",
    "deploy/test_kubernetes.py",
    "trainer/test_faults.py",
    "trainer/test_reshape.py",
    "trainer/test_layouts.py",
    "trainer/test_saver.py",
    "deploy/test_scrape.py",
)
"""Files that take longest: begun last, one of them would run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        place = [number for number, name in enumerate(FIRST) if item.path.match(f"tests/{name}")]
        return place[0] if place else len(FIRST)

    items.sort(key=rank)
