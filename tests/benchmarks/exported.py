"""Trained models for the benchmarks of exports, made when they are needed: quickstart and what it is compared with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODELS: dict[str, dict[str, object]] = {
    "unipool": {},
    # As many parameters, as many of them active: eight private experts a layer.
    "vanilla": {"model.groups": 8, "router.kind": "softmax", "balance.pool": 0.0, "balance.layer": 1e-2},
    "draft": {
        "model.ffn": "dense",
        "model.layers": 2,
        "pool.experts": 0,
        "balance.pool": 0.0,
        "balance.scores": "raw",
    },
}
"""Settings that differ from the recipe quickstart. All models have the same data and the same tokenizer."""

LAYOUT = {"parallel.pool_ranks": 0, "metrics.tensorboard": "false"}


def run_of(folder: Path, name: str) -> Path:
    """Return the folder of a model's run below the benchmark's folder."""
    return folder / name / "run"


def exported(folder: Path, name: str) -> Path:
    """Return the export of a model, which is trained first, or resumed, unless it is there."""
    run, out = run_of(folder, name), folder / name / "hf"
    if not out.exists():
        settings = LAYOUT | MODELS[name] | {"run.dir": run, "data.dir": folder / "data"}
        overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        subprocess.run([sys.executable, "-m", "trainer", "train", "quickstart", *overrides], check=True)
        subprocess.run([sys.executable, "-m", "trainer", "export", str(run), str(out)], check=True)
    return out
