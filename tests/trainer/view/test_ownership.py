"""`own`: who would own what by the load that a run has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from router import assign
from tests.trainer.fuzzing import user_error
from tests.trainer.made_up import write_run
from trainer.cli import cli
from trainer.common.format import spans
from trainer.config.recipe import load_recipe
from trainer.view.frame import frame_lines
from trainer.view.ownership import read_ownership
from trainer.view.records import facts_of
from trainer.view.view import View


def own(*arguments: str) -> Any:
    done = CliRunner().invoke(cli, ["own", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_table_json_and_picture(tmp_path: Path) -> None:
    run, picture = write_run(tmp_path / "a run"), tmp_path / "own.png"
    load_LM = np.load(run / "load.npy")
    expected = assign(torch.from_numpy(load_LM), 0.95)
    found = json.loads(own(str(run), "--json"))
    assert found["owners"] == list(expected.owners) and not found["feasible"] and found["coverage"] == 0.95
    for layer, row in enumerate(found["layers"]):
        inside = sum(load_LM[layer, expert] for expert in row["experts"]) / load_LM[layer].sum()
        assert row["share"] == pytest.approx(inside)
        assert row["shortfall"] == pytest.approx(0.95 - inside)
        assert row["most"] == pytest.approx(sorted(load_LM[layer])[-8:] @ np.ones(8) / load_LM[layer].sum())
    printed = own(str(run), "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in printed
    assert "a run: what each layer would own" in printed
    assert "8 of 8 layers lack up to" in printed and f"{found['share']:.1%}" in printed
    assert spans(expected.experts_by_layer[0], ", ") in printed


def test_coverage_that_is_met(tmp_path: Path) -> None:
    printed = own(str(write_run(tmp_path / "run")), "--coverage", "0.3")
    assert "Every layer has at least 30% of its tokens inside its own set." in printed


def test_a_coverage_that_is_not_a_share(tmp_path: Path) -> None:
    """click's ranges let NaN through."""
    run = write_run(tmp_path / "run")
    assert "--coverage nan: must be" in str(user_error(lambda: read_ownership(run, float("nan"))))


def test_a_checkpoint(tmp_path: Path) -> None:
    """It has its own load and recipe; its run's folder need not have any load."""
    run = write_run(tmp_path / "run")
    step = run / "checkpoints" / "step_00000060"
    step.mkdir(parents=True)
    (run / "load.npy").rename(step / "load.npy")
    (step / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    (step / "COMPLETE").touch()
    assert json.loads(own(str(step), "--json"))["owners"] == json.loads(own(str(run), "--json"))["owners"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.groups=8"], "every layer has its own experts already (model.groups = model.layers)"),
        (["model.groups=2"], "model.groups = 2: only layers that share one pool (1) can divide it"),
        (["model.ffn=dense", "pool.experts=0", "parallel.pool_ranks=0"], "is a dense model (model.ffn)"),
        (["pool.experts=60"], "pool.experts = 60 is not a multiple of model.layers (8)"),
    ],
)
def test_models_without_a_pool_to_divide(overrides: list[str], said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, overrides=overrides)
    assert f"{run}: {said}" in str(user_error(lambda: read_ownership(run, None)))


def test_folders_without_a_load(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    np.save(run / "load.npy", np.ones((8, 63), np.int64))
    assert "is not of this run's layers and experts" in str(user_error(lambda: read_ownership(run, None)))
    (run / "load.npy").unlink()
    assert "has no load of the experts" in str(user_error(lambda: read_ownership(run, None)))
    assert "not a run or a checkpoint" in str(user_error(lambda: read_ownership(tmp_path, None)))


def record(step: int, **changes: Any) -> str:
    owners = [7 - expert // 8 for expert in range(64)]
    tree = {"owners": owners, "shares": [0.9, *[0.97] * 7], "shortfalls": [0.05, *[0] * 7], "feasible": False}
    return json.dumps({**tree, "step": step, "val_loss": 3.21, **changes})


def test_a_run_that_has_assigned_its_experts(tmp_path: Path) -> None:
    """It shows what the run owns and how the load has become, not what the load would assign now."""
    run = write_run(tmp_path / "run", overrides=["lock.coverage=0.95"])
    (run / "ownership.json").write_text(record(4))
    load_LM = np.load(run / "load.npy")
    found = json.loads(own(str(run), "--json"))
    assert found["assigned_after_step"] == 4 and found["owners"] == json.loads(record(4))["owners"]
    for layer, row in enumerate(found["layers"]):
        experts = list(range(56 - 8 * layer, 64 - 8 * layer))
        assert row["experts"] == experts and row["share"] == (0.97 if layer else 0.9)
        assert row["recorded_share"] == pytest.approx(load_LM[layer, experts].sum() / load_LM[layer].sum())
    printed = own(str(run), "--out", str(tmp_path / "own.png"))
    for said in ("what each layer owns since step 4", "56-63", "1 of 8 layers lack up to 5.0%", "was 3.2100 nats"):
        assert said in printed
    assert "assigned its experts already" in str(user_error(lambda: read_ownership(run, 0.9)))
    (run / "ownership.json").write_text(record(0, val_loss=None))
    assert "at random before the first step" in own(str(run))
    (run / "ownership.json").write_text(record(4, shares=[1.0] * 4, owners=[e // 16 for e in range(64)]))
    assert "is not of this run's layers" in str(user_error(lambda: read_ownership(run, None)))
    (run / "ownership.json").write_text("{")
    assert "ownership.json: damaged" in str(user_error(lambda: read_ownership(run, None)))


def test_before_the_assignment_the_coverage_is_the_recipes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", overrides=["lock.coverage=0.4"])
    found = json.loads(own(str(run), "--json"))
    assert found["coverage"] == 0.4 and found["feasible"] and found["assigned_after_step"] is None


@pytest.mark.parametrize(("stage", "said"), [(0.0, "full"), (2.0, "locked"), (float("nan"), ""), (None, "")])
def test_watch_names_the_stage(stage: float | None, said: str) -> None:
    scalars = {"loss": 3.0, **({} if stage is None else {"lock_stage": stage})}
    info = facts_of(load_recipe("small", ["lock={}"]), Path("nowhere")) | {"lanes": "1"}
    text = "\n".join(line.plain for line in frame_lines(View("r", "running", info, scalars, {}, ()), 120, 40))
    assert ("stage of the lock " + said in text) if said else ("stage" not in text)
    assert " 1 lane " in text
