"""Whatever a person writes as a hostfile is valid or an error of one line."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.trainer.fuzzing import fuzz, odd_text, user_error
from trainer.cluster.hostfile import find_node
from trainer.config.recipe import load_recipe


@fuzz(60)
@given(st.one_of(odd_text, st.text("ab slot=0123#\n\t \0", max_size=30)), st.one_of(st.none(), st.integers(-3, 3)))
@example("a slots=²\n", 0)
@example("a slots=99999999999999999999\n", 0)
@example(f"a slots={'9' * 5000}\n", 0)
@example("a\x85slots=2\n", 0)
@example("a slots=0\nb slots=2\n", 0)
def test_hostfiles(tmp_path_factory: pytest.TempPathFactory, text: str, node_rank: int | None) -> None:
    file = tmp_path_factory.getbasetemp() / "hosts"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    user_error(lambda: find_node(load_recipe("quickstart"), file, node_rank, None, None))
