"""Output that documents quote is in the code: messages in the table of faults, and the output on the front page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.markdown import FENCED, ROOT

FAILURES = (ROOT / "docs/operations/faults.md").read_text().partition("## Failures")[2].partition("\n## ")[0]
ROWS = [row.strip("| ").split(" | ") for row in FAILURES.splitlines() if row.startswith("| ")][1:]
OUTPUT = [
    line
    for _, language, block in FENCED.findall((ROOT / "README.md").read_text())
    if language == "console"
    for line in block.splitlines()
    if not line.startswith("$ ")
]
VALUE = re.compile(
    r"\S*/\S*|\.\.\.|\. |[\d()/:;,%]+|\s{2,}|[^\x00-\x7f]+|\brank\b|\bstep(?=\b|_)"
    r"|(?:in|during) (?:the forward and backward of|start-up)|UNIPOOL_ROLE|SIG\w+|\bnan\b|the answer of"
    r"|could not|top-1 norm|\+cpu"
)
"""What stands between the fixed words of an output: names, numbers, phases, bars."""


def _texts() -> Iterator[str]:
    """Every string of the code; a value in an f-string is a null character."""
    for folder in ("trainer", "pool"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


TEXTS = "\n".join(_texts())


def foreign(output: str) -> set[str]:
    """Words of an output, two or more in a row, that are in no string of the code."""
    fragments = {part.strip() for part in VALUE.split(output)}
    return {part for part in fragments if len(part.split()) > 1 and part not in TEXTS}


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_the_table_quotes_the_code(row: list[str]) -> None:
    messages = [message for message in re.findall(r"`([^`]+)`", row[1]) if " " in message]
    assert set().union(*map(foreign, messages)) <= {"No space left on device"}  # the system's


def test_the_front_page_shows_real_output() -> None:
    assert len(OUTPUT) > 15
    assert {line: words for line in OUTPUT if (words := foreign(line))} == {}


def test_the_tests_that_the_table_names_exist() -> None:
    files = [ROOT / "tests/trainer/train" / name for name in ("test_faults.py", "test_restarts.py")]
    tests = "".join(path.read_text() for path in files)
    named = re.findall(r"`(test_\w+)`", FAILURES)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
