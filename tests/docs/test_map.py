"""docs/README.md is the map: it names every folder and every document."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from tests.docs.markdown import DOCUMENTS, ROOT, links, tracked

MAP = "docs/README.md"
WHOLE = (
    "deploy/kubernetes",
    "deploy/grafana",
    "deploy/prometheus",
    "docs/results",
    "tests/deploy",
    "tests/benchmarks",
    "tests/faults",
)
"""Folders whose row in the map speaks for all that is in them."""


def folders() -> set[str]:
    """Every folder with a file of the repository, and those above it."""
    return {str(parent) for name in tracked() for parent in PurePosixPath(name).parents} - {"."}


def test_every_folder_is_in_the_map() -> None:
    mapped = {name.rstrip("/") for name in re.findall(r"^\| `([\w./-]+/)` \|", (ROOT / MAP).read_text(), re.MULTILINE)}
    mirrors = {f"tests/{folder}" for folder in folders()}
    below = {folder for folder in folders() if folder.startswith(tuple(f"{whole}/" for whole in WHOLE))}
    assert folders() - mapped - mirrors - below == set()
    assert mapped - folders() == set()


def test_every_document_is_linked_from_the_map() -> None:
    linked = {str(((ROOT / MAP).parent / link.partition("#")[0]).resolve().relative_to(ROOT)) for link in links(MAP)}
    documents = {name for name in DOCUMENTS if name.startswith("docs/")} - {MAP}
    assert documents - linked == set()


def test_rooms_are_mapped_in_their_order() -> None:
    """The rooms that exist stand in the map once each."""
    rooms = [str(path.parent.relative_to(ROOT)) for path in Path(ROOT / "trainer").glob("*/__init__.py")]
    text = (ROOT / MAP).read_text()
    assert [room for room in rooms if text.count(f"| `{room}/` |") != 1] == []
