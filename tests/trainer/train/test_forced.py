"""`router.force: balanced` in training: even in every layout, and refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training import assert_same, run_training, tiny
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe, recipe_text
from trainer.export.saved_run import find_run


def forced(**parallel: Any) -> Recipe:
    """Three layers share 12 experts. A micro-batch has 18 tokens, so that a layer alone cannot be even."""
    return tiny(
        router={"force": "balanced", "top_k": 1},
        pool={"experts": 12},
        parallel={"trunk_zero": 0, "pool_zero": 0, **parallel},
    )


def test_every_layout_is_even() -> None:
    """18 tokens of a micro-batch in 3 layers are 54 turns of 12 experts: 4 or 5 each, 16 or 20 in a step of four."""
    one = run_training(forced(), steps=2)
    assert {int(load) for load in one.load_LM.sum(0)} == {16, 20}
    assert one.load_LM.sum(1).tolist() == [72, 72, 72] and int(one.load_LM.max()) <= 8
    for parallel in ({"trunk_ranks": 2, "pool_ranks": 2}, {"layout": "every_rank", "trunk_ranks": 2}):
        assert_same(one, run_training(forced(**parallel), steps=2))
    free = run_training(tiny(router={"top_k": 1}, pool={"experts": 12}), steps=1)
    assert free.load_LM.sum(0).max() > 20


@pytest.mark.parametrize(
    "override", ["lock.allocation=learned", "probe.every=10", "model.ffn=dense"], ids=lambda text: text.split("=")[0]
)
def test_refused(override: str) -> None:
    overrides = ["router.force=balanced", override]
    if "dense" in override:
        overrides += ["pool.experts=0", "balance.pool=0.0"]
    with pytest.raises(UserError, match="router.force = 'balanced': must be left out with") as refused:
        load_recipe("small", overrides)
    assert "\n" not in str(refused.value)


def test_its_model_is_not_for_use(tmp_path: Path) -> None:
    """Neither `export` nor `eval` nor a probe gets it."""
    step = tmp_path / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    for name, text in {"COMPLETE": "", "recipe.yaml": recipe_text(forced())}.items():
        (step / name).write_text(text)
    with pytest.raises(UserError, match="trained with router.force = balanced, so that its model has not learned"):
        find_run(step)
