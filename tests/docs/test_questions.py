"""docs/questions.md answers with numbers that stand in the documents it names."""

from __future__ import annotations

import re

import pytest

from tests.docs.markdown import ROOT

ROWS = re.findall(r"^\| (.+\?) \| (.+) \| (.*) \|$", (ROOT / "docs/questions.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("question", "answer", "where"), ROWS)
def test_numbers_are_those_of_the_source(question: str, answer: str, where: str) -> None:
    sources = re.findall(r"\]\(([^)#]+)", where)
    text = "\n".join((ROOT / "docs" / source).read_text() for source in sources)
    numbers = re.findall(r"(?<![\w.])[+-]?\d+\.\d+\w*|(?<![\w.])\d\d+(?: %)?", answer)
    assert [number for number in numbers if number not in text] == [], question
    assert sources, question


def test_every_question_is_read() -> None:
    lines = [line for line in (ROOT / "docs/questions.md").read_text().splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(lines) - 1 > 20  # but the header
