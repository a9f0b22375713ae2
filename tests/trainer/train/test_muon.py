"""`train.optimizer: muon` in every layout, and over a resume."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.training import Outcome, assert_same, run_training, tiny
from trainer.common.errors import SharedUserError, UserError
from trainer.config.recipe import Recipe, load_recipe, recipe_text

DEDICATED = {"trunk_ranks": 2, "pool_ranks": 2}
HALF = 2


def muon(**parallel: Any) -> Recipe:
    """With a schedule that still has its highest rate in the middle of the run, where it is saved."""
    train = {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.5}
    return tiny(train=train, parallel={"trunk_zero": 0, "pool_zero": 0, **parallel})


@cache
def colocated() -> Outcome:
    return run_training(muon())


@pytest.mark.parametrize(
    "parallel",
    [{**DEDICATED, "expert_parallel": 1}, {"layout": "every_rank", "trunk_ranks": 2, "lanes": 2}],
    ids=["replicas", "every_rank"],
)
def test_layouts_come_to_the_same(parallel: dict[str, Any]) -> None:
    assert_same(colocated(), run_training(muon(**parallel)))


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit in the same layout, to 1e-5 in another; and not with another optimizer."""
    whole = run_training(muon(**DEDICATED), save_to=tmp_path, save_after=HALF)
    rest = replace(whole, scalars=whole.scalars[HALF:], gradients=whole.gradients[HALF:])
    assert_same(rest, run_training(muon(**DEDICATED), resume_from=tmp_path), tolerance=0.0)
    assert_same(rest, run_training(muon(), resume_from=tmp_path))
    assert [scalars["lr"] for scalars in whole.scalars] == pytest.approx([1.5e-3, 2.25e-3, 1.5858e-3, 1e-3], rel=1e-4)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    from trainer.checkpoint.resume import check

    folder = tmp_path / "step_00000002"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_text(muon()))
    adamw = tiny(train={"schedule": "wsd", "decay_fraction": 0.5}, parallel={"trunk_zero": 0, "pool_zero": 0})
    message = 'has the moments of another optimizer: train.optimizer "muon" -> "adamw"; restore the key'
    with pytest.raises(SharedUserError, match=message):
        check(adamw, folder, force=True)


@pytest.mark.parametrize("role", ["trunk", "pool"])
def test_zero_is_refused(role: str) -> None:
    other = "pool" if role == "trunk" else "trunk"
    overrides = ["train.optimizer=muon", f"parallel.{other}_zero=0"]
    with pytest.raises(UserError, match=rf"parallel.{role}_zero = 1: must be 0 with train.optimizer = muon") as refused:
        load_recipe("small", overrides)
    assert "\n" not in str(refused.value)
    load_recipe("small", [*overrides, f"parallel.{role}_zero=0"])
    load_recipe("dense-182m", ["train.optimizer=muon", "parallel.trunk_zero=0"])  # which has no pool
