"""A checkpoint of any layout continues in any other: as if it had been that layout from the start."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.checkpoint.constants import AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY

from pool.placement import contiguous
from tests.distributed import RankFailed
from tests.tools import folder_of_process
from tests.training import Outcome, assert_same, run_training, tiny
from trainer.checkpoint.format import Layout, layout_of, newest, read_load
from trainer.checkpoint.reshard import SavedCheckpoint, SavedRole, convert
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.engine import role_engine as engine
from trainer.engine.parameter_state import CHECKPOINT_TAG, ParameterState
from trainer.model.trunk import Trunk

pytestmark = pytest.mark.slow

HALF, WHOLE = 2, 4
LOCK_STEP = {"lanes": 1, "stagger": False}

COLOCATED = {"trunk_zero": 0, "pool_zero": 0}
EVERY_RANK_4 = {"layout": "every_rank", "trunk_ranks": 4, "expert_parallel": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": COLOCATED,
    "colocated-zero2": {"trunk_ranks": 2, "trunk_zero": 2, "pool_zero": 1},
    "1+2": {"pool_ranks": 2, "trunk_zero": 1, "pool_zero": 0},
    "every-rank": {"layout": "every_rank", "trunk_ranks": 2, "trunk_zero": 0, "pool_zero": 1},
    "every-rank-replicas": {**EVERY_RANK_4, "trunk_zero": 3, "pool_zero": 2, **LOCK_STEP},
    "2+2-replicas": {"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1, "trunk_zero": 1, "pool_zero": 2},
    "2+2-zero3": {"trunk_ranks": 2, "pool_ranks": 2, "trunk_zero": 3, "pool_zero": 1, **LOCK_STEP},
}


def recipe(parallel: dict[str, Any], **sections: Any) -> Recipe:
    return tiny(router={"kind": "sigmoid_bias", "top_k": 2, "bias_rate": 0.05}, parallel=parallel, **sections)


@cache
def undisturbed() -> Outcome:
    return run_training(recipe(COLOCATED), WHOLE)


@cache
def saved(layout: str) -> Path:
    """Folder of a checkpoint after half of the steps."""
    folder = folder_of_process()
    run_training(recipe(LAYOUTS[layout]), HALF, save_to=folder)
    return folder


@cache
def saved_states(layout: str) -> dict[str, ParameterState]:
    return states(saved(layout))


@pytest.mark.parametrize(
    "before, after",
    [
        ("colocated", "2+2-zero3"),
        ("2+2-zero3", "every-rank-replicas"),
        ("every-rank-replicas", "1+2"),
        ("1+2", "colocated-zero2"),
        ("colocated-zero2", "2+2-replicas"),
        ("2+2-replicas", "every-rank"),
        ("every-rank", "colocated"),
    ],
)
def test_goes_on_as_if_nothing_had_changed(before: str, after: str) -> None:
    """What comes after is that of a run in one layout, so weights, moments, schedule and balance load came over."""
    resumed = run_training(recipe(LAYOUTS[after]), WHOLE, resume_from=saved(before))
    reference = undisturbed()
    rest = replace(reference, scalars=reference.scalars[HALF:], gradients=reference.gradients[HALF:])
    assert_same(rest, resumed)


@pytest.mark.parametrize("after", LAYOUTS)
def test_moments_are_the_same_ones(after: str, tmp_path: Path) -> None:
    """Loaded into another layout and saved from there at once, every weight and moment is bit for bit what it was."""
    run_training(recipe(LAYOUTS[after]), HALF, save_to=tmp_path, resume_from=saved("1+2"))
    others = states(tmp_path)
    for name, state in saved_states("1+2").items():
        other = others[name]
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(state, key), getattr(other, key)), (name, key)
        assert state.exp_avg_sq.abs().max() > 0, name


def test_there_are_no_moments_if_all_steps_were_skipped(tmp_path: Path) -> None:
    weight = torch.ones(3, 2)
    saved = {"module": {"w": weight}, "buffer_names": [], "lr_scheduler": {"last_batch_iteration": 0}}
    saved |= {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}
    (tmp_path / CHECKPOINT_TAG).mkdir()
    torch.save(saved, tmp_path / CHECKPOINT_TAG / "mp_rank_00_model_states.pt")
    state = SavedRole(tmp_path, tmp_path).read("w")
    assert torch.equal(state.weight, weight) and state.exp_avg_sq is not None
    assert torch.equal(state.exp_avg, weight * 0) and torch.equal(state.exp_avg_sq, weight * 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_before_the_first_update_begins_anew(stage: int, tmp_path: Path) -> None:
    """Nothing has been learned, so the run in the other layout is that of a start."""
    run_training(recipe({"trunk_ranks": 2, "trunk_zero": stage, "pool_zero": 2}), 0, save_to=tmp_path)
    assert_same(undisturbed(), run_training(recipe(COLOCATED), WHOLE, resume_from=tmp_path))


@pytest.mark.parametrize(("stage", "same"), [(0, True), (1, False), (2, False), (3, True)])
def test_a_trunk_that_is_not_aligned_is_another_layout(stage: int, same: bool) -> None:
    """DeepSpeed refuses its partitions, so they are resharded."""
    now = layout_of(recipe({"trunk_ranks": 2, "trunk_zero": stage}), None)
    before = Layout.model_validate_json(now.model_dump_json(exclude={"aligned"}))
    assert (before == now) == same


def test_where_every_rank_has_both_roles_the_layout_is_its_own() -> None:
    """Its files are those of the colocated layout if each rank holds the whole pool."""
    halves, whole = contiguous(8, 1, 2), contiguous(8, 1, 1)
    every_rank = {"layout": "every_rank", "trunk_ranks": 2}
    dedicated = {"trunk_ranks": 2, "pool_ranks": 2}
    assert layout_of(recipe(every_rank), halves) != layout_of(recipe(dedicated), halves)
    one_shard = layout_of(recipe({**every_rank, "expert_parallel": 1}), whole)
    assert one_shard == layout_of(recipe({"trunk_ranks": 2}), whole)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.proof), "w")


MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def altered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of layout 1+2 of which one file, the test's parameter, has been replaced by somebody."""
    folder = tmp_path / "checkpoints" / "step_00000002"
    shutil.copytree(saved("1+2") / folder.name, folder)
    torch.save({"module": Code(tmp_path / "proof")}, folder / request.param)
    return folder


def refusal(altered: Path, file: str) -> str:
    return re.escape(f"{altered / file}: refused, and nothing in it was executed: it holds io.open, which no")


@pytest.mark.parametrize(
    "altered, file",
    [(file, file) for file in (f"trunk/state/{MODEL}", f"trunk/state/{OPTIMIZER}")],
    indirect=["altered"],
)
def test_a_resume_runs_nothing_that_a_checkpoint_holds(altered: Path, file: str) -> None:
    with pytest.raises(RankFailed, match=refusal(altered, file)):
        run_training(recipe(LAYOUTS["1+2"]), WHOLE, resume_from=altered.parent)
    assert not (altered.parents[1] / "proof").exists()


@pytest.mark.parametrize(
    "altered, file",
    [(file, file) for file in (f"trunk/state/{MODEL}", f"trunk/state/{OPTIMIZER}", f"pool/shard_1/state/{MODEL}")],
    indirect=["altered"],
)
def test_a_conversion_runs_nothing_that_a_checkpoint_holds(
    altered: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> None:
        convert(altered, tmp_path / "work")
        SavedCheckpoint(altered, tmp_path / "work")

    with pytest.raises(UserError, match=refusal(altered, file)):
        read()
    monkeypatch.setattr(engine, "read_tensors", lambda *_, **__: {})  # as if it had been altered a moment later
    with pytest.raises((UserError, pickle.UnpicklingError)):
        read()
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", ".."])
@pytest.mark.parametrize("part", ["module", "param_shapes", "param_slice_mappings", "by_group"])
def test_a_conversion_writes_nowhere_else(part: str, name: str, tmp_path: Path) -> None:
    """DeepSpeed names folders after parameters."""
    table = {name: torch.ones(1)}
    saved: dict[str, dict[str, Any]] = {"module": {"module": table}, "param_shapes": {"param_shapes": [table]}}
    saved["param_slice_mappings"] = {"optimizer_state_dict": {"param_slice_mappings": [{}, table]}}
    saved["by_group"] = {"optimizer_state_dict": {"param_slice_mappings": {0: table}}}
    with pytest.raises(UserError, match=f"{MODEL}: refused: .* named {re.escape(name)}, which is a path"):
        convert_file(tmp_path, MODEL, saved[part])


@pytest.mark.parametrize("file", [f"deeper/{MODEL}", "mp_rank_00", OPTIMIZER])
def test_a_conversion_looks_at_every_file(file: str, tmp_path: Path) -> None:
    """DeepSpeed takes files by how their names begin, also those in folders."""
    with pytest.raises(UserError, match=f"{file}: refused: "):
        convert_file(tmp_path, file, {"module": {"../elsewhere": torch.ones(1)}})


@pytest.mark.parametrize("key", [AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY])
def test_a_conversion_knows_no_experts_of_deepspeed(key: str, tmp_path: Path) -> None:
    """It would name folders after their prefixes."""
    with pytest.raises(UserError, match=f"{MODEL}: refused: it has {key}, which no checkpoint of this trainer has"):
        convert_file(tmp_path, MODEL, {key: [{"expert_key_prefix": "../../elsewhere"}]})


def convert_file(tmp_path: Path, name: str, saved: dict[str, Any]) -> None:
    file = tmp_path / "trunk" / CHECKPOINT_TAG / name
    file.parent.mkdir(parents=True)
    torch.save(saved, file)
    engine.to_universal(tmp_path / "trunk", tmp_path / "work")


def test_a_recorded_load_that_is_no_numbers_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", np.array([Code(tmp_path / "proof")], dtype=object))
    with pytest.raises(UserError, match=f"{tmp_path}/load.npy: missing or damaged"):
        read_load(tmp_path)
    assert not (tmp_path / "proof").exists()


def states(checkpoints: Path) -> dict[str, ParameterState]:
    """Every parameter of the newest checkpoint with its moments; the pool's in the order of global ids."""
    found = newest(checkpoints)
    assert found
    work = folder_of_process()
    convert(found[1], work)
    everything = SavedCheckpoint(found[1], work)
    trunk = Trunk(recipe(COLOCATED), torch.device("cpu"))
    every_expert = tuple(range(8))
    pool = {name: everything.read_experts(name, every_expert) for name in ("w13_e2FD", "w2_eDF")}
    return {name: everything.trunk.read(name) for name, _ in trunk.named_parameters()} | pool
