"""Whatever a person writes as a recipe or after --set is valid or an error of one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.trainer.fuzzing import YAML, fuzz, keys, odd_text, user_error, values
from trainer.config.recipe import Recipe, check_recipe, load_recipe, read_tree

QUICKSTART = read_tree("quickstart")


@fuzz(100)
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=4), st.booleans())
@example([("train.lr", math.nan)], False)
@example([("train.lr", math.inf)], False)
@example([("model.rope_base", 1e308)], True)
@example([("model.layers", 10**400)], False)
@example([("run.dir", "a\nb")], False)
@example([("run.dir", "")], False)
@example([("data.text_field", "\ud800")], False)
@example([("a\nb", 1)], False)
@example([("train", [1])], False)
@example([("parallel.trunk_ranks", 2**62)], False)
def test_trees_of_recipes(settings: list[tuple[str, Any]], whole: bool) -> None:
    """Keys set in a good recipe, or a tree of nothing else; a recipe that passes has a plan and comes back equal."""
    checked: list[Recipe] = []

    def check() -> None:
        checked.append(check_recipe(QUICKSTART if whole else {}, settings, "recipe x"))

    if whole and user_error(check) is None:
        text = yaml.safe_dump(checked[0].model_dump(mode="json"))
        assert Recipe.model_validate(yaml.safe_load(text)) == checked[0]
        assert all(
            math.isfinite(v) for s in checked[0].model_dump().values() if s for v in s.values() if isinstance(v, float)
        )
    elif not whole:
        assert user_error(check)


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_nobody_means(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(YAML[name], encoding="utf-8")
    assert user_error(lambda: load_recipe(str(file)))
    if name not in ("empty", "only a comment", "two documents"):
        user_error(lambda: load_recipe("quickstart", [f"run={YAML[name]}"]))


@fuzz(100)
@given(st.one_of(st.tuples(keys, odd_text).map("=".join), odd_text, st.text("=.[]{}:,&*!|>'\"%@` \n-", max_size=12)))
@example("")
@example("=")
@example(".=1")
@example("a..b=1")
@example("run=1")
@example("run.dir.x=1")
@example(f"run.dir={'[' * 3000}")
@example("train.lr=.nan")
@example("train.lr=1e400")
@example("train.steps=*a")
def test_set(text: str) -> None:
    user_error(lambda: load_recipe("quickstart", [text]))
