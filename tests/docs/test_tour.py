"""Files and names that the documents mention in backticks exist: `path/to/file.py`, `path/to/file.py:Class.method`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FEWEST_STOPS, MOST_STOPS = 6, 8

DOCUMENTS = ("docs/tour.md", "docs/method.md", "docs/design.md", "docs/glossary.md", "CONTRIBUTING.md")


def places(text: str) -> set[tuple[str, str]]:
    """Return (file, name) of everything that a document mentions; the name is "" where only a file is named."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([\w./-]+\.py)(?::([\w.]+))?`", prose))


def names(path: Path) -> set[str]:
    """Return the functions, classes and constants of a module, and what its classes define as "Class.name"."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for name in _defined(node):
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{member}" for statement in node.body for member in _defined(statement)}
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document: str) -> None:
    missing = []
    for file, name in sorted(places((ROOT / document).read_text())):
        path = ROOT / file
        if not path.is_file():
            missing.append(file)
        elif name and name not in names(path):
            missing.append(f"{file}:{name}")
    assert not missing, f"{document} names what does not exist: {', '.join(missing)}"


def test_each_walk_has_few_stops_and_shows_something_at_each() -> None:
    walks = (ROOT / "docs/tour.md").read_text().split("\n## ")[1:]
    assert len(walks) == 2
    for walk in walks:
        stops = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
        assert FEWEST_STOPS <= len(stops) <= MOST_STOPS
        for stop in stops:
            (file,) = re.findall(r"\A`([\w/]+\.py)` - ", stop)
            assert any(name for named, name in places(stop) if named == file), f"{file}: says nothing to look at"


def test_places_are_found_in_prose_only() -> None:
    text = "See `a/b.py:C.d`, `a.py` and `--set key`.\n```\n`not/this.py`\n```\n"
    assert places(text) == {("a/b.py", "C.d"), ("a.py", "")}


def test_names_are_those_of_a_module_and_its_classes() -> None:
    found = names(ROOT / "pool" / "shard.py")
    assert {"ExpertShard", "ExpertShard.backward_rows", "EXPERTS_AT_A_TIME"} <= found
    assert "ExpertShard.no_such_method" not in found and "backward_rows" not in found
