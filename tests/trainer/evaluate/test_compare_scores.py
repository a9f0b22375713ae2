"""The comparison of scores by two commands and in several batch sizes; the commands themselves take minutes."""

from __future__ import annotations

import pytest

from tests.compare_scores import Values, compare, same

ACC, PERPLEXITY = ("arc_easy", "acc"), ("lambada_openai", "perplexity")


def test_only_perplexities_may_differ_and_only_a_little() -> None:
    assert same(ACC, [0.25, 0.25]) and same(PERPLEXITY, [1e6, 1e6 + 5])
    assert not same(ACC, [0.25, 0.25 + 1e-9]) and not same(PERPLEXITY, [1e6, 1e6 + 20])
    assert not same(ACC, [0.25, None]), "a score that only one of them has"


def test_scores_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    first: Values = {ACC: 0.25, PERPLEXITY: 8.0}
    assert compare({"one": first, "other": dict(first)}) == 0
    assert compare({"one": first, "other": {ACC: 0.5, PERPLEXITY: 8.0}}) == 1
    shown = capsys.readouterr().out
    assert "2 scores, of which 1 differ." in shown
