"""Whatever a person writes as a sweep is valid or an error of one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.trainer.fuzzing import YAML, fuzz, keys, odd_text, user_error, values
from trainer.sweep.spec import load_sweep

SWEEP = yaml.safe_load("{base: quickstart, baseline: a, variants: {a: {}, b: {train.lr: 1.0e-3}}, seeds: [0]}")


@fuzz(40)
@given(
    st.dictionaries(
        st.sampled_from(["dir", "base", "set", "variants", "baseline", "grid", "seeds"]),
        st.one_of(
            values, st.dictionaries(keys, values, max_size=2), st.dictionaries(odd_text, st.dictionaries(keys, values))
        ),
        min_size=1,
        max_size=2,
    )
)
@example({"grid": {"train.lr": [math.nan, math.nan]}})
@example({"grid": {"train.lr, train.min_lr": [[1]]}})
@example({"variants": {"a": None}})
@example({"base": {"run": None}})
@example({"base": "a\0b"})
@example({"base": "x" * 300})
@example({"seeds": [10**30]})
@example({"dir": "\ud800"})
@example({"dir": ""})
def test_sweeps(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP | changes))
    user_error(lambda: load_sweep(str(file)))


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_nobody_means(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(YAML[name], encoding="utf-8")
    assert user_error(lambda: load_sweep(str(file)))
