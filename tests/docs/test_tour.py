"""Files and names that the documents mention in backticks exist: `path/to/file.py`, `path/to/file.py:Class.method`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, prose

FEWEST_STOPS, MOST_STOPS = 6, 8


def places(text: str) -> set[tuple[str, str]]:
    """Return (file, name) of all code that a text mentions as `file:name`, or as `file` with the name ""."""
    return set(re.findall(r"`([\w.-]+/[\w./-]+\.py)(?::([\w.]+))?`", text))


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
    for file, name in sorted(places(prose(document))):
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


def test_places_are_files_with_or_without_a_name() -> None:
    assert places("See `a/b.py:C.d`, `a/c.py`, `recipe.py` and `--set key`.") == {("a/b.py", "C.d"), ("a/c.py", "")}


def test_names_are_those_of_a_module_and_its_classes() -> None:
    found = names(ROOT / "pool" / "shard.py")
    assert {"ExpertShard", "ExpertShard.backward_rows", "EXPERTS_AT_A_TIME"} <= found
    assert "ExpertShard.no_such_method" not in found and "backward_rows" not in found


def test_cited_equations_exist_and_each_is_said_to_be_somewhere_in_the_code() -> None:
    method = (ROOT / "docs/method.md").read_text()
    numbers = [int(number) for number in re.findall(r"\\tag\{M(\d+)\}", method)]
    assert numbers == list(range(1, len(numbers) + 1))
    rows = re.findall(
        r"^\| (M[\dM, to]+) \|", method.partition("## Where each equation is in the code")[2], re.MULTILINE
    )
    mapped = []
    for row in rows:
        first, *more = map(int, re.findall(r"\d+", row))
        mapped += range(first, more[0] + 1) if " to " in row else [first, *more]
    assert sorted(mapped) == numbers
    files = [path for folder in ("router", "pool", "trainer") for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text() for path in files] + [prose(document) for document in DOCUMENTS]
    cited = [
        int(n)
        for text in texts
        for group in re.findall(r"Eq\. M[\dM, andto]+", text)
        for n in re.findall(r"\d+", group)
    ]
    assert cited and set(cited) <= set(numbers)
