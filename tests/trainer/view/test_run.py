"""`load_run`: what a run's folder, a checkpoint and an export give to Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import trainer
from tests.trainer.fuzzing import user_error
from tests.trainer.made_up import write_run
from trainer import load_run
from trainer.view.records import Records


def test_metrics_are_those_of_the_file(tmp_path: Path) -> None:
    """A row per step with its evaluation and probe; what was not finite is NaN; a line cut short is left out."""
    folder = write_run(tmp_path / "run", 12)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": null, "not_finite": ["loss"], "applied": false, "layer_gates": [0.5, null]}\n')
        file.write('{"step": 13, "random_routing_by_layer": {"00": 0.25, "07": 0.5}}\n{"step": 14, "lo')
    run, records = load_run(folder), Records(folder)
    records.read()
    metrics = run.metrics
    assert metrics.index.name == "step" and list(metrics.index) == list(range(1, 14))
    assert metrics["loss"].to_numpy() == pytest.approx(np.array(records.columns["loss"]), nan_ok=True)
    evaluated = metrics["val_loss"].dropna()
    assert list(evaluated.index) == list(records.val_steps) and list(evaluated) == list(records.val_losses)
    assert np.isnan(metrics["loss"][13]) and metrics["applied"].sum() == 11 and "not_finite" not in metrics
    gates, random = run.by_layer("layer_gates"), run.by_layer("random_routing_by_layer")
    assert gates.columns.name == "layer" and gates.loc[13, 0] == 0.5 and np.isnan(gates.loc[13, 1])
    assert list(random.columns) == [0, 7] and random.loc[13].tolist() == [0.25, 0.5]
    assert "it has layer_gates, random_routing_by_layer" in str(user_error(lambda: run.by_layer("loss")))


def as_checkpoint(run: Path, step: int, load_LM: np.ndarray) -> Path:
    """What `load_run` reads of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    layout = {"layout": {"ranks": [1, 1, 1], "zero": [1, 1], "placement": None}, "data": "", "steps": step}
    (folder / "layout.json").write_text(json.dumps({**layout, "micro_batches": 1}))
    (folder / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    np.save(folder / "load.npy", load_LM)
    (folder / "COMPLETE").touch()
    return folder


def test_load_and_ownership_over_the_checkpoints(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 12, overrides=["lock={}"])
    last_LM = np.load(folder / "load.npy")
    saved = {step: as_checkpoint(folder, step, last_LM * 0 + step) for step in (8, 4)}
    run = load_run(str(folder))
    assert run.kind == "run" and run.name == "run" and run.recipe.model.layers == 8
    assert run.checkpoints == dict(sorted(saved.items()))
    assert run.load.steps.tolist() == [4, 8, 12] and run.load.tokens_SLM.shape == (3, 8, 64)
    assert (run.load.tokens_SLM[:2] == np.array([4, 8])[:, None, None]).all()
    assert (run.load.tokens_SLM[2] == last_LM).all()
    assert run.ownership is None
    owners = [expert // 8 for expert in range(64)]
    tree = {"owners": owners, "shares": [0.9] * 8, "shortfalls": [0] * 8, "feasible": True, "step": 4}
    (saved[8] / "ownership.json").write_text(json.dumps(tree))
    checkpoint = load_run(run.checkpoints[8])
    assert checkpoint.kind == "checkpoint" and checkpoint.ownership and list(checkpoint.ownership.owners) == owners
    assert checkpoint.load.steps.tolist() == [8] and checkpoint.checkpoints == {8: saved[8]}
    assert list(checkpoint.metrics.index) == list(range(1, 9)), "what was recorded later is not of this checkpoint"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "not a run; give" in str(user_error(lambda: load_run(tmp_path)))
    assert "not a run; give" in str(user_error(lambda: load_run(tmp_path / "nothing")))
    assert "not a run; give" in str(user_error(lambda: load_run("a\0b")))
    assert "cannot be read (file name too long); give" in str(user_error(lambda: load_run("a" * 5000)))
    folder = write_run(tmp_path / "run", 2)
    assert "device = 'cuda:1'; allowed are 'cpu', 'cuda' and None" in str(
        user_error(lambda: load_run(folder, "cuda:1"))
    )
    assert "precision = 'fp8'; allowed" in str(user_error(lambda: load_run(folder, precision="fp8")))
    for name in ("metrics.jsonl", "load.npy"):
        (folder / name).unlink()
    run = load_run(folder)
    assert "has no metrics.jsonl" in str(user_error(lambda: run.metrics))
    assert "has no complete checkpoint" in str(user_error(lambda: run.model))
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    assert "has no recipe.yaml" in str(user_error(lambda: load_run(export).recipe))
    (folder / "recipe.yaml").unlink()
    np.save(as_checkpoint_of_another(folder), np.ones((2, 3), np.int64))
    assert load_run(folder).load.tokens_SLM.shape == (1, 2, 3)


def as_checkpoint_of_another(folder: Path) -> Path:
    step = folder / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step / "COMPLETE").touch()
    (folder / "metrics.jsonl").touch()
    return step / "load.npy"


def test_other_names_are_not_there() -> None:
    """tests/test_imports.py holds that `load_run` is only imported when it is asked for."""
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        trainer.load_runs  # type: ignore[attr-defined]  # noqa: B018
