"""Which tests run side by side, and in which order (see `make test` for how many at once)."""

from __future__ import annotations

import pytest

FIRST = (
    "trainer/test_faults.py",
    "trainer/test_jobs.py",
    "deploy/test_kubernetes.py",
    "trainer/test_reshape.py",
    "trainer/test_layouts.py",
    "trainer/test_saver.py",
    "deploy/test_scrape.py",
)
"""Files that take longest: begun last, one of them would run alone at the end."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what they set up, so they run in one process, unless they are marked as of a group."""

    def rank(item: pytest.Item) -> int:
        place = [number for number, name in enumerate(FIRST) if item.path.match(f"tests/{name}")]
        return place[0] if place else len(FIRST)

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=rank)
