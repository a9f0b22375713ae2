"""Messages that the runbook quotes are messages of the code, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.markdown import ROOT

FAILURES = (ROOT / "docs/operations/runbook.md").read_text().partition("## Failures")[2].partition("\n## ")[0]
ROWS = [row.strip("| ").split(" | ") for row in FAILURES.splitlines() if row.startswith("| ")][1:]
VALUE = re.compile(
    r"\.\.\.|\. |[\d()/:;,]+|\brank\b|\bstep(?=\b|_)|in the forward and backward of|in start-up|UNIPOOL_ROLE|SIG\w+"
    r"|\bnan\b|the answer of"
)
"""What stands between the fixed words of a message: names, numbers, phases."""


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


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_messages_are_the_codes(row: list[str]) -> None:
    messages = [message for message in re.findall(r"`([^`]+)`", row[1]) if " " in message]
    fragments = [part.strip() for message in messages for part in VALUE.split(message)]
    wrong = [part for part in fragments if len(part.split()) > 1 and part not in TEXTS]
    assert set(wrong) <= {"No space left on device"}  # the system's


def test_the_tests_that_are_named_exist() -> None:
    files = [ROOT / "tests/trainer/train" / name for name in ("test_faults.py", "test_restarts.py")]
    faults = "".join(path.read_text() for path in files)
    named = re.findall(r"`(test_\w+)`", FAILURES)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in faults] == []
