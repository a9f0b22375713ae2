"""Resuming: from the newest intact checkpoint, with a recipe that gives the same results."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import RankFailed, join, run_ranks
from tests.training import Outcome, assert_same, run_training, tiny
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.resume import affects_results, check, check_data, choose
from trainer.common.errors import UserError
from trainer.common.safe_read import read_tensors
from trainer.config.recipe import Recipe

RECIPE: dict[str, Any] = {"parallel": {"pool_ranks": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after one and after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    run_training(tiny(**RECIPE), 1, save_to=folder)
    run_training(tiny(**RECIPE), 2, save_to=folder, resume_from=folder)
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_a_checkpoint_has_no_state_that_differs_between_equal_runs(saved: Path) -> None:
    """As that of torch's generator, which checkpoints of earlier versions have: no step draws from it."""
    state = read_tensors(checkpoint.state_file(checkpoint.folder_of(saved, 2), 0))
    assert state.keys() == {"statistics", "recent_load_LM"}


def test_keys_that_affect_results() -> None:
    recipe = tiny()
    for key in ("train.lr", "train.steps", "run.seed", "data.source", "balance.pool", "router.top_k", "model.norm_eps"):
        assert affects_results(key, recipe), key
    for key in ("parallel.trunk_ranks", "train.micro_batch", "eval.every", "run.dir", "pool.placement", "data.dir"):
        assert not affects_results(key, recipe), key
    for key in ("topology.order", "metrics.port", "parallel.layout"):
        assert not affects_results(key, recipe), key
    own = tiny(balance={"scope": "micro_batch", "delay": 0})
    assert affects_results("train.micro_batch", own)
    assert not affects_results("parallel.trunk_ranks", own)
    assert affects_results("parallel.trunk_ranks", tiny(balance={"scope": "micro_batch", "delay": 1}))


def test_a_changed_recipe_says_what_differs(checkpoints: Path) -> None:
    folder = checkpoint.folder_of(checkpoints, 2)
    assert check(tiny(**RECIPE), folder, force=False) == []
    allowed = tiny(parallel={"pool_ranks": 1, "trunk_ranks": 2}, eval={"every": 3})
    assert check(allowed, folder, force=False) == ["parallel.trunk_ranks 1 -> 2", "eval.every 0 -> 3"]
    layout = check(tiny(parallel={"layout": "every_rank", "trunk_ranks": 2}), folder, force=False)
    assert layout[0] == 'parallel.layout null -> "every_rank"'
    changed = tiny(**RECIPE, train={"lr": 1e-2, "betas": (0.8, 0.9)})
    with pytest.raises(UserError, match=r"different settings: train.lr 0.003 -> 0.01, train.betas .* pass --force"):
        check(changed, folder, force=False)
    assert check(changed, folder, force=True) == ["train.lr 0.003 -> 0.01", "train.betas [0.9, 0.95] -> [0.8, 0.9]"]
    with pytest.raises(UserError, match="to another model: pool.experts 8 -> 16"):
        check(tiny(**RECIPE, pool={"experts": 16}), folder, force=True)


def test_forced_values_take_effect(saved: Path) -> None:
    """Rate, decay and balance statistic of the new recipe; a statistic of another scope begins anew."""
    new = {"train": {"lr": 1e-2, "weight_decay": 0.5}, "balance": {"scope": "micro_batch", "delay": 1}}
    resumed = run_training(tiny(**RECIPE, **new), resume_from=saved)
    before = run_training(tiny(**RECIPE), resume_from=saved)
    assert [s["loss"] for s in resumed.scalars[:1]] == [s["loss"] for s in before.scalars[:1]]
    assert resumed.scalars[0]["lr"] == pytest.approx(before.scalars[0]["lr"] * 1e-2 / 3e-3, rel=0.2)
    only_rate = run_training(tiny(**RECIPE, train={"lr": 1e-2}), resume_from=saved)
    assert only_rate.scalars[0]["lr"] == resumed.scalars[0]["lr"]
    assert _norm(resumed) < _norm(only_rate), "more weight decay makes weights smaller"


def test_a_forced_clip_holds_at_every_zero_stage(saved: Path) -> None:
    """DeepSpeed's ZeRO 1 brings the old one back with its state."""
    clip = {"train": {"clip": 1e-3}}
    partitioned = run_training(tiny(**RECIPE, **clip), 3, resume_from=saved)
    whole = run_training(
        tiny(parallel={"pool_ranks": 1, "trunk_zero": 0, "pool_zero": 0}, **clip), 3, resume_from=saved
    )
    assert_same(partitioned, whole)
    assert partitioned.scalars[0]["grad_norm"] > 1e-2


def test_changed_data_is_refused(checkpoints: Path) -> None:
    folder = checkpoint.folder_of(checkpoints, 2)
    saved_identity = ""
    check_data(tiny(), folder, saved_identity, force=False)
    check_data(tiny(), folder, "another", force=True)
    with pytest.raises(UserError, match="its text or its tokenizer has changed since checkpoint step_00000002"):
        check_data(tiny(), folder, "another", force=False)


def _norm(outcome: Outcome) -> float:
    return float(sum(weight.square().sum() for weight in outcome.weights.values()))


def chosen(recipe: Recipe, checkpoints: Path) -> tuple[str | None, str]:
    """What `choose` takes, and what it says."""
    job = join(recipe)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = choose(job, recipe, checkpoints, force=False)
    job.close()
    return found[1].name if found else None, said.getvalue()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "pool/shard_0/state/mp_rank_00_model_states.pt": (flip_a_bit, "does not have the checksum in its manifest"),
    "trunk/rank_0.pt": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "bytes instead of"),
    "load.npy": (Path.unlink, "cannot be read (no such file or directory)"),
    "manifest.json": (flip_a_bit, "is not the one that COMPLETE was written for"),
    "COMPLETE": (Path.unlink, "cannot be read (no such file or directory)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, checkpoints: Path) -> None:
    harm, message = DAMAGE[name]
    folder = checkpoint.folder_of(checkpoints, 2)
    assert checkpoint.damage(folder) is None
    harm(folder / name)
    problem = checkpoint.damage(folder)
    assert problem and problem.startswith(name) and message in problem


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(checkpoints: Path) -> None:
    name = "pool/shard_0/state/mp_rank_00_model_states.pt"
    flip_a_bit(checkpoint.folder_of(checkpoints, 2) / name)
    shutil.copytree(checkpoint.folder_of(checkpoints, 1), checkpoints / "step_00000003.bak")  # somebody's own copy
    (trunk, said), (pool, nothing) = run_ranks(2, chosen, tiny(**RECIPE), checkpoints)
    assert trunk == pool == "step_00000001"
    assert f"WARNING: checkpoint step_00000002 is damaged: {name} does not have the checksum" in said
    assert "RESUMING FROM step_00000001" in said
    assert nothing == ""
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "damaged_step_00000002",
        "step_00000001",
        "step_00000003.bak",
    ]


def test_no_whole_checkpoint_is_an_error_not_a_new_start(checkpoints: Path) -> None:
    for steps in (1, 2):
        flip_a_bit(checkpoint.folder_of(checkpoints, steps) / "load.npy")
    with pytest.raises(RankFailed, match=r"all its checkpoints are damaged \(step_00000002: load.npy does not have"):
        run_ranks(2, chosen, tiny(**RECIPE), checkpoints)
    assert len(list(checkpoints.glob("step_*"))) == 2


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """On two trunk ranks, whose engines are built when both have compiled; and the numbers are eager's."""
    recipe = tiny(parallel={"trunk_ranks": 2}, train={"compile": True})
    whole = run_training(recipe, 2, save_to=tmp_path, save_after=1)
    resumed = run_training(recipe, 2, resume_from=tmp_path)
    assert resumed.scalars == whole.scalars[1:] and resumed.val_loss == whole.val_loss
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=0)
    assert_same(whole, run_training(tiny(parallel={"trunk_ranks": 2}), 2))
